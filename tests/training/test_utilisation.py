"""Peaks by the names that JAX gives devices, and counts of arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from jaxreg.training import utilisation


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("Tesla T4", 65),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("cpu", None),
        ("TPU v5 litepod", None),
        ("NVIDIA A10G", None),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_peaks_are_those_of_the_device_or_of_none(kind, tera):
    assert utilisation.peak_flops(kind) == (None if tera is None else tera * 1e12)


def test_a_product_counts_two_operations_a_term():
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((16, 32), (32, 8))]
    found = utilisation.counted_flops(lambda: jax.jit(jnp.matmul).lower(*shapes))
    assert found == 2 * 16 * 32 * 8


def test_nothing_is_counted_without_a_cpu(monkeypatch):
    def none(*_, **__):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    assert utilisation.counted_flops(lambda: pytest.fail("lowered")) is None
