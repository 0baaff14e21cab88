"""A lowered program is read again, and not where anything differs; its numbers stay."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.nn import layers
from jaxreg.training import parallel, state, step
from jaxreg.xla import compilation_cache, fingerprint, lowered_cache

pytest.importorskip("flatbuffers", reason="JAX writes lowered programs by its means")
SINGLE = parallel.Layout("single")


@pytest.fixture
def folder(tmp_path):
    """The cache's folder, in a run."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with compilation_cache.kept():
            yield tmp_path / "lowered"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def lowered(monkeypatch):
    """Grows by one each time that a function is traced for the cache."""
    traced, lower = [], lowered_cache._lower

    def counted(*args):
        traced.append(1)
        return lower(*args)

    monkeypatch.setattr(lowered_cache, "_lower", counted)
    return traced


def train_step(rate=0.1, power=2):
    """A step of training, of a network of one layer."""

    def parts_of(variables, batch, key):
        def loss_of(params):
            noise = jax.random.normal(key, batch["moving"].shape)
            warped = layers.leaky(params["kernel"] * (batch["moving"] + noise))
            return jnp.mean((warped - batch["fixed"]) ** power)

        loss, gradient = jax.value_and_grad(loss_of)(variables["params"])
        return gradient, {"loss": loss}, variables

    return step.TrainStep(parts_of, optax.adam(rate), 0.5)


def start():
    variables = {"params": {"kernel": jnp.linspace(-1.0, 1.0, 5)}}
    return state.start(variables, optax.adam(0.1), jax.random.key(3), ema=True)


def batch(size=8):
    images = np.random.default_rng(0).random((2, size, 5), np.float32)
    return {"moving": images[0], "fixed": images[1]}


def run(made, given=None, *, before=None):
    """Returns the arrays of two steps' results, on the host."""
    found = parallel.place_state(start() if before is None else before, SINGLE)
    for _ in range(2):
        found, parts = made(found, given or batch())
    tree = state.to_tree(found)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((tree, parts))]


def entries(folder):
    return sorted(folder.glob("*"))


def assert_same(wanted, found):
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_second_start_traces_nothing_and_has_the_same_bits(folder, lowered):
    wanted = run(jax.jit(train_step()))
    assert_same(wanted, run(parallel.compile_step(train_step(), SINGLE)))
    assert len(lowered) == len(entries(folder)) == 1
    assert_same(wanted, run(parallel.compile_step(train_step(), SINGLE)))
    assert len(lowered) == 1


def changed_rate(_):
    return train_step(rate=0.2), batch()


def changed_objective(_):
    return train_step(power=4), batch()


def changed_shape(_):
    return train_step(), batch(10)


def changed_type(_):
    return train_step(), {k: a.astype(np.float16) for k, a in batch().items()}


def changed_code(patched):
    patched.setattr(layers, "leaky", lambda x, slope=0.01: jnp.maximum(x, slope * x))
    return train_step(), batch()


def changed_source(patched):
    patched.setattr(fingerprint, "_versions", lambda: "of another version")
    return train_step(), batch()


@pytest.mark.parametrize(
    "change",
    [changed_rate, changed_objective, changed_shape, changed_type, changed_code,
     changed_source],
)  # fmt: skip
def test_what_differs_is_traced_anew(folder, lowered, monkeypatch, change):
    run(parallel.compile_step(train_step(), SINGLE))
    with monkeypatch.context() as patched:
        made, given = change(patched)
        found = run(parallel.compile_step(made, SINGLE), given)
        assert len(lowered) == len(entries(folder)) == 2
        assert_same(run(jax.jit(change(patched)[0]), given), found)


def test_a_setting_of_jax_is_traced_anew(folder, lowered):
    made = lowered_cache.kept(lambda a: a @ a)
    jax.jit(made)(jnp.ones((2, 2)))
    with jax.default_matmul_precision("highest"):
        jax.jit(made)(jnp.ones((2, 2)))
    assert len(lowered) == 2
    jax.jit(made).lower(jnp.ones((2, 2)))
    assert len(lowered) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_written_anew(folder, lowered, damage):
    wanted = run(parallel.compile_step(train_step(), SINGLE))
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    middle = len(whole) // 2
    flipped = bytes([whole[middle] ^ 1])
    entry.write_bytes({
        "cut": whole[:middle],
        "flipped": whole[:middle] + flipped + whole[middle + 1 :],
        "empty": b"",
        "other": b"jaxreg lowered 0\n" + whole[len(lowered_cache._HEAD) :],
    }[damage])  # fmt: skip
    assert_same(wanted, run(parallel.compile_step(train_step(), SINGLE)))
    assert len(lowered) == 2
    assert entries(folder) == [entry]
    assert_same(wanted, run(parallel.compile_step(train_step(), SINGLE)))
    assert len(lowered) == 2


def test_memory_and_donation_are_those_of_the_traced_program(folder, lowered):
    shapes = parallel.placed_shapes(start(), batch(), SINGLE)
    plain = jax.jit(train_step(), donate_argnums=0).lower(*shapes).compile()
    made = parallel.compile_step(train_step(), SINGLE)
    kept = made.lower(*shapes).compile()
    for name in ("temp", "argument", "output", "alias"):
        attribute = f"{name}_size_in_bytes"
        assert getattr(kept.memory_analysis(), attribute) == getattr(
            plain.memory_analysis(), attribute
        )
    placed = parallel.place_state(start(), SINGLE)
    made(placed, batch())
    params = jax.tree.leaves(placed.variables["params"])
    assert all(leaf.is_deleted() for leaf in params)
    # A dry run and training lower the same.
    assert len(lowered) == 1


@dataclasses.dataclass(frozen=True)
class Own:
    value: jax.Array


jax.tree_util.register_dataclass(Own, ["value"], [])


def test_results_come_back_in_their_containers(folder, lowered):
    def several_of(x, key):
        a = x["a"]
        return {"key": key, "more": [a, (), None, (a + 1, {"y": 2 * a})]}, x

    given = {"a": jnp.arange(3.0)}, jax.random.key(7, impl="rbg")
    for _ in range(2):
        found = jax.jit(lowered_cache.kept(several_of))(*given)
        wanted = several_of(*given)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        assert jax.random.key_impl(found[0]["key"]) == "rbg"
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            assert jnp.all(a == b)
    assert len(lowered) == 1


def test_other_containers_are_traced_at_every_start(folder, lowered):
    def own(x):
        return Own(x + 1)

    for _ in range(2):
        assert jax.jit(lowered_cache.kept(own))(1.0).value == 2
    # That it cannot be kept is.
    assert len(lowered) == len(entries(folder)) == 1


def test_what_is_not_known_is_traced_at_every_start(folder, lowered):
    source = iter([1.0, 2.0])
    first = jax.jit(lowered_cache.kept(lambda x: x + next(source)))(1.0)
    second = jax.jit(lowered_cache.kept(lambda x: x + next(source)))(1.0)
    assert (first, second) == (2, 3)
    assert not lowered
    assert not entries(folder)


@pytest.mark.parametrize(
    "why", ["no run", "no folder", "off", "other device", "no file"]
)
def test_without_a_place_nothing_is_kept(folder, lowered, monkeypatch, why):
    made = jax.jit(lowered_cache.kept(lambda x: 3 * x))
    with contextlib.ExitStack() as stack:
        if why == "no run":
            token = compilation_cache._IN_RUN.set(False)
            stack.callback(compilation_cache._IN_RUN.reset, token)
        elif why == "no folder":
            jax.config.update("jax_compilation_cache_dir", None)
        elif why == "off":
            jax.config.update("jax_enable_compilation_cache", False)
            stack.callback(jax.config.update, "jax_enable_compilation_cache", True)
        elif why == "other device":
            stack.enter_context(jax.default_device(jax.devices()[0]))
        else:
            folder.parent.mkdir(exist_ok=True)
            folder.write_text("where a folder should be")
        assert made(2.0) == 6
    assert not lowered or why == "no file"
    assert not folder.is_dir()


def test_the_folder_does_not_grow_without_end(folder, lowered, monkeypatch):
    monkeypatch.setattr(lowered_cache, "_MOST", 2)
    for size in (1, 2, 3):
        jax.jit(lowered_cache.kept(lambda x: x + 1))(jnp.ones(size))
    assert len(entries(folder)) == 2


def test_a_mistake_in_the_function_is_told_as_without(folder):
    def wrong(x):
        raise ValueError(f"{x.shape} is wrong")

    with pytest.raises(ValueError, match="is wrong"):
        jax.jit(lowered_cache.kept(wrong))(1.0)
