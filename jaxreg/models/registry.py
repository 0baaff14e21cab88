"""The kinds of network by name: from a configuration to the network, and back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.errors import UserError
from jaxreg.models import rdp
from jaxreg.models.base import RegistrationModel
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.models.promptreg import (
    PromptReg,
    PromptRegConfig,
    bank_of,
    resize_bank,
    take_rows,
)
from jaxreg.models.rdp import DIVISOR, Rdp, RdpConfig
from jaxreg.models.unireg import paper, released
from jaxreg.models.unireg.paper import UniReg, UniRegConfig
from jaxreg.models.unireg.released import UniRegRpn, UniRegRpnConfig
from jaxreg.nn import heads
from jaxreg.nn.heads import SmoothnessRange, Tasks
from jaxreg.space.grid import Shape
from jaxreg.typing import Variables

Config = GradIconConfig | RdpConfig | PromptRegConfig | UniRegConfig | UniRegRpnConfig

_KINDS: Mapping[str, tuple[Any, Any]] = MappingProxyType(
    {
        "gradicon": (GradIconConfig, GradIcon),
        "rdp": (RdpConfig, Rdp),
        "promptreg": (PromptRegConfig, PromptReg),
        "unireg": (UniRegConfig, UniReg),
        "unireg_rpn": (UniRegRpnConfig, UniRegRpn),
    }
)
_CHECKS: Mapping[str, Callable[[Shape], None]] = MappingProxyType(
    {
        "rdp": rdp.check_shape,
        "promptreg": rdp.check_shape,
        "unireg": paper.check_shape,
        "unireg_rpn": released.check_shape,
    }
)
"""What a network grid must be, for those that cannot take any."""
_SECTIONS: Mapping[str, Any] = MappingProxyType({"smoothness_range": SmoothnessRange})
"""Fields of configurations that are configurations."""
NAMES = tuple(_KINDS)
_MEANING = (
    "slope",
    "temperature",
    "readout",
    "static_block",
    "integrate_steps",
    "residual",
    "features",
    "pool_norm",
    "downsample",
    "matching",
    "window",
    "backbone_window",
    "smoothness_range",
)


def name_of(config: Config) -> str:
    """Returns the kind's name, as weights carry it."""
    return next(n for n, (known, _) in _KINDS.items() if type(config) is known)


def build(config: Config) -> RegistrationModel:
    """Returns the network of a configuration."""
    return _KINDS[name_of(config)][1](config)


def config_of(kind: str, fields: Mapping[str, Any]) -> Config:
    """Returns a configuration from its fields, lists in place of tuples welcome.

    Args:
      kind: one of `NAMES`.
      fields: by name; the others have their defaults.

    Raises:
      UserError: a field is unknown, or its value is refused.
    """
    return read_fields(_KINDS[kind][0], fields)


def read_fields(known: type[Any], fields: Mapping[str, Any]) -> Any:
    """Returns a configuration of a class from its fields; see `config_of`."""
    names = [field.name for field in dataclasses.fields(known)]
    unknown = [name for name in fields if name not in names]
    if unknown:
        raise UserError(
            f"the network's config has the fields {', '.join(unknown)}, which this "
            f"jaxreg does not know (it knows {', '.join(names)}); install a newer one"
        )
    return known(**{name: _frozen(value, name) for name, value in fields.items()})


def _frozen(value: Any, name: str = "") -> Any:
    """Returns nested lists, as JSON has them, as tuples, and sections as they were."""
    if isinstance(value, Mapping):
        return _SECTIONS[name](**{key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def fitted(
    config: Config,
    variables: Variables,
    shape: Shape,
    fresh: Variables,
    rows: Mapping[int, int],
    known: int,
) -> Variables:
    """Returns weights from elsewhere as a network takes them.

    A bank of prompts is resized to the network grid, and its rows follow their tasks.
    Rows of controllers (UniReg) follow their regions. Weights of every other kind, or
    of other widths, stay as they are.

    Args:
      config: of the network that takes them.
      variables: its own, or of another kind.
      shape: the network grid, D H W.
      fresh: variables of the network, for prompts that are new.
      rows: of the network's bank, or its regions, to those of `variables`; the rest is
        new.
      known: how many rows or regions `variables` have.
    """
    if isinstance(config, UniRegConfig | UniRegRpnConfig):
        return _with_regions(config, variables, fresh, rows, known)
    if not isinstance(config, PromptRegConfig) or not prompts_in(variables):
        return variables
    if bank_of(variables).shape[-1] != bank_of(fresh).shape[-1]:
        return variables
    d, h, w = (n // DIVISOR for n in shape)
    return take_rows(fresh, resize_bank(variables, (d, h, w)), rows)


def _with_regions(
    config: UniRegConfig | UniRegRpnConfig,
    variables: Variables,
    fresh: Variables,
    rows: Mapping[int, int],
    known: int,
) -> Variables:
    # The paper's condition has the regions before the two types, the release after.
    behind = config.conditioning_size - config.regions
    if isinstance(config, UniRegRpnConfig):
        behind -= len(released.TYPES)

    def taken(path, old):
        names = [part.key for part in path]
        if names[-2:] != ["controller", "kernel"]:
            return old
        new: Any = fresh["params"]
        for name in names:
            new = new.get(name, {})
        if np.ndim(new) != np.ndim(old) or new.shape[-1] != old.shape[-1]:
            return old
        first = new.shape[-2] - behind - config.regions
        regions = (config.regions, known)
        return heads.take_regions(new, old, rows, first, regions)

    params = jax.tree_util.tree_map_with_path(taken, variables["params"])
    return {**variables, "params": params}


def tells_tasks(config: Config) -> Literal["tasks", "regions"] | None:
    """Returns what weights of a network must name: prompts' tasks, heads' regions."""
    if isinstance(config, PromptRegConfig):
        return "tasks"
    if isinstance(config, UniRegConfig | UniRegRpnConfig) and config.head == "dynamic":
        return "regions"
    return None


def names_in(config: Config, variables: Variables) -> int:
    """Returns how many prompts or regions weights have; 0 if they know no tasks."""
    if isinstance(config, UniRegConfig | UniRegRpnConfig):
        return config.regions if config.head == "dynamic" else 0
    return prompts_in(variables)


def with_names(config: Config, names: Sequence[str], tasks: Tasks) -> Config:
    """Returns the configuration for as many prompts or regions as there are names.

    Args:
      config: of any network; one that knows no tasks stays as it is.
      names: of the bank's rows or of the regions.
      tasks: region and type of each task, for networks that are told regions.
    """
    if isinstance(config, PromptRegConfig):
        return dataclasses.replace(config, tasks=len(names))
    if isinstance(config, UniRegConfig | UniRegRpnConfig):
        return dataclasses.replace(config, regions=len(names), tasks=tuple(tasks))
    return config


def correlates_sam(config: Config) -> bool:
    """Whether a network needs a SAM network among its variables."""
    return isinstance(config, UniRegConfig) and config.features == "sam"


def smoothness_range(config: Config) -> SmoothnessRange | None:
    """Returns the weights of smoothness that a network can be asked for."""
    if isinstance(config, UniRegConfig | UniRegRpnConfig) and config.head == "dynamic":
        return config.smoothness_range
    return None


def hounsfield_window(config: Config | None) -> tuple[float, float] | None:
    """Returns the Hounsfield units that a CT scan's 0 and 1 must be for a network.

    None where any scaling will do that is the same in training and in use.
    """
    if isinstance(config, UniRegConfig) and (
        config.features == "sam" or config.backbone_window is not None
    ):
        return config.window
    return None


def reads_ct_alone(config: Config | None) -> bool:
    """Whether a network takes its images for Hounsfield units."""
    return isinstance(config, UniRegConfig) and config.backbone_window is not None


def network_window(config: Config | None) -> tuple[float, float] | None:
    """Returns the Hounsfield units that a network sees where a task has none.

    None for networks that see all that was loaded.
    """
    return config.backbone_window if isinstance(config, UniRegConfig) else None


def task_window(
    config: Config, task: tuple[int, heads.Pairing]
) -> tuple[float, float] | None:
    """Returns the Hounsfield units that a network is shown of a task; see `Tasks`.

    Where training did not have the task, those of the same region, if it has but one.
    """
    shown = getattr(config, "task_windows", ())
    tasks = getattr(config, "tasks", ())
    for alike in (lambda t: t == task, lambda t: t[0] == task[0]):
        found = {w for w, t in zip(shown, tasks, strict=False) if alike(t)}
        if len(found) == 1:
            return found.pop()
    return network_window(config)


def with_network_windows(
    config: Config, windows: Sequence[tuple[float, float] | None]
) -> Config:
    """Returns the configuration with the window of each of its tasks.

    Args:
      config: of any network; one that reads no Hounsfield units stays as it is.
      windows: of each task; None for the network's own.
    """
    own = network_window(config)
    if own is None or not isinstance(config, UniRegConfig):
        return config
    shown = tuple(window or own for window in windows)
    if set(shown) <= {own}:
        shown = ()
    return dataclasses.replace(config, task_windows=shown)


def with_sam_window(config: Config, window: tuple[float, float]) -> Config:
    """Returns the configuration of a UniReg for a SAM network that knows a window."""
    assert isinstance(config, UniRegConfig)  # no other network has one
    low, high = window
    return dataclasses.replace(config, sam_window=(float(low), float(high)))


def with_every_task(
    config: Config, tasks: Tasks, window: tuple[float, float] | None
) -> Config:
    """Returns the configuration for another table of tasks, all with one window.

    Args:
      config: of a network that is told regions.
      tasks: region and type of each.
      window: Hounsfield units that the network is shown; None for its own.
    """
    assert isinstance(config, UniRegConfig | UniRegRpnConfig)  # the caller's promise
    if isinstance(config, UniRegRpnConfig):
        return dataclasses.replace(config, tasks=tasks)
    own = config.backbone_window and (window or config.backbone_window)
    return dataclasses.replace(
        config, tasks=tasks, task_windows=(), backbone_window=own
    )


def prompts_in(variables: Variables) -> int:
    """Returns how many static prompts weights of any kind hold."""
    bottleneck = variables["params"].get("bottleneck", {})
    return len(bank_of(variables)) if "generator" in bottleneck else 0


def unlike(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields that give the same weights another meaning in a network.

    Args:
      config: of the network that takes them.
      fields: of the network that they were trained in.

    Returns:
      Name to what it was there.
    """
    said = {name: _frozen(fields[name], name) for name in _MEANING if name in fields}
    return {
        name: fields[name]
        for name, value in said.items()
        if getattr(config, name, value) != value
    }


def check_grid(config: Config, shape: Shape) -> None:
    """Checks a network grid.

    Raises:
      UserError: the network cannot take it, see its module's `check_shape`.
    """
    if check := _CHECKS.get(name_of(config)):
        check(shape)


def prompt_mask(params: Any, *, rows: Sequence[int]) -> Any:
    """Returns 1 for some static prompts of a bank and 0 for all other parameters."""

    def mask(path, leaf):
        names = [getattr(part, "key", None) for part in path]
        if names != ["bottleneck", "generator", "bank"]:
            return jnp.zeros((1,) * leaf.ndim, leaf.dtype)
        chosen = jnp.isin(jnp.arange(len(leaf)), jnp.asarray(rows))
        return chosen.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(mask, params)
