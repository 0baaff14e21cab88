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
import json
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxreg.data import pair_source
from jaxreg.data.manifest.records import Record
from jaxreg.errors import UserError
from jaxreg.experiments import config, folder, warm_start
from jaxreg.experiments import files as files_lib
from jaxreg.experiments import stage as stage_lib
from jaxreg.experiments.config import Experiment
from jaxreg.experiments.datasets import (
    Sources,
    TaskRule,
    seen_orientation,
    stored_orientations,
)
from jaxreg.experiments.stage import StageRun
from jaxreg.experiments.warm_start import Report
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.models.sam import TrainedSam
from jaxreg.training import parallel
from jaxreg.typing import Variables
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo
from jaxreg.xla import compilation_cache


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
def run(
    experiment: Experiment,
    out: pathlib.Path,
    *,
    resume: bool = False,
    report: Report = print,
) -> Outcome:
    """Trains all stages of an experiment.

    Args:
      experiment: what to do.
      out: the folder of the run.
      resume: go on where a run in `out` ended or was killed.
      report: takes a sentence at a time for the user.

    Raises:
      UserError: settings, data, devices or the folder do not fit together, or training
        cannot go on; every checkpoint written so far is kept.
    """
    began = time.perf_counter()
    settings = [files_lib.to_dict(experiment), str(out), resume]
    if not parallel.same_everywhere(json.dumps(settings, sort_keys=True)):
        raise UserError(
            "the processes were started with different settings; give each the same "
            "command but for --process"
        )
    # All before the folder: a mistake in the last stage must not leave half a run.
    started_with = folder.recorded_tasks(out)
    if started_with is None:
        started_with = warm_start.tasks_of_start(experiment)
    sam = warm_start.sam_of(experiment, out)
    stage_runs: list[stage_lib.StageRun] = []
    for stage, changed in config.stages(experiment):
        before = stage_runs[-1].sources.bank if stage_runs else started_with
        # New is what the weights of the run's start do not know, in every stage.
        known = before if experiment.train.start is None else started_with
        own = sam if registry.correlates_sam(changed.model) else None
        stage_runs.append(
            stage_lib.StageRun(changed, stage, out, report, before, known, own)
        )
    orientation = _orientation(experiment, stage_runs, out, report)
    if not (out / folder.SETTINGS).is_file():
        if resume:
            report(f"there is no run in {out} to resume, so it starts anew")
        first = stage_runs[0]
        if experiment.train.start or first.sam:
            warm_start.initial_variables(
                first.experiment,
                first.model,
                None,
                lambda _: None,
                first.sources.bank,
                started_with,
                first.sam,
            )
    records = {
        folder.SCANS: _scans_of(stage_runs),
        folder.START_TASKS: list(started_with),
        folder.VALIDATION_SCANS: _scans_of_start(experiment, out),
        folder.ORIENTATION: [orientation] if orientation else [],
    }
    folder.open_folder(experiment, out, records, resume=resume)
    if sam is not None and jax.process_index() == 0 and not (out / folder.SAM).is_dir():
        bundle_lib.save_bundle(out / folder.SAM, warm_start.bundle_of_sam(sam))
    variables: Variables | None = None
    scores: Mapping[str, float] = {}
    steps = 0
    for trainer in stage_runs:
        report(f"stage {trainer.stage.name}: {trainer.stage.epochs} epochs")
        variables, scores, steps = trainer.run(variables, resume=resume)
    weights = out / "weights"
    if jax.process_index() == 0:
        assert variables is not None  # an experiment has a stage
        last = stage_runs[-1]
        bundle = bundle_of(last.experiment, variables, last.sources, last.sam)
        chosen_on = {
            *folder.read_lines(out / folder.VALIDATION_SCANS),
            *validation_scans(stage_runs),
        }
        bundle_lib.save_bundle(weights, _with_validation_scans(bundle, chosen_on))
    parallel.barrier("weights written")
    return Outcome(weights, scores, steps, time.perf_counter() - began)


def _orientation(
    experiment: Experiment,
    stage_runs: Sequence["StageRun"],
    out: pathlib.Path,
    report: Report,
) -> str | None:
    """Makes all stages see scans in one orientation; returns which.

    A run that goes on keeps to its own. One of an older jaxreg saw scans as stored.
    """
    spl = experiment.loading.axes == "spl"  # turned anyhow: no header need be read
    stored = {} if spl else stored_orientations(one.sources for one in stage_runs)
    if (out / folder.SETTINGS).is_file():
        text = "".join(folder.read_lines(out / folder.ORIENTATION))
        only = next(iter(stored)) if len(stored) == 1 else None
        found, why = None if spl else text or only, ""
    else:
        start = experiment.train.start
        said = None if start is None else load.load(start).orientation
        found, why = seen_orientation(experiment, stored, said)
    if why:
        report(why)
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
) -> bundle_lib.Bundle:
    """Returns trained weights as they are stored.

    Args:
      experiment: as it was during the last stage.
      variables: of the network.
      sources: with the names of prompts or regions, for networks that know tasks.
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


def _scans_of(stage_runs: Sequence["StageRun"]) -> list[str]:
    """Returns a line for each scan of each stage: their order decides the pairs."""
    found = []
    for trainer in stage_runs:
        for source in (trainer.sources.train, trainer.sources.validation):
            if isinstance(source, pair_source.PairSource):
                found += [line_of(trainer.stage.name, r) for r in source.records]
    return found


def _with_validation_scans(
    bundle: bundle_lib.Bundle, scans: Collection[str]
) -> bundle_lib.Bundle:
    """Returns the weights with what chose them, for `data.pair_list` to warn of."""
    if not scans:
        return bundle
    preprocessing = {**bundle.preprocessing, zoo.VALIDATION_SCANS: sorted(scans)}
    return dataclasses.replace(bundle, preprocessing=preprocessing)


def _scans_of_start(experiment: Experiment, out: pathlib.Path) -> list[str]:
    """Returns on which scans the weights to start a new run from were chosen."""
    start = experiment.train.start
    if start is None or (out / folder.SETTINGS).is_file():
        return []
    return sorted(load.load(start).validation_scans)


def validation_scans(stage_runs: Sequence["StageRun"]) -> list[str]:
    """Returns the scans of the subjects whose scores choose the weights of a stage.

    They are named as `files.scan_name` does. All scans of such a subject count, even
    one that was in no validation pair.
    """
    found: set[str] = set()
    for trainer in stage_runs:
        source = trainer.sources.validation
        if trainer.metric is None or not isinstance(source, pair_source.PairSource):
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
    text = ", ".join(f"{name} {value}" for name, value in values.items() if value)
    return f"{stage}: {text}"
