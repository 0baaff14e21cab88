"""A stage of training: start or resume, the loop, the best variables.

FOLDER/log.csv        one row a step, and TensorBoard events; see `training.logging`
FOLDER/checkpoints/   from which a stopped stage is resumed; see `training.checkpoints`
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxreg.data.batches import Batches
from jaxreg.data.loading import Loading
from jaxreg.data.pair_source import PairSource, ReadyPairs
from jaxreg.training import checkpoints, parallel
from jaxreg.training import loop as loop_lib
from jaxreg.training import state as state_lib
from jaxreg.training.logging import RunLog
from jaxreg.training.loop import FindBadPairs, LoopConfig, Validation
from jaxreg.training.parallel import Layout
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
      layout: the devices.
      batch: elements of a global batch.
      steps: of the stage.
      steps_per_epoch: of them.
      optimizer: the update rule.
      learning_rate: as a function of the step, for the log.
      key: root key of the steps.
      ema: whether a moving average of the variables is kept.
      loop: when to log, validate and save.
      metric: the score by which a checkpoint is best, None for the latest.
      record: stored in each checkpoint with the state.
      validates: whether there is anything to validate on.
      fresh: returns variables of the right structure, for a stage that is resumed.
      initial: (variables of the stage before or None, report) to the first variables.
      make_step: returns the step, compiled by `parallel.compile_step`.
      make_validation: returns what scores variables; None where nothing validates.
      make_find_bad_pairs: returns what finds those of a batch with a non-finite loss.
    """

    title: str
    folder: pathlib.Path
    source: PairSource | ReadyPairs
    loading: Loading
    layout: Layout
    batch: int
    steps: int
    steps_per_epoch: int
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    key: Key
    ema: bool
    loop: LoopConfig
    metric: str | None
    record: Mapping[str, Any]
    validates: bool
    fresh: Callable[[], Variables]
    initial: Callable[[Variables | None, Report], Variables]
    make_step: Callable[[], Callable]
    make_validation: Callable[[], Callable[[Variables], Validation] | None]
    make_find_bad_pairs: Callable[[], FindBadPairs]


def run(
    plan: StagePlan, before: Variables | None, *, resume: bool, report: Report
) -> tuple[Variables, Mapping[str, float]]:
    """Returns the best variables, and the scores of the last validation.

    Args:
      plan: of the stage.
      before: variables of the stage before, None for the first.
      resume: go on from the last checkpoint, if there is one.
      report: takes a sentence at a time for the user.

    Raises:
      UserError: there is no good checkpoint to resume, or training cannot go on.
    """
    if plan.title:
        report(plan.title)
    with checkpoints.RunCheckpoints(
        plan.folder / "checkpoints",
        keep_latest=plan.loop.keep_latest,
        keep_best=plan.loop.keep_best,
        metric=plan.metric,
        larger_is_better=plan.metric == "dice",
    ) as kept:
        resumes = resume and kept.latest_step() is not None
        # What a run started from need not be there any more when it is resumed.
        variables = plan.fresh() if resumes else plan.initial(before, report)
        start = state_lib.start(variables, plan.optimizer, plan.key, ema=plan.ema)
        frozen, record = state_lib.frozen(variables), {}
        if resumes:
            restored = kept.restore(state_lib.to_tree(start))
            for sentence in restored.skipped:
                report(sentence)
            report(f"resumed at step {restored.step} of {plan.steps}")
            start = state_lib.from_tree(restored.state, frozen)
            record = restored.record
        scores = record.get("scores", {})
        # A run may have been stopped in its last validation.
        if int(start.step) < plan.steps or (plan.validates and not scores):
            scores = _train(plan, start, kept, record)
        best = kept.restore(state_lib.to_tree(start), best=True)
    for sentence in best.skipped:
        report(sentence)
    if best.skipped:
        report(f"the weights are those of step {best.step} of {plan.steps}")
    return state_lib.averaged(state_lib.from_tree(best.state, frozen)), scores


def _train(
    plan: StagePlan,
    start: TrainState,
    kept: checkpoints.RunCheckpoints,
    resumed: Mapping[str, Any],
) -> Mapping[str, float]:
    """Trains to the end of the stage; returns the last validation's scores."""
    first, process = int(start.step), jax.process_index()
    scores: dict[str, float] = {}
    validate = plan.make_validation()

    def scoring(variables: Variables) -> Validation:
        assert validate is not None
        found = validate(variables)
        scores.clear()
        scores.update(found.scores)
        return found

    with (
        Batches(
            plan.source,
            plan.loading,
            batch_size=plan.batch,
            process_index=process,
            process_count=jax.process_count(),
            start=first,
            stop=plan.steps,
        ) as batches,
        RunLog(plan.folder, start_step=first, enabled=process == 0) as log,
    ):
        job = loop_lib.Job(
            step=plan.make_step(),
            layout=plan.layout,
            batches=batches,
            batch_size=plan.batch,
            steps=plan.steps,
            steps_per_epoch=plan.steps_per_epoch,
            learning_rate=plan.learning_rate,
            validate=None if validate is None else scoring,
            find_bad_pairs=plan.make_find_bad_pairs(),
            checkpoints=kept,
            log=log,
            record=plan.record,
            metric=plan.metric,
            resumed=resumed,
        )
        loop_lib.run(parallel.place_state(start, plan.layout), job, plan.loop)
    return scores
