"""The variables that training starts from."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxreg.errors import UserError
from jaxreg.experiments import config as config_lib
from jaxreg.experiments import folder
from jaxreg.experiments.config import Experiment
from jaxreg.models import registry
from jaxreg.models import sam as sam_lib
from jaxreg.models.sam import TrainedSam
from jaxreg.training.checkpoint_files import named_leaves
from jaxreg.training.stage import Report
from jaxreg.typing import Key, Variables
from jaxreg.weights import bundle, load, zoo

Read = Callable[[str], zoo.LoadedModel]
"""Reads weights by name or path: `load.load`, or one that reads no file twice."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """Variables of a network, some of them from another one.

    Attributes:
      variables: the target's tree.
      loaded: names of the leaves that come from the source, "params/step_1/...".
      missing: names of the target alone; they stay as they were.
      unexpected: names of the source alone.
      misshapen: names of both, with other shapes; they stay as they were.
    """

    variables: Variables
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]


def weights_key(seed: int) -> Key:
    """Returns the key of fresh weights, from which each layer's key follows by name."""
    return jax.random.split(jax.random.key(seed))[0]


def names_of_start(experiment: Experiment, read: Read = load.load) -> tuple[str, ...]:
    """Returns the names of the prompts, or regions, of the weights to start from.

    Raises:
      UserError: the weights do not name them and `train.start_tasks` does not either,
        or it has another number of names.
    """
    start, names = experiment.train.start, experiment.train.start_tasks
    model = experiment.model
    if start is None or model.names_entry is None:
        return ()
    loaded = read(start)
    config = registry.config_of(loaded.bundle.model, loaded.bundle.config)
    count = config.names_in(loaded.variables)
    if not count:
        return ()
    names = names or tuple(loaded.bundle.preprocessing.get(model.names_entry, ()))
    if len(set(names)) != count:
        raise UserError(
            f"{start} has {count} {model.conditioning}, but their names are "
            f"{', '.join(names) or 'not stored with it'}; give `train.start_tasks` "
            "with a name for each, in their order"
        )
    return tuple(names)


def initial_variables(
    experiment: Experiment,
    model: Any,
    before: Variables | None,
    report: Report,
    bank: Sequence[str] = (),
    known: Sequence[str] = (),
    sam: TrainedSam | None = None,
    read: Read = load.load,
) -> Variables:
    """Returns the variables that a stage starts with.

    Args:
      experiment: with the model and, for the first stage, `train.start`.
      model: the network.
      before: of the previous stage, or None.
      report: takes a sentence about what was loaded.
      bank: names of the network's prompts or regions.
      known: those of the weights to start from.
      sam: the network for a UniReg's embeddings, see `sam_of`.
      read: reads the weights of `train.start`.

    Raises:
      UserError: the weights to start from have other sizes, nothing in common, or,
        where only prompts are trained, not all that the network needs.
    """
    train, shape = experiment.train, experiment.loading.shape
    if before is None and train.start is None:
        return fresh_variables(experiment, model, sam)
    fresh = fresh_variables(experiment, model)
    if before is not None:
        source, name = before, "the previous stage"
    else:
        assert train.start is not None
        loaded = read(train.start)
        source, name = loaded.variables, f"train.start {train.start}"
        _compare_meaning(experiment, loaded, report)
    rows = {i: known.index(task) for i, task in enumerate(bank) if task in known}
    own = experiment.model.frozen  # what is frozen joins at the end
    source = {name: tree for name, tree in source.items() if name not in own}
    source = experiment.model.fitted(source, shape, fresh, rows, len(known))
    merged = merge_variables(fresh, source)
    _check_merged(merged, name, train.only)
    report(
        f"started from {name}: {len(merged.loaded)} arrays loaded, "
        f"{len(merged.missing)} fresh, {len(merged.unexpected)} not used"
    )
    if known:
        new = [task for task in bank if task not in known]
        what = experiment.model.conditioning
        report(f"{what} kept: {', '.join(known)}; new: {', '.join(new) or 'none'}")
    return _with_sam(merged.variables, sam)


def fresh_variables(
    experiment: Experiment, model: Any, sam: TrainedSam | None = None
) -> Variables:
    """Returns untrained variables, and those of `sam`."""
    key = weights_key(experiment.train.seed)
    fresh = jax.tree.map(np.asarray, model.init(key, experiment.loading.shape))
    return _with_sam(fresh, sam)


def _check_merged(merged: Merged, name: str, only: str) -> None:
    """Checks that the weights to start from fit the network.

    Args:
      merged: the network's variables with those weights.
      name: of the weights.
      only: `TrainConfig.only`.
    """
    if merged.misshapen or not merged.loaded:
        wrong = ", ".join(merged.misshapen[:3]) or "no name in common"
        raise UserError(
            f"{name} does not fit the network ({wrong}); give the model's section "
            "(such as `model.channels_down` or `model.channels`) the sizes of the "
            "weights"
        )
    if only != "all" and merged.missing:
        raise UserError(
            f"train.only is {only}, but {name} lacks {merged.missing[0]}, which "
            "would stay untrained; start from weights of the same network, or give "
            "`train.only` all"
        )


def _with_sam(variables: Variables, sam: TrainedSam | None) -> Variables:
    """Returns a network's variables with those of the SAM network that it needs."""
    return variables if sam is None else sam_lib.with_sam(variables, sam.variables)


def sam_of(
    experiment: Experiment,
    out: pathlib.Path | None = None,
    read: Read = load.load,
) -> TrainedSam | None:
    """Returns the SAM network that a UniReg of the experiment correlates.

    That of the run in `out`, of `train.sam`, or of `train.start`, in this order.

    Raises:
      UserError: it is needed and there is none, or given and no stage needs it, or it
        knows voxels of another size.
    """
    stages = [during for _, during in config_lib.stages(experiment)]
    needing = [during for during in stages if during.model.needs_sam]
    named, start = experiment.train.sam, experiment.train.start
    if not needing:
        if named is not None:
            raise UserError(
                f"train.sam is {named}, but the network correlates no embeddings of "
                "SAM; leave it out, or give `model.features` sam"
            )
        return None
    found = None
    if out is not None and (out / folder.SAM).is_dir():
        found = load.load_sam(out / folder.SAM)
    elif named is not None:
        found = load.load_sam(named)
    elif start is not None:
        found = zoo.sam_of(read(start))
    if found is None:
        raise UserError(
            "model.features is sam, but there are no SAM weights; give `train.sam` "
            "PATH (jaxreg train --config configs/sam.py makes some), or "
            "`model.features` mind"
        )
    for during in needing:
        loading = during.loading
        if loading.resize == "pad_crop" and loading.spacing_mm != found.spacing_mm:
            raise UserError(
                f"the SAM network knows voxels of {found.spacing_mm:g} mm, the network "
                f"grid has {loading.spacing_mm:g} mm; give `loading.spacing_mm` "
                f"{found.spacing_mm:g}"
            )
    return found


def bundle_of_sam(sam: TrainedSam) -> bundle.Bundle:
    """Returns the bundle under which a run keeps SAM's network."""
    return bundle.Bundle(
        variables=sam.variables,
        model=zoo.SAM,
        config=dataclasses.asdict(sam.config),
        preprocessing=zoo.sam_rule(sam),
        source="the SAM network that a training run was given",
        licence="that of the network that the run was given",
    )


def _compare_meaning(experiment: Experiment, loaded: Any, report: Report) -> None:
    """Reports settings with which the weights to start from mean something else.

    Raises:
      UserError: only prompts are trained, in a network of another form.
    """
    other = registry.unlike(experiment.model, loaded.bundle.config)
    if not other:
        return
    start = experiment.train.start
    text = ", ".join(f"{name} {value}" for name, value in other.items())
    if experiment.train.only != "all":
        options = " ".join(f"`model.{name}` {value}" for name, value in other.items())
        raise UserError(
            f"{start} was trained with {text}, so its frozen part would mean something "
            f"else here; give {options}"
        )
    report(f"{start} was trained with {text}; this run differs")


def merge_variables(target: Variables, source: Variables) -> Merged:
    """Replaces leaves of one tree by those of the same name and shape of another.

    A warm start: the first stage's network gives step_1 to step_3 of the second's, and
    step_4 stays fresh.

    Args:
      target: variables of the network to be trained.
      source: variables of another network.

    Returns:
      The variables, in the target's types, and what became of each name.
    """
    wanted, given = named_leaves(target), named_leaves(source)
    shared = [name for name in wanted if name in given]
    fitting = {n for n in shared if np.shape(given[n]) == np.shape(wanted[n])}
    merged = [
        np.asarray(given[name]).astype(np.asarray(leaf).dtype)
        if name in fitting
        else leaf
        for name, leaf in wanted.items()
    ]
    return Merged(
        variables=jax.tree.unflatten(jax.tree.structure(target), merged),
        loaded=tuple(name for name in shared if name in fitting),
        missing=tuple(name for name in wanted if name not in given),
        unexpected=tuple(name for name in given if name not in wanted),
        misshapen=tuple(name for name in shared if name not in fitting),
    )
