"""The released UniReg pyramid's tensors both ways, and what is refused."""

import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.weights.pytorch import unireg_rpn
from jaxreg.weights.pytorch.unireg_rpn import Sizes

NAME = "unireg_rpn_small"
SMALL = Sizes(2, 1, "dynamic", 3, 4)
SIZES = [SMALL, Sizes(4, 2, "dynamic", 6, 8), Sizes(8, 1, "static")]


def random_state(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        entry.key: rng.normal(size=entry.torch_shape).astype(np.float32)
        for entry in unireg_rpn.TABLE.entries(sizes)
    }


@pytest.mark.golden
def test_golden_state_round_trips_bit_for_bit(golden):
    state = {
        k.removeprefix("state/"): v for k, v in golden(NAME).items() if "state/" in k
    }
    back = unireg_rpn.TABLE.from_variables(unireg_rpn.TABLE.to_variables(state))
    assert list(back) == list(state)
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_are_read_from_either_side(sizes):
    state = random_state(sizes)
    assert unireg_rpn.TABLE.sizes_of(state, source="here") == sizes
    variables = unireg_rpn.TABLE.to_variables(state)
    assert unireg_rpn.TABLE.variable_sizes(variables, {}, source="here") == sizes
    config = unireg_rpn.TABLE.read_config(state)
    unireg_rpn.TABLE.check_variables(variables, config)
    back = unireg_rpn.TABLE.from_variables(variables)
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


RECIPE = ("cardiac", "liver", "head", "abdomen", "chest", "brain")


def test_regions_get_the_places_that_the_release_gives_them():
    state = random_state(SIZES[1])
    for level in (1, 2, 3, 4):  # a column tells its region
        kernel = state[f"decoder{level}.dynamic_flow.controller.weight"]
        kernel[:, -6:] = np.float32([RECIPE.index(name) for name in RECIPE]).reshape(
            6, 1, 1, 1
        )
    variables = unireg_rpn.TABLE.to_variables(state)
    ordered, names = unireg_rpn.TABLE.in_order(None, variables, RECIPE)
    assert names == ("chest", "abdomen", "head", "liver", "cardiac", "brain")
    back = unireg_rpn.TABLE.from_variables(ordered)
    for level in (1, 2, 3, 4):
        key = f"decoder{level}.dynamic_flow.controller.weight"
        for place, name in enumerate(names):
            np.testing.assert_array_equal(
                back[key][:, place - 6], RECIPE.index(name), err_msg=name
            )
        np.testing.assert_array_equal(back[key][:, :-6], state[key][:, :-6])
    for key in set(state) - {k for k in state if "controller.weight" in k}:
        np.testing.assert_array_equal(back[key], state[key], err_msg=key)
    # What was given stays as it was.
    for key, array in unireg_rpn.TABLE.from_variables(variables).items():
        np.testing.assert_array_equal(array, state[key], err_msg=key)


@pytest.mark.parametrize(
    "names", [("chest", "abdomen"), (*RECIPE[:5], "hip"), (*RECIPE, "hip")]
)
def test_regions_that_the_release_does_not_know_are_refused(names):
    sizes = Sizes(2, 1, "dynamic", len(names), 4)
    variables = unireg_rpn.TABLE.to_variables(random_state(sizes))
    with pytest.raises(UserError, match=r"regions chest|regions cardiac.* no others"):
        unireg_rpn.TABLE.in_order(None, variables, names)


def test_a_range_of_smoothness_means_nothing_to_static_heads():
    state = random_state(SIZES[2])
    variables = unireg_rpn.TABLE.to_variables(state)
    config = {**unireg_rpn.TABLE.read_config(state), "smoothness_range": {"knots": 5}}
    unireg_rpn.TABLE.check_variables(variables, config)
    assert set(unireg_rpn.TABLE.from_variables(variables, config)) == set(state)


def test_config_of_six_and_of_other_regions():
    six = unireg_rpn.TABLE.read_config(random_state(SIZES[1]))
    assert six["regions"] == 6 and "tasks" not in six
    three = unireg_rpn.TABLE.read_config(random_state(SMALL))
    assert three["tasks"][2:4] == ((2, "inter"), (0, "intra"))
    assert len(three["tasks"]) == 6 and three["hidden"] == 4
    static = unireg_rpn.TABLE.read_config(random_state(SIZES[2]))
    assert static == {"channels": 8, "image_channels": 1, "head": "static"}


@pytest.mark.parametrize(
    "prefix", ["net.", "base_model.net.", "module.", "module.net."]
)
def test_prefixes_and_grids_are_left_out(prefix):
    state = random_state(SIZES[2])
    wrapped = {prefix + key: array for key, array in state.items()}
    wrapped[f"{prefix}transformer.0.grid"] = np.zeros((1, 3, 8, 8, 8), np.float32)
    assert unireg_rpn.TABLE.owns(wrapped)
    variables = unireg_rpn.TABLE.to_variables(wrapped)
    assert list(unireg_rpn.TABLE.from_variables(variables)) == list(state)


BIAS = "decoder2.Conv4.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(BIAS), f"missing: {BIAS}"),
        (lambda s: s.update(extra=s[BIAS]), "unknown: extra"),
        (lambda s: s.update({BIAS: np.ones(5, "f4")}), f"misshapen: {BIAS}"),
        (lambda s: s.update({BIAS: np.full(4, np.nan, "f4")}), "finite"),
        (lambda s: s.pop("encoder.block1.main.weight"), "model_state_dict of a"),
        (lambda s: s.pop("decoder1.dynamic_flow.controller.weight"), "unfit"),
        (
            lambda s: s.update({"decoder3.dynamic_flow.gap.0.bias": np.ones(9, "f4")}),
            "misshapen: decoder3.dynamic_flow.gap.0.bias",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(change, said):
    state = random_state(SMALL)
    change(state)
    with pytest.raises(UserError, match=f"weights.pth .*{said}"):
        unireg_rpn.TABLE.to_variables(state, source="weights.pth")


def test_variables_of_other_sizes_or_kinds_are_refused():
    variables = unireg_rpn.TABLE.to_variables(random_state(SMALL))
    with pytest.raises(UserError, match="'channels': 2.*'channels': 8"):
        unireg_rpn.TABLE.check_variables(variables, {"channels": 8})
    del variables["params"]["decoder_1"]["head"]["controller"]["bias"]
    with pytest.raises(UserError, match="missing: params/decoder_1/head/controller"):
        unireg_rpn.TABLE.check_variables(variables)
    with pytest.raises(UserError, match="does not hold the variables"):
        unireg_rpn.TABLE.check_variables({"params": {"step_1": {}}})
