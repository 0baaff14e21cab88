"""The training loop: batches in; checkpoints, logs and trained variables out.

Everything that a step computes is in `training.step`; this is the host's side. A run
that was killed and resumed goes through the same states as one that was not: the state
holds the step and the key, and the data are a function of the number of batches.
"""

import collections
import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxreg.errors import UserError
from jaxreg.training import parallel, utilisation
from jaxreg.training import state as state_lib
from jaxreg.training.checkpoints import RunCheckpoints
from jaxreg.training.logging import RunLog, device_memory
from jaxreg.training.parallel import Layout
from jaxreg.training.profiling import Profile
from jaxreg.training.state import TrainState
from jaxreg.typing import Variables


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When to write what.

    Attributes:
      log_every: steps between rows of the log.
      validate_every: epochs between validations, 0 for the end only.
      image_every: epochs between pictures, 0 for none; where validation happens.
      checkpoint_every: steps between checkpoints, 0 for one each epoch.
      keep_latest: checkpoints kept for resuming.
      keep_best: checkpoints kept for their validation score.
      metric: of validation, by which a checkpoint is best: "dice" (larger is better) or
        "loss"; "auto" takes Dice where there are labels, "last" the last checkpoint.
    """

    log_every: int = 10
    validate_every: int = 10
    image_every: int = 10
    checkpoint_every: int = 0
    keep_latest: int = 2
    keep_best: int = 1
    metric: str = "auto"

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a number is out of its range, or the metric unknown.
        """
        for name, least in (("log_every", 1), ("keep_latest", 1), ("keep_best", 0),
                            ("validate_every", 0), ("image_every", 0),
                            ("checkpoint_every", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(
                    f"loop.{name} is {getattr(self, name)}, expected at least {least}"
                )
        if self.metric not in ("auto", "dice", "loss", "last"):
            raise UserError(
                f'loop.metric is "{self.metric}", expected auto, dice, loss or last'
            )


FindBadPairs = Callable[[Variables, Mapping[str, np.ndarray]], list[int]]
"""(variables, batch) to the positions of pairs that alone give no finite loss."""

_SHOWN = ("dice", "loss", "folding_percent")
_OF_DATASET = ("dice", "loss")


class Batches(Protocol):
    """Where batches come from: `batches.Batches` or one like it."""

    waited_s: float

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Returns this process' share of the next global batch."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Returns what to keep in a checkpoint."""
        ...

    def named(self, index: int) -> str:
        """Names pair `index` for a message."""
        ...


@dataclasses.dataclass(frozen=True)
class Validation:
    """What one validation found.

    Attributes:
      scores: by name, means over datasets.
      images: by name, D H W, of the first pair.
      datasets: scores of each dataset's pairs, by its name.
    """

    scores: Mapping[str, float]
    images: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    datasets: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """What the loop does.

    Attributes:
      step: compiled by `parallel.compile_step`.
      layout: where it runs.
      batch_size: pairs of a global batch.
      steps: of the whole stage.
      steps_per_epoch: for what happens once an epoch.
      learning_rate: as a function of the step, for the log.
      validate: variables to scores, or None.
      find_bad_pairs: see `FindBadPairs`.
      record: stored in each checkpoint with the state.
      metric: the score by which a checkpoint is best; None: the latest is.
      flops: returns the floating-point operations that a step needs, None if not known;
        called where the devices' peak is known, see `utilisation`.
    """

    step: Callable
    layout: Layout
    batch_size: int
    steps: int
    steps_per_epoch: int
    learning_rate: Callable[[int], Any]
    validate: Callable[[Variables], Validation] | None
    find_bad_pairs: FindBadPairs
    record: Mapping[str, Any]
    metric: str | None = None
    flops: Callable[[], float | None] = lambda: None


def run(
    state: TrainState,
    job: Job,
    config: LoopConfig,
    batches: Batches,
    log: RunLog,
    checkpoints: RunCheckpoints | None = None,
    resumed: Mapping[str, Any] = MappingProxyType({}),
    profile: Profile | None = None,
) -> TrainState:
    """Trains from a state to the end of the stage; returns the last state, placed.

    Ctrl-C, SIGTERM and data that cannot be read keep a checkpoint of the last complete
    step before they are raised; where several processes train, that cannot be agreed
    on, and the last regular checkpoint counts.

    Args:
      state: placed by `parallel.place_state`; its buffers are reused.
      job: what to do.
      config: when to write what.
      batches: positioned at the state's step.
      log: where numbers go.
      checkpoints: where states are kept, or None.
      resumed: the record of the checkpoint that the state comes from.
      profile: traces some of the steps, or None.

    Raises:
      UserError: the loss or its gradient is not finite (names the pair), data cannot be
        read, or a checkpoint cannot be written.
      KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    loop = _Loop(state, job, config, batches, log, checkpoints, resumed, profile)
    with _sigterm_as_interrupt():
        return loop.run()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Turns SIGTERM, by which batch systems end a job, into a KeyboardInterrupt."""
    mine = (
        threading.current_thread() is threading.main_thread()
        # Several processes have JAX's own handler, and nothing to save in it.
        and jax.process_count() == 1
        # One that Python does not know could not be put back.
        and signal.getsignal(signal.SIGTERM) is not None
    )
    if not mine:
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass
class _Meter:
    """Sums the numbers of the steps since the last row of the log.

    Attributes:
      began: when the clock read so, in seconds.
      waited: seconds waited for data until then.
      steps: how many are in the sums.
      untimed: how many of these were done before a kill, on another clock.
      sums: by name.
    """

    began: float
    waited: float
    steps: int = 0
    untimed: int = 0
    sums: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def add(self, parts: Mapping[str, float]) -> None:
        self.steps += 1
        self.sums.update(parts)


@dataclasses.dataclass
class _Loop:
    """One run of the loop; it owns the state, whose buffers each step reuses."""

    state: TrainState
    job: Job
    config: LoopConfig
    batches: Batches
    log: RunLog
    checkpoints: RunCheckpoints | None
    resumed: Mapping[str, Any]
    profile: Profile | None

    def __post_init__(self):
        self.done = int(parallel.fetch_state(self.state.step, self.job.layout))
        self.pending: collections.deque = collections.deque()
        self.least_step_s = _least_step_s(self.job)
        self.meter = self._new_meter()
        # The next row is the mean of all its steps, those before the kill too.
        before = self.resumed.get("unlogged", {"steps": 0, "sums": {}})
        self.meter.steps = self.meter.untimed = before["steps"]
        self.meter.sums.update(before["sums"])
        # What a run starts or goes on from need not be saved again.
        self.saved = self.done

    def run(self) -> TrainState:
        job = self.job
        if self.done == 0:
            # What there is to improve on, and a trial of the validation data.
            self._validate()
        elif self._validation_due() and not self.resumed.get("scores"):
            self._make_up_validation()
        try:
            while self.done < job.steps:
                with self._traced():
                    self._step()
        except KeyboardInterrupt:
            self._keep()
            raise
        finally:
            if self.profile is not None:
                self.profile.close()
        self._drain()
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return self.state

    def _traced(self) -> contextlib.AbstractContextManager[None]:
        if self.profile is None:
            return contextlib.nullcontext()
        # The state of then, not of now: a step reuses the buffers of the last.
        return self.profile.step(
            self.done + 1, lambda: jax.block_until_ready(self.state), self.log.note
        )

    def _step(self) -> None:
        """Takes one step, and does what is due after it."""
        job = self.job
        batch = self._next_batch()
        placed = parallel.place_batch(batch, job.layout)
        self.state, parts = job.step(self.state, placed)
        self.done += 1
        self.pending.append((self.done, parts, batch))
        # One step behind, so that the device never waits for the host.
        if len(self.pending) > 1:
            self._account(*self.pending.popleft())
        self._after_step()

    def _next_batch(self) -> Mapping[str, np.ndarray]:
        try:
            return next(self.batches)
        except UserError as error:
            if not self._keep():
                raise
            raise UserError(
                f"{error}. The checkpoint of step {self.done} is good; mend this, then "
                "resume"
            ) from error

    def _keep(self) -> bool:
        """Saves the last complete step of a run that ends early; returns if it did."""
        job = self.job
        if self.checkpoints is None or jax.process_count() > 1:
            return False
        # An interrupt may have come between a step and its count.
        self.done = int(parallel.fetch_state(self.state.step, job.layout))
        self._save({})
        self.checkpoints.wait()
        return self.done in self.checkpoints.steps()

    def _after_step(self) -> None:
        job, every = self.job, self.config.checkpoint_every
        scores = self._validate() if self._validation_due() else {}
        due = self.done % (every or job.steps_per_epoch) == 0
        if due or self.done == job.steps or scores:
            self._save(scores)

    def _validation_due(self) -> bool:
        """Whether the latest step is to be validated."""
        job, every = self.job, self.config.validate_every
        if job.validate is None:
            return False
        between = bool(every) and self.done % (every * job.steps_per_epoch) == 0
        return between or self.done == job.steps

    def _make_up_validation(self) -> None:
        """Scores the step that a run was stopped after, before it was scored."""
        scores = self._validate()
        if self.checkpoints is not None:
            self.checkpoints.amend(
                self.done,
                {**self.resumed, "scores": dict(scores)},
                metrics=self._metrics(scores),
            )

    def _new_meter(self) -> _Meter:
        return _Meter(time.perf_counter(), self.batches.waited_s)

    def _account(self, step: int, parts: Any, batch: Mapping[str, np.ndarray]) -> None:
        numbers = parallel.fetch_parts(parts, self.job.layout)
        if not numbers.pop("finite"):
            self._stop(step, numbers, batch)
        self.meter.add(numbers)
        if step % self.config.log_every == 0 or step == self.job.steps:
            self._write(step)

    def _write(self, step: int) -> None:
        job, meter = self.job, self.meter
        seconds = max(time.perf_counter() - meter.began, 1e-9)
        row = {name: total / meter.steps for name, total in meter.sums.items()}
        row["learning_rate"] = float(job.learning_rate(step - 1))
        row["epoch"] = step / job.steps_per_epoch
        timed = meter.steps - meter.untimed
        row["pairs_per_s"] = timed * job.batch_size / seconds
        row["data_wait_share"] = (self.batches.waited_s - meter.waited) / seconds
        if self.least_step_s is not None:
            row["model_flops_utilisation"] = timed * self.least_step_s / seconds
        memory = device_memory()
        if memory is not None:
            row["device_memory_gb"] = memory.in_use / 1e9
            row["device_memory_peak_gb"] = memory.peak / 1e9
        self.log.scalars(step, row)
        self.log.progress(step, job.steps, row)
        self.meter = self._new_meter()

    def _drain(self) -> None:
        while self.pending:
            self._account(*self.pending.popleft())

    def _variables(self) -> Variables:
        used = state_lib.averaged(self.state)
        return jax.device_get(parallel.fetch_state(used, self.job.layout))

    def _validate(self) -> Mapping[str, float]:
        self._drain()
        job, every = self.job, self.config.image_every
        if job.validate is None:
            return {}
        began = time.perf_counter()
        found = job.validate(self._variables())
        row = {f"validation_{k}": v for k, v in found.scores.items()}
        for dataset, scores in found.datasets.items():
            own = [name for name in _OF_DATASET if name in scores]
            row |= {f"val/{dataset}/{name}": scores[name] for name in own}
        self.log.scalars(self.done, row)
        shown = [f"{n} {found.scores[n]:.4f}" for n in _SHOWN if n in found.scores]
        shown += _each_dataset(found)
        self.log.note(f"step {self.done} validation: {', '.join(shown)}")
        epoch = self.done // job.steps_per_epoch
        if every and (self.done == job.steps or epoch % every == 0):
            self.log.images(self.done, found.images)
        # What validation took is no part of the training's rate.
        self.meter.began += time.perf_counter() - began
        return found.scores

    def _metrics(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Returns the score by which a checkpoint is best, where there is one."""
        name = self.job.metric
        if name is None or name not in scores:
            return {}
        return {name: float(scores[name])}

    def _save(self, scores: Mapping[str, float]) -> None:
        # A state is only kept once its numbers have been seen to be finite.
        self._drain()
        job = self.job
        if self.checkpoints is None or self.saved == self.done:
            return
        one = parallel.fetch_state(self.state, job.layout)
        data = {**self.batches.state(), "batches": self.done}
        unlogged = {"steps": self.meter.steps, "sums": dict(self.meter.sums)}
        record = {
            **job.record, "data": data, "scores": dict(scores), "unlogged": unlogged
        }  # fmt: skip
        # Before it is: interrupted within, it is not to be tried a second time.
        self.saved = self.done
        self.checkpoints.save(
            self.done, state_lib.to_tree(one), record, metrics=self._metrics(scores)
        )

    def _stop(self, step: int, numbers: Mapping[str, float], batch) -> None:
        """Raises an error that names the pairs with a non-finite loss."""
        job = self.job
        used = parallel.fetch_state(self.state.variables, job.layout)
        at_fault = job.find_bad_pairs(jax.device_get(used), batch)
        indices = np.asarray(batch["index"])
        suspects = at_fault or range(len(indices))
        names = "; ".join(self.batches.named(int(indices[i])) for i in suspects)
        what = "pair" if at_fault else "one of the batch's pairs, none of them alone"
        kept = None
        if self.checkpoints is not None:
            # One that is still being written counts; if it fails, those before do.
            with contextlib.suppress(UserError):
                self.checkpoints.wait()
            kept = self.checkpoints.latest_step()
        mend = (
            "look at these files, or start anew with a lower optimizer.learning_rate"
            if at_fault
            else "start anew with a lower optimizer.learning_rate or optimizer.clip"
        )
        raise UserError(
            f"at step {step} the loss is {numbers['loss']:g} and its gradient "
            f"{numbers['gradient_norm']:g}, caused by {what}: {names}; {mend}. "
            + (
                "No checkpoint had been written"
                if kept is None
                else f"The checkpoint of step {kept} is good"
            )
        )


def _least_step_s(job: Job) -> float | None:
    """Returns the seconds of a step at the devices' peak; None if it is not known."""
    devices = job.layout.data * job.layout.space
    peak = utilisation.peak_flops(jax.local_devices()[0].device_kind)
    flops = None if peak is None else job.flops()
    return None if peak is None or flops is None else flops / (devices * peak)


def _each_dataset(found: Validation) -> list[str]:
    """Returns what is shown of each of several datasets: Dice, loss without labels."""
    if len(found.datasets) < 2:
        return []
    return [
        f"{dataset} {name} {scores[name]:.4f}"
        for dataset, scores in found.datasets.items()
        for name in [n for n in _OF_DATASET if n in scores][:1]
    ]


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Returns the sum of every process' array, on all of them."""
    if jax.process_count() == 1:
        return values
    gathered = multihost_utils.process_allgather(values[None], tiled=True)
    return np.asarray(gathered).sum(0)
