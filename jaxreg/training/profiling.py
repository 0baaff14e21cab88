"""A profile of some steps of a run, written by `jax.profiler`.

FOLDER/plugins/profile/TIME/*.xplane.pb       for TensorBoard's profile plugin (xprof)
FOLDER/plugins/profile/TIME/*.trace.json.gz   the same for ui.perfetto.dev
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax

from jaxreg.errors import UserError

FOLDER = "profile"
WARM_UP = 3
"""Steps before the first that is traced: one that compiles, and some that fill caches
and the queue of batches."""


def check(steps: int, left: int) -> None:
    """Checks that a stage has as many steps as are to be traced.

    Args:
      steps: to be traced.
      left: of the stage.

    Raises:
      UserError: there are none to be traced, or fewer in the stage.
    """
    if steps < 1:
        raise UserError(
            f"`profile` is {steps}, expected the number of steps, 1 or more"
        )
    if left < WARM_UP + steps:
        raise UserError(
            f"`profile` is {steps}, but of the {left} steps to train the first "
            f"{WARM_UP} are not traced; give at most {left - WARM_UP}, or train longer"
            if left > WARM_UP
            else f"`profile` is {steps}, but there are only {left} steps to train, of "
            f"which the first {WARM_UP} are not traced; train longer"
        )


@dataclasses.dataclass
class Profile:
    """Traces the steps after the first few.

    Attributes:
      folder: to write into; made when there is something to write.
      steps: to be traced.
    """

    folder: pathlib.Path
    steps: int

    def __post_init__(self):
        """Begins to count."""
        self._seen, self._tracing = 0, False

    @contextlib.contextmanager
    def step(
        self, number: int, settle: Callable[[], object], note: Callable[[str], None]
    ) -> Iterator[None]:
        """Goes around all that the host does for a step.

        Args:
          number: of the step, by which the viewers group what they show.
          settle: waits until the devices have done what they were given.
          note: told where the trace is, once it is there.
        """
        self._seen += 1
        if self._seen == WARM_UP + 1:
            settle()
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True
        if not self._tracing:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if self._seen == WARM_UP + self.steps:
            settle()
            self.close()
            note(f"wrote a profile of {self.steps} steps to {self.folder}")

    def close(self) -> None:
        """Writes what was traced, if the run ends earlier; may be called again."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
