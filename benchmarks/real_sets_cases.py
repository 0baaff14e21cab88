"""The labelled sets of real_sets.py: files, labels or landmarks, modalities.

A set is a folder of the data's folder: with pairs.csv, as `jaxreg evaluate --pairs`
reads it, or with images/ and labels/ alone, of which every n-th subject is paired with
its neighbours. What a set says of itself there holds, except for modalities whose
names a set's own list does not tell.
"""

import dataclasses
import pathlib
from typing import Literal

import numpy as np

from jaxreg.data import modality, pair_list
from jaxreg.data.manifest import read
from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.evaluation import pairs as pairs_lib

Kind = Literal["same", "across"]
Measure = Literal["dice", "tre"]


@dataclasses.dataclass(frozen=True)
class RealSet:
    """A set.

    Attributes:
      name: of its folder.
      measure: what says whether a method has helped: Dice, or TRE where landmarks say
        more than the labels.
      labels: those that count; all of either scan if None.
      modalities: of the fixed and the moving scans, instead of the list's; keys of
        `modality.CONTRASTS`.
      holdout: of a folder without pairs.csv, every n-th subject makes the pairs.
    """

    name: str
    measure: Measure = "dice"
    labels: tuple[int, ...] | None = None
    modalities: tuple[str, str] | None = None
    holdout: int = 5


SETS = (
    RealSet("hippocampus"),
    RealSet("mouse_brain", modalities=("t2", "t2")),
    RealSet("oasis_pair", modalities=("t1", "t1")),
    RealSet("colin_mni_aal", modalities=("t1", "t1")),
    RealSet("lung_mr_lobes"),
    RealSet("lung_ct_landmarks", measure="tre"),
    RealSet("brain_tumour_followup", measure="tre", modalities=("t1c", "t1c")),
    RealSet("abdomen_ct_mr"),
    RealSet("prostate_trus_mr", labels=(1,), modalities=("us", "mri")),
)


def pairs_of(real_set: RealSet, data: pathlib.Path) -> dict[str, PairSpec]:
    """Returns a set's pairs by name, shuffled the same way each time.

    The first few are a sample of all, and more of them keep those before.

    Args:
      real_set: the set.
      data: the folder that holds the set's folder.

    Raises:
      UserError: files are missing or do not go together.
    """
    folder = data / real_set.name
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; correct --data, or leave {real_set.name} "
            "out of --sets"
        )
    if (folder / "pairs.csv").is_file():
        listed = pair_list.read_pairs(folder / "pairs.csv")
    else:
        manifest = read.read_manifest(folder, holdout=real_set.holdout)
        listed = pairs_lib.pairs_of_manifest(manifest)
    if real_set.modalities is not None:
        fixed, moving = real_set.modalities
        listed = [
            dataclasses.replace(pair, fixed_modality=fixed, moving_modality=moving)
            for pair in listed
        ]
    named = list(zip(pair_list.pair_names(listed), listed, strict=True))
    order = np.random.default_rng(0).permutation(len(named))
    return dict(named[i] for i in order)


def kind_of(pair: PairSpec) -> Kind:
    """Returns whether tissue may look alike in both scans, by their modalities."""
    names = (pair.fixed_modality or "mri", pair.moving_modality or "mri")
    return "same" if modality.same_contrast(*names) else "across"
