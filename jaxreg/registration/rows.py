"""The options of each row of a list of pairs."""

import dataclasses
import pathlib
import warnings
from collections.abc import Iterable, Sequence

from jaxreg.data import preprocess
from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.io import files, volumes
from jaxreg.registration import conditioning, preparation
from jaxreg.registration import options as options_lib
from jaxreg.space.grid import Grid
from jaxreg.weights import zoo


def conditioning_of_pair(
    pair: PairSpec, model: zoo.LoadedModel, options: options_lib.Options
) -> conditioning.Conditioning:
    """Returns the conditioning of a network for a pair: by the options, else the pair.

    Raises:
      UserError: see `conditioning.condition`; it names the column.
    """
    chosen, source = options_of(pair, options, model), "`task`"
    if options.task == "auto" and conditioning.needs_region(model):
        columns = {"region": pair.region, "task": pair.task}
        column = next((n for n, word in columns.items() if word == chosen.task), None)
        source = f"the column {column}" if column else "without a column task, `task`"
    return conditioning.condition(
        model, chosen.task, chosen.pairing, chosen.smoothness, source=source
    )


def options_of(
    pair: PairSpec, options: options_lib.Options, model: zoo.LoadedModel | None = None
) -> options_lib.Options:
    """Returns the options with a pair's modalities and conditioning."""
    chosen = dataclasses.replace(
        options,
        fixed_modality=pair.fixed_modality or options.fixed_modality,
        moving_modality=pair.moving_modality or options.moving_modality,
    )
    if model is None or not conditioning.needs_region(model):
        return chosen
    own = conditioning.task_name_of(model, pair.task, pair.region)
    return dataclasses.replace(
        chosen,
        task=own if options.task == "auto" else options.task,
        pairing=options.pairing or pair.pairing,
    )


def uses_masks(options: options_lib.Options) -> bool:
    """Whether the masks of a list have a use."""
    return options.input_masking or options.loss_function_masking


def warn_of_idle_masks(
    pairs: Iterable[PairSpec], options: options_lib.Options, *, stacklevel: int
) -> None:
    """Warns if pairs have masks and the options no use for them.

    Args:
      pairs: of a list.
      options: of all of them.
      stacklevel: as in `warnings.warn`; 2 is the caller.
    """
    masked = any(pair.fixed_mask or pair.moving_mask for pair in pairs)
    if masked and not uses_masks(options):
        warnings.warn(
            "the masks have no effect without `input_masking` or "
            "`loss_function_masking`",
            stacklevel=stacklevel,
        )


def warn_of_validation_scans(
    pairs: Sequence[PairSpec], model: zoo.LoadedModel | None, *, stacklevel: int
) -> None:
    """Warns of pairs with scans of subjects on which the weights were chosen.

    Args:
      pairs: to be scored.
      model: the network; weights that do not tell what chose them are trusted.
      stacklevel: as in `warnings.warn`; 2 is the caller.
    """
    if model is None:
        return
    seen = [
        pair
        for pair in pairs
        if model.validation_scans
        & {files.scan_name(pair.fixed), files.scan_name(pair.moving)}
    ]
    if seen:
        name = files.scan_name(seen[0].fixed)
        warnings.warn(
            f"{len(seen)} of {len(pairs)} pairs, the first with {name} as fixed scan, "
            f"are of subjects on which the weights of {model.name} were chosen in "
            "training (by the names of their files), so that their scores are too good "
            "for held-out ones; evaluate others, with `split` test or another list",
            stacklevel=stacklevel,
        )


def check_conditioning(
    pairs: Sequence[PairSpec],
    names: Sequence[str],
    model: zoo.LoadedModel | None,
    options: options_lib.Options,
    smoothness: Sequence[float] = (),
) -> None:
    """Checks that a network takes each pair's conditioning, and warns of doubts.

    Args:
      pairs: the pairs.
      names: what to call them in a message.
      model: the network, if there is one.
      options: of all pairs.
      smoothness: what the network is to be asked for; the options' own if empty.

    Raises:
      UserError: see `conditioning.condition` and `preparation.check_units`; names the
        pair.
    """
    if model is None:
        conditioning.check_unconditioned(
            options.task, options.pairing, options.smoothness
        )
        return
    doubts: dict[str, None] = {}
    for pair, name in zip(pairs, names, strict=True):
        try:
            for weight in smoothness or (options.smoothness,):
                asking = dataclasses.replace(options, smoothness=weight)
                conditioned = conditioning_of_pair(pair, model, asking)
                shown = options_of(pair, options, model)
                preparation.check_units(conditioned.model, shown)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if not conditioning.needs_region(model):
            continue
        if options.pairing and pair.pairing not in (None, options.pairing):
            doubts[
                f"{pair.table} is {pair.pairing} in the list, but `pairing` is "
                f"{options.pairing}, which the network is told"
            ] = None
        elif not conditioned.trained:
            doubts[
                f"{pair.table} is told to {model.name} as {conditioned.key}, which "
                "training did not have; correct the column pairing, or give `pairing`, "
                "if the pairs are of the other type"
            ] = None
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=3)


def check_grids(pair: PairSpec, side: str, grids: dict[pathlib.Path, Grid]) -> None:
    """Checks that a scan can be read and that what belongs to it lies on its grid.

    Args:
      pair: the pair.
      side: "fixed" or "moving".
      grids: those that were read before, by path; the others are added.

    Raises:
      UserError: as far as headers show it.
    """
    image = getattr(pair, side)
    for name in (side, f"{side}_label", f"{side}_mask"):
        path = getattr(pair, name)
        if path is None:
            continue
        if path not in grids:
            grids[path] = volumes.read_grid(path)
        preprocess.check_grids(grids[path], grids[image], f"{name} {path}", image)
