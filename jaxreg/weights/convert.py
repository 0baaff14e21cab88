"""Conversion of weights between checkpoint folders and PyTorch files."""

import pathlib
import warnings

from jaxreg.data.network_grid import ANY_ORIENTATION
from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo
from jaxreg.weights.bundle import Bundle
from jaxreg.weights.download import PathLike
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.table import TensorTable, table_of


def convert(source: PathLike, target: PathLike, *, model: str | None = None) -> None:
    """Converts weights between a checkpoint folder and a PyTorch file.

    Args:
      source: a checkpoint folder, or a PyTorch file (.trch, .pth, .pt).
      target: the other of the two; replaced if it exists.
      model: kind of network, or a name of `ZOO`; by the tensors' names if None. The
        tensors decide the sizes.

    Raises:
      UserError: both are of the same kind, the model is unknown, the weights are
        damaged or of another architecture, or the target cannot be written. Nothing is
        left half-written.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if model is not None:
        model = zoo.ZOO[model].model if model in zoo.ZOO else model
        registry.kind_named(model, "`model`")
    from_torch, to_torch = (
        zoo.is_torch(source),
        target.suffix.lower() in zoo.TORCH_SUFFIXES,
    )
    if from_torch == to_torch:
        what = "PyTorch files" if to_torch else "checkpoint folders"
        raise UserError(
            f"{source} and {target} are both {what}; one of them must be a folder and "
            f"the other a file with the extension {' or '.join(zoo.TORCH_SUFFIXES)}"
        )
    if target.suffix.lower() in zoo.OTHER_SUFFIXES:
        raise UserError(
            f"{target} has the extension {target.suffix}, which jaxreg does not write; "
            f"give a folder or a file with {' or '.join(zoo.TORCH_SUFFIXES)}"
        )
    if from_torch:
        bundle_lib.check_checkpoint_path(target)
        bundle_lib.save_bundle(target, load.load_torch(source, model))
        return
    files.check_writable(target, "the target")
    state_lib.require_torch(f"write {target}")
    bundle = bundle_lib.load_bundle(source)
    if model not in (None, bundle.model):
        raise UserError(
            f"{source} holds a {bundle.model} network, `model` says {model}; "
            f"give `model` {bundle.model}"
        )
    kind = registry.kind_named(bundle.model, str(source))
    table = table_of(kind, source=str(source))
    config = registry.config_of(bundle.model, bundle.config)
    variables, beside = bundle.variables, dict(table.beside)
    entry = config.names_entry
    if entry and (names := tuple(bundle.preprocessing.get(entry, ()))):
        variables, names = table.in_order(config, variables, names, source=str(source))
        beside[entry] = list(names)
    state = table.from_variables(variables, bundle.config, source=str(source))
    state_lib.write_state_dict(target, state, wrapper=table.wrapper, beside=beside)
    lost = _unlike_released(bundle, table)
    if lost:
        warnings.warn(
            f"{target} cannot say how its network sees scans; who reads it takes "
            f"{'; '.join(lost)}; keep {source} for use in jaxreg",
            stacklevel=2,
        )


def _unlike_released(bundle: Bundle, table: TensorTable) -> list[str]:
    """Returns what a reader of the PyTorch file takes for weights' preprocessing.

    Where it differs from theirs alone: the file holds tensors and names.
    """
    stated, found = bundle.preprocessing, []
    assumed_by_reader = table.preprocessing(bundle.variables)
    for name, assumed in assumed_by_reader.items():
        own = stated.get(name, assumed)
        if name in ("tasks", "regions", "resize_labels", "orientation"):
            continue
        if isinstance(assumed, list):
            own = list(own)
        if own != assumed:
            found.append(f"{name} {assumed} where it is {own}")
    rules = zip(stated.get("tasks", ()), stated.get("task_rules", ()), strict=False)
    ruled = [name for name, rule in rules if any(v is not None for v in rule.values())]
    if ruled:
        found.append(
            "one window for all tasks and no smoothness of one's own, where the "
            f"training has rules for {', '.join(ruled)}"
        )
    if table.ordered and "regions" not in stated and "regions" in assumed_by_reader:
        found.append(
            f"the regions {', '.join(assumed_by_reader['regions'])} in this order, "
            "where the checkpoint names none"
        )
    orientation = stated.get("orientation", ANY_ORIENTATION)
    if orientation != ANY_ORIENTATION:
        found.append(
            f"scans as they are stored where they were turned to {orientation} (a "
            'checkpoint made of the file needs "orientation": '
            f'"{orientation}" under preprocessing in its jaxreg.json)'
        )
    return found
