"""From an experiment to trained weights: where data, model and training loop meet.

OUT/experiment.json   the settings
OUT/scans.txt         what manifests listed when the run was started
OUT/STAGE/            log.csv, TensorBoard events, checkpoints/ of each stage
OUT/weights/          the last stage's best weights, for `jaxreg register`
"""

import dataclasses
import itertools
import json
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import experiment as experiment_lib
from jaxreg import metrics, zoo
from jaxreg.data import augment, manifest, pairs, pipeline, synthetic
from jaxreg.data.manifest import Manifest, Record
from jaxreg.errors import UserError
from jaxreg.experiment import Experiment, Stage
from jaxreg.io import checkpoints, files, runs
from jaxreg.losses.objective import Objective, TaskObjective
from jaxreg.models.gradicon import GradIcon
from jaxreg.space import fields, sampling
from jaxreg.training import loop, optimizer, parallel, state, step
from jaxreg.training.logging import RunLog
from jaxreg.training.parallel import Layout
from jaxreg.typing import Key, Pair, Variables

Source = pipeline.PairSource | pipeline.ReadyPairs
Say = Callable[[str], None]
_VALIDATION_SEED = 1
_SETTINGS = "experiment.json"
_SCANS = "scans.txt"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run leaves.

    Attributes:
      weights: folder of the best weights.
      scores: of the last validation, by name; empty without validation.
      steps: of the last stage.
      seconds: of the whole run, since it was last started.
    """

    weights: pathlib.Path
    scores: Mapping[str, float]
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Sources:
    """The pairs of an experiment.

    Attributes:
      train: endless.
      validation: a few, or None.
      validation_count: how many.
      objectives: which objective scores each task, as an index into `objectives_of`.
      classes: label values of the Dice term.
    """

    train: Source
    validation: Source | None
    validation_count: int
    objectives: tuple[int, ...]
    classes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FixedPlans:
    """A list of pairs in place of a sampler.

    Attributes:
      tasks: what `PairPlan.task` counts.
      plans: pair i is the i-th.
    """

    tasks: tuple[pairs.Task, ...]
    plans: tuple[pairs.PairPlan, ...]

    def __getitem__(self, index: int, /) -> pairs.PairPlan:
        """Returns pair `index`."""
        return self.plans[index]


def objectives_of(experiment: Experiment) -> tuple[Objective, ...]:
    """Returns the default objective and the named ones, in order."""
    return (experiment.objective, *(o for _, o in experiment.objectives))


def loss_of(experiment: Experiment) -> Objective | TaskObjective:
    """Returns what is minimised: one objective, or each task's own."""
    if experiment.objectives:
        return TaskObjective(objectives_of(experiment))
    return experiment.objective


def read_manifests(experiment: Experiment) -> Manifest:
    """Returns all manifests of an experiment as one, with a validation split.

    Raises:
      UserError: one cannot be read, or two hold a dataset of the same name.
    """
    found: list[Manifest] = []
    for path in experiment.data.manifests:
        found.append(manifest.read_manifest(path, holdout=experiment.data.holdout))
    records: list[Record] = []
    labels: dict[str, Mapping[int, str]] = {}
    for one in found:
        names = {record.dataset for record in one.records}
        twice = sorted(names & {record.dataset for record in records})
        if twice:
            raise UserError(
                f"{one.source} has a dataset {twice[0]}, and so has another manifest; "
                "give one of them another name in its dataset column"
            )
        records.extend(one.records)
        labels |= one.labels
    source = ", ".join(one.source for one in found)
    return Manifest(records=tuple(records), source=source, labels=labels)


def make_sources(experiment: Experiment, *, number: int = 0) -> Sources:
    """Returns the pairs to train and to validate on.

    Args:
      experiment: as it is during the stage.
      number: of the stage, from 0; each draws training pairs of its own.

    Raises:
      UserError: there are no data, or they do not fit the tasks and objectives.
    """
    if experiment.data.synthetic:
        return _synthetic_sources(experiment, number)
    if not experiment.data.manifests:
        raise UserError(
            "the experiment names no data; give --data.manifests PATH (a manifest or a "
            "folder of scans) or --data.synthetic inter_mono"
        )
    data = experiment.data
    whole = read_manifests(experiment)
    tasks = data.tasks or tuple(
        pairs.Task(name) for name in sorted({r.dataset for r in whole.records})
    )
    names = ["default", *(name for name, _ in experiment.objectives)]
    train = whole.of_split("train")
    sampler = pairs.sampler(
        train,
        tasks,
        pairs_per_epoch=data.pairs_per_epoch,
        schedule=data.schedule,
        seed=_pairs_seed(experiment.train.seed, number),
    )
    plans, held_out = _validation_plans(whole, tasks, experiment)
    classes = data.classes or tuple(
        sorted({value for named in whole.labels.values() for value in named} - {0})
    )
    _check_annotations(experiment, train, tasks, classes)
    validation = FixedPlans(tasks, plans)
    return Sources(
        train=pipeline.PairSource(train, sampler, whole.labels),
        validation=(
            pipeline.PairSource(held_out, validation, whole.labels) if plans else None
        ),
        validation_count=len(plans),
        objectives=tuple(names.index(task.objective) for task in tasks),
        classes=classes,
    )


def _pairs_seed(seed: int, number: int) -> int:
    """Returns the seed of a stage's training pairs.

    A sum would give the second stage of one run the pairs of another's first.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _weights_key(seed: int) -> Key:
    """Returns the key of fresh weights; layers tell themselves apart by their names."""
    return jax.random.split(jax.random.key(seed))[0]


def _steps_key(seed: int, number: int) -> Key:
    """Returns the root key of a stage's steps; independent of the weights' key."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)


def _synthetic_sources(experiment: Experiment, number: int) -> Sources:
    data = experiment.data
    configs = [
        dataclasses.replace(
            synthetic.TASKS[name],
            shape=experiment.loading.shape,
            labels=data.synthetic_labels,
        )
        for name in data.synthetic
    ]
    train, validation = (
        synthetic.SyntheticPairs(configs, seed, data.pairs_per_epoch)
        for seed in (
            _pairs_seed(experiment.train.seed, number),
            experiment.train.seed + _VALIDATION_SEED,
        )
    )
    return Sources(
        train=train,
        validation=validation if data.validation_pairs else None,
        validation_count=data.validation_pairs,
        objectives=(0,) * len(configs),
        classes=data.classes or tuple(range(1, data.synthetic_labels + 1)),
    )


def _validation_plans(
    whole: Manifest, tasks: Sequence[pairs.Task], experiment: Experiment
) -> tuple[tuple[pairs.PairPlan, ...], tuple[Record, ...]]:
    """Returns at most as many pairs as asked for, spread over the split.

    Of several tasks of one dataset, the first has its pairs.
    """
    pairing_of = {task.dataset: task.pairing for task in reversed(tasks)}
    held_out = tuple(
        dataclasses.replace(
            record, pairing=pairing_of.get(record.dataset) or record.pairing
        )
        for record in whole.of_split("val")
    )
    number = {record: i for i, record in enumerate(held_out)}
    task_of = {task.dataset: i for i, task in reversed(list(enumerate(tasks)))}
    found = [
        pairs.PairPlan(
            task_of[fixed.dataset],
            moving=pairs.View(number[moving]),
            fixed=pairs.View(number[fixed]),
        )
        for fixed, moving in manifest.neighbour_pairs(
            held_out,
            experiment.data.neighbours,
            across_modalities=True,  # as the sampler draws them
        )
        if fixed.dataset in task_of
    ]
    count = min(len(found), experiment.data.validation_pairs)
    chosen = np.linspace(0, len(found), count, endpoint=False).astype(int)
    return tuple(found[i] for i in chosen), held_out


def _check_annotations(
    experiment: Experiment,
    train: Sequence[Record],
    tasks: Sequence[pairs.Task],
    classes: tuple[int, ...],
) -> None:
    named = {"default": experiment.objective, **dict(experiment.objectives)}
    for task in tasks:
        objective = named[task.objective]
        members = [record for record in train if record.dataset == task.dataset]
        for needed, what, weight in (
            ("label", "a Dice term", objective.dice_weight > 0),
            ("mask", "loss masking", objective.loss_masking),
        ):
            if weight and not any(getattr(record, needed) for record in members):
                raise UserError(
                    f"dataset {task.dataset} has no {needed} in its manifest, but its "
                    f"objective has {what}; add the column {needed} or switch it off"
                )
        if objective.dice_weight > 0 and not classes:
            raise UserError(
                f"dataset {task.dataset} is to be trained with labels, but the "
                "manifest does not list them; give --data.classes 1,2,3"
            )
    datasets = {task.dataset for task in tasks}
    if experiment.loading.mask_inputs and not any(
        record.mask for record in train if record.dataset in datasets
    ):
        raise UserError(
            "loading.mask_inputs is true, but no training image has a mask; add the "
            "column mask to a manifest or give --loading.mask_inputs false"
        )


def loading_of(experiment: Experiment, *, validation: bool) -> pipeline.Loading:
    """Returns how scans are read, with the annotations that are needed."""
    several = objectives_of(experiment)
    return dataclasses.replace(
        experiment.loading,
        use_labels=validation or any(o.dice_weight > 0 for o in several),
        use_masks=any(o.loss_masking for o in several),
    )


def make_prepare(
    experiment: Experiment, sources: Sources, layout: Layout
) -> Callable[[step.Batch, Any], Pair]:
    """Returns the device side of the data, for `step.make_train_step`."""
    several = objectives_of(experiment)
    supervised = any(o.dice_weight > 0 for o in several)
    classes = sources.classes if supervised else ()
    lookup = np.asarray(sources.objectives, np.int32)

    def prepare(batch, key):
        pair = augment.to_pair(batch, key, experiment.augment, classes=classes)
        if len(several) > 1:
            pair = dataclasses.replace(pair, task=jnp.asarray(lookup)[pair.task])
        return parallel.constrain(pair, layout)

    return prepare


def _one_volume(layout: Layout) -> Layout:
    """Returns the layout of one pair: as many devices as share a volume in training.

    They are this process' first, since each process works on pairs of its own.
    """
    if layout.space == 1:
        return Layout("single")
    mine = jax.local_devices()[: layout.space]
    return parallel.make_layout("mesh", space=layout.space, devices=mine)


def make_validation(
    experiment: Experiment, sources: Sources, model: Any, layout: Layout
) -> Callable[[Variables], loop.Validation] | None:
    """Returns ``validate(variables)``, or None where there is nothing to score on.

    Each process scores its share of the pairs, one at a time. Scores are means over the
    pairs: the parts of the objective in evaluation mode with fixed noise, "dice" (mean
    over a pair's labels, nearest, on the network grid), and "folding_percent".
    """
    source = sources.validation
    if source is None:
        return None
    loading = loading_of(experiment, validation=True)
    objective, several = loss_of(experiment), objectives_of(experiment)
    lookup = jnp.asarray(sources.objectives, jnp.int32)
    supervised = any(o.dice_weight > 0 for o in several)
    noise = jax.random.normal(jax.random.key(0), (1, *loading.shape, 3))
    one = _one_volume(layout)

    def score(variables, batch):
        classes = sources.classes if supervised else ()
        pair = augment.to_pair(batch, None, None, classes=classes)
        if len(several) > 1:
            pair = dataclasses.replace(pair, task=lookup[pair.task])
        pair = parallel.constrain(pair, one)
        _, (parts, forward, _, _) = step.evaluate(
            model, variables, pair, noise, objective=objective
        )
        points = forward.on_grid(loading.shape)
        # The Dice term's part is a loss; the score below is the overlap.
        if "dice" in parts:
            parts["dice_loss"] = parts.pop("dice")
        labels = batch.get("moving_labels")
        if labels is not None:
            labels = sampling.sample(labels.astype(jnp.float32), points, order=0)
        shown = {"fixed": pair.fixed, "moving": pair.moving}
        shown["warped"] = fields.warp(pair.moving, points)
        return parts, (points, labels, shown)

    compiled = parallel.compile_step(score, one, donate=False)
    mine = _own_share(sources.validation_count)

    def validate(variables):
        rows, images = [], {}
        placed = parallel.place_state(variables, one)
        # One reader for all of them: worker processes take seconds to start.
        with pipeline.Batches(
            source, loading, batch_size=1, start=mine.start, stop=mine.stop
        ) as batches:
            for i, batch in zip(mine, batches, strict=True):
                parts, (points, warped, shown) = jax.device_get(
                    compiled(placed, parallel.place_batch(batch, one))
                )
                row = {name: float(value) for name, value in parts.items()}
                cells = metrics.cell_determinant(np.asarray(points))
                row["folding_percent"] = metrics.folding_fraction(cells)
                row |= _overlap(warped, batch)
                if "dice" in row and not np.isfinite(points).all():
                    row["dice"] = np.nan
                rows.append(row)
                _warn_if_not_finite(row, _pair_name(source, i))
                if i == 0:
                    images = {name: a[0, ..., 0] for name, a in shown.items()}
        return loop.Validation(_means(rows), images)

    return validate


def _own_share(count: int) -> range:
    """Returns this process' part of the first `count` numbers; process 0 has 0."""
    share = -(-count // jax.process_count())
    start = min(share * jax.process_index(), count)
    return range(start, min(start + share, count))


def _overlap(warped: np.ndarray | None, batch: pipeline.Batch) -> dict[str, float]:
    """Returns the Dice score of a pair; none unless both scans have labels."""
    # A scan without a label map has zeros.
    sides = ("moving_labels", "fixed_labels")
    if warped is None or not all(np.any(batch[side]) for side in sides):
        return {}
    overlap = metrics.dice(warped.astype(int), batch["fixed_labels"])
    return {"dice": metrics.mean_score(overlap)}


def _pair_name(source: Source, index: int) -> str:
    named = isinstance(source, pipeline.PairSource)
    return f"pair {index} ({source.named(index)})" if named else f"pair {index}"


def _warn_if_not_finite(row: Mapping[str, float], pair: str) -> None:
    broken = [f"{n} {value:g}" for n, value in row.items() if not np.isfinite(value)]
    if broken:
        warnings.warn(
            f"validation {pair} gives {', '.join(broken)}, so that the means are not "
            "finite and never the best; look at the pair, or start anew with a lower "
            "optimizer.learning_rate",
            stacklevel=3,
        )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over all pairs of all processes; a pair without a score is left out.

    A score that is not finite makes its mean infinite, which is never the best.
    """
    names = ("loss", "inverse_consistency", "similarity", "transform_magnitude",
             "folds", "dice_loss", "folding_percent", "dice")  # fmt: skip
    sums = np.zeros((2, len(names)))
    for row in rows:
        for i, name in enumerate(names):
            if name in row:
                sums[:, i] += row[name] if np.isfinite(row[name]) else np.inf, 1
    total, count = loop.sum_over_processes(sums)
    return {n: float(t / c) for n, t, c in zip(names, total, count, strict=True) if c}


def make_blame(
    experiment: Experiment, sources: Sources, model: Any, layout: Layout
) -> Callable[[Variables, Mapping[str, np.ndarray]], list[int]]:
    """Returns ``blame(variables, batch)``: which pairs alone give no finite loss."""
    objective, one = loss_of(experiment), _one_volume(layout)
    prepare = make_prepare(dataclasses.replace(experiment, augment=None), sources, one)

    def loss(variables, batch):
        pair = prepare(batch, None)
        noise = jnp.zeros((1, *pair.fixed.shape[1:4], 3))
        value, (parts, *_) = step.evaluate(
            model, variables, pair, noise, objective=objective
        )
        return value, parts

    compiled = parallel.compile_step(loss, one, donate=False)

    def blame(variables, batch):
        found, placed = [], parallel.place_state(variables, one)
        for i in range(len(batch["index"])):
            pair = {name: array[i : i + 1] for name, array in batch.items()}
            broken = not all(np.isfinite(a).all() for a in pair.values())
            if broken or not np.isfinite(
                compiled(placed, parallel.place_batch(pair, one))[0]
            ):
                found.append(i)
        return found

    return blame


def initial_variables(
    experiment: Experiment, model: Any, before: Variables | None, say: Say
) -> Variables:
    """Returns the variables that a stage starts with.

    Args:
      experiment: with the model and, for the first stage, `train.start`.
      model: the network.
      before: of the previous stage, or None.
      say: takes a sentence about what was loaded.

    Raises:
      UserError: the weights to start from have other sizes or nothing in common.
    """
    key = _weights_key(experiment.train.seed)
    fresh = jax.tree.map(np.asarray, model.init(key))
    start = experiment.train.start
    if before is None and start is None:
        return fresh
    if before is not None:
        source, name = before, "the previous stage"
    else:
        assert start is not None
        source, name = zoo.load(start).variables, f"train.start {start}"
    merged = runs.merge_variables(fresh, source)
    if merged.misshapen or not merged.loaded:
        wrong = ", ".join(merged.misshapen[:3]) or "no name in common"
        raise UserError(
            f"{name} does not fit the network ({wrong}); set --model.channels_down and "
            "--model.channels_up to those of the weights"
        )
    say(
        f"started from {name}: {len(merged.loaded)} arrays loaded, "
        f"{len(merged.missing)} fresh, {len(merged.unexpected)} not used"
    )
    return merged.variables


def run(
    experiment: Experiment,
    out: pathlib.Path,
    *,
    resume: bool = False,
    say: Say = print,
) -> Outcome:
    """Trains all stages of an experiment.

    Args:
      experiment: what to do.
      out: the folder of the run.
      resume: go on where a run in `out` ended or was killed.
      say: takes a sentence at a time for the user.

    Raises:
      UserError: settings, data, devices or the folder do not fit together, or training
        cannot go on; every checkpoint written so far is kept.
    """
    began = time.perf_counter()
    settings = [experiment_lib.to_dict(experiment), str(out), resume]
    if not parallel.same_everywhere(json.dumps(settings, sort_keys=True)):
        raise UserError(
            "the processes were started with different settings; give each the same "
            "command but for --process"
        )
    # All before the folder: a mistake in the last stage must not leave half a run.
    stage_runs = [
        _StageRun(changed, stage, out, say)
        for stage, changed in experiment_lib.stages(experiment)
    ]
    if not (out / _SETTINGS).is_file():
        if resume:
            say(f"there is no run in {out} to resume, so it starts anew")
        if experiment.train.start is not None:
            first = stage_runs[0]
            initial_variables(first.experiment, first.model, None, lambda _: None)
    _open_folder(experiment, out, _scans_of(stage_runs), resume=resume)
    variables: Variables | None = None
    scores: Mapping[str, float] = {}
    steps = 0
    for trainer in stage_runs:
        say(f"stage {trainer.stage.name}: {trainer.stage.epochs} epochs")
        variables, scores, steps = trainer.run(variables, resume=resume)
    weights = out / "weights"
    if jax.process_index() == 0:
        assert variables is not None  # an experiment has a stage
        last = experiment_lib.stages(experiment)[-1][1]
        checkpoints.save_bundle(weights, bundle_of(last, variables))
    parallel.barrier("weights written")
    return Outcome(weights, scores, steps, time.perf_counter() - began)


def bundle_of(experiment: Experiment, variables: Variables) -> checkpoints.Bundle:
    """Returns trained weights as they are stored."""
    config = dataclasses.asdict(experiment.model)
    loading = experiment.loading
    return checkpoints.Bundle(
        variables=jax.tree.map(np.asarray, variables),
        model="gradicon",
        config=config,
        preprocessing={
            **zoo.KINDS["gradicon"].preprocessing,
            "shape": list(loading.shape),
            "ct_window": list(loading.ct_window),
            "mri_quantiles": list(loading.quantile_range or (0.0, 0.99)),
            "mask_inputs": loading.mask_inputs,
        },
        source=f"trained by jaxreg, experiment {experiment.name}",
        licence=experiment.licence,
    )


def _scans_of(stage_runs: Sequence["_StageRun"]) -> list[str]:
    """Returns a line for each scan of each stage: their order decides the pairs."""
    found = []
    for trainer in stage_runs:
        for source in (trainer.sources.train, trainer.sources.validation):
            if isinstance(source, pipeline.PairSource):
                found += [_line(trainer.stage.name, r) for r in source.records]
    return found


def _line(stage: str, record: Record) -> str:
    values = dataclasses.asdict(record)
    for name, value in values.items():
        # The same scans may lie elsewhere when a run goes on.
        if isinstance(value, pathlib.Path):
            values[name] = "/".join(value.parts[-2:])
    told = ", ".join(f"{name} {value}" for name, value in values.items() if value)
    return f"{stage}: {told}"


def _check_scans(path: pathlib.Path, scans: Sequence[str]) -> None:
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else scans
    for was, now in itertools.zip_longest(before, scans, fillvalue="nothing"):
        if was != now:
            raise UserError(
                f"the run in {path.parent} was started with other scans, the first "
                f"difference is {was} -> {now}; put the manifest back as it was, or "
                "give another --out"
            )


def _open_folder(
    experiment: Experiment, out: pathlib.Path, scans: Sequence[str], *, resume: bool
) -> None:
    problem = None
    if jax.process_index() == 0:
        problem = _folder_problem(experiment, out, scans, resume=resume)
    problems = parallel.from_first_process(problem or "")
    if problems:
        raise UserError(problems)


def _folder_problem(
    experiment: Experiment, out: pathlib.Path, scans: Sequence[str], *, resume: bool
) -> str | None:
    settings = out / _SETTINGS
    try:
        if settings.is_file():
            if not resume:
                return (
                    f"--out {out} holds a run already; pass --resume to go on with it, "
                    "or give another folder"
                )
            experiment_lib.check_same(settings, experiment)
            _check_scans(out / _SCANS, scans)
            return None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            return f"--out {out} exists and holds no run; give another folder"
        out.mkdir(parents=True, exist_ok=True)
        experiment_lib.write(settings, experiment)
        if scans:
            with files.atomic_path(out / _SCANS) as temporary:
                text = "\n".join(scans) + "\n"
                pathlib.Path(temporary).write_text(text, encoding="utf-8")
    except OSError as error:
        return f"--out {out} cannot be written ({error.strerror}); give another folder"
    except UserError as error:
        return str(error)
    return None


def _shared_out(experiment: Experiment) -> tuple[int, Layout, tuple[int, int]]:
    """Returns steps per epoch, the devices, and what `parallel.check_batch` does."""
    train, pairs_per_epoch = experiment.train, experiment.data.pairs_per_epoch
    if pairs_per_epoch < train.batch:
        raise UserError(
            f"data.pairs_per_epoch is {pairs_per_epoch}, less than train.batch "
            f"{train.batch}; raise it"
        )
    layout = parallel.make_layout(train.parallel, space=train.space)
    shares = parallel.check_batch(
        train.batch, layout, accumulate=train.accumulate, replicas=train.replicas
    )
    return pairs_per_epoch // train.batch, layout, shares


def _metric(experiment: Experiment, sources: Sources) -> str | None:
    """Returns the score by which a checkpoint is best; None without validation."""
    wanted, source = experiment.loop.metric, sources.validation
    if source is None:
        if wanted != "auto":
            raise UserError(
                f"loop.metric is {wanted}, but no pair validates; give validation "
                "images or --loop.metric auto, which then takes the last checkpoint"
            )
        return None
    labelled = not isinstance(source, pipeline.PairSource) or any(
        source.records[plan.moving.record].label
        and source.records[plan.fixed.record].label
        for plan in map(source.plan, range(sources.validation_count))
    )
    if wanted == "dice" and not labelled:
        raise UserError(
            "loop.metric is dice, but no validation pair has label maps of both "
            "images; add the column label or give --loop.metric loss"
        )
    if wanted == "auto":
        return "dice" if labelled else "loss"
    return wanted


class _StageRun:
    """One stage: builds what the loop needs, runs it, and reads the best state back."""

    def __init__(
        self,
        experiment: Experiment,
        stage: Stage,
        out: pathlib.Path,
        say: Say,
    ):
        self.experiment, self.stage, self.say = experiment, stage, say
        self.out = out / stage.name
        self.model = GradIcon(experiment.model)
        self.number = experiment.stages.index(stage)
        self.sources = make_sources(experiment, number=self.number)
        self.per_epoch, self.layout, shares = _shared_out(experiment)
        self.replicas, self.span = shares
        self.steps = self.per_epoch * stage.epochs
        self.optimizer = optimizer.make_optimizer(experiment.optimizer, self.steps)
        self.metric = _metric(experiment, self.sources)

    def run(
        self, before: Variables | None, *, resume: bool
    ) -> tuple[Variables, Mapping[str, float], int]:
        """Returns the best variables, the last validation's scores, and the steps.

        Args:
          before: variables of the stage before, None for the first.
          resume: go on from the last checkpoint, if there is one.
        """
        keep = self.experiment.loop
        with runs.RunCheckpoints(
            self.out / "checkpoints",
            keep_latest=keep.keep_latest,
            keep_best=keep.keep_best,
            metric=self.metric,
            larger_is_better=self.metric == "dice",
        ) as kept:
            start, record = self._start(kept, before, resume=resume)
            scores = record.get("scores", {})
            # A run may have been stopped in its last validation.
            unscored = self.sources.validation is not None and not scores
            if int(start.step) < self.steps or unscored:
                scores = self._train(start, kept, record)
            found = kept.restore(state.to_tree(start), best=True)
        for sentence in found.skipped:
            self.say(sentence)
        if found.skipped:
            self.say(f"the weights are those of step {found.step} of {self.steps}")
        return state.averaged(state.from_tree(found.state)), scores, self.steps

    def _start(
        self, kept: runs.RunCheckpoints, before: Variables | None, *, resume: bool
    ) -> tuple[state.TrainState, Mapping[str, Any]]:
        """Returns the state to go on from, and the record of its checkpoint."""
        seed = self.experiment.train.seed
        going_on = resume and kept.latest_step() is not None
        # What a run started from need not be there any more when it goes on.
        variables = (
            jax.tree.map(np.asarray, self.model.init(_weights_key(seed)))
            if going_on
            else initial_variables(self.experiment, self.model, before, self.say)
        )
        fresh = state.start(
            variables,
            self.optimizer,
            _steps_key(seed, self.number),
            ema=self.experiment.train.ema > 0,
        )
        if not going_on:
            return fresh, {}
        restored = kept.restore(state.to_tree(fresh))
        for sentence in restored.skipped:
            self.say(sentence)
        self.say(f"resumed at step {restored.step} of {self.steps}")
        return state.from_tree(restored.state), restored.record

    def _train(
        self,
        start: state.TrainState,
        kept: runs.RunCheckpoints,
        resumed: Mapping[str, Any],
    ) -> Mapping[str, float]:
        """Trains to the end of the stage; returns the last validation's scores."""
        experiment, layout = self.experiment, self.layout
        train, first = experiment.train, int(start.step)
        train_step = step.make_train_step(
            self.model,
            loss_of(experiment),
            self.optimizer,
            make_prepare(experiment, self.sources, layout),
            step.StepConfig(
                train.accumulate, self.replicas, train.ema, layout.axis, self.span
            ),
        )
        last: dict[str, float] = {}
        validate = make_validation(experiment, self.sources, self.model, layout)

        def remembered(variables):
            assert validate is not None
            found = validate(variables)
            last.clear()
            last.update(found.scores)
            return found

        with (
            pipeline.Batches(
                self.sources.train,
                loading_of(experiment, validation=False),
                batch_size=train.batch,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                start=first,
                stop=self.steps,
            ) as batches,
            RunLog(self.out, start_step=first, enabled=jax.process_index() == 0) as log,
        ):
            job = loop.Job(
                step=parallel.compile_step(train_step, layout),
                layout=layout,
                batches=batches,
                batch_size=train.batch,
                steps=self.steps,
                steps_per_epoch=self.per_epoch,
                learning_rate=optimizer.make_schedule(experiment.optimizer, self.steps),
                validate=None if validate is None else remembered,
                blame=make_blame(experiment, self.sources, self.model, layout),
                checkpoints=kept,
                log=log,
                record={"stage": self.stage.name},
                metric=self.metric,
                resumed=resumed,
            )
            loop.run(parallel.place_state(start, layout), job, experiment.loop)
        return last


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a dry run found; see `dry_run`.

    Attributes:
      parameters: trained numbers.
      flops: of one step at the full grid and batch, as XLA counts them before it
        optimises.
      state_bytes: parameters, gradient and optimiser state.
      activation_bytes: of one step, scaled up by voxels and batch from the small grid.
      small: the grid that the step was compiled at.
      compile_seconds: for that.
      data: a sentence about each manifest of any stage.
    """

    parameters: int
    flops: float
    state_bytes: int
    activation_bytes: float
    small: tuple[int, int, int]
    compile_seconds: float
    data: tuple[str, ...]

    def rows(self) -> dict[str, str]:
        """Returns what to print, name to value."""
        return {
            "parameters": f"{self.parameters:,}",
            "arithmetic of a step": f"{self.flops / 1e12:.3g} TFLOP",
            "memory of parameters, gradient, optimiser": _gigabytes(self.state_bytes),
            "memory of activations (estimate)": _gigabytes(self.activation_bytes),
            "compiled at": " x ".join(map(str, self.small)),
            "seconds to compile": f"{self.compile_seconds:.1f}",
            **{f"data {i + 1}": text for i, text in enumerate(self.data)},
        }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def dry_run(experiment: Experiment, *, small: int = 32) -> DryRun:
    """Builds the last stage of an experiment and compiles one step on a small grid.

    The data need not be there: what their manifests would give is made up. What
    training asks of settings and manifests before it starts is asked of every stage.

    Args:
      experiment: what to try.
      small: longest axis of the small grid.

    Raises:
      UserError: settings, devices or data do not fit together.
    """
    # What is quickly found comes before what takes minutes.
    data = tuple(_quick_checks(experiment))
    last = experiment_lib.stages(experiment)[-1][1]
    shape = last.loading.shape
    factor = min(1.0, small / max(shape))
    grid = tuple(max(8, round(n * factor)) for n in shape)
    grid = (grid[0], grid[1], grid[2])
    began = time.perf_counter()
    compiled = _lowered(last, grid, 1).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    batch = last.train.batch
    model = GradIcon(last.model)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    scale = np.prod(shape) / np.prod(grid) * batch / last.train.accumulate
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    gradient = 4 * parameters
    # The native form, since XLA counts the body of a loop over slabs only once.
    native = dataclasses.replace(
        last, model=dataclasses.replace(last.model, form="native")
    )
    cost = _lowered(native, shape, 1).cost_analysis() or {}
    start = jax.eval_shape(lambda: _abstract_state(last, variables))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(start))
    return DryRun(
        parameters=parameters,
        flops=float(cost.get("flops", 0.0)) * batch,
        state_bytes=held + gradient,
        activation_bytes=max(temporary - gradient, 0) * float(scale),
        small=grid,
        compile_seconds=seconds,
        data=data,
    )


def _abstract_state(experiment: Experiment, variables: Any) -> dict[str, Any]:
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables)
    rule = optimizer.make_optimizer(experiment.optimizer, 1)
    made = state.start(zeros, rule, jax.random.key(0), ema=experiment.train.ema > 0)
    return state.to_tree(made)


def _lowered(experiment: Experiment, grid, count: int):
    """Returns the step of `count` pairs on a grid, traced on shapes alone."""
    supervised = any(o.dice_weight > 0 for o in objectives_of(experiment))
    names = ("moving", "fixed")
    image = jax.ShapeDtypeStruct((count, *grid, 1), jnp.float32)
    batch: dict[str, Any] = dict.fromkeys(names, image)
    number = jax.ShapeDtypeStruct((count,), jnp.int32)
    batch |= {"task": number, "index": number}
    if any(task.randomise != "B" for task in experiment.data.tasks):
        batch |= {f"{name}_target": image for name in names}
    for suffix, needed in (
        ("labels", supervised),
        ("mask", any(o.loss_masking for o in objectives_of(experiment))),
    ):
        if needed:
            whole = jax.ShapeDtypeStruct(image.shape, jnp.int32)
            batch |= {f"{name}_{suffix}": whole for name in names}
    sources = Sources(
        train=synthetic.SyntheticPairs([synthetic.SyntheticConfig()]),
        validation=None,
        validation_count=0,
        objectives=(0,) * max(len(experiment.data.tasks), 1),
        classes=experiment.data.classes or (1, 2),
    )
    model = GradIcon(experiment.model)
    rule = optimizer.make_optimizer(experiment.optimizer, 1)
    one = Layout("single")
    train_step = step.make_train_step(
        model,
        loss_of(experiment),
        rule,
        make_prepare(experiment, sources, one),
        step.StepConfig(ema=experiment.train.ema),
    )
    variables = jax.eval_shape(model.init, jax.random.key(0))
    shapes = jax.eval_shape(
        lambda v: state.start(v, rule, jax.random.key(0), ema=experiment.train.ema > 0),
        variables,
    )
    return jax.jit(train_step, donate_argnums=0).lower(shapes, batch)


def _check_cache(folder: pathlib.Path) -> None:
    """Checks that the folder is there or that training can make it; makes nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    files.check_writable(there / "entry", "loading.cache_dir")


def _quick_checks(experiment: Experiment) -> list[str]:
    """Checks each stage as training does before it starts, as far as its data exist.

    Returns:
      A sentence about each manifest.
    """
    said: list[str] = []
    for stage, changed in experiment_lib.stages(experiment):
        GradIcon(changed.model)
        per_epoch, *_ = _shared_out(changed)
        optimizer.make_optimizer(changed.optimizer, per_epoch * stage.epochs)
        said.extend(_data_sentences(changed))
        data = changed.data
        there = all(pathlib.Path(path).exists() for path in data.manifests)
        if data.synthetic or (data.manifests and there):
            _metric(changed, make_sources(changed))
    # Most stages share their data.
    return list(dict.fromkeys(said))


def _data_sentences(experiment: Experiment) -> Iterator[str]:
    if experiment.data.synthetic:
        yield f"synthetic: {', '.join(experiment.data.synthetic)}"
    for path in experiment.data.manifests:
        if not pathlib.Path(path).exists():
            yield f"{path} is not there yet; training will need it"
            continue
        found = manifest.read_manifest(path, holdout=experiment.data.holdout)
        counts = [f"{len(found.of_split(s))} {s}" for s in ("train", "val", "test")]
        yield f"{path}: {', '.join(counts)}"
    cache = experiment.loading.cache_dir
    if cache is not None:
        _check_cache(pathlib.Path(cache).absolute())
