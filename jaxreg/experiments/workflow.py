"""The workflow of a training run: checks, folder, stages, weights."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax

from jaxreg.errors import UserError
from jaxreg.experiments import files as files_lib
from jaxreg.experiments import folder
from jaxreg.experiments.config import Experiment
from jaxreg.experiments.sam_config import SamExperiment
from jaxreg.training import parallel
from jaxreg.training import stage as stage_lib
from jaxreg.training.stage import Report, StagePlan
from jaxreg.typing import Variables
from jaxreg.weights import bundle as bundle_lib
from jaxreg.xla import compilation_cache

AnyExperiment = TypeVar("AnyExperiment", Experiment, SamExperiment)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A training run whose settings, data and devices fit together.

    Attributes:
      records: lines of text by name of file, for the run's folder.
      stages: one after the other.
      bundle_of: variables of the last stage to weights as they are stored.
      sam: the SAM network that the run keeps a copy of, None for none.
    """

    records: Mapping[str, Sequence[str]]
    stages: Sequence[StagePlan]
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
    experiment: AnyExperiment,
    out: pathlib.Path,
    plan_of: Callable[[AnyExperiment, pathlib.Path, Report], RunPlan],
    *,
    resume: bool,
    report: Report,
) -> Outcome:
    """Trains all stages of an experiment.

    Args:
      experiment: what to do.
      out: the folder of the run.
      plan_of: (experiment, out, report) to the plan; checks what can be checked.
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
    plan = plan_of(experiment, out, report)
    first, *others = plan.stages
    if not folder.holds_run(out):
        if resume:
            report(f"there is no run in {out} to resume, so it starts anew")
        first = _with_initial(first)
    folder.open_folder(experiment, out, plan.records, resume=resume)
    writes = jax.process_index() == 0
    if plan.sam is not None and writes and not (out / folder.SAM).is_dir():
        bundle_lib.save_bundle(out / folder.SAM, plan.sam)
    variables: Variables | None = None
    scores: Mapping[str, float] = {}
    for stage in (first, *others):
        variables, scores = stage_lib.run(
            stage, variables, resume=resume, report=report
        )
    weights = out / "weights"
    if writes:
        assert variables is not None  # an experiment has a stage
        bundle_lib.save_bundle(weights, plan.bundle_of(variables))
    parallel.barrier("weights written")
    seconds = time.perf_counter() - began
    return Outcome(weights, scores, plan.stages[-1].steps, seconds)


def _with_initial(stage: StagePlan) -> StagePlan:
    """Returns the stage with its first variables at hand; it reports on them later."""
    sentences: list[str] = []
    variables = stage.initial(None, sentences.append)

    def initial(_: Variables | None, report: Report) -> Variables:
        for sentence in sentences:
            report(sentence)
        return variables

    return dataclasses.replace(stage, initial=initial)
