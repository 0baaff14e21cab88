"""Does it help to tell a network its task? UniReg's Tables 4 to 6 in small.

    python benchmarks/unireg_tasks.py --hippocampus Task04_Hippocampus --out runs/tasks
    python benchmarks/unireg_tasks.py --out runs/tasks --table

Six tasks on grids of 32^3: the hippocampus between subjects, and five synthetic ones
like CT, three between and two within subjects, whose deformation and noise ask for
other weights of smoothness (lambda). For each seed:

1. *asked*: a network that is asked for lambda, trained over a range of it; the sweep
   over validation pairs gives each task's best (Table 4). The first seed's are the
   priors of all runs that follow.
2. *told*: a network that is told region and type of each task.
3. *untold*: the same with static heads for all tasks (Table 6).
4. *specialists*: a network per task with a sixth of the steps each.

All are scored with each task's own number, and *told* with each of the others' as well
(Table 5), on the same validation pairs as the sweep; every run's last weights count.
The whole runs have equal --steps. Trained with LNCC and smoothness, moving onto fixed,
without labels.

The network is the released pyramid (UniReg-RPN): in so few steps the paper's, whose one
head makes the whole displacement, hardly leaves its start.

Every run is a folder of OUT; finished ones are not repeated.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import metrics
from jaxreg.data import augment, synthetic
from jaxreg.data import batches as batches_lib
from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.evaluation import sweep as sweep_lib
from jaxreg.experiments import datasets
from jaxreg.experiments import run as run_lib
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.io import files
from jaxreg.losses.objective import Objective
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.nn.heads import SmoothnessRange
from jaxreg.space import sampling
from jaxreg.training import step
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig
from jaxreg.weights import load

SHAPE = (32, 32, 32)
SYNTHETIC = (
    synthetic.SyntheticConfig("head", SHAPE, labels=5, anatomy=20,
                              deformation_voxel=2.0, organ_change=0.2, texture=0.12),
    synthetic.SyntheticConfig("chest", SHAPE, labels=7, anatomy=21,
                              deformation_voxel=5.0),
    synthetic.SyntheticConfig("abdomen", SHAPE, labels=9, anatomy=22,
                              deformation_voxel=4.0, noise=0.08, blur_voxel=1.2),
    synthetic.SyntheticConfig("liver", SHAPE, labels=7, anatomy=23, pairing="intra",
                              deformation_voxel=1.5, organ_change=0.03, noise=0.08),
    synthetic.SyntheticConfig("lung", SHAPE, labels=5, anatomy=24, pairing="intra",
                              deformation_voxel=4.0, organ_change=0.05, noise=0.01),
)  # fmt: skip
SUBJECTS = 60
VALIDATION_PAIRS = 24
CURVE_PAIRS = 30
CURVE_POINTS = 8
RANGE = SmoothnessRange(0.03, 10.0)
SWEEP = 7

PRIORS_SEED = 0
_NETWORK = UniRegRpnConfig()
_METHODS = {
    "asked": dataclasses.replace(_NETWORK, smoothness_range=RANGE),
    "told": _NETWORK,
    "untold": dataclasses.replace(_NETWORK, head="static"),
    "specialist": _NETWORK,
}


def main() -> None:
    """Parses the command line; prepares, trains, scores, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hippocampus", type=pathlib.Path, help="Task04_Hippocampus")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=960, help="of a whole run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--table", action="store_true", help="print what is there")
    arguments = parser.parse_args()
    out = arguments.out
    if not arguments.table:
        # Many runs compile the same programs.
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        manifests = prepare(arguments.hippocampus, out)
        for seed in arguments.seeds:
            carry_out(manifests, arguments.steps, out, seed)
    print_tables(out)


def prepare(hippocampus: pathlib.Path | None, out: pathlib.Path) -> dict[str, str]:
    """Returns the manifest of each task; the synthetic ones are written first."""
    if hippocampus is None:
        raise SystemExit("--hippocampus is missing; name the folder of the set")
    found = {"hippocampus": str(hippocampus)}
    for config in SYNTHETIC:
        folder = out / "data" / config.name
        if not (folder / "manifest.csv").is_file():
            synthetic.write_dataset(folder, config, subjects=SUBJECTS)
        found[config.name] = str(folder / "manifest.csv")
    return found


def experiment_of(
    name: str,
    manifests: Mapping[str, str],
    steps: int,
    priors: Mapping[str, float],
    seed: int,
    *,
    curve: bool = False,
) -> Experiment:
    """Returns the experiment of a run."""
    data = DataConfig(
        manifests=tuple(manifests.values()),
        tasks=tuple(
            Task(task, region=task, smoothness=priors.get(task, 1.0))
            for task in manifests
        ),
        pairs_per_epoch=max(1, steps // (CURVE_POINTS if curve else 1)),
        validation_pairs=CURVE_PAIRS if curve else 0,
    )
    return Experiment(
        name=name,
        model=_METHODS[name],
        data=data,
        loading=Loading(shape=SHAPE),
        augment=Augmentation(permute=False, flip=False, noise=0.03, shared_noise=0.03),
        objective=Objective(
            similarity_options=(("sigma", 2),),
            inverse_consistency_weight=0.0,
            smoothness_weight=1.0,
            directions="forward",
        ),
        optimizer=OptimizerConfig(
            "adam", learning_rate=1e-3, schedule="cosine", warm_up=40, clip=1.0
        ),
        train=TrainConfig(batch=1, seed=seed),
        loop=LoopConfig(log_every=20, image_every=0, validate_every=1, metric="last"),
        stages=(Stage("stage_1", epochs=CURVE_POINTS if curve else 1),),
    )


def carry_out(
    manifests: Mapping[str, str], steps: int, out: pathlib.Path, seed: int
) -> None:
    """Trains and scores all runs of a seed; writes OUT/NAME-SEED.json of each."""

    def run(name: str, some: Mapping[str, str], count: int, priors, **options):
        folder = out / "-".join([name, *(some if len(some) == 1 else ()), str(seed)])
        experiment = experiment_of(name, some, count, priors, seed, **options)
        return run_lib.run(experiment, folder, resume=True).weights, folder

    def scored(path: pathlib.Path, make) -> Any:
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text())

    def sweep():
        weights, _ = run("asked", manifests, steps, {})
        asked = sweep_lib.weights_to_try(load.load(weights), SWEEP)
        return {
            task: {f"{w:g}": score(weights, manifests, task, task, w) for w in asked}
            for task in manifests
        }

    scored(out / f"asked-{seed}.json", sweep)
    # One statement of the priors, whatever the seed.
    path = out / f"asked-{PRIORS_SEED}.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run --seeds {PRIORS_SEED} first")
    table = json.loads(path.read_text())
    priors = {
        task: float(max(row, key=lambda w, row=row: row[w]["dice"]))
        for task, row in table.items()
    }

    def told():
        weights, folder = run("told", manifests, steps, priors, curve=True)
        matrix = {
            task: {said: score(weights, manifests, task, said) for said in manifests}
            for task in manifests
        }
        return {"matrix": matrix, "curve": curve_of(folder)}

    def untold():
        weights, folder = run("untold", manifests, steps, priors, curve=True)
        own = {task: score(weights, manifests, task, task) for task in manifests}
        return {"own": own, "curve": curve_of(folder)}

    def specialists():
        found = {}
        for task, path in manifests.items():
            share = steps // len(manifests)
            weights, _ = run("specialist", {task: path}, share, priors)
            found[task] = score(weights, manifests, task, task)
        return found

    scored(out / f"told-{seed}.json", told)
    scored(out / f"untold-{seed}.json", untold)
    scored(out / f"specialists-{seed}.json", specialists)


def curve_of(folder: pathlib.Path) -> dict[str, float]:
    """Returns step to validation Dice of a run, from its log."""
    with open(folder / "stage_1" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    name = next(n for n in rows[0] if n.endswith("dice") and "val" in n)
    return {row["step"]: 100 * float(row[name]) for row in rows if row.get(name)}


def score(
    weights: pathlib.Path,
    manifests: Mapping[str, str],
    task: str,
    said: str,
    smoothness: float | None = None,
) -> dict[str, float]:
    """Returns means over a task's validation pairs, in percent.

    Args:
      weights: of a run.
      manifests: of all tasks.
      task: whose pairs.
      said: what the network is told instead.
      smoothness: what it is asked for.
    """
    loaded = load.load(str(weights))
    only = {task: manifests[task]}
    experiment = experiment_of("told", only, 1, {}, 0)
    data = dataclasses.replace(experiment.data, validation_pairs=VALIDATION_PAIRS)
    experiment = dataclasses.replace(experiment, data=data)
    found = datasets.make_sources(experiment)
    assert found.validation is not None  # some pairs were asked for
    loading = datasets.loading_of(experiment, validation=True)
    names = list(loaded.task_names)
    number = names.index(said) if said in names else 0  # a static head knows none

    @jax.jit
    def register(variables, batch, asked):
        pair = augment.to_pair(batch, None, None)
        n = len(pair.fixed)
        pair = dataclasses.replace(
            pair, task=jnp.full(n, number, jnp.int32), smoothness=jnp.full(n, asked)
        )
        maps, _ = step.predict(loaded.model, variables, pair, directions="forward")
        points = maps.forward.on_grid(SHAPE)
        labels = batch["moving_labels"].astype(jnp.float32)
        return points, sampling.sample(labels, points, order=0)

    rows = []
    with batches_lib.Batches(
        found.validation, loading, batch_size=1, start=0, stop=found.validation_count
    ) as batches:
        for batch in batches:
            asked = np.float32(1.0 if smoothness is None else smoothness)
            points, warped = jax.device_get(register(loaded.variables, batch, asked))
            cells = metrics.cell_determinant(points)
            rows.append(
                (
                    100 * overlap(batch["moving_labels"], batch),
                    100 * overlap(warped, batch),
                    metrics.folding_percent(cells),
                    metrics.sdlogj(cells),
                )
            )
    names = ("initial", "dice", "folding", "sdlogj")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def overlap(labels: np.ndarray, batch: Mapping[str, np.ndarray]) -> float:
    """Returns the mean Dice over labels on the network grid, 0 to 1."""
    return metrics.mean_score(metrics.dice(labels.astype(int), batch["fixed_labels"]))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file all at once."""
    with files.atomic_path(path) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(value, indent=2) + "\n")


# --- tables ---------------------------------------------------------------------------


def print_tables(out: pathlib.Path) -> None:
    """Prints what has been scored so far, a number per seed."""
    found = {
        name: [json.loads(p.read_text()) for p in sorted(out.glob(f"{name}-*.json"))]
        for name in ("asked", "told", "untold", "specialists")
    }
    if not found["asked"]:
        raise SystemExit(f"no run in {out} is finished")
    tasks = list(found["asked"][0])
    sweep_table(found["asked"], tasks)
    rows = {"initial": [f"{_first(found['asked'], t)['initial']:.1f}" for t in tasks]}
    if found["told"]:
        rows["told (own task)"] = cells(
            [{t: run["matrix"][t][t] for t in tasks} for run in found["told"]], tasks
        )
        rows["told another task, mean"] = cells(
            [{t: _others(run["matrix"][t], t) for t in tasks} for run in found["told"]],
            tasks,
        )
    if found["untold"]:
        rows["untold"] = cells([run["own"] for run in found["untold"]], tasks)
    if found["specialists"]:
        rows["specialists"] = cells(found["specialists"], tasks)
    grid("Dice %", tasks, rows)
    for number, run in enumerate(found["told"], start=1):
        print(f"told (rows) instead of the true task (columns), run {number}:\n")
        matrix = {
            said: [f"{run['matrix'][t][said]['dice']:.1f}" for t in tasks]
            for said in tasks
        }
        grid("Dice %", tasks, matrix)
    print("Validation Dice % by step:\n")
    for name in ("told", "untold"):
        for number, run in enumerate(found[name], start=1):
            curve = ", ".join(f"{s}: {d:.1f}" for s, d in run["curve"].items())
            print(f"{name}, run {number}: {curve}")


def _first(runs: Sequence[Any], task: str) -> Mapping[str, float]:
    return next(iter(runs[0][task].values()))


def _others(row: Mapping[str, Any], task: str) -> dict[str, float]:
    dice = [scores["dice"] for said, scores in row.items() if said != task]
    return {"dice": statistics.fmean(dice)}


def cells(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Returns a cell per task with a number per seed."""
    return [" / ".join(f"{run[t]['dice']:.1f}" for run in runs) for t in tasks]


def sweep_table(runs: Sequence[Any], tasks: Sequence[str]) -> None:
    """Prints Dice by lambda, and each task's best."""
    rows = {
        f"lambda {weight}": cells(
            [{t: r[t][weight] for t in tasks} for r in runs], tasks
        )
        for weight in runs[0][tasks[0]]
    }
    rows["best lambda"] = [
        " / ".join(max(r[t], key=lambda w, r=r, t=t: r[t][w]["dice"]) for r in runs)
        for t in tasks
    ]
    grid("asked: Dice %", tasks, rows)


def grid(title: str, tasks: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Prints rows of cells."""
    print(f"| {title} | " + " | ".join(tasks) + " |")
    print("| --- |" + " ---: |" * len(tasks))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(row) + " |")
    print()


if __name__ == "__main__":
    main()
