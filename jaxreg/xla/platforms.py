"""Forms of a computation for one platform each, and which of them are traced."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

# Of the key by which JAX finds what it has traced before.
_traced_for = jax.make_user_context(None)


def dependent(
    *args: Any, default: Callable[..., Any], **by_platform: Callable[..., Any]
) -> Any:
    """Applies the function of the platform that a program is compiled for.

    As `jax.lax.platform_dependent`, which traces and differentiates the functions of
    all platforms and leaves the choice to the compiler. A process that has CPUs alone
    traces the CPU's: most of the time of a first step there.

    Args:
      *args: trees of arrays.
      default: the function for platforms that are not named.
      **by_platform: functions by name of platform: "cpu", "tpu", "cuda".
    """
    platform = _traced_for.value
    if platform is None and jax.default_backend() == "cpu":
        platform = "cpu"
    if platform is None or platform == "any":
        return lax.platform_dependent(*args, default=default, **by_platform)
    return by_platform.get(platform, default)(*args)


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Traces programs for a platform that this process need not have.

    For `jax.export` and for compilers without their devices.

    Args:
      platform: "cpu", "tpu", "cuda" or "rocm"; "any" leaves the choice to the compiler.
    """
    with _traced_for(platform):
        yield
