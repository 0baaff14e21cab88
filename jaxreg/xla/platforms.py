"""Forms of a computation for one platform each, and which of them are traced."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

# Of the key by which JAX finds what it has traced before, as its default device is.
_traced_for = jax.make_user_context(None)


def dependent(
    *args: Any, default: Callable[..., Any], **by_platform: Callable[..., Any]
) -> Any:
    """Applies the function of the platform that a program is traced for.

    `jax.lax.platform_dependent` traces and differentiates the functions of all
    platforms, and leaves the choice to the compiler: most of the time before a first
    step. Here that of JAX's default device alone is traced, see `tracing_for`. A
    program that runs on another device of the process has the same numbers.

    Args:
      *args: trees of arrays.
      default: the function for platforms that are not named.
      **by_platform: functions by name of platform: "cpu", "tpu".
    """
    platform = traced()
    if platform == "any":
        return lax.platform_dependent(*args, default=default, **by_platform)
    return by_platform.get(platform, default)(*args)


def traced() -> str:
    """Returns the platform that programs are traced for; "any", see `tracing_for`."""
    return _traced_for.value or _default()


def _default() -> str:
    device = jax.config.jax_default_device  # pyright: ignore
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Traces programs for a platform that this process need not have.

    For `jax.export` and for compilers without their devices.

    Args:
      platform: "cpu", "tpu", "cuda" or "rocm"; "any" leaves the choice to the compiler.
    """
    with _traced_for(platform):
        yield
