"""From an experiment to trained weights: where data, model and training loop meet.

OUT/experiment.json   the settings
OUT/scans.txt         what manifests listed when the run was started
OUT/start_tasks.txt   names of the prompts in the bank that it started from
OUT/validation_scans.txt   scans on which the weights it started from were chosen
OUT/orientation.txt   how the network sees scans, see `sources.seen_orientation`
OUT/sam/              the SAM network whose embeddings a UniReg correlates
OUT/STAGE/            log.csv, TensorBoard events, checkpoints/ of each stage
OUT/weights/          the last stage's best weights, for `jaxreg register`
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxreg import compiled, zoo
from jaxreg import experiment as experiment_lib
from jaxreg.data import pipeline
from jaxreg.data.manifest import Record
from jaxreg.errors import UserError
from jaxreg.experiment import Experiment, Stage
from jaxreg.io import checkpoints, files, runs
from jaxreg.models import kinds, unireg
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.models.sam import TrainedSam
from jaxreg.sources import (
    Sources,
    TaskRule,
    dataset_names,
    loading_of,
    loss_of,
    make_prepare,
    make_sources,
    seen_orientation,
    stored_orientations,
    with_bank,
    with_tasks,
)
from jaxreg.training import loop, optimizer, parallel, state, step
from jaxreg.training.logging import RunLog
from jaxreg.training.parallel import Layout
from jaxreg.typing import Key, Variables
from jaxreg.validation import make_blame, make_validation

Say = Callable[[str], None]
SETTINGS = "experiment.json"
SCANS = "scans.txt"
_START_TASKS = "start_tasks.txt"
_VALIDATION_SCANS = "validation_scans.txt"
_SAM = "sam"
_ORIENTATION = "orientation.txt"


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


def _weights_key(seed: int) -> Key:
    """Returns the key of fresh weights; layers tell themselves apart by their names."""
    return jax.random.split(jax.random.key(seed))[0]


def _steps_key(seed: int, number: int) -> Key:
    """Returns the root key of a stage's steps; independent of the weights' key."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)


def tasks_of_start(experiment: Experiment) -> tuple[str, ...]:
    """Returns the names of the prompts, or regions, of the weights to start from.

    Raises:
      UserError: the weights do not name them and `train.start_tasks` does not either,
        or it has another number of names.
    """
    start, names = experiment.train.start, experiment.train.start_tasks
    told = kinds.tells_tasks(experiment.model)
    if start is None or told is None:
        return ()
    loaded = zoo.load(start)
    config = kinds.config_of(loaded.bundle.model, loaded.bundle.config)
    count = kinds.names_in(config, loaded.variables)
    if not count:
        return ()
    names = names or tuple(loaded.bundle.preprocessing.get(told, ()))
    if len(set(names)) != count:
        what = "prompts" if told == "tasks" else "regions"
        raise UserError(
            f"{start} has {count} {what}, but their names are "
            f"{', '.join(names) or 'not stored with it'}; give --train.start_tasks "
            "with a name for each, in their order"
        )
    return tuple(names)


def initial_variables(
    experiment: Experiment,
    model: Any,
    before: Variables | None,
    say: Say,
    bank: Sequence[str] = (),
    known: Sequence[str] = (),
    sam: TrainedSam | None = None,
) -> Variables:
    """Returns the variables that a stage starts with.

    Args:
      experiment: with the model and, for the first stage, `train.start`.
      model: the network.
      before: of the previous stage, or None.
      say: takes a sentence about what was loaded.
      bank: names of the network's prompts or regions.
      known: those of the weights to start from.
      sam: the network for a UniReg's embeddings, see `sam_of`.

    Raises:
      UserError: the weights to start from have other sizes, nothing in common, or,
        where only prompts are trained, not all that the network needs.
    """
    train, shape = experiment.train, experiment.loading.shape
    fresh = jax.tree.map(np.asarray, model.init(_weights_key(train.seed), shape))
    if before is None and train.start is None:
        return _with_sam(fresh, sam)
    if before is not None:
        source, name = before, "the previous stage"
    else:
        assert train.start is not None
        loaded = zoo.load(train.start)
        source, name = loaded.variables, f"train.start {train.start}"
        _compare_meaning(experiment, loaded, say)
    rows = {i: known.index(task) for i, task in enumerate(bank) if task in known}
    source = state.changing(source)  # SAM joins at the end
    source = kinds.fitted(experiment.model, source, shape, fresh, rows, len(known))
    merged = runs.merge_variables(fresh, source)
    if merged.misshapen or not merged.loaded:
        wrong = ", ".join(merged.misshapen[:3]) or "no name in common"
        raise UserError(
            f"{name} does not fit the network ({wrong}); give the model's section "
            "(such as --model.channels_down or --model.channels) the sizes of the "
            "weights"
        )
    if train.only != "all" and merged.missing:
        raise UserError(
            f"train.only is {train.only}, but {name} lacks {merged.missing[0]}, which "
            "would stay untrained; start from weights of the same network, or give "
            "--train.only all"
        )
    say(
        f"started from {name}: {len(merged.loaded)} arrays loaded, "
        f"{len(merged.missing)} fresh, {len(merged.unexpected)} not used"
    )
    if known:
        new = [task for task in bank if task not in known]
        what = (
            "prompts" if kinds.tells_tasks(experiment.model) == "tasks" else "regions"
        )
        say(f"{what} kept: {', '.join(known)}; new: {', '.join(new) or 'none'}")
    return _with_sam(merged.variables, sam)


def _with_sam(variables: Variables, sam: TrainedSam | None) -> Variables:
    return variables if sam is None else unireg.with_sam(variables, sam.variables)


def sam_of(
    experiment: Experiment, out: pathlib.Path | None = None
) -> TrainedSam | None:
    """Returns the SAM network that a UniReg of the experiment correlates.

    That of the run in `out`, of `train.sam`, or of `train.start`, in this order.

    Raises:
      UserError: it is needed and there is none, or given and no stage needs it, or it
        knows voxels of another size.
    """
    stages = [during for _, during in experiment_lib.stages(experiment)]
    needing = [during for during in stages if kinds.correlates_sam(during.model)]
    named, start = experiment.train.sam, experiment.train.start
    if not needing:
        if named is not None:
            raise UserError(
                f"train.sam is {named}, but the network correlates no embeddings of "
                "SAM; leave it out, or give --model.features sam"
            )
        return None
    found = None
    if out is not None and (out / _SAM).is_dir():
        found = zoo.load_sam(out / _SAM)
    elif named is not None:
        found = zoo.load_sam(named)
    elif start is not None:
        found = zoo.sam_of(zoo.load(start))
    if found is None:
        raise UserError(
            "model.features is sam, but there are no SAM weights; give --train.sam "
            "PATH (jaxreg train --config configs/sam.py makes some), or "
            "--model.features mind"
        )
    for during in needing:
        loading = during.loading
        if loading.resize == "pad_crop" and loading.spacing_mm != found.spacing_mm:
            raise UserError(
                f"the SAM network knows voxels of {found.spacing_mm:g} mm, the network "
                f"grid has {loading.spacing_mm:g} mm; give --loading.spacing_mm "
                f"{found.spacing_mm:g}"
            )
    return found


def _bundle_of_sam(sam: TrainedSam) -> checkpoints.Bundle:
    return checkpoints.Bundle(
        variables=sam.variables,
        model=zoo.SAM,
        config=dataclasses.asdict(sam.config),
        preprocessing=zoo.sam_rule(sam),
        source="the SAM network that a training run was given",
        licence="that of the network that the run was given",
    )


def _compare_meaning(experiment: Experiment, loaded: Any, say: Say) -> None:
    """Says what makes the same weights mean something else; refuses it for frozen ones.

    Raises:
      UserError: only prompts are trained, in a network of another form.
    """
    other = kinds.unlike(experiment.model, loaded.bundle.config)
    if not other:
        return
    start = experiment.train.start
    told = ", ".join(f"{name} {value}" for name, value in other.items())
    if experiment.train.only != "all":
        options = " ".join(f"--model.{name} {value}" for name, value in other.items())
        raise UserError(
            f"{start} was trained with {told}, so its frozen part would mean something "
            f"else here; give {options}"
        )
    say(f"{start} was trained with {told}; this run differs")


@compiled.kept()
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
    started_with = _recorded_tasks(out)
    if started_with is None:
        started_with = tasks_of_start(experiment)
    sam = sam_of(experiment, out)
    stage_runs: list[_StageRun] = []
    for stage, changed in experiment_lib.stages(experiment):
        before = stage_runs[-1].sources.bank if stage_runs else started_with
        # New is what the weights of the run's start do not know, in every stage.
        known = before if experiment.train.start is None else started_with
        own = sam if kinds.correlates_sam(changed.model) else None
        stage_runs.append(_StageRun(changed, stage, out, say, before, known, own))
    orientation = _orientation(experiment, stage_runs, out, say)
    if not (out / SETTINGS).is_file():
        if resume:
            say(f"there is no run in {out} to resume, so it starts anew")
        first = stage_runs[0]
        if experiment.train.start or first.sam:
            initial_variables(
                first.experiment,
                first.model,
                None,
                lambda _: None,
                first.sources.bank,
                started_with,
                first.sam,
            )
    records = {
        SCANS: _scans_of(stage_runs),
        _START_TASKS: list(started_with),
        _VALIDATION_SCANS: _scans_of_start(experiment, out),
        _ORIENTATION: [orientation] if orientation else [],
    }
    open_folder(experiment, out, records, resume=resume)
    if sam is not None and jax.process_index() == 0 and not (out / _SAM).is_dir():
        checkpoints.save_bundle(out / _SAM, _bundle_of_sam(sam))
    variables: Variables | None = None
    scores: Mapping[str, float] = {}
    steps = 0
    for trainer in stage_runs:
        say(f"stage {trainer.stage.name}: {trainer.stage.epochs} epochs")
        variables, scores, steps = trainer.run(variables, resume=resume)
    weights = out / "weights"
    if jax.process_index() == 0:
        assert variables is not None  # an experiment has a stage
        last = stage_runs[-1]
        bundle = bundle_of(last.experiment, variables, last.sources, last.sam)
        chosen_on = {*_lines(out / _VALIDATION_SCANS), *validation_scans(stage_runs)}
        checkpoints.save_bundle(weights, _with_validation_scans(bundle, chosen_on))
    parallel.barrier("weights written")
    return Outcome(weights, scores, steps, time.perf_counter() - began)


def _orientation(
    experiment: Experiment,
    stage_runs: Sequence["_StageRun"],
    out: pathlib.Path,
    say: Say,
) -> str | None:
    """Makes all stages see scans in one orientation; returns which.

    A run that goes on keeps to its own. One of an older jaxreg saw scans as stored.
    """
    spl = experiment.loading.axes == "spl"  # turned anyhow: no header need be read
    stored = {} if spl else stored_orientations(one.sources for one in stage_runs)
    if (out / SETTINGS).is_file():
        text = "".join(_lines(out / _ORIENTATION))
        only = next(iter(stored)) if len(stored) == 1 else None
        found, why = None if spl else text or only, ""
    else:
        start = experiment.train.start
        said = None if start is None else zoo.load(start).orientation
        found, why = seen_orientation(experiment, stored, said)
    if why:
        say(why)
    for one in stage_runs:
        one.sources = dataclasses.replace(one.sources, orientation=found)
        if set(stored) - {found} and found is not None:
            loading = one.experiment.loading
            loading = dataclasses.replace(loading, orientation=found)
            one.experiment = dataclasses.replace(one.experiment, loading=loading)
    return found


def bundle_of(
    experiment: Experiment,
    variables: Variables,
    sources: Sources | None = None,
    sam: TrainedSam | None = None,
) -> checkpoints.Bundle:
    """Returns trained weights as they are stored.

    Args:
      experiment: as it was during the last stage.
      variables: of the network.
      sources: with the names of prompts or regions, for networks that know tasks.
      sam: the network that the variables hold for a UniReg's embeddings.
    """
    loading, told = experiment.loading, kinds.tells_tasks(experiment.model)
    named: dict[str, Any] = {}
    if told is not None:
        assert sources is not None  # the caller's promise
        rules: Sequence[TaskRule] = sources.rules
        if told == "tasks":  # one for each prompt, whose data need not be there
            of_row = dict(zip(sources.rows, sources.rules, strict=False))
            rules = [of_row.get(row, TaskRule()) for row in range(len(sources.bank))]
        named = {
            "tasks": list(sources.tasks),
            told: list(sources.bank),
            "task_rules": [dataclasses.asdict(rule) for rule in rules],
        }
    if sam is not None:
        named["sam"] = zoo.sam_rule(sam)
    compared = {rule.similarity_window for rule in sources.rules} if sources else {None}
    if len(compared) == 1 and (window := compared.pop()):
        named["similarity_window"] = list(window)
    if sources is not None and sources.orientation is not None:
        named["orientation"] = sources.orientation
    return checkpoints.Bundle(
        variables=jax.tree.map(np.asarray, variables),
        model=kinds.name_of(experiment.model),
        config=dataclasses.asdict(experiment.model),
        preprocessing={
            **loading.placement.to_dict(),
            "shape": list(loading.shape),
            "ct_window": list(loading.ct_window),
            "mri_quantiles": list(loading.quantile_range or (0.0, 0.99)),
            "mri_foreground": loading.foreground,
            "mask_inputs": loading.mask_inputs,
            **named,
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
                found += [line_of(trainer.stage.name, r) for r in source.records]
    return found


def _with_validation_scans(
    bundle: checkpoints.Bundle, scans: Collection[str]
) -> checkpoints.Bundle:
    """Returns the weights with what chose them, for `pair_list` to warn of."""
    if not scans:
        return bundle
    told = {**bundle.preprocessing, zoo.VALIDATION_SCANS: sorted(scans)}
    return dataclasses.replace(bundle, preprocessing=told)


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def _scans_of_start(experiment: Experiment, out: pathlib.Path) -> list[str]:
    """Returns on which scans the weights to start a new run from were chosen."""
    start = experiment.train.start
    if start is None or (out / SETTINGS).is_file():
        return []
    return sorted(zoo.load(start).validation_scans)


def validation_scans(stage_runs: Sequence["_StageRun"]) -> list[str]:
    """Returns the scans of the subjects whose scores choose the weights of a stage.

    They are named as `files.scan_name` does. All scans of such a subject count, even
    one that was in no validation pair.
    """
    found: set[str] = set()
    for trainer in stage_runs:
        source = trainer.sources.validation
        if trainer.metric is None or not isinstance(source, pipeline.PairSource):
            continue
        plans = map(source.plan, range(trainer.sources.validation_count))
        shown = [
            source.records[view.record] for p in plans for view in (p.moving, p.fixed)
        ]
        subjects = {(record.dataset, record.subject) for record in shown}
        found |= {
            files.scan_name(record.image)
            for record in source.records
            if (record.dataset, record.subject) in subjects
        }
    return sorted(found)


def line_of(stage: str, record: Record) -> str:
    """Returns what is kept of a scan, to tell whether a run goes on with the same."""
    values = dataclasses.asdict(record)
    for name, value in values.items():
        # The same scans may lie elsewhere when a run goes on.
        if isinstance(value, pathlib.Path):
            values[name] = files.scan_name(value)
    told = ", ".join(f"{name} {value}" for name, value in values.items() if value)
    return f"{stage}: {told}"


def _recorded_tasks(out: pathlib.Path) -> tuple[str, ...] | None:
    """Returns what a run in the folder started from; None if there is no run.

    What it started from need not be there any more when it goes on.
    """
    if not (out / SETTINGS).is_file():
        return None
    return tuple(_lines(out / _START_TASKS))


def _check_scans(path: pathlib.Path, scans: Sequence[str]) -> None:
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else scans
    for was, now in itertools.zip_longest(before, scans, fillvalue="nothing"):
        if was != now:
            raise UserError(
                f"the run in {path.parent} was started with other scans, the first "
                f"difference is {was} -> {now}; put the manifest back as it was, or "
                "give another --out"
            )


def open_folder(
    experiment: Any,
    out: pathlib.Path,
    records: Mapping[str, Sequence[str]],
    *,
    resume: bool,
) -> None:
    """Writes settings and lists of a new run, or compares them with an old one's.

    Args:
      experiment: any tree of settings.
      out: folder of the run.
      records: lines of text by name of file.
      resume: whether an old run goes on.

    Raises:
      UserError: the folder does not fit, or cannot be written.
    """
    problem = None
    if jax.process_index() == 0:
        problem = _folder_problem(experiment, out, records, resume=resume)
    problems = parallel.from_first_process(problem or "")
    if problems:
        raise UserError(problems)


def _folder_problem(
    experiment: Any,
    out: pathlib.Path,
    records: Mapping[str, Sequence[str]],
    *,
    resume: bool,
) -> str | None:
    settings = out / SETTINGS
    try:
        if settings.is_file():
            if not resume:
                return (
                    f"--out {out} holds a run already; pass --resume to go on with it, "
                    "or give another folder"
                )
            experiment_lib.check_same(settings, experiment)
            _check_scans(out / SCANS, records[SCANS])
            return None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            return f"--out {out} exists and holds no run; give another folder"
        out.mkdir(parents=True, exist_ok=True)
        experiment_lib.write(settings, experiment)
        for name, lines in records.items():
            if lines:
                with files.atomic_path(out / name) as temporary:
                    text = "\n".join(lines) + "\n"
                    pathlib.Path(temporary).write_text(text, encoding="utf-8")
    except OSError as error:
        return f"--out {out} cannot be written ({error.strerror}); give another folder"
    except UserError as error:
        return str(error)
    return None


def trained_rows(
    experiment: Experiment, sources: Sources, known: Sequence[str], *, first: bool
) -> tuple[int, ...]:
    """Returns the prompts that change where `train.only` restricts training.

    Args:
      experiment: as it is during the stage.
      sources: with their bank.
      known: tasks of the bank that training starts from.
      first: whether no stage came before.

    Raises:
      UserError: the network has no bank, nothing to start from, or no prompt to change.
    """
    only, start = experiment.train.only, experiment.train.start
    if not isinstance(experiment.model, PromptRegConfig):
        raise UserError(
            f"train.only is {only}, but the network has no prompt bank; give "
            "--train.only all, or a PromptReg model"
        )
    if first and start is None:
        raise UserError(
            f"train.only is {only}, but there are no weights to start from and the "
            "rest would stay untrained; give --train.start"
        )
    if only == "prompts":
        return tuple(sorted(set(sources.rows)))
    rows = tuple(i for i, name in enumerate(sources.bank) if name not in known)
    if not rows:
        raise UserError(
            "train.only is new_prompts, but the weights to start from know all tasks "
            f"already ({', '.join(sources.tasks)}); add a dataset, or give "
            "--train.only prompts"
        )
    return rows


def shared_out(experiment: Experiment) -> tuple[int, Layout, tuple[int, int]]:
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


def make_optimizer(
    experiment: Experiment,
    steps: int,
    per_epoch: int,
    rows: tuple[int, ...] | None = None,
) -> optax.GradientTransformation:
    """Returns the update rule of a stage.

    Args:
      experiment: as it is during the stage.
      steps: of the stage.
      per_epoch: of them.
      rows: the prompts that alone change, see `trained_rows`; None for all parameters.
    """
    rule = optimizer.make_optimizer(experiment.optimizer, steps, per_epoch)
    if rows is None:
        return rule
    return optimizer.only(rule, functools.partial(kinds.prompt_mask, rows=rows))


def make_step(
    experiment: Experiment,
    sources: Sources,
    rule: optax.GradientTransformation,
    layout: Layout,
    shares: tuple[int, int],
) -> Callable:
    """Returns ``step(state, batch) -> (state, parts)`` of a stage, for its devices.

    Args:
      experiment: as it is during the stage, with its network, see `with_tasks`.
      sources: of its pairs.
      rule: of `make_optimizer`.
      layout: its devices.
      shares: replicas, see `parallel.check_batch`.
    """
    train, (replicas, span) = experiment.train, shares
    train_step = step.make_train_step(
        kinds.build(experiment.model),
        loss_of(experiment),
        rule,
        make_prepare(experiment, sources, layout),
        step.StepConfig(train.accumulate, replicas, train.ema, layout.axis, span),
    )
    return parallel.compile_step(train_step, layout)


def metric_of(experiment: Experiment, sources: Sources) -> str | None:
    """Returns the score by which a checkpoint is best; None if the last one is."""
    wanted, source = experiment.loop.metric, sources.validation
    if wanted == "last":
        return None
    if source is None:
        if wanted != "auto":
            raise UserError(
                f"loop.metric is {wanted}, but no pair validates; give validation "
                "images or --loop.metric auto, which then takes the last checkpoint"
            )
        return None
    having = _labelled_datasets(sources)
    labelled = any(having.values())
    if wanted == "dice" and not labelled:
        raise UserError(
            "loop.metric is dice, but no validation pair has label maps of both "
            "images; add the column label or give --loop.metric loss"
        )
    chosen = ("dice" if labelled else "loss") if wanted == "auto" else wanted
    if chosen == "dice" and not all(having.values()):
        without = ", ".join(name for name, has in having.items() if not has)
        warnings.warn(
            "the best weights are those of the best mean Dice over datasets, in which "
            f"{without} has no say: no validation pair there has label maps of both "
            "images; add them, or give --loop.metric loss",
            stacklevel=2,
        )
    return chosen


def _labelled_datasets(sources: Sources) -> dict[str, bool]:
    """Returns whether a dataset that validates has a pair with both label maps."""
    source, names = sources.validation, dataset_names(sources)
    if not isinstance(source, pipeline.PairSource):
        return dict.fromkeys(names, True)
    found: dict[str, bool] = {}
    for plan in map(source.plan, range(sources.validation_count)):
        both = (source.records[view.record].label for view in (plan.moving, plan.fixed))
        name = names[plan.task]
        found[name] = all(both) or found.get(name, False)
    return found


class _StageRun:
    """One stage: builds what the loop needs, runs it, and reads the best state back."""

    def __init__(
        self,
        experiment: Experiment,
        stage: Stage,
        out: pathlib.Path,
        say: Say,
        before: Sequence[str],
        known: Sequence[str],
        sam: TrainedSam | None,
    ):
        self.stage, self.say, self.before, self.sam = stage, say, before, sam
        self.out = out / stage.name
        self.number = experiment.stages.index(stage)
        kinds.check_grid(experiment.model, experiment.loading.shape)
        found = make_sources(experiment, number=self.number)
        self.sources = with_bank(found, before, experiment.model)
        experiment = with_tasks(experiment, self.sources)
        if sam is not None:
            model = kinds.with_sam_window(experiment.model, sam.ct_window)
            experiment = dataclasses.replace(experiment, model=model)
        self.experiment, self.model = experiment, kinds.build(experiment.model)
        self.per_epoch, self.layout, shares = shared_out(experiment)
        self.shares = shares
        self.steps = self.per_epoch * stage.epochs
        self.learning_rate = optimizer.make_schedule(
            experiment.optimizer, self.steps, self.per_epoch
        )
        rows = None
        if experiment.train.only != "all":
            rows = trained_rows(experiment, self.sources, known, first=self.number == 0)
        self.optimizer = make_optimizer(experiment, self.steps, self.per_epoch, rows)
        self.metric = metric_of(experiment, self.sources)

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
        held = state.frozen(start.variables)
        best = state.from_tree(found.state, held)
        return state.averaged(best), scores, self.steps

    def _start(
        self, kept: runs.RunCheckpoints, before: Variables | None, *, resume: bool
    ) -> tuple[state.TrainState, Mapping[str, Any]]:
        """Returns the state to go on from, and the record of its checkpoint."""
        seed, shape = self.experiment.train.seed, self.experiment.loading.shape
        going_on = resume and kept.latest_step() is not None
        # What a run started from need not be there any more when it goes on.
        variables = (
            _with_sam(
                jax.tree.map(np.asarray, self.model.init(_weights_key(seed), shape)),
                self.sam,
            )
            if going_on
            else initial_variables(
                self.experiment,
                self.model,
                before,
                self.say,
                self.sources.bank,
                self.before,
                self.sam,
            )
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
        held = state.frozen(variables)
        return state.from_tree(restored.state, held), restored.record

    def _train(
        self,
        start: state.TrainState,
        kept: runs.RunCheckpoints,
        resumed: Mapping[str, Any],
    ) -> Mapping[str, float]:
        """Trains to the end of the stage; returns the last validation's scores."""
        experiment, layout = self.experiment, self.layout
        train, first = experiment.train, int(start.step)
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
                step=make_step(
                    experiment, self.sources, self.optimizer, layout, self.shares
                ),
                layout=layout,
                batches=batches,
                batch_size=train.batch,
                steps=self.steps,
                steps_per_epoch=self.per_epoch,
                learning_rate=self.learning_rate,
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
