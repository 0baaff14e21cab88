"""Do prompts help? Networks trained on several domains at once, for the same time.

    python benchmarks/universal.py --hippocampus Task04_Hippocampus --out runs/universal
    python benchmarks/universal.py --out runs/universal --table

A small replica of PromptReg's Tables 1 and 2: one real domain (hippocampus) and three
synthetic ones of different contrast and deformation, on grids of 24^3. A *whole run*
takes --minutes; a network trained on k of the 4 domains gets k/4 of its steps, as in
the paper (100 pairs per dataset and epoch). How many steps fit is measured first, once
for each network, and written to OUT/steps.json. All are trained without labels, with
LNCC and the same augmentation; the pyramids with their own smoothness term and moving
onto fixed alone, GradICON with its own inverse consistency. Scores are those of the
last weights, on subjects that no training saw, on the network grid.

Every run is a folder of OUT; finished ones are not repeated, so that a stopped command
goes on, and several commands with different --seeds may share OUT once steps.json is
there.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import metrics
from jaxreg.data import augment, synthetic
from jaxreg.data import batches as batches_lib
from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.experiments import datasets
from jaxreg.experiments import run as run_lib
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.io import files
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import AS_PAPER, PromptRegConfig
from jaxreg.models.rdp import RdpConfig
from jaxreg.space import sampling
from jaxreg.training import step
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig
from jaxreg.weights import load

SCAN = (32, 32, 32)
SHAPE = (24, 24, 24)
SYNTHETIC = (
    synthetic.SyntheticConfig("large", SCAN, labels=5, anatomy=10),
    synthetic.SyntheticConfig(
        "noisy", SCAN, labels=7, anatomy=11, deformation_voxel=3.0, organ_change=0.2,
        bias=0.4, blur_voxel=1.2, noise=0.08,
    ),
    synthetic.SyntheticConfig(
        "intra", SCAN, labels=9, anatomy=12, pairing="intra", deformation_voxel=2.5,
        texture=0.12,
    ),
)  # fmt: skip
SUBJECTS = 60
VALIDATION_PAIRS = 36
CALIBRATION_STEPS = 30

_LNCC = Objective(similarity_options=(("sigma", 2),))
_PYRAMID = dataclasses.replace(
    _LNCC, inverse_consistency_weight=0.0, smoothness_weight=0.3, directions="forward"
)
_PROMPTS = dataclasses.replace(_PYRAMID, orthogonality_weight=0.001, task_weight=0.001)
_PAPER = dataclasses.replace(AS_PAPER, channels=4)


@dataclasses.dataclass(frozen=True)
class Method:
    """A network, and what it is trained to do."""

    model: GradIconConfig | RdpConfig | PromptRegConfig
    objective: Objective
    optimizer: OptimizerConfig = OptimizerConfig(
        "amsgrad", learning_rate=5e-4, schedule="polynomial", warm_up=40
    )
    batch: int = 1


METHODS = {
    "GradICON": Method(
        GradIconConfig(
            (2, 16, 32, 64), (16, 16, 32), downsampled_steps=1, fullres_steps=0
        ),
        _LNCC,
        OptimizerConfig(learning_rate=1e-3, schedule="cosine"),
        batch=2,
    ),
    "RDP": Method(RdpConfig(channels=4), _PYRAMID),
    "PromptReg": Method(_PAPER, _PROMPTS),
    "PromptReg, no prompt losses": Method(_PAPER, _PYRAMID),
    "PromptReg, released form": Method(PromptRegConfig(channels=4), _PROMPTS),
}
ALONE = ("PromptReg",)
LEFT_OUT = ("PromptReg", "RDP")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a method on some domains, with a seed."""

    method: str
    domains: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.method, *self.domains, str(self.seed)]
        return "-".join(parts).replace(", ", "_").replace(" ", "_").lower()


def main() -> None:
    """Parses the command line; prepares, trains, scores, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hippocampus", type=pathlib.Path, help="Task04_Hippocampus")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="of a whole run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=None)
    parser.add_argument("--table", action="store_true", help="print what is there")
    arguments = parser.parse_args()
    out = arguments.out
    if not arguments.table:
        # Many runs compile the same programs.
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        manifests = prepare(arguments.hippocampus, out)
        steps = calibrate(manifests, out, arguments.minutes)
        for seed in arguments.seeds:
            for run in plan(tuple(manifests), seed):
                if arguments.only is None or run.method in arguments.only:
                    carry_out(run, manifests, steps, out)
    print_tables(out)


def prepare(hippocampus: pathlib.Path | None, out: pathlib.Path) -> dict[str, str]:
    """Returns the manifest of each domain; the synthetic ones are written first."""
    if hippocampus is None:
        raise SystemExit("--hippocampus is missing; name the folder of the set")
    found = {"hippocampus": str(hippocampus)}
    for config in SYNTHETIC:
        folder = out / "data" / config.name
        if not (folder / "manifest.csv").is_file():
            synthetic.write_dataset(folder, config, subjects=SUBJECTS)
        found[config.name] = str(folder / "manifest.csv")
    return found


def plan(domains: Sequence[str], seed: int) -> list[Run]:
    """Returns the runs of one seed, the most telling first."""
    whole = tuple(domains)
    runs = [Run(method, whole, seed) for method in METHODS]
    for domain in whole:
        rest = tuple(d for d in whole if d != domain)
        runs += [Run(method, rest, seed) for method in LEFT_OUT]
    runs += [Run(method, (domain,), seed) for method in ALONE for domain in whole]
    return runs


def experiment_of(
    run: Run, manifests: dict[str, str], steps: int, *, validation_pairs: int = 0
) -> Experiment:
    """Returns the experiment of a run; without validation the last weights count."""
    method = METHODS[run.method]
    several = len(run.domains) > 1
    objective = method.objective
    if not several:  # one prompt is orthogonal to no other, and every pair's own
        objective = dataclasses.replace(
            objective, orthogonality_weight=0.0, task_weight=0.0
        )
    return Experiment(
        name=run.name,
        model=method.model,
        data=DataConfig(
            manifests=tuple(manifests[d] for d in run.domains),
            pairs_per_epoch=steps * method.batch,
            validation_pairs=validation_pairs,
        ),
        loading=Loading(shape=SHAPE),
        augment=Augmentation(permute=False, flip=False, noise=0.05, shared_noise=0.05),
        objective=objective,
        optimizer=method.optimizer,
        train=TrainConfig(batch=method.batch, seed=run.seed),
        loop=LoopConfig(log_every=10, image_every=0),
        stages=(Stage("stage_1", epochs=1),),
    )


def calibrate(
    manifests: dict[str, str], out: pathlib.Path, minutes: float
) -> dict[str, int]:
    """Returns the steps of a whole run of each method, measured once."""
    path = out / "steps.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found["minutes"] != minutes:
            raise SystemExit(
                f"{path} is of --minutes {found['minutes']}; give that, or a new --out"
            )
        return found["steps"]
    seconds = {}
    for method in METHODS:
        run = Run(method, tuple(manifests), 0)
        experiment = experiment_of(run, manifests, CALIBRATION_STEPS)
        folder = out / "calibration" / run.name
        run_lib.run(experiment, folder, resume=True)
        seconds[method] = METHODS[method].batch * seconds_per_pair(folder)
    steps = {m: max(4, round(60 * minutes / s / 4) * 4) for m, s in seconds.items()}
    with files.atomic_path(path) as temporary:
        text = {"minutes": minutes, "seconds": seconds, "steps": steps}
        pathlib.Path(temporary).write_text(json.dumps(text, indent=2) + "\n")
    return steps


def seconds_per_pair(folder: pathlib.Path) -> float:
    """Returns the median over the rows of a run's log."""
    with open(folder / "stage_1" / "log.csv", newline="") as file:
        rates = [float(row["pairs_per_s"]) for row in csv.DictReader(file)]
    # The first row has the compiler's time in it.
    return 1 / statistics.median(rates[1:])


def carry_out(
    run: Run, manifests: dict[str, str], steps: dict[str, int], out: pathlib.Path
) -> None:
    """Trains, and scores on every domain; writes OUT/NAME.json."""
    path = out / f"{run.name}.json"
    if path.is_file():
        return
    share = len(run.domains) / len(manifests)
    count = round(steps[run.method] * share)
    folder = out / run.name
    outcome = run_lib.run(experiment_of(run, manifests, count), folder, resume=True)
    pairs = count * METHODS[run.method].batch
    result = {
        **dataclasses.asdict(run),
        "steps": count,
        "seconds": pairs * seconds_per_pair(folder),
        "domains_scored": {
            domain: score(run, outcome.weights, manifests, domain)
            for domain in manifests
        },
    }
    with files.atomic_path(path) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
    print(run.name, {d: r["dice"] for d, r in result["domains_scored"].items()})


def score(
    run: Run, weights: pathlib.Path, manifests: dict[str, str], domain: str
) -> dict[str, Any]:
    """Returns means over a domain's validation pairs, in percent.

    "initial" and "dice" (over labels, nearest, network grid), "folding", and for a bank
    "weights": of the domains that it was trained on.
    """
    loaded = load.load(str(weights))
    experiment = experiment_of(
        dataclasses.replace(run, domains=(domain,)),
        manifests,
        1,
        validation_pairs=VALIDATION_PAIRS,
    )
    found = datasets.make_sources(experiment)
    assert found.validation is not None  # some pairs were asked for
    loading = datasets.loading_of(experiment, validation=True)

    @jax.jit
    def register(variables, batch):
        pair = augment.to_pair(batch, None, None)
        maps, _ = step.predict(loaded.model, variables, pair, directions="forward")
        points = maps.forward.on_grid(SHAPE)
        labels = batch["moving_labels"].astype(jnp.float32)
        return points, sampling.sample(labels, points, order=0), maps.aux

    def overlap(labels, batch):
        by_label = metrics.dice(labels.astype(int), batch["fixed_labels"])
        return metrics.mean_score(by_label)

    rows, shares = [], []
    with batches_lib.Batches(
        found.validation, loading, batch_size=1, start=0, stop=found.validation_count
    ) as batches:
        for batch in batches:
            points, warped, aux = jax.device_get(register(loaded.variables, batch))
            cells = metrics.cell_determinant(points)
            rows.append(
                (
                    100 * overlap(batch["moving_labels"], batch),
                    100 * overlap(warped, batch),
                    metrics.folding_percent(cells),
                )
            )
            shares.append(aux.get("task_weights", np.zeros((1, 0)))[0])
    names = ("initial", "dice", "folding")
    means: dict[str, Any] = dict(
        zip(names, np.mean(rows, axis=0).tolist(), strict=True)
    )
    if not np.size(shares):
        return means
    weights_of = np.mean(shares, axis=0).tolist()
    return {**means, "weights": dict(zip(loaded.task_names, weights_of, strict=True))}


Result = dict[str, Any]


def print_tables(out: pathlib.Path) -> None:
    """Prints what has been scored so far: a number per seed."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
    if not results:
        raise SystemExit(f"no run in {out} is finished")
    results.sort(key=lambda result: result["seed"])
    domains = list(results[0]["domains_scored"])
    print_table("Dice %", domains, dice_rows(results, domains), "dice")
    print_table("folded cells %", domains, all_domain_rows(results, domains), "folding")
    print("Prompts' mean weights (PromptReg, all domains):\n")
    for result in whole_runs(results, domains):
        if result["method"] == "PromptReg":
            for domain, scored in result["domains_scored"].items():
                shares = [f"{n} {w:.2f}" for n, w in scored["weights"].items()]
                print(f"seed {result['seed']}, {domain}: {', '.join(shares)}")
    print("\nWhole runs:\n")
    for result in whole_runs(results, domains):
        print(
            f"{result['method']}, seed {result['seed']}: {result['steps']} steps, "
            f"{result['seconds'] / 60:.1f} minutes without compilation"
        )


def whole_runs(results: Sequence[Result], domains: Sequence[str]) -> list[Result]:
    """Returns the runs on all domains."""
    return [result for result in results if len(result["domains"]) == len(domains)]


Rows = list[tuple[str, dict[str, list[Result]]]]


def all_domain_rows(results: Sequence[Result], domains: Sequence[str]) -> Rows:
    """Returns a row per method: the same runs for every domain."""
    whole = whole_runs(results, domains)
    by_method = {m: [r for r in whole if r["method"] == m] for m in METHODS}
    return [
        (f"{method}, all domains", dict.fromkeys(domains, found))
        for method, found in by_method.items()
    ]


def dice_rows(results: Sequence[Result], domains: Sequence[str]) -> Rows:
    """Returns the rows of Table 1: all, left out, alone."""

    def trained_on(method: str, on: dict[str, set[str]]) -> dict[str, list[Result]]:
        return {
            d: [
                r
                for r in results
                if r["method"] == method and set(r["domains"]) == on[d]
            ]
            for d in domains
        }

    rest = {d: set(domains) - {d} for d in domains}
    alone = {d: {d} for d in domains}
    return [
        *all_domain_rows(results, domains),
        *((f"{m}, this domain left out", trained_on(m, rest)) for m in LEFT_OUT),
        *((f"{m}, this domain alone", trained_on(m, alone)) for m in ALONE),
    ]


def print_table(title: str, domains: Sequence[str], rows: Rows, field: str) -> None:
    """Prints rows of domains, in each cell a number per seed."""
    print(f"| {title}, a number per seed | " + " | ".join(domains) + " |")
    print("| --- |" + " ---: |" * len(domains))
    if field == "dice":
        first = next(r for _, cells in rows for r in cells[domains[0]])
        initial = [f"{first['domains_scored'][d]['initial']:.1f}" for d in domains]
        print("| initial | " + " | ".join(initial) + " |")
    for name, cells in rows:
        texts = (
            " / ".join(f"{r['domains_scored'][d][field]:.1f}" for r in cells[d]) or "-"
            for d in domains
        )
        print(f"| {name} | " + " | ".join(texts) + " |")
    print()


if __name__ == "__main__":
    main()
