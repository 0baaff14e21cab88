"""SAM's tensors both ways, the file's layout, and what is refused."""

import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.weights.pytorch import sam
from jaxreg.weights.pytorch import state as state_lib

WIDTHS = {"channels": (2, 3, 4, 5), "embedding": 6}


def random_state(channels=WIDTHS["channels"], embedding=WIDTHS["embedding"]):
    rng = np.random.default_rng(0)

    def tensor(entry):
        if entry.is_count:
            return np.array(rng.integers(1000), np.int64)
        return rng.normal(size=entry.torch_shape).astype(np.float32)

    sizes = {"channels": channels, "embedding": embedding}
    return {entry.key: tensor(entry) for entry in sam.TABLE.entries(sizes)}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
        assert found[key].dtype == array.dtype, key


@pytest.mark.golden
def test_names_and_shapes_are_the_released_ones(golden):
    g = golden("sam_small")
    table = tuple(
        sam.TABLE.entries({"channels": (64, 128, 256, 512), "embedding": 128})
    )
    assert len(table) == 138
    floats = [entry for entry in table if not entry.is_count]
    assert [entry.key for entry in floats] == [str(name) for name in g["param_names"]]
    shapes = [str(entry.torch_shape) for entry in floats]
    assert shapes == [str(shape) for shape in g["param_shapes"]]


@pytest.mark.parametrize("sizes", [WIDTHS, {"channels": (7, 3, 2, 1), "embedding": 1}])
def test_either_side_tells_the_sizes_and_gives_the_other(sizes):
    state = random_state(**sizes)
    assert sam.TABLE.read_config(state) == sizes
    variables = sam.TABLE.to_variables(state)
    assert sam.TABLE.variable_sizes(variables, {}, source="here") == sizes
    sam.TABLE.check_variables(variables, sizes)
    assert_same(sam.TABLE.from_variables(variables), state)


def test_kernels_have_their_channels_last():
    state = random_state()
    variables = sam.TABLE.to_variables(state)
    kernel = variables["params"]["backbone"]["stage_2_0"]["shortcut"]["conv"]["kernel"]
    weight = state["backbone.layer2.0.downsample.conv.weight"]
    assert kernel.shape == (1, 1, 1, 2, 3)
    np.testing.assert_array_equal(kernel[0, 0, 0], weight[:, :, 0, 0, 0].T)


@pytest.mark.torch
def test_file_is_laid_out_as_the_released_one(tmp_path):
    torch = pytest.importorskip("torch")
    state = random_state()
    path = tmp_path / "sam.pth"
    written = sam.TABLE.from_variables(sam.TABLE.to_variables(state))
    state_lib.write_state_dict(
        path, written, wrapper=sam.TABLE.wrapper, beside=sam.TABLE.beside
    )
    content = torch.load(path, weights_only=True)
    assert set(content) == {"state_dict", "meta"}
    assert_same({k: v.numpy() for k, v in content["state_dict"].items()}, state)
    content |= {"meta": {"epoch": 1, "config": "model = ..."}, "optimizer": {}}
    torch.save(content, path)
    assert_same(state_lib.read_state_dict(path), state)


def test_counters_may_be_absent_all_together():
    state = random_state()
    floats = {k: v for k, v in state.items() if not k.endswith("tracked")}
    back = sam.TABLE.from_variables(sam.TABLE.to_variables(floats))
    assert list(back) == list(state)
    assert not any(back[key] for key in back if key.endswith("tracked"))
    floats["backbone.conv1.bn.num_batches_tracked"] = np.array(1)
    with pytest.raises(UserError, match="missing: backbone.layer1.0.conv1.bn.num"):
        sam.TABLE.to_variables(floats)


BIAS = "neck.lateral_convs.0.conv.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(BIAS), f"missing: {BIAS}"),
        (lambda s: s.update(extra=s[BIAS]), "unknown: extra"),
        (lambda s: s.update({BIAS: np.ones(4, "f4")}), "misshapen"),
        (lambda s: s.update({BIAS: np.full(6, np.nan, "f4")}), "finite"),
        (lambda s: s.update({BIAS: np.ones(6, "i4")}), "of type int32"),
        (lambda s: s.pop("backbone.layer3.1.conv2.bn.weight"), "of a SAM network"),
        (lambda s: s.clear(), "of a SAM network"),
    ],
)
def test_other_tensors_are_refused_by_name(change, said):
    state = random_state()
    change(state)
    with pytest.raises(UserError, match=f"sam.pth .*{said}"):
        sam.TABLE.to_variables(state, source="sam.pth")


def test_other_variables_are_refused():
    variables = sam.TABLE.to_variables(random_state())
    with pytest.raises(UserError, match="misshapen"):
        sam.TABLE.check_variables(variables, {"embedding": 7})
    with pytest.raises(UserError, match="of a SAM network"):
        sam.TABLE.check_variables({"params": {"step_1": {}}})
    del variables["params"]["fine"]["bias"]
    with pytest.raises(UserError, match="missing: params/fine/bias"):
        sam.TABLE.from_variables(variables)
