"""Loading of weights by name or path."""

import dataclasses
import functools
import os
import pathlib

import jax
import numpy as np

from jaxreg.data.network_grid import ResamplingRule
from jaxreg.errors import UserError, near_match
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.models.base import NetworkConfig
from jaxreg.models.sam import TrainedSam
from jaxreg.typing import Variables
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import download, zoo
from jaxreg.weights.bundle import Bundle
from jaxreg.weights.download import PathLike, Progress
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.table import kind_of_file, table_of
from jaxreg.weights.zoo import LoadedModel


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
    check_variables(bundle, name)
    model = registry.config_of(bundle.model, bundle.config).build()
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
        _ = model.shape, model.task_names, model.validation_scans
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
    check_variables(bundle, name)
    config = registry.config_of(bundle.model, bundle.config)
    return zoo.with_rule(config, bundle.variables, bundle.preprocessing)


def check_variables(bundle: Bundle, source: str) -> None:
    """Checks that a bundle's variables are exactly those of its network.

    Raises:
      UserError: leaves are unknown, missing, misshapen, of the wrong type or not
        finite; or the kind of network is unknown.
    """
    kind = registry.kind_named(bundle.model, source)
    variables = bundle.variables
    own = {name: tree for name, tree in variables.items() if name not in kind.frozen}
    if kind.tensor_table:
        table = table_of(kind, source=source)
        table.check_variables(own, bundle.config, source=source)
    else:
        _check_shapes(bundle, own, source)
    for name in kind.frozen:
        if name in variables:
            table = table_of(registry.kind_named(name, source), source=source)
            table.check_variables(variables[name], source=f"{source}, {name}")


def _check_shapes(bundle: Bundle, variables: Variables, source: str) -> None:
    """Checks variables by fresh ones, where no table names them.

    Raises:
      UserError: leaves are unknown, missing or misshapen.
    """
    config: NetworkConfig = registry.config_of(bundle.model, bundle.config)
    model = LoadedModel(source, config.build(), variables, bundle)
    _check_stated(model)
    shape = model.shape if "shape" in bundle.preprocessing else config.least_grid
    init = functools.partial(model.model.init, shape=shape)
    fresh = jax.eval_shape(init, jax.random.key(0))
    expected, got = (
        {
            jax.tree_util.keystr(path): np.shape(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (fresh, variables)
    )
    wrong = [k for k in expected | got if expected.get(k) != got.get(k)]
    wrong += [name for name in variables if name not in fresh]
    if wrong:
        raise UserError(
            f"{source} does not hold the variables of this {config.title} network "
            f"({wrong[0]} is missing, misshapen or unknown); give its own weights"
        )


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
            f"there is no model {name!r}{near_match(name, zoo.ZOO)}; expected "
            f"one of {', '.join(zoo.ZOO)}, a checkpoint folder or a PyTorch file"
        )
    if zoo.is_torch(path):
        return load_torch(path, None)
    return bundle_lib.load_bundle(path)


def load_torch(path: pathlib.Path, model: str | None) -> Bundle:
    """Reads a user's own PyTorch file; its names tell the kind of network if None."""
    source = str(path)
    state = state_lib.read_state_dict(path)
    model = model or kind_of_file(state)
    table = table_of(registry.kind_named(model, source), source=source)
    fields = table.read_config(state, source=source)
    variables = table.to_variables(state, source=source)
    preprocessing = dict(table.preprocessing(variables))
    config = registry.config_of(model, fields)
    entry = config.names_entry
    if entry and (names := state_lib.read_names(path, entry)):
        # What else is said of the tasks goes by the released order.
        variables, names = table.in_order(config, variables, names, source=source)
        preprocessing[entry] = list(names)
    return Bundle(
        variables=variables,
        model=model,
        config=fields,
        preprocessing=preprocessing,
        source=f"{path.name}; sha256 {files.sha256(path)}",
        licence="not stated by the file",
    )
