"""One function of several by platform: what is traced, and what a compiler chooses."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxreg.xla import platforms


def program(traced: list[str]):
    """A new function that notes which of its forms are traced."""

    def form(name, value):
        def function(x):
            traced.append(name)
            return x * value

        return function

    def run(x):
        return platforms.dependent(
            x, cpu=form("cpu", 2.0), tpu=form("tpu", 3.0), default=form("others", 5.0)
        )

    return jax.jit(run)


@pytest.mark.parametrize("device", ["cpu", jax.local_devices(backend="cpu")[0]])
def test_the_form_of_the_default_device_is_traced(device):
    traced = []
    run = program(traced)
    with jax.default_device(device):
        assert run(jnp.float32(1.0)) == 2.0
        assert jax.grad(run)(jnp.float32(1.0)) == 2.0
    assert set(traced) == {"cpu"}


@pytest.mark.parametrize(("backend", "factor"), [("tpu", 3.0), ("gpu", 5.0)])
def test_without_one_it_is_that_of_the_process(backend, factor, monkeypatch):
    # Each form runs anywhere.
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert program([])(jnp.float32(1.0)) == factor


@pytest.mark.parametrize(
    ("platform", "form", "factor"),
    [("tpu", "tpu", "3.0"), ("cuda", "others", "5.0"), ("cpu", "cpu", "2.0")],
)
def test_a_program_can_be_traced_for_a_platform_that_is_not_there(
    platform, form, factor
):
    traced = []
    run = program(traced)
    run(jnp.float32(1.0))  # what was traced before is not taken for the other
    traced.clear()
    with platforms.tracing_for(platform):
        found = export.export(run, platforms=[platform])(jnp.float32(1.0))
    assert set(traced) == {form}
    assert f"dense<{float(factor):.6e}>" in found.mlir_module()


def test_the_choice_can_be_left_to_the_compiler():
    traced = []
    run = program(traced)
    with platforms.tracing_for("any"):
        found = export.export(run, platforms=["cpu", "tpu"])(jnp.float32(1.0))
        assert run(jnp.float32(1.0)) == 2.0
    assert set(traced) == {"cpu", "tpu", "others"}
    assert "stablehlo.case" in found.mlir_module()
