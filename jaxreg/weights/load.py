"""Loading of weights by name or path."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxreg.data.network_grid import ResamplingRule
from jaxreg.errors import UserError, near_match
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.models.sam import (
    SamConfig,
    TrainedSam,
)
from jaxreg.typing import Variables
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import download, zoo
from jaxreg.weights.bundle import Bundle
from jaxreg.weights.download import PathLike, Progress
from jaxreg.weights.pytorch import sam, unireg_rpn
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.zoo import Kind, LoadedModel


def load(
    name_or_path: PathLike,
    *,
    cache_dir: PathLike | None = None,
    base_url: str | None = None,
    timeout_s: float = 30.0,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a network by its name in `ZOO` or by the path of its weights.

    Args:
      name_or_path: a name; else a checkpoint folder; else a PyTorch file, which is
        converted on the fly. A name wins over a folder called so: write ./NAME.
      cache_dir: where fetched weights are kept; `cache_dir()` if None.
      base_url: the release page, if not GitHub's.
      timeout_s: seconds without an answer after which a server counts as absent.
      progress: called while a file is fetched.

    Returns:
      The network with its weights in host memory.

    Raises:
      UserError: the name is unknown, the weights cannot be fetched, are damaged or are
        those of another architecture. Where fetching failed, the sentence says what to
        download and where to put it.
    """
    name = os.fspath(name_or_path)
    if name.lower() == zoo.SAM and not os.path.exists(name):
        raise zoo.no_registration(name)
    if name in zoo.ZOO:
        folder = download.cache_folder(cache_dir)
        bundle = _from_cache(name, folder)
        if bundle is None:
            bundle = download.fill_cache(name, folder, base_url, timeout_s, progress)
    else:
        bundle = _from_path(name)
    if bundle.model == zoo.SAM:
        raise zoo.no_registration(name)
    kind = zoo.kind_named(bundle.model, name)
    kind.check_variables(bundle.variables, bundle.config, source=name)
    model = registry.build(registry.config_of(bundle.model, bundle.config))
    loaded = LoadedModel(name, model, bundle.variables, bundle)
    _check_stated(loaded)
    return loaded


def _check_stated(model: LoadedModel) -> None:
    """Checks what weights say of their scans, to which a user may add by hand.

    Raises:
      UserError: a value that cannot be; names the weights.
    """
    stated = model.bundle.preprocessing
    try:
        ResamplingRule.of_weights(stated)
        for name in ("ct_window", "mri_quantiles", "similarity_window"):
            if stated.get(name) is not None:
                low, high = stated[name]
                _ = float(low), float(high)
        _ = model.shape, model.tasks, model.validation_scans
    except (TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{model.name} says of its preprocessing what cannot be ({error}); mend "
            "it in the folder's jaxreg.json, or fetch the weights again"
        ) from error


def load_sam(path: PathLike) -> TrainedSam:
    """Loads SAM from a checkpoint folder or a PyTorch file; nothing is downloaded.

    Raises:
      UserError: there is no such file, or it holds damaged weights or another network.
    """
    name = os.fspath(path)
    there = pathlib.Path(name).expanduser()
    if not there.exists():
        raise UserError(
            f"there are no SAM weights at {name}; give a checkpoint folder of jaxreg "
            "(as jaxreg train --config configs/sam.py leaves one), or the PyTorch "
            "file of the released code"
        )
    bundle = _from_path(str(there))
    if bundle.model != zoo.SAM:
        raise UserError(
            f"{name} holds a {bundle.model} network, which registers scans and "
            "describes no places; give the weights of SAM"
        )
    sam.check_variables(bundle.variables, bundle.config, source=name)
    config = registry.read_fields(SamConfig, bundle.config)
    return zoo.with_rule(config, bundle.variables, bundle.preprocessing)


def in_order(
    kind: Kind, variables: Variables, names: tuple[str, ...], source: str
) -> tuple[Variables, tuple[str, ...]]:
    """Returns weights and their prompts' or regions' names as the released code orders.

    Raises:
      UserError: there are other names than prompts, or see `Kind.in_order`.
    """
    if kind.in_order is not None:
        return kind.in_order(variables, names, source=source)
    count = registry.prompts_in(variables)
    if len(names) != count or len(set(names)) < count:
        raise UserError(
            f"{source} names the prompts {', '.join(names)}, but its weights hold "
            f"{count}; give a name of its own to each"
        )
    return variables, names


def _from_cache(name: str, folder: pathlib.Path) -> Bundle | None:
    """Returns the checkpoint of a name, or None where there is none yet."""
    place = folder / name
    if not place.exists():
        return None
    try:
        bundle = bundle_lib.load_bundle(place)
    except UserError as error:
        raise UserError(f"{error}. Remove {place} to fetch it anew") from error
    zoo.check_sizes(
        zoo.ZOO[name], bundle.config, f"{place} (remove it to fetch it anew)"
    )
    # An older jaxreg knew less of the published networks.
    said = {**zoo.ZOO[name].preprocessing, **bundle.preprocessing}
    return dataclasses.replace(bundle, preprocessing=said)


def _from_path(name: str) -> Bundle:
    """Reads weights that are not in the zoo."""
    path = pathlib.Path(name).expanduser()
    looks_like_path = path.suffix.lower() in zoo.TORCH_SUFFIXES or len(path.parts) > 1
    if not os.path.exists(path) and not looks_like_path:
        raise UserError(
            f"there is no model {name!r}{near_match(name, zoo.ZOO, most=2)}; expected "
            f"one of {', '.join(zoo.ZOO)}, a checkpoint folder or a PyTorch file"
        )
    if zoo.is_torch(path):
        return load_torch(path, None)
    return bundle_lib.load_bundle(path)


def _kind_of(state: Mapping[str, Any]) -> str:
    """Says whose network the names of a PyTorch file are."""
    if any(key.startswith(("backbone.conv1.conv.", "read_out_head.")) for key in state):
        return zoo.SAM
    if any(key.startswith("prompt_generator.") for key in state):
        return "promptreg"
    if any(key.startswith("encoder_moving.") for key in state):
        return "rdp"
    return "unireg_rpn" if unireg_rpn.is_released(state) else "gradicon"


def load_torch(path: pathlib.Path, model: str | None) -> Bundle:
    """Reads a user's own PyTorch file."""
    state = state_lib.read_state_dict(path)
    model = model or _kind_of(state)
    kind = zoo.KINDS[model]
    config = kind.read_config(state, source=str(path))
    variables = kind.to_variables(state, config, source=str(path))
    preprocessing = dict(kind.preprocessing(variables))
    if kind.names and (names := state_lib.read_names(path, kind.names)):
        # What else is said of the tasks goes by the released order.
        variables, names = in_order(kind, variables, names, str(path))
        preprocessing[kind.names] = list(names)
    return Bundle(
        variables=variables,
        model=model,
        config=config,
        preprocessing=preprocessing,
        source=f"{path.name}; sha256 {files.sha256(path)}",
        licence="not stated by the file",
    )
