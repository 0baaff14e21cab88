"""jaxreg in a process of its own, at real_sets.py's request."""

import functools
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import jax
from real_sets_process import serve

import jaxreg
from jaxreg.data.pair_list import PairSpec
from jaxreg.io import transforms
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import rows
from jaxreg.registration.options import Options
from jaxreg.weights import load

_COMPILING = "/jax/core/compile/"
_spent: list[tuple[float, float]] = []  # start and end; one lies within another


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Registers a job's pair, writes the transform, and returns seconds."""
    scans = {name: pathlib.Path(job["pair"].pop(name)) for name in ("fixed", "moving")}
    spec = PairSpec(**scans, **job["pair"])
    model = None if job["weights"] is None else _loaded(job["weights"])
    options = rows.options_of(spec, Options(**job["options"]), model)
    fixed, moving = (jaxreg.read_volume(path) for path in (spec.fixed, spec.moving))
    _spent.clear()
    start, cpu = time.perf_counter(), time.process_time()
    found = pair_lib.register(moving, fixed, model, options)
    whole, cpu = time.perf_counter() - start, time.process_time() - cpu
    # What `register` measures of its result is no part of finding it.
    whole -= found.seconds.get("score", 0.0)
    transforms.write_transform(job["transform_out"], found.transform, fixed.grid)
    compiling = covered(_spent)
    return {
        "seconds": max(0.0, whole - compiling),
        "compile_seconds": compiling,
        "cpu_seconds": cpu,
        "version": jaxreg.__version__,
    }


_loaded = functools.lru_cache(maxsize=1)(load.load)


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith(_COMPILING):
        now = time.perf_counter()
        _spent.append((now - duration_secs, now))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns how much of a line spans cover that may overlap."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    jax.monitoring.register_event_duration_secs_listener(_listen)
    serve(answer)
