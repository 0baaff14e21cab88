"""A training run: from an experiment to trained weights.

OUT/experiment.json   the settings
OUT/scans.txt         what manifests listed when the run was started
OUT/start_tasks.txt   names of the prompts in the bank that it started from
OUT/validation_scans.txt   scans on which the weights it started from were chosen
OUT/orientation.txt   how the network sees scans, see `datasets.seen_orientation`
OUT/sam/              the SAM network whose embeddings a UniReg correlates
OUT/STAGE/            log.csv, TensorBoard events, checkpoints/ of each stage
OUT/weights/          the last stage's best weights, for `jaxreg register`
"""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from jaxreg.data import pair_source
from jaxreg.experiments import config, folder, warm_start, workflow
from jaxreg.experiments.config import Experiment
from jaxreg.experiments.datasets import (
    Sources,
    TaskRule,
    seen_orientation,
    stored_orientations,
)
from jaxreg.experiments.stage import PairStage
from jaxreg.experiments.warm_start import Read
from jaxreg.experiments.workflow import Outcome, RunPlan
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.models.sam import TrainedSam
from jaxreg.training.stage import Report
from jaxreg.typing import Variables
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo


def run(
    experiment: Experiment,
    out: pathlib.Path,
    *,
    resume: bool = False,
    report: Report = print,
) -> Outcome:
    """Trains all stages of an experiment; see `workflow.train`."""
    return workflow.train(experiment, out, _plan, resume=resume, report=report)


def _plan(experiment: Experiment, out: pathlib.Path, report: Report) -> RunPlan:
    """Returns the checked stages of an experiment."""
    read = functools.cache(load.load)
    started_with = folder.recorded_names(out)
    if started_with is None:
        started_with = warm_start.names_of_start(experiment, read)
    sam = warm_start.sam_of(experiment, out, read)
    stages: list[PairStage] = []
    for stage, changed in config.stages(experiment):
        before = stages[-1].sources.bank if stages else started_with
        # New is what the weights of the run's start do not know, in every stage.
        known = before if experiment.train.start is None else started_with
        own = sam if registry.correlates_sam(changed.model) else None
        stages.append(PairStage(changed, stage, out, before, known, own, read))
    orientation = _orientation(experiment, stages, out, report, read)

    def bundle(variables: Variables) -> bundle_lib.Bundle:
        last = stages[-1]
        weights = bundle_of(last.experiment, variables, last.sources, last.sam)
        chosen_on = {
            *folder.read_lines(out / folder.VALIDATION_SCANS),
            *validation_scans(stages),
        }
        return _with_validation_scans(weights, chosen_on)

    records = {
        folder.SCANS: _scans_of(stages),
        folder.START_TASKS: list(started_with),
        folder.VALIDATION_SCANS: _scans_of_start(experiment, out, read),
        folder.ORIENTATION: [orientation] if orientation else [],
    }
    kept_sam = None if sam is None else warm_start.bundle_of_sam(sam)
    return RunPlan(records, [stage.plan() for stage in stages], bundle, kept_sam)


def _orientation(
    experiment: Experiment,
    stages: Sequence[PairStage],
    out: pathlib.Path,
    report: Report,
    read: Read,
) -> str | None:
    """Sets the orientation in which all stages see scans; returns it.

    A resumed run keeps its own. One of an older jaxreg saw scans as stored.
    """
    spl = experiment.loading.axes == "spl"  # turned anyhow: no header need be read
    stored = {} if spl else stored_orientations(one.sources for one in stages)
    if folder.holds_run(out):
        text = "".join(folder.read_lines(out / folder.ORIENTATION))
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
    loading, kind = experiment.loading, registry.tells_tasks(experiment.model)
    named: dict[str, Any] = {}
    if kind is not None:
        assert sources is not None  # the caller's promise
        rules: Sequence[TaskRule] = sources.rules
        if kind == "tasks":  # one for each prompt, whose data need not be there
            of_row = dict(zip(sources.rows, sources.rules, strict=False))
            rules = [of_row.get(row, TaskRule()) for row in range(len(sources.bank))]
        named = {
            "tasks": list(sources.tasks),
            kind: list(sources.bank),
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
        model=registry.name_of(experiment.model),
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


def _scans_of(stages: Sequence[PairStage]) -> list[str]:
    """Returns a line for each scan of each stage: their order decides the pairs."""
    found = []
    for one in stages:
        for source in (one.sources.train, one.sources.validation):
            if isinstance(source, pair_source.PairSource):
                found += [folder.line_of(one.stage.name, r) for r in source.records]
    return found


def _with_validation_scans(
    bundle: bundle_lib.Bundle, scans: Collection[str]
) -> bundle_lib.Bundle:
    """Returns the weights with the scans that chose them; evaluation warns of these."""
    if not scans:
        return bundle
    preprocessing = {**bundle.preprocessing, zoo.VALIDATION_SCANS: sorted(scans)}
    return dataclasses.replace(bundle, preprocessing=preprocessing)


def _scans_of_start(experiment: Experiment, out: pathlib.Path, read: Read) -> list[str]:
    """Returns on which scans the weights to start a new run from were chosen."""
    start = experiment.train.start
    if start is None or folder.holds_run(out):
        return []
    return sorted(read(start).validation_scans)


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
