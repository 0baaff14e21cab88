"""PromptReg's tensors both ways, and what is refused."""

import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.weights.pytorch import promptreg
from jaxreg.weights.pytorch.promptreg import PROMPTREG, RDP

NAME = "promptreg_small"


@pytest.fixture
def state(golden):
    return {
        k.removeprefix("state/"): v for k, v in golden(NAME).items() if "state/" in k
    }


def random_state(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        entry.key: rng.normal(size=entry.torch_shape).astype(np.float32)
        for entry in PROMPTREG.entries(sizes)
    }


@pytest.mark.golden
def test_golden_state_round_trips_bit_for_bit(state):
    back = PROMPTREG.from_variables(PROMPTREG.to_variables(state))
    grids = [key for key in back if key.endswith(".grid")]
    assert set(back) - set(grids) == set(state)
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


@pytest.mark.golden
def test_grids_hold_voxel_indices(state):
    back = PROMPTREG.from_variables(PROMPTREG.to_variables(state))
    whole = [8 * n for n in state["prompt_generator.static_prompt"].shape[2:]]
    for level in range(4):
        shape = tuple(n // 2**level for n in whole)
        for key in (f"warp.{level}.grid", f"diff.{level}.transformer.grid"):
            assert back[key].shape == (1, 3, *shape)
            assert back[key].dtype == np.float32
            assert tuple(back[key][0, :, 1, 0, 1]) == (1, 0, 1)


@pytest.mark.parametrize(
    "sizes",
    [
        promptreg.Sizes(2, 1, 4, (2, 3, 4)),
        promptreg.Sizes(3, 2, 1, (2, 2, 2)),
        promptreg.Sizes(2, 1, 0, (1, 1, 1)),
    ],
)
def test_sizes_are_read_from_either_side(sizes):
    table = PROMPTREG if sizes.tasks else RDP
    state = random_state(sizes)
    assert table.sizes_of(state, source="here") == sizes
    variables = table.to_variables(state)
    assert table.variable_sizes(variables, {}, source="here") == sizes
    back = table.from_variables(variables)
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_a_network_without_the_unused_tensors_gets_zeros():
    sizes = promptreg.Sizes(2, 1, 2, (2, 2, 2))
    variables = PROMPTREG.to_variables(random_state(sizes))
    del variables["unused"]
    PROMPTREG.check_variables(variables)
    back = PROMPTREG.from_variables(variables)
    assert not back["prompt_generator.x_proj.weight"].any()
    assert back["prompt_generator.cross_attention.v.weight"].any()


def test_grids_in_the_file_are_left_out():
    state = random_state(promptreg.Sizes(2, 1, 2, (2, 2, 2)))
    grid = {"warp.0.grid": np.zeros((1, 3, 16, 16, 16), np.float32)}
    PROMPTREG.to_variables(state | grid)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("defconv2.bias"), "missing: defconv2.bias"),
        (lambda s: s.update(extra=s["defconv2.bias"]), "unknown: extra"),
        (lambda s: s.update({"defconv2.bias": np.ones(4, "f4")}), "misshapen"),
        (lambda s: s.update({"defconv2.bias": np.full(3, np.nan, "f4")}), "finite"),
        (lambda s: s.pop("encoder_moving.conv0.conv.weight"), "model_state_dict of a"),
    ],
)
def test_other_tensors_are_refused_by_name(change, said):
    state = random_state(promptreg.Sizes(2, 1, 2, (2, 2, 2)))
    change(state)
    with pytest.raises(UserError, match=f"weights.pth .*{said}"):
        PROMPTREG.to_variables(state, source="weights.pth")
