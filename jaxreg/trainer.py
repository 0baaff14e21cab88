"""From an experiment to trained weights: where data, model and training loop meet.

OUT/experiment.json   the settings
OUT/STAGE/            log.csv, TensorBoard events, checkpoints/ of each stage
OUT/weights/          the last stage's best weights, for `jaxreg register`
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
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
from jaxreg.typing import Pair, Variables

Source = pipeline.PairSource | pipeline.ReadyPairs
Say = Callable[[str], None]
_VALIDATION_SEED = 1
_SETTINGS = "experiment.json"


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


def make_sources(experiment: Experiment) -> Sources:
    """Returns the pairs to train and to validate on.

    Raises:
      UserError: there are no data, or they do not fit the tasks and objectives.
    """
    if experiment.data.synthetic:
        return _synthetic_sources(experiment)
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
        seed=experiment.train.seed,
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


def _synthetic_sources(experiment: Experiment) -> Sources:
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
        for seed in (experiment.train.seed, experiment.train.seed + _VALIDATION_SEED)
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
    """Returns at most as many pairs as asked for, spread over the split."""
    held_out = whole.of_split("val")
    number = {record: i for i, record in enumerate(held_out)}
    task_of = {task.dataset: i for i, task in reversed(list(enumerate(tasks)))}
    found = [
        pairs.PairPlan(
            task_of[fixed.dataset],
            moving=pairs.View(number[moving]),
            fixed=pairs.View(number[fixed]),
        )
        for fixed, moving in manifest.neighbour_pairs(
            held_out, experiment.data.neighbours
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


def make_validation(
    experiment: Experiment, sources: Sources, model: Any
) -> Callable[[Variables], loop.Validation] | None:
    """Returns ``validate(variables)``, or None where there is nothing to score on.

    Each process scores its share of the pairs on one device. Scores are means over the
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

    @jax.jit
    def score(variables, batch):
        classes = sources.classes if supervised else ()
        pair = augment.to_pair(batch, None, None, classes=classes)
        if len(several) > 1:
            pair = dataclasses.replace(pair, task=lookup[pair.task])
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
        return parts, points, labels, pair, fields.warp(pair.moving, points)

    def validate(variables):
        mine = range(jax.process_index(), sources.validation_count, jax.process_count())
        rows, images = [], {}
        for i in mine:
            with pipeline.Batches(
                source, loading, batch_size=1, start=i, stop=i + 1
            ) as batches:
                batch = next(batches)
            parts, points, warped, pair, image = jax.device_get(score(variables, batch))
            row = {name: float(value) for name, value in parts.items()}
            cells = metrics.cell_determinant(np.asarray(points))
            row["folding_percent"] = metrics.folding_fraction(cells)
            if warped is not None and np.any(batch["fixed_labels"]):
                overlap = metrics.dice(warped.astype(int), batch["fixed_labels"])
                row["dice"] = metrics.mean_score(overlap)
            rows.append(row)
            if i == 0:
                shown = {"fixed": pair.fixed, "moving": pair.moving, "warped": image}
                images = {name: a[0, ..., 0] for name, a in shown.items()}
        return loop.Validation(_means(rows), images)

    return validate


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over all pairs of all processes; a pair without a score is left out."""
    names = ("loss", "inverse_consistency", "similarity", "transform_magnitude",
             "folds", "dice_loss", "folding_percent", "dice")  # fmt: skip
    sums = np.zeros((2, len(names)))
    for row in rows:
        for i, name in enumerate(names):
            if np.isfinite(row.get(name, np.nan)):
                sums[:, i] += row[name], 1
    total, count = loop.sum_over_processes(sums)
    return {n: float(t / c) for n, t, c in zip(names, total, count, strict=True) if c}


def make_blame(
    experiment: Experiment, sources: Sources, model: Any
) -> Callable[[Variables, Mapping[str, np.ndarray]], list[int]]:
    """Returns ``blame(variables, batch)``: which pairs alone give no finite loss."""
    objective = loss_of(experiment)
    prepare = make_prepare(
        dataclasses.replace(experiment, augment=None), sources, Layout("single")
    )

    @jax.jit
    def loss(variables, batch):
        pair = prepare(batch, None)
        noise = jnp.zeros((1, *pair.fixed.shape[1:4], 3))
        return step.evaluate(model, variables, pair, noise, objective=objective)[0]

    def blame(variables, batch):
        found = []
        for i in range(len(batch["index"])):
            one = {name: array[i : i + 1] for name, array in batch.items()}
            broken = not all(np.isfinite(a).all() for a in one.values())
            if broken or not np.isfinite(loss(variables, one)):
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
    key = jax.random.key(experiment.train.seed)
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
    _open_folder(experiment, out, resume=resume)
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
        },
        source=f"trained by jaxreg, experiment {experiment.name}",
        licence=experiment.licence,
    )


def _open_folder(experiment: Experiment, out: pathlib.Path, *, resume: bool) -> None:
    settings = out / _SETTINGS
    problem = None
    if jax.process_index() == 0:
        problem = _folder_problem(experiment, out, settings, resume=resume)
    problems = parallel.from_first_process(problem or "")
    if problems:
        raise UserError(problems)


def _folder_problem(
    experiment: Experiment, out: pathlib.Path, settings: pathlib.Path, *, resume: bool
) -> str | None:
    try:
        if settings.is_file():
            if not resume:
                return (
                    f"--out {out} holds a run already; pass --resume to go on with it, "
                    "or give another folder"
                )
            experiment_lib.check_same(settings, experiment)
            return None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            return f"--out {out} exists and holds no run; give another folder"
        out.mkdir(parents=True, exist_ok=True)
        experiment_lib.write(settings, experiment)
    except OSError as error:
        return f"--out {out} cannot be written ({error.strerror}); give another folder"
    except UserError as error:
        return str(error)
    return None


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
        self.sources = make_sources(experiment)
        batch = experiment.train.batch
        self.per_epoch = experiment.data.pairs_per_epoch // batch
        if not self.per_epoch:
            raise UserError(
                f"data.pairs_per_epoch is {experiment.data.pairs_per_epoch}, less than "
                f"train.batch {batch}; raise it"
            )
        train = experiment.train
        self.layout = parallel.make_layout(train.parallel, space=train.space)
        self.replicas = parallel.check_batch(
            batch, self.layout, accumulate=train.accumulate, replicas=train.replicas
        )
        self.steps = self.per_epoch * stage.epochs
        self.optimizer = optimizer.make_optimizer(experiment.optimizer, self.steps)
        self.metric = self._metric()

    def _metric(self) -> str | None:
        wanted = self.experiment.loop.metric
        if self.sources.validation is None:
            return None
        if wanted != "auto":
            return wanted
        source = self.sources.validation
        labelled = not isinstance(source, pipeline.PairSource) or any(
            record.label is not None for record in source.records
        )
        return "dice" if labelled else "loss"

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
            if int(start.step) < self.steps:
                scores = self._train(start, kept, record)
            best = kept.best_step() if self.metric else kept.latest_step()
            like = state.to_tree(start)
            tree = kept.restore(like, step=best).state
        return state.averaged(state.from_tree(tree)), scores, self.steps

    def _start(
        self, kept: runs.RunCheckpoints, before: Variables | None, *, resume: bool
    ) -> tuple[state.TrainState, Mapping[str, Any]]:
        """Returns the state to go on from, and the record of its checkpoint."""
        seed = jax.random.key(self.experiment.train.seed)
        going_on = resume and kept.latest_step() is not None
        # What a run started from need not be there any more when it goes on.
        variables = (
            jax.tree.map(np.asarray, self.model.init(seed))
            if going_on
            else initial_variables(self.experiment, self.model, before, self.say)
        )
        fresh = state.start(
            variables, self.optimizer, seed, ema=self.experiment.train.ema > 0
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
            step.StepConfig(train.accumulate, self.replicas, train.ema, layout.axis),
        )
        last: dict[str, float] = {}
        validate = make_validation(experiment, self.sources, self.model)

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
                blame=make_blame(experiment, self.sources, self.model),
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
      data: a sentence about each manifest.
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

    The data need not be there: what their manifests would give is made up.

    Args:
      experiment: what to try.
      small: longest axis of the small grid.

    Raises:
      UserError: settings or data do not fit together.
    """
    for _, changed in experiment_lib.stages(experiment):
        optimizer.make_optimizer(changed.optimizer, 1)
    last = experiment_lib.stages(experiment)[-1][1]
    shape = last.loading.shape
    factor = min(1.0, small / max(shape))
    grid = tuple(max(8, round(n * factor)) for n in shape)
    grid = (grid[0], grid[1], grid[2])
    # What is quickly found comes before what takes minutes.
    data = tuple(_data_sentences(experiment))
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
    native = experiment_lib.override(last, [("model.form", "native")])
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


def _data_sentences(experiment: Experiment):
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
