"""A stage of training: start or resume, the loop, the best variables.

FOLDER/log.csv        one row a step, and TensorBoard events; see `training.logging`
FOLDER/checkpoints/   from which a stopped stage is resumed; see `training.checkpoints`
FOLDER/profile/       a trace of some steps, where one is asked for; see `profiling`
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from jaxreg.data.batches import Batches
from jaxreg.data.loading import Loading
from jaxreg.data.pair_source import PairSource, ReadyPairs
from jaxreg.errors import UserError
from jaxreg.training import checkpoints, loop, parallel, profiling
from jaxreg.training import state as state_lib
from jaxreg.training.logging import RunLog
from jaxreg.training.state import TrainState
from jaxreg.typing import Key, Variables

Report = Callable[[str], None]
"""Takes a sentence at a time for the user."""


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage of training is made of; nothing is compiled or read yet.

    Attributes:
      title: a sentence for the user before the stage begins, "" for none.
      folder: of its log and checkpoints.
      source: of the batches.
      loading: how they are read.
      job: what the loop does.
      optimizer: the update rule.
      key: root key of the steps.
      ema: whether a moving average of the variables is kept.
      config: when to log, validate and save.
      fresh: returns variables of the right structure, for a stage that is resumed.
      initial: variables of the stage before, or None, to those to start with, and
        sentences about them for the user.
    """

    title: str
    folder: pathlib.Path
    source: PairSource | ReadyPairs
    loading: Loading
    job: loop.Job
    optimizer: optax.GradientTransformation
    key: Key
    ema: bool
    config: loop.LoopConfig
    fresh: Callable[[], Variables]
    initial: Callable[[Variables | None], tuple[Variables, Sequence[str]]]


def run(
    plan: StagePlan,
    before: Variables | None,
    *,
    resume: bool,
    report: Report,
    profile: int | None = None,
) -> tuple[Variables, Mapping[str, float]]:
    """Returns the best variables, and the scores of the last validation.

    Args:
      plan: of the stage.
      before: variables of the stage before, None for the first.
      resume: go on from the last checkpoint, if there is one.
      report: takes a sentence at a time for the user.
      profile: so many steps are traced, by the first process; None for none.

    Raises:
      UserError: there is no good checkpoint to resume, or training cannot go on.
    """
    if plan.title:
        report(plan.title)
    job = plan.job
    with checkpoints.RunCheckpoints(
        plan.folder / "checkpoints",
        keep_latest=plan.config.keep_latest,
        keep_best=plan.config.keep_best,
        metric=job.metric,
        larger_is_better=job.metric == "dice",
    ) as kept:
        resumes = resume and kept.latest_step() is not None
        # What a run started from need not be there any more when it is resumed.
        variables, news = (plan.fresh(), ()) if resumes else plan.initial(before)
        for sentence in news:
            report(sentence)
        start = state_lib.start(variables, plan.optimizer, plan.key, ema=plan.ema)
        frozen, record = state_lib.frozen(variables), {}
        if resumes:
            restored = kept.restore(state_lib.to_tree(start))
            for sentence in restored.skipped:
                report(sentence)
            report(f"resumed at step {restored.step} of {job.steps}")
            start = state_lib.from_tree(restored.state, frozen)
            record = restored.record
        scores = record.get("scores", {})
        # A run may have been stopped in its last validation.
        if int(start.step) < job.steps or (job.validate is not None and not scores):
            traced = None
            if profile is not None and jax.process_index() == 0:
                traced = _profile(plan, int(start.step), profile, report)
            scores = _train(plan, start, kept, record, traced)
        best = kept.restore(state_lib.to_tree(start), best=True)
    for sentence in best.skipped:
        report(sentence)
    if best.skipped:
        report(f"the weights are those of step {best.step} of {job.steps}")
    return state_lib.averaged(state_lib.from_tree(best.state, frozen)), scores


def _train(
    plan: StagePlan,
    start: TrainState,
    kept: checkpoints.RunCheckpoints,
    resumed: Mapping[str, Any],
    profile: profiling.Profile | None,
) -> Mapping[str, float]:
    """Trains to the end of the stage; returns the last validation's scores."""
    first, process = int(start.step), jax.process_index()
    job, validate, scores = plan.job, plan.job.validate, {}

    def scoring(variables: Variables) -> loop.Validation:
        assert validate is not None
        found = validate(variables)
        scores.clear()
        scores.update(found.scores)
        return found

    if validate is not None:
        job = dataclasses.replace(job, validate=scoring)
    with (
        Batches(
            plan.source,
            plan.loading,
            batch_size=job.batch_size,
            process_index=process,
            process_count=jax.process_count(),
            start=first,
            stop=job.steps,
        ) as batches,
        RunLog(plan.folder, start_step=first, enabled=process == 0) as log,
    ):
        placed = parallel.place_state(start, job.layout)
        loop.run(placed, job, plan.config, batches, log, kept, resumed, profile)
    return scores


def _profile(
    plan: StagePlan, first: int, steps: int, report: Report
) -> profiling.Profile | None:
    """Returns what traces a stage from its step `first` on, if it has the steps."""
    try:
        profiling.check(steps, plan.job.steps - first)
    except UserError as error:
        # A later stage, or the rest of one: too late to stop the run.
        report(f"no profile of {plan.folder.name}: {error}")
        return None
    return profiling.Profile(plan.folder / profiling.FOLDER, steps)
