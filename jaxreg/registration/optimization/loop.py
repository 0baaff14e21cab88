"""The loop of instance optimisation, and what it returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxreg.space.grid import Shape
from jaxreg.space.transform import Transform
from jaxreg.typing import Key

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with (step from 1, steps in all, parts of the objective)."""
LEVEL = "level"
"""Name, in a history, of the number of the loop that each step belongs to."""


@dataclasses.dataclass(frozen=True)
class Optimized:
    """A pair's transforms and how they came about.

    Attributes:
      forward: fixed to moving points, unit.
      backward: moving to fixed points, unit.
      history: parts of the objective per step, by name; the last entry belongs to the
        result. Empty without optimisation.
      start: name of what it started from, where there was a choice.
      similarity: name of the measure, where there was a choice.
      doubts: what was warned about, a sentence each.
    """

    forward: Transform
    backward: Transform
    history: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    start: str = ""
    similarity: str = ""
    doubts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """Passes a step on to the user's function.

    Attributes:
      progress: the user's function.
      total: steps of all loops of the optimisation.
      done: those of the loops before this one.
    """

    progress: Progress
    total: int
    done: int = 0

    def after(self, steps: int) -> "Report":
        """Returns the report of the loop after one of so many steps."""
        return dataclasses.replace(self, done=self.done + steps)

    def __call__(self, step: int, parts: Mapping[str, Any]) -> None:
        """Reports a step, counted from 0 in its loop."""
        numbers = {name: float(value) for name, value in parts.items()}
        self.progress(self.done + step + 1, self.total, numbers)


def repeat(
    step: Callable[[Any, int], tuple[Any, dict[str, jax.Array], Any]],
    state: Any,
    steps: int,
    report: Report | None = None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Repeats a compiled step, the last time for its result alone.

    The loop runs on the host: from a compiled one, only a callback could tell of steps,
    and no program with a callback is kept in the cache of compiled programs.

    Args:
      step: (state, index) to (next state, parts of the objective, result), of which
        parts and result belong to the state that was given.
      state: the first one.
      steps: number of updates.
      report: told of every update.

    Returns:
      (result, history): the last result, and the parts by name, steps + 1.
    """
    recorded, parts, result = [], {}, None
    for index in range(steps + 1):
        before = parts
        result = None  # a second one would take its memory beside the next
        state, parts, result = step(state, index)
        # One step behind, so that the device has work while the host waits and tells.
        if index > 0:
            recorded.append(jax.device_get(before))
            if report is not None:
                report(index - 1, recorded[-1])
    recorded.append(jax.device_get(parts))
    return result, {name: np.stack([p[name] for p in recorded]) for name in parts}


def draw_noise(key: Key, step, shape: Shape, given):
    """Returns a step's jitter, N D H W 3: given, or drawn."""
    if given is not None:
        return given[step]
    return jax.random.normal(jax.random.fold_in(key, step), (1, *shape, 3))
