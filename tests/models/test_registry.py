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
    assert registry.name_of(config) == name and name in registry.NAMES
    assert registry.build(config).config == config  # pyright: ignore
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
    registry.check_grid(config, good)
    with pytest.raises(UserError, match=" x ".join(map(str, bad))):
        registry.check_grid(config, bad)
    registry.check_grid(GradIconConfig(), bad)


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
