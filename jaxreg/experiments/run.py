"""A training run: from an experiment to trained weights.

OUT/experiment.json   the settings
OUT/scans.txt         what manifests listed when the run was started
OUT/start_tasks.txt   names of the prompts in the bank that it started from
OUT/validation_scans.txt   scans on which the weights it started from were chosen
OUT/orientation.txt   how the network sees scans, see `datasets.seen_orientation`
OUT/sam/              the SAM network whose embeddings a UniReg correlates
OUT/STAGE/            log.csv, TensorBoard events, checkpoints/, profile/ of each stage
OUT/weights/          the last stage's best weights, for `jaxreg register`
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxreg.data import pair_source
from jaxreg.errors import UserError
from jaxreg.experiments import config, folder, warm_start
from jaxreg.experiments import files as files_lib
from jaxreg.experiments.config import Experiment
from jaxreg.experiments.datasets import Sources, TaskRule
from jaxreg.experiments.orientation import seen_orientation, stored_orientations
from jaxreg.experiments.stage import PairStage
from jaxreg.experiments.warm_start import Read
from jaxreg.io import files
from jaxreg.models.sam import TrainedSam
from jaxreg.training import parallel, profiling
from jaxreg.training import stage as stage_lib
from jaxreg.training.stage import Report, StagePlan
from jaxreg.typing import Variables
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo
from jaxreg.xla import compilation_cache


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A training run whose settings, data and devices fit together.

    Attributes:
      records: lines of text by name of file, for the run's folder.
      stages: return the plan of each, one after the other; at least one.
      bundle_of: variables of the last stage to weights as they are stored.
      sam: the SAM network that the run keeps a copy of, None for none.
    """

    records: Mapping[str, Sequence[str]]
    stages: Sequence[Callable[[], StagePlan]]
    bundle_of: Callable[[Variables], bundle_lib.Bundle]
    sam: bundle_lib.Bundle | None = None


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


@compilation_cache.kept()
def train(
    experiment: Any,
    out: pathlib.Path,
    plan_of: Callable[..., RunPlan],
    *,
    resume: bool,
    report: Report,
    profile: int | None = None,
) -> Outcome:
    """Trains all stages of an experiment.

    Args:
      experiment: an `Experiment` or a `SamExperiment`.
      out: the folder of the run.
      plan_of: (experiment, out, report, begun=whether `out` holds a run) to the plan;
        checks what can be checked.
      resume: go on where a run in `out` ended or was killed.
      report: takes a sentence at a time for the user.
      profile: so many steps of each stage that is trained are traced, see
        `training.profiling`; None for none.

    Raises:
      UserError: settings, data, devices or the folder do not fit together, or training
        cannot go on; every checkpoint written so far is kept.
    """
    began = time.perf_counter()
    settings = [files_lib.to_dict(experiment), str(out), resume]
    if not parallel.same_everywhere(json.dumps(settings, sort_keys=True)):
        raise UserError(
            "the processes were started with different settings; give each the same "
            "command but for `process`"
        )
    begun = folder.begun_everywhere(out)
    # All before the folder: a mistake in the last stage must not leave half a run.
    plan = plan_of(experiment, out, report, begun=begun)
    first, *others = plan.stages
    stage = first()
    if profile is not None:
        profiling.check(profile, stage.job.steps)
    if not begun:
        if resume:
            report(f"there is no run in {out} to resume, so it starts anew")
        started = stage.initial(None)
        stage = dataclasses.replace(stage, initial=lambda _: started)
    folder.open_folder(experiment, out, plan.records, resume=resume)
    writes = jax.process_index() == 0
    if plan.sam is not None and writes and not (out / folder.SAM).is_dir():
        bundle_lib.save_bundle(out / folder.SAM, plan.sam)
    train_stage = functools.partial(
        stage_lib.run, resume=resume, report=report, profile=profile
    )
    variables, scores = train_stage(stage, None)
    for following in others:
        stage = following()
        variables, scores = train_stage(stage, variables)
    weights = out / "weights"
    if writes:
        bundle_lib.save_bundle(weights, plan.bundle_of(variables))
    parallel.barrier("weights written")
    seconds = time.perf_counter() - began
    return Outcome(weights, scores, stage.job.steps, seconds)


def run(
    experiment: Experiment,
    out: pathlib.Path,
    *,
    resume: bool = False,
    report: Report = print,
    profile: int | None = None,
) -> Outcome:
    """Trains all stages of an experiment; see `train`."""
    return train(experiment, out, _plan, resume=resume, report=report, profile=profile)


def _plan(
    experiment: Experiment, out: pathlib.Path, report: Report, *, begun: bool
) -> RunPlan:
    """Returns the checked stages of an experiment."""
    read = functools.cache(load.load)
    start, chosen_before = experiment.train.start, []
    if begun:
        # What it started from need not be there any more.
        started_with = tuple(folder.read_lines(out / folder.START_TASKS))
    else:
        started_with = warm_start.names_of_start(experiment, read)
        if start is not None:
            chosen_before = sorted(read(start).validation_scans)
    stored_in = out if begun else None
    sam = warm_start.sam_of(experiment, stored_in, read)
    stages: list[PairStage] = []
    for stage, changed in config.stages(experiment):
        before = stages[-1].sources.bank if stages else started_with
        # New is what the weights of the run's start do not know, in every stage.
        known = before if start is None else started_with
        own = sam if changed.model.needs_sam else None
        stages.append(PairStage(changed, stage, out, before, known, own, read))
    orientation = _orientation(experiment, stages, stored_in, report, read)

    def bundle(variables: Variables) -> bundle_lib.Bundle:
        last = stages[-1]
        weights = bundle_of(last.experiment, variables, last.sources, last.sam)
        # Evaluation warns of the scans that chose the weights.
        chosen_on = {
            *folder.read_lines(out / folder.VALIDATION_SCANS),
            *validation_scans(stages),
        }
        if not chosen_on:
            return weights
        rule = {**weights.preprocessing, zoo.VALIDATION_SCANS: sorted(chosen_on)}
        return dataclasses.replace(weights, preprocessing=rule)

    records = {
        folder.SCANS: _scans_of(stages),
        folder.START_TASKS: list(started_with),
        folder.VALIDATION_SCANS: chosen_before,
        folder.ORIENTATION: [orientation] if orientation else [],
    }
    kept_sam = None if sam is None else warm_start.bundle_of_sam(sam)
    return RunPlan(records, [stage.plan for stage in stages], bundle, kept_sam)


def _orientation(
    experiment: Experiment,
    stages: Sequence[PairStage],
    stored_in: pathlib.Path | None,
    report: Report,
    read: Read,
) -> str | None:
    """Sets the orientation in which all stages see scans; returns it.

    A resumed run, whose folder is `stored_in`, keeps its own. One of an older jaxreg
    saw scans as stored.
    """
    spl = experiment.loading.axes == "spl"  # turned anyhow: no header need be read
    stored = {} if spl else stored_orientations(one.sources for one in stages)
    if stored_in is not None:
        text = "".join(folder.read_lines(stored_in / folder.ORIENTATION))
        only = next(iter(stored)) if len(stored) == 1 else None
        found, why = None if spl else text or only, ""
    else:
        start = experiment.train.start
        meant = None if start is None else read(start).orientation
        found, why = seen_orientation(experiment, stored, meant)
    if why:
        report(why)
    for one in stages:
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
) -> bundle_lib.Bundle:
    """Returns trained weights as they are stored.

    Args:
      experiment: as it was during the last stage.
      variables: of the network.
      sources: with the names of prompts or regions, for conditioned networks.
      sam: the network that the variables hold for a UniReg's embeddings.
    """
    loading, model = experiment.loading, experiment.model
    named: dict[str, Any] = {}
    if model.names_entry is not None:
        assert sources is not None  # the caller's promise
        rules: Sequence[TaskRule] = sources.rules
        # One for each prompt, whose data need not be there.
        if model.conditioning == "prompts":
            of_row = dict(zip(sources.rows, sources.rules, strict=False))
            rules = [of_row.get(row, TaskRule()) for row in range(len(sources.bank))]
        named = {
            "tasks": list(sources.tasks),
            model.names_entry: list(sources.bank),
            "task_rules": [dataclasses.asdict(rule) for rule in rules],
        }
    if sam is not None:
        named["sam"] = zoo.sam_rule(sam)
    compared = {rule.similarity_window for rule in sources.rules} if sources else {None}
    if len(compared) == 1 and (window := compared.pop()):
        named["similarity_window"] = list(window)
    if sources is not None and sources.orientation is not None:
        named["orientation"] = sources.orientation
    return bundle_lib.Bundle(
        variables=jax.tree.map(np.asarray, variables),
        model=model.kind,
        config=dataclasses.asdict(model),
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


def _scans_of(stages: Sequence[PairStage]) -> list[str]:
    """Returns a line for each scan of each stage: their order decides the pairs."""
    found = []
    for one in stages:
        for source in (one.sources.train, one.sources.validation):
            if isinstance(source, pair_source.PairSource):
                found += [folder.line_of(one.stage.name, r) for r in source.records]
    return found


def validation_scans(stages: Sequence[PairStage]) -> list[str]:
    """Returns the scans of the subjects whose scores choose the weights of a stage.

    They are named as `files.scan_name` does. All scans of such a subject count, even
    one that was in no validation pair.
    """
    found: set[str] = set()
    for one in stages:
        source = one.sources.validation
        if one.metric is None or not isinstance(source, pair_source.PairSource):
            continue
        plans = map(source.plan, range(one.sources.validation_count))
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
