"""Pairs of held-out scans, from the manifest that training reads."""

import dataclasses
from typing import Any

from jaxreg.data import modality as modality_lib
from jaxreg.data.manifest import neighbours as neighbours_lib
from jaxreg.data.manifest import records
from jaxreg.data.pair_list import Pairing, PairSpec
from jaxreg.errors import UserError
from jaxreg.registration import conditioning
from jaxreg.registration import options as options_lib
from jaxreg.registration.rows import conditioning_of_pair
from jaxreg.weights import zoo


def pairs_of_manifest(
    manifest: records.Manifest,
    *,
    split: str = "val",
    neighbours: int = 3,
    across_modalities: bool = False,
    model: zoo.LoadedModel | None = None,
    options: options_lib.Options | None = None,
) -> tuple[PairSpec, ...]:
    """Returns the pairs of held-out scans, by `neighbours.neighbour_pairs`.

    A pair's task is its dataset. Label maps and landmarks come along where both scans
    have them. A dataset of which the manifest says no pairing is paired as the network
    will be told of it: as the options say, or as it was trained on it.

    Args:
      manifest: the scans.
      split: which of them.
      neighbours: moving images per fixed one, at most.
      across_modalities: see `neighbours.neighbour_pairs`.
      model: that is to register them.
      options: how; the defaults if None.

    Raises:
      UserError: the split leaves no pair.
    """
    chosen = [record for record in manifest.records if record.split == split]
    pairings = {
        (record.dataset, record.region): _trained_pairing(record, model, options)
        for record in chosen
        if record.dataset in manifest.unpaired
    }
    chosen = [
        dataclasses.replace(record, pairing=pairing)
        if (pairing := pairings.get((record.dataset, record.region))) is not None
        else record
        for record in chosen
    ]
    found = neighbours_lib.neighbour_pairs(
        chosen, neighbours, across_modalities=across_modalities
    )
    if not found:
        held = any(record.split == "val" for record in manifest.records)
        mend = (
            "give another `split`, or hold out at least two subjects (of intra pairs: "
            "two scans of one)"
            if held or split != "val"
            else "give `holdout` 5, `split` train, or a column split"
        )
        raise UserError(
            f'{manifest.source} has {len(chosen)} scans of the split "{split}" and no '
            f"pair among them; {mend}"
        )
    pairs = []
    for fixed, moving in found:
        pair = _pair_of_records(fixed, moving)
        if pairings.get((fixed.dataset, fixed.region), "") is None:
            pair = dataclasses.replace(pair, pairing=None)
        pairs.append(pair)
    return tuple(pairs)


def _trained_pairing(
    record: records.Record,
    model: zoo.LoadedModel | None,
    options: options_lib.Options | None,
) -> Pairing | None:
    """Returns a dataset's pairing in a network's training; None if unsure."""
    if model is None or not conditioning.needs_region(model):
        return None
    pair = dataclasses.replace(_pair_of_records(record, record), pairing=None)
    try:
        return conditioning_of_pair(
            pair, model, options or options_lib.Options()
        ).pairing
    except UserError:  # which is said of the pair, with its name
        return None


def _pair_of_records(fixed: records.Record, moving: records.Record) -> PairSpec:
    fields: dict[str, Any] = {}
    for name in ("label", "landmarks", "mask"):
        both = {"fixed": getattr(fixed, name), "moving": getattr(moving, name)}
        if name == "mask" or None not in both.values():
            fields |= {f"{side}_{name}": path for side, path in both.items()}
    return PairSpec(
        fixed=fixed.image,
        moving=moving.image,
        fixed_modality=modality_lib.canonical(fixed.modality),
        moving_modality=modality_lib.canonical(moving.modality),
        task=fixed.dataset,
        region=fixed.region or None,
        pairing=fixed.pairing,
        **fields,
    )
