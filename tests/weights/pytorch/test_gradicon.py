"""PyTorch's names and axes against ours: both ways, bit by bit, and what is refused."""

import io
import itertools
import pickle
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.errors import UserError
from jaxreg.weights.pytorch import gradicon
from jaxreg.weights.pytorch import state as state_lib

SMALL = {
    "channels_down": (2, 3, 5),
    "channels_up": (4, 3),
    "downsampled_steps": 1,
    "fullres_steps": 1,
}
FULL = {
    "channels_down": (2, 16, 32, 64, 256, 512),
    "channels_up": (16, 32, 64, 128, 256),
    "downsampled_steps": 2,
    "fullres_steps": 1,
}


def random_state(config, seed=0):
    """A state dict of a network of these sizes with random contents."""
    rng = np.random.default_rng(seed)
    state = {}
    for entry in gradicon.TABLE.entries(config):
        if entry.is_count:
            state[entry.key] = np.array(rng.integers(0, 2**31), np.int64)
        else:
            state[entry.key] = rng.normal(size=entry.torch_shape).astype(np.float32)
    return state


def assert_same(got, expected):
    """The same names in the same order, the same types and the same bits."""
    assert list(got) == list(expected)
    for key, array in expected.items():
        assert got[key].dtype == array.dtype, key
        np.testing.assert_array_equal(got[key], array, err_msg=key)


def golden_state(arrays):
    return {
        key.removeprefix("state/"): array
        for key, array in arrays.items()
        if key.startswith("state/")
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", ["unigradicon_net_small", "unigradicon_io"])
def test_golden_state_round_trips_bit_for_bit(golden, name):
    state = golden_state(golden(name))
    config = gradicon.TABLE.read_config(state)
    variables = gradicon.TABLE.to_variables(state)
    assert_same(gradicon.TABLE.from_variables(variables, config), state)
    # And from our side: the same tree.
    again = gradicon.TABLE.to_variables(
        gradicon.TABLE.from_variables(variables, config)
    )
    assert sorted(again) == ["batch_stats", "params"]
    assert list(again["params"]) == [
        f"step_{i + 1}"
        for i in range(1 + config["downsampled_steps"] + config["fullres_steps"])
    ]
    for collection, step in itertools.product(again, again["params"]):
        for module, leaves in again[collection][step].items():
            for leaf, array in leaves.items():
                mine = variables[collection][step][module][leaf]
                assert mine.dtype == array.dtype
                np.testing.assert_array_equal(mine, array)


@pytest.mark.golden
@pytest.mark.torch
@pytest.mark.parametrize("name", ["unigradicon_net_small", "unigradicon_io"])
def test_golden_state_round_trips_through_a_file(golden, name, tmp_path):
    torch = pytest.importorskip("torch")
    state = golden_state(golden(name))
    path = tmp_path / "weights.trch"
    torch.save({key: torch.tensor(array) for key, array in state.items()}, path)
    read = state_lib.read_state_dict(path)
    assert_same(read, state)
    config = gradicon.TABLE.read_config(read)
    variables = gradicon.TABLE.to_variables(read)
    state_lib.write_state_dict(path, gradicon.TABLE.from_variables(variables, config))
    again = torch.load(path, weights_only=True)
    assert_same({key: tensor.numpy() for key, tensor in again.items()}, state)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.trch"]


@pytest.mark.golden
def test_golden_config_is_read_off_the_tensors(golden):
    arrays = golden("unigradicon_net_small")
    state = golden_state(arrays)
    config = gradicon.TABLE.read_config(state)
    prefixes = {key.split("lastConv")[0] for key in state if "lastConv" in key}
    assert (
        set(
            gradicon.gradicon_prefixes(
                config["downsampled_steps"], config["fullres_steps"]
            )
        )
        == prefixes
    )
    unet = golden("unigradicon_unet_small")
    assert config["channels_down"] == tuple(unet["channels_down"])
    assert config["channels_up"] == tuple(unet["channels_up"])


def test_prefixes_of_the_released_networks():
    assert gradicon.gradicon_prefixes(2, 1) == (
        "netPhi.netPhi.net.netPhi.net.net.",
        "netPhi.netPhi.net.netPsi.net.",
        "netPhi.netPsi.net.",
        "netPsi.net.",
    )
    assert gradicon.gradicon_prefixes(2, 0) == (
        "netPhi.net.netPhi.net.net.",
        "netPhi.net.netPsi.net.",
        "netPsi.net.",
    )
    assert gradicon.gradicon_prefixes(0, 0) == ("net.",)


def test_sizes_of_the_released_network():
    entries = gradicon.TABLE.entries(FULL)
    assert len(entries) == 188
    elements = sum(int(np.prod(e.torch_shape)) for e in entries)
    assert elements == 70_684_904
    trained = [e for e in entries if e.path[0] == "params"]
    assert sum(int(np.prod(e.torch_shape)) for e in trained) == 70_680_916


def test_axes_move_and_taps_stay():
    state = random_state(SMALL)
    variables = gradicon.TABLE.to_variables(state)
    step = variables["params"]["step_3"]
    down = state["netPsi.net.downConvs.1.weight"]  # O I D H W
    up = state["netPsi.net.upConvs.0.weight"]  # I O D H W
    assert step["down_1"]["kernel"].shape == (3, 3, 3, 3, 5)
    assert step["down_1"]["kernel"][0, 1, 2, 1, 4] == down[4, 1, 0, 1, 2]
    assert step["up_0"]["kernel"].shape == (4, 4, 4, 6, 4)
    assert step["up_0"]["kernel"][0, 1, 3, 5, 2] == up[5, 2, 0, 1, 3]
    assert step["last"]["kernel"].shape == (3, 3, 3, 6, 3)
    stats = variables["batch_stats"]["step_3"]["norm_1"]
    assert stats["count"].dtype == np.int32
    assert stats["count"].shape == ()
    assert step["down_0"]["bias"].dtype == np.float32


@st.composite
def structures(draw):
    levels = draw(st.integers(2, 4))
    channels = st.integers(1, 5)
    return {
        "channels_down": tuple(draw(channels) for _ in range(levels + 1)),
        "channels_up": tuple(draw(channels) for _ in range(levels)),
        "downsampled_steps": draw(st.integers(0, 2)),
        "fullres_steps": draw(st.integers(0, 2)),
    }


@settings(max_examples=30, deadline=None)
@given(structures(), st.integers(0, 2**32 - 1))
def test_any_structure_is_recognised_and_round_trips(config, seed):
    state = random_state(config, seed)
    assert gradicon.TABLE.read_config(state) == config
    variables = gradicon.TABLE.to_variables(state)
    assert_same(gradicon.TABLE.from_variables(variables, config), state)


@settings(max_examples=30, deadline=None)
@given(structures(), st.data())
def test_any_missing_or_misshapen_tensor_is_named(config, data):
    state = random_state(config)
    key = data.draw(st.sampled_from(list(state)))
    if data.draw(st.booleans()):
        del state[key]
    else:
        state[key] = np.zeros((*state[key].shape, 7), state[key].dtype)
    with pytest.raises(UserError) as error:
        state_lib.tree_of(
            state, gradicon.TABLE.entries(config), source="here", network="test"
        )
    assert key in str(error.value)
    # Read off the damaged tensors, the config may be that of a smaller network, in
    # which case other tensors are the odd ones; it never passes.
    with pytest.raises(UserError):
        gradicon.TABLE.to_variables(state)


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("netPsi.net.downConvs.0.weight", np.zeros((3, 1, 3, 3, 3), np.float32)),
        ("netPsi.net.upConvs.1.bias", np.zeros(4, np.float32)),
        ("netPhi.netPsi.net.lastConv.weight", np.zeros((2, 6, 3, 3), np.float32)),
    ],
)
def test_misshapen_tensor_is_named_with_both_shapes(key, array):
    state = random_state(SMALL)
    expected = state[key].shape
    state[key] = array
    config = gradicon.TABLE.read_config(state)
    assert config == SMALL
    with pytest.raises(UserError) as error:
        gradicon.TABLE.to_variables(state, source="x.trch")
    message = str(error.value)
    assert message.startswith("x.trch ")
    assert f"1 misshapen: {key} of shape {array.shape}, expected {expected}" in message
    assert "missing" not in message


def test_unknown_tensors_are_named_and_counted():
    state = random_state(SMALL)
    for i in range(6):
        state[f"netPsi.net.extra.{i}"] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as error:
        gradicon.TABLE.to_variables(state)
    assert "6 unknown: netPsi.net.extra.0, " in str(error.value)
    assert "and 2 more" in str(error.value)


def test_missing_unet_is_answered_with_its_tensors():
    state = random_state(SMALL)
    state = {k: v for k, v in state.items() if not k.startswith("netPsi.")}
    with pytest.raises(UserError) as error:
        gradicon.TABLE.to_variables(state)
    assert "20 missing: netPsi.net.downConvs.0.weight" in str(error.value)
    assert "unknown" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("net.downConvs.0.bias", np.zeros(3, np.int64), "wrong type"),
        ("net.batchNorms.0.num_batches_tracked", np.array(1.0), "wrong type"),
        ("net.batchNorms.0.num_batches_tracked", np.array(2**31), "out of range"),
        ("net.lastConv.bias", np.array([0, np.nan, 0], np.float32), "not finite"),
    ],
)
def test_unusable_values_are_named(key, value, words):
    config = SMALL | {"downsampled_steps": 0, "fullres_steps": 0}
    state = random_state(config) | {key: value}
    with pytest.raises(UserError, match=words) as error:
        gradicon.TABLE.to_variables(state)
    assert key in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["conv1.weight", "conv1.bias"],
        ["downConvs.0.weight", "lastConv.weight"],
        ["module.regis_net.netPsi.net.lastConv.weight"],
    ],
)
def test_other_architectures_are_refused(keys):
    state = {key: np.zeros((2, 2), np.float32) for key in keys}
    with pytest.raises(UserError, match="expected the tensors of a uniGradICON"):
        gradicon.TABLE.read_config(state)


def test_network_without_down_convolutions_is_refused():
    state = {k: v for k, v in random_state(SMALL).items() if "downConvs" not in k}
    with pytest.raises(UserError, match="downConvs"):
        gradicon.TABLE.read_config(state)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {k: v for k, v in SMALL.items() if k != "downsampled_steps"},
        SMALL | {"downsampled_steps": -1},
        SMALL | {"downsampled_steps": 10**9},
        SMALL | {"fullres_steps": 0.5},
        SMALL | {"channels_up": ()},
        SMALL | {"channels_down": (2, 3)},
        SMALL | {"channels_down": (0, 3, 5)},
    ],
)
def test_impossible_configs_are_refused(config):
    with pytest.raises(UserError, match="config"):
        gradicon.TABLE.entries(config)


def test_config_from_json_has_lists():
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()}
    listed["form"] = "auto"  # how it is computed, not which tensors it has
    assert gradicon.TABLE.entries(listed) == gradicon.TABLE.entries(SMALL)


def test_variables_with_other_leaves_are_refused():
    variables = gradicon.TABLE.to_variables(random_state(SMALL))
    variables["params"]["step_2"]["down_0"]["kernle"] = np.zeros(1, np.float32)
    del variables["params"]["step_1"]["last"]["bias"]
    variables["params"]["step_3"]["up_1"]["bias"] = np.zeros(9, np.float32)
    with pytest.raises(UserError) as error:
        gradicon.TABLE.from_variables(variables, SMALL, source="run/best")
    message = str(error.value)
    assert message.startswith("run/best ")
    assert "1 unknown: params/step_2/down_0/kernle" in message
    assert "1 missing: params/step_1/last/bias" in message
    assert (
        "1 misshapen: params/step_3/up_1/bias of shape (9,), expected (3,)" in message
    )


def test_bfloat16_variables_are_exported_as_float32():
    import jax.numpy as jnp

    variables = gradicon.TABLE.to_variables(random_state(SMALL))
    last = variables["params"]["step_1"]["last"]
    last["bias"] = jnp.array([1.0, -0.5, 3.0], jnp.bfloat16)
    state = gradicon.TABLE.from_variables(variables, SMALL)
    bias = state["netPhi.netPhi.net.net.lastConv.bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, [1.0, -0.5, 3.0])


# ---- files ----


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensors(torch, config=SMALL):
    return {k: torch.tensor(v) for k, v in random_state(config).items()}


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True])
def test_reads_both_formats_of_torch_save(torch, tmp_path, legacy):
    path = tmp_path / "weights.pth"
    torch.save(
        tensors(torch),
        path,
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=2,
    )
    assert_same(state_lib.read_state_dict(path), random_state(SMALL))


@pytest.mark.torch
def test_written_bytes_depend_on_the_tensors_alone(torch, tmp_path):
    state = random_state(SMALL)
    for name in ("one.trch", "two.trch"):
        state_lib.write_state_dict(tmp_path / name, state)
    one, two = (tmp_path / n for n in ("one.trch", "two.trch"))
    with zipfile.ZipFile(one) as a, zipfile.ZipFile(two) as b:
        assert a.namelist() == b.namelist()
    assert_same(state_lib.read_state_dict(two), state)


@pytest.mark.torch
def test_reads_what_jax_arrays_were_written(torch, tmp_path):
    import jax.numpy as jnp

    path = tmp_path / "weights.trch"
    state_lib.write_state_dict(
        path, {"a": np.asarray(jnp.arange(3.0)), "n": np.array(2)}
    )
    read = state_lib.read_state_dict(path)
    np.testing.assert_array_equal(read["a"], [0.0, 1.0, 2.0])
    assert read["n"].shape == ()


@pytest.mark.torch
def test_floating_types_become_float32(torch, tmp_path):
    path = tmp_path / "weights.trch"
    types = {"h": torch.float16, "b": torch.bfloat16, "d": torch.float64}
    torch.save({k: torch.tensor([1.5, -2.0], dtype=t) for k, t in types.items()}, path)
    for array in state_lib.read_state_dict(path).values():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, [1.5, -2.0])


@pytest.mark.torch
def test_whole_network_and_its_identity_maps_are_accepted(torch, tmp_path):
    whole = {f"regis_net.{k}": v for k, v in tensors(torch).items()}
    maps = {
        "identity_map": torch.zeros(1, 3, 2, 2, 2),
        "regis_net.netPhi.identity_map": torch.zeros(1, 3, 2, 2, 2),
    }
    torch.save(maps | whole, tmp_path / "whole.trch")
    assert_same(state_lib.read_state_dict(tmp_path / "whole.trch"), random_state(SMALL))
    # One tensor outside the network: nothing is stripped, and nothing fits.
    torch.save(whole | {"other": torch.zeros(1)}, tmp_path / "odd.trch")
    state = state_lib.read_state_dict(tmp_path / "odd.trch")
    with pytest.raises(UserError):
        gradicon.TABLE.to_variables(state)


class Anything:
    """A Python object in a file, which must never be loaded."""


def _cut(torch, path):
    torch.save(tensors(torch), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_legacy(torch, path):
    torch.save(tensors(torch), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:200])


def _flip(torch, path):
    torch.save(tensors(torch), path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        data[archive.getinfo(name).header_offset + 150] ^= 0xFF
    path.write_bytes(data)


def _optimiser(torch, path):
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    torch.save(torch.optim.Adam(parameters).state_dict(), path)


def _zip(_, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


OTHER_FILES = {
    "object": lambda torch, path: torch.save({"a": Anything()}, path),
    "module": lambda torch, path: torch.save(torch.nn.Linear(1, 1), path),
    "optimiser": _optimiser,
    "training checkpoint": lambda torch, path: torch.save(
        {"epoch": 3, "model": tensors(torch)}, path
    ),
    "list": lambda torch, path: torch.save([torch.zeros(1)], path),
    "numbers": lambda torch, path: torch.save({"lr": 0.1, "a": torch.zeros(1)}, path),
    "sparse": lambda torch, path: torch.save(
        {"a": torch.zeros(2, 2).to_sparse()}, path
    ),
    "truncated": _cut,
    "flipped": _flip,
    "zip": _zip,
    "pickle": lambda _, path: path.write_bytes(pickle.dumps({"a": 1})),
    "text": lambda _, path: path.write_text("<!DOCTYPE html> not found"),
    "empty": lambda _, path: path.write_bytes(b""),
    "legacy, cut": _cut_legacy,
    "folder": lambda _, path: path.mkdir(),
    "missing": lambda _, path: None,
}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("object", "not a plain tensor file"),
        ("module", "not a plain tensor file"),
        ("optimiser", "state of an optimiser"),
        ("training checkpoint", r"training checkpoint .*checkpoint\['model'\]"),
        ("list", "holds a list"),
        ("numbers", r"no plain tensors: lr \(float\)"),
        ("sparse", "no plain tensors"),
        ("truncated", "damaged or incomplete"),
        ("flipped", "damaged .checksum"),
        ("zip", "zip archive without tensors"),
        ("pickle", "not a PyTorch file"),
        ("text", "not a PyTorch file"),
        ("empty", "not a PyTorch file|is empty"),
        ("legacy, cut", "cannot be read as PyTorch tensors|not a plain tensor"),
        ("folder", "folder"),
        ("missing", "does not exist"),
    ],
)
def test_other_files_are_refused_in_one_sentence(torch, tmp_path, kind, words):
    path = tmp_path / "weights.trch"
    OTHER_FILES[kind](torch, path)
    with pytest.raises(UserError, match=words) as error:
        state_lib.read_state_dict(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="^https://x/y"):
        state_lib.read_state_dict(path, source="https://x/y")


@pytest.mark.torch
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_damaged_files_never_pass_unnoticed_nor_crash(tmp_path_factory, seed, legacy):
    torch = pytest.importorskip("torch")
    good = io.BytesIO()
    config = SMALL | {"downsampled_steps": 0, "fullres_steps": 0}
    torch.save(tensors(torch, config), good, _use_new_zipfile_serialization=not legacy)
    data = bytearray(good.getvalue())
    rng = np.random.default_rng(seed)
    # The names and the directory, where damage changes the structure.
    places = rng.integers(0, min(2000, len(data)), 3)
    for place in places:
        data[place] ^= int(rng.integers(1, 256))
    path = tmp_path_factory.mktemp("damaged") / "weights.trch"
    path.write_bytes(data)
    try:
        state = state_lib.read_state_dict(path)
        gradicon.TABLE.to_variables(state)
    except UserError:
        pass


def test_without_torch_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install "jaxreg\[torch\]"'):
        state_lib.write_state_dict(tmp_path / "weights.trch", {})


@pytest.mark.torch
def test_reading_needs_no_torch(torch, tmp_path, monkeypatch):
    path = tmp_path / "weights.trch"
    torch.save(tensors(torch), path)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_same(state_lib.read_state_dict(path), random_state(SMALL))


@pytest.mark.torch
def test_unwritable_target_is_answered(torch, tmp_path):
    with pytest.raises(UserError, match="folder"):
        state_lib.write_state_dict(tmp_path / "none" / "a.trch", {"a": np.zeros(1)})
    with pytest.raises(UserError):
        state_lib.write_state_dict(tmp_path, {"a": np.zeros(1)})


# ---- the live packages ----


def icon_network(icon, config):
    """The same network built by icon_registration."""
    from icon_registration import networks

    channels = [list(config["channels_down"]), list(config["channels_up"])]

    def field():
        unet = networks.UNet2(len(config["channels_up"]), channels, 3)
        return icon.FunctionFromVectorField(unet)

    net = field()
    for _ in range(config["downsampled_steps"]):
        net = icon.TwoStepRegistration(icon.DownsampleRegistration(net, 3), field())
    for _ in range(config["fullres_steps"]):
        net = icon.TwoStepRegistration(net, field())
    return net


@pytest.mark.torch
@pytest.mark.parametrize(
    ("downsampled_steps", "fullres_steps"), [(0, 0), (2, 0), (2, 1), (1, 2)]
)
def test_keys_shapes_and_order_are_those_of_icon(
    icon, tmp_path, downsampled_steps, fullres_steps
):
    import torch

    config = SMALL | {
        "downsampled_steps": downsampled_steps,
        "fullres_steps": fullres_steps,
    }
    net = icon_network(icon, config)
    theirs = {k: v.numpy() for k, v in net.state_dict().items()}
    entries = gradicon.TABLE.entries(config)
    assert list(theirs) == [entry.key for entry in entries]
    assert [a.shape for a in theirs.values()] == [e.torch_shape for e in entries]
    assert gradicon.TABLE.read_config(theirs) == config
    variables = gradicon.TABLE.to_variables(theirs)
    assert_same(gradicon.TABLE.from_variables(variables, config), theirs)
    # And ours, exported, loads strictly there.
    path = tmp_path / "weights.trch"
    state = random_state(config, seed=3)
    state_lib.write_state_dict(path, state)
    net.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert_same({k: v.numpy() for k, v in net.state_dict().items()}, state)


@pytest.mark.torch
def test_whole_module_of_unigradicon_is_read(icon, unigradicon, tmp_path):
    import torch

    config = SMALL | {"downsampled_steps": 1, "fullres_steps": 0}
    net = unigradicon.GradientICONSparse(icon_network(icon, config), icon.LNCC(5), 1.5)
    net.assign_identity_map((1, 1, 8, 8, 8))
    path = tmp_path / "whole.trch"
    torch.save(net.state_dict(), path)
    expected = {k: v.numpy() for k, v in net.regis_net.state_dict().items()}
    assert_same(state_lib.read_state_dict(path), expected)


@pytest.mark.slow
@pytest.mark.torch
def test_full_size_export_loads_strictly_in_unigradicon(unigradicon, tmp_path):
    import torch

    state = random_state(FULL)
    variables = gradicon.TABLE.to_variables(state)
    path = tmp_path / "Step_2_final.trch"
    state_lib.write_state_dict(path, gradicon.TABLE.from_variables(variables, FULL))
    net = unigradicon.make_network((1, 1, 16, 16, 16), include_last_step=True)
    net.regis_net.load_state_dict(torch.load(path, weights_only=True), strict=True)
    got = {k: v.numpy() for k, v in net.regis_net.state_dict().items()}
    assert_same(got, state)
    assert gradicon.TABLE.read_config(state_lib.read_state_dict(path)) == FULL
