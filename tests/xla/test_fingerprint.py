"""Functions of one digest do the same: whatever changes a program changes it."""

import dataclasses
import functools
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.nn import layers, unet
from jaxreg.space import fields, sampling
from jaxreg.training import step
from jaxreg.xla import fingerprint
from jaxreg.xla.fingerprint import UnknownKindError

HALF = 0.5


def add(x):
    return x + HALF


def subtract(x):
    return x - HALF


def scaled(factor):
    def scale(x):
        return factor * add(x)

    return scale


class Halving:
    def __call__(self, x):
        return HALF * x


def a_step(**objective):
    return step.make_step(
        GradIconConfig((2, 4), (4,), 1, 0).build(),
        Objective(**objective),
        optax.adam(1),
    )


@pytest.mark.parametrize(
    "one, other",
    [
        (add, subtract),
        (scaled(2.0), scaled(3.0)),
        (scaled(2), scaled(2.0)),
        (scaled(np.float32(2)), scaled(np.float64(2))),
        (scaled(np.zeros((2, 3))), scaled(np.zeros((3, 2)))),
        (scaled(jnp.arange(2)), scaled(jnp.arange(2) + 1)),
        (scaled(jax.random.key(1)), scaled(jax.random.key(2))),
        (scaled({"a": 1, "b": 2}), scaled({"b": 1, "a": 2})),
        (scaled(frozenset("ab")), scaled(frozenset("ac"))),
        (functools.partial(add, 1), functools.partial(add, 2)),
        (jax.jit(add), jax.jit(subtract)),
        (optax.adam(0.1).update, optax.adam(0.2).update),
        (lambda x: x[1:], lambda x: x[2:]),
        (lambda x: (lambda: x + 1)(), lambda x: (lambda: x + 2)()),
        (a_step(), a_step(similarity="mse")),
    ],
)
def test_what_differs_has_another_digest(one, other):
    assert fingerprint.fingerprint(one) == fingerprint.fingerprint(one)
    assert fingerprint.fingerprint(one) != fingerprint.fingerprint(other)


def test_equal_settings_built_twice_have_one_digest():
    assert fingerprint.fingerprint(a_step()) == fingerprint.fingerprint(a_step())
    assert fingerprint.fingerprint(scaled((1, "a"))) == fingerprint.fingerprint(
        scaled((1, "a"))
    )


@pytest.mark.parametrize(
    "module, name, value",
    [
        (unet, "_NORM_EPSILON", 1e-4),
        (layers, "leaky", lambda x, slope=0.01: x),
        (fields, "warp", lambda image, points: image),
        (sampling, "sample", lambda *_, **__: None),
    ],
)
def test_what_is_replaced_at_run_time_counts(monkeypatch, module, name, value):
    """A configuration is Python, and may put its own in place of ours."""
    before = fingerprint.fingerprint(a_step())
    monkeypatch.setattr(module, name, value)
    assert fingerprint.fingerprint(a_step()) != before


def test_a_method_replaced_counts(monkeypatch):
    halving = Halving()
    before = fingerprint.fingerprint(halving)
    monkeypatch.setattr(Halving, "__call__", lambda self, x: x)
    assert fingerprint.fingerprint(halving) != before


def test_code_that_a_value_of_the_module_reaches_counts(monkeypatch):
    before = fingerprint.fingerprint(scaled(2.0))
    monkeypatch.setitem(globals(), "HALF", 0.25)
    assert fingerprint.fingerprint(scaled(2.0)) != before


@pytest.mark.parametrize("name", ["jax", "jaxlib", "flax", "optax", "numpy"])
def test_the_versions_of_libraries_count(monkeypatch, name):
    fingerprint._versions.cache_clear()
    before = fingerprint.fingerprint(add)
    version = fingerprint.importlib.metadata.version
    monkeypatch.setattr(
        fingerprint.importlib.metadata,
        "version",
        lambda wanted: version(wanted) + "1" * (wanted == name),
    )
    fingerprint._versions.cache_clear()
    assert fingerprint.fingerprint(add) != before
    monkeypatch.undo()
    fingerprint._versions.cache_clear()
    assert fingerprint.fingerprint(add) == before


def test_every_source_file_counts(monkeypatch, tmp_path):
    package = tmp_path / "jaxreg"
    (package / "xla").mkdir(parents=True)
    (package / "nn").mkdir()
    (package / "nn" / "layer.py").write_text("SLOPE = 0.01\n")
    monkeypatch.setattr(fingerprint, "__file__", str(package / "xla" / "x.py"))
    found = []
    for text in ("SLOPE = 0.01\n", "SLOPE = 0.02\n", "SLOPE = 0.01\n"):
        (package / "nn" / "layer.py").write_text(text)
        fingerprint._versions.cache_clear()
        found.append(fingerprint.fingerprint(add))
    fingerprint._versions.cache_clear()
    assert found[0] == found[2] != found[1]


@dataclasses.dataclass(frozen=True)
class Held:
    value: object


@pytest.mark.parametrize(
    "value", [threading.Lock(), iter(()), Held(threading.Lock()), np.array([None])]
)
def test_what_is_not_known_is_refused(value):
    with pytest.raises(UnknownKindError):
        fingerprint.fingerprint(scaled(value))


def test_what_is_being_traced_is_refused():
    def outer(x):
        with pytest.raises(UnknownKindError, match="traced"):
            fingerprint.fingerprint(scaled(x))
        return x

    jax.jit(outer)(1.0)


def test_endless_nesting_is_refused():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(UnknownKindError, match="inside each other"):
        fingerprint.fingerprint(nested)


def test_a_circle_ends():
    circle: list = []
    circle.append(circle)
    fingerprint.fingerprint(circle)


PROGRAM = """
import optax
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training import step
from jaxreg.xla import fingerprint
model = GradIconConfig((2, 4), (4,), 1, 0).build()
made = step.make_step(model, Objective(), optax.adam(1))
print(fingerprint.fingerprint(made, frozenset("abcdefg")))
"""


def test_another_process_finds_the_same_digest():
    def found(seed):
        return subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    assert found("1") == found("2") != ""
