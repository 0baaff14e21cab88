"""The kinds of network by name."""

import dataclasses
import json

import pytest

from jaxreg.errors import UserError
from jaxreg.models import registry
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpnConfig

CONFIGS = {
    "promptreg": PromptRegConfig(tasks=2),
    "unireg": UniRegConfig(regions=3, tasks=((2, "intra"), (0, "inter"))),
    "unireg_rpn": UniRegRpnConfig(iterations=10),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json_and_build_their_kind(name):
    config = CONFIGS[name]
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert registry.config_of(name, stored) == config
    assert config.kind == name and registry.kinds()[name] is type(config)
    assert config.build().config == config
    assert not registry.unlike(config, stored)


@pytest.mark.parametrize(
    ("config", "good", "bad"),
    [
        (CONFIGS["promptreg"], (16, 24, 16), (8, 16, 16)),
        (CONFIGS["unireg"], (16, 32, 16), (16, 24, 16)),
        (CONFIGS["unireg_rpn"], (8, 24, 16), (8, 20, 16)),
    ],
)
def test_grids_are_checked_by_kind(config, good, bad):
    config.check_grid(good)
    with pytest.raises(UserError, match=" x ".join(map(str, bad))):
        config.check_grid(bad)
    GradIconConfig().check_grid(bad)


def test_what_means_something_else_is_named():
    config = CONFIGS["unireg"]
    other = dataclasses.replace(config, backbone_window=None, integrate_steps=7)
    stored = json.loads(json.dumps(dataclasses.asdict(other)))
    assert registry.unlike(config, stored) == {
        "integrate_steps": 7,
        "backbone_window": None,
    }
    # The size of a bank says nothing about the weights' meaning.
    assert not registry.unlike(PromptRegConfig(tasks=3), {"tasks": 2, "slope": 0.01})


# --- former names of fields -----------------------------------------------------------


def test_fields_go_by_their_former_names_too():
    """As configurations of users, older bundles and `dataclasses.replace` give them."""
    now = GradIconConfig(downsampled_steps=1, fullres_steps=0)
    assert GradIconConfig(halvings=1, refinements=0) == now  # pyright: ignore
    assert dataclasses.replace(now, refinements=2).fullres_steps == 2  # pyright: ignore
    assert registry.config_of("gradicon", {"halvings": 1, "refinements": 0}) == now
    assert "halvings" not in dataclasses.asdict(now)  # the present ones are written
    with pytest.raises(UserError, match="fields halving, .*knows .*downsampled_steps"):
        registry.config_of("gradicon", {"halving": 1})


def test_a_kind_is_known_once():
    registry.register_kind(GradIconConfig)
    other = type("Other", (GradIconConfig,), {})
    with pytest.raises(ValueError, match="gradicon"):
        registry.register_kind(other)
    with pytest.raises(UserError, match="here: 'gradicn' .*did you mean gradicon"):
        registry.kind_named("gradicn", "here")
