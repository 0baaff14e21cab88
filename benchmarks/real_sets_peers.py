"""antspyx and picsl_greedy in their own environment, at real_sets.py's request.

Needs neither jaxreg nor JAX. The settings come with the job, from
jaxreg.evaluation.baselines.
"""

import importlib.metadata
import inspect
import io
import time
from typing import Any

from real_sets_process import serve


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job's call and returns its seconds and the package's version."""
    run, package = {"ants": (_ants, "antspyx"), "greedy": (_greedy, "picsl_greedy")}[
        job["tool"]
    ]
    seconds = run(job)
    return {"seconds": seconds, "version": importlib.metadata.version(package)}


def _ants(job: dict[str, Any]) -> float:
    import ants

    settings = job["settings"]
    if "random_seed" not in inspect.signature(ants.registration).parameters:
        settings.pop("random_seed")
    settings["reg_iterations"] = tuple(settings["reg_iterations"])
    scans = {name: ants.image_read(settings.pop(name)) for name in ("fixed", "moving")}
    start = time.perf_counter()
    ants.registration(**scans, **settings)
    return time.perf_counter() - start


def _greedy(job: dict[str, Any]) -> float:
    import picsl_greedy

    greedy = picsl_greedy.Greedy3D()
    start = time.perf_counter()
    greedy.execute(job["command"], out=io.StringIO())
    return time.perf_counter() - start


if __name__ == "__main__":
    serve(answer)
