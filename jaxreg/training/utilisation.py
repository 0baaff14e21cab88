"""How much of a device's arithmetic a training run uses: model FLOPs utilisation.

The arithmetic of the step in plain convolutions, over what all devices could do in the
same time at their fastest, in matrix products of 16 bits. What is computed twice
(rematerialisation), or in zeros that padding or a platform's form of a convolution
adds, counts as time lost and not as work. Filters and resizing count as the whole
matrices that they are applied as: for a forward pass of uniGradICON 1.17 times what it
needs at 175^3 and 1.5 times at 48^3, see `benchmarks/counting.py`.

References:
  Chowdhery et al., PaLM: Scaling language modeling with pathways, JMLR 2023, app. B.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

_PEAK_FLOPS = (
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"(Tesla |NVIDIA )?T4", 65e12),
    (r"NVIDIA A100\b.*", 312e12),
    # The SXM boards; of the others each has a number of its own.
    (r"NVIDIA H(100 80GB HBM3|200)", 989e12),
    (r"NVIDIA H100 PCIe", 756e12),
)
"""Operations a second in bfloat16 (T4: float16) without sparsity, by `device_kind`, as
the makers state them."""


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's floating-point operations a second; None if not known."""
    for pattern, peak in _PEAK_FLOPS:
        if re.fullmatch(pattern, device_kind):
            return peak
    return None


def plain(model: Any) -> Any:
    """Returns a network's settings in the form whose arithmetic is counted.

    Native convolutions, since XLA counts the body of a loop over slabs only once, and
    nothing that is computed twice to save memory.

    Args:
      model: a dataclass with `form`, and perhaps `remat`, whose default does so least.
    """
    usual = {field.name: field.default for field in dataclasses.fields(model)}
    changes = {"form": "native"} | {n: usual[n] for n in ("remat",) if n in usual}
    return dataclasses.replace(model, **changes)


def counted_flops(lower: Callable[[], jax.stages.Lowered]) -> float | None:
    """Returns the arithmetic of a program as XLA counts it before it optimises.

    Args:
      lower: traces and lowers it. It is counted for the CPU whatever the device: TPU
        and GPU do not count what is not compiled. The body of a loop counts once.

    Returns:
      Floating-point operations; None where JAX has been told of no CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        cost = lower().cost_analysis() or {}
    return float(cost["flops"]) if "flops" in cost else None
