"""antspyx and picsl_greedy in their own environment, at real_sets.py's request.

Needs neither jaxreg nor JAX. The settings come with the job, from
jaxreg.evaluation.baselines.
"""

import importlib.metadata
import inspect
import io
import time
from collections.abc import Callable
from typing import Any

from real_sets_process import serve


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job's call; returns its seconds, the processors' and the version."""
    run, package = {"ants": (_ants, "antspyx"), "greedy": (_greedy, "picsl_greedy")}[
        job["tool"]
    ]
    seconds, cpu_seconds = run(job)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "version": importlib.metadata.version(package),
    }


def _ants(job: dict[str, Any]) -> tuple[float, float]:
    import ants

    settings = job["settings"]
    if "random_seed" not in inspect.signature(ants.registration).parameters:
        settings.pop("random_seed")
    settings["reg_iterations"] = tuple(settings["reg_iterations"])
    scans = {name: ants.image_read(settings.pop(name)) for name in ("fixed", "moving")}
    return _timed(lambda: ants.registration(**scans, **settings))


def _greedy(job: dict[str, Any]) -> tuple[float, float]:
    import picsl_greedy

    greedy = picsl_greedy.Greedy3D()
    return _timed(lambda: greedy.execute(job["command"], out=io.StringIO()))


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds of a call, by the clock and of all processors."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    serve(answer)
