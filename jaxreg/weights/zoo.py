"""Models by name: their networks, preprocessing, licences and sources.

The only place that downloads. A name is fetched once into the cache, converted from
PyTorch's format to a checkpoint (`weights.bundle`), and read from there afterwards:

    CACHE/NAME/        the converted checkpoint
    CACHE/NAME.trch    a file put there by hand, used where nothing can be fetched
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxreg.data.network_grid import ANY_ORIENTATION, ResamplingRule
from jaxreg.errors import UserError, near_match
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.models.base import RegistrationModel
from jaxreg.models.sam import (
    HU_RANGE,
    SPACING_MM,
    SamConfig,
    TrainedSam,
    config_of,
)
from jaxreg.models.unireg import paper as paper_lib
from jaxreg.typing import Variables
from jaxreg.weights.bundle import Bundle
from jaxreg.weights.pytorch import gradicon, promptreg, sam, unireg_rpn
from jaxreg.weights.pytorch import state as state_lib

VALIDATION_SCANS = "validation_scans"
"""Under this name weights tell what chose them, beside their preprocessing."""
BASE_URL = "https://github.com/uncbiag/uniGradICON/releases/download"
TORCH_SUFFIXES = (".trch", ".pth", ".pt")
OTHER_SUFFIXES = (".safetensors", ".onnx", ".npz", ".h5", ".ckpt", ".bin", ".pkl")


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """A published network.

    Attributes:
      title: its name in print.
      model: kind of network, a key of `KINDS`.
      config: fields of the kind's config; the weights must have these sizes.
      preprocessing: what its input must look like.
      parameters: number of trained numbers.
      tasks: anatomies and modalities, one line.
      licence: terms of the weights.
      paper: where it is described.
      asset: the file's place below the release page.
      sha256: published digest of the file, if there is one.
    """

    title: str
    model: str
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    parameters: int
    tasks: str
    licence: str
    paper: str
    asset: str
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A network ready for use.

    Attributes:
      name: what it was asked for by: a name of `ZOO` or a path.
      model: the network; variables are passed to its `apply`.
      variables: its weights, NumPy arrays in host memory.
      bundle: these weights with config, preprocessing, source and licence.
    """

    name: str
    model: RegistrationModel
    variables: Variables
    bundle: Bundle

    @property
    def shape(self) -> tuple[int, int, int]:
        """The network grid that the weights were trained on, D H W voxels."""
        d, h, w = self.bundle.preprocessing.get("shape", (175, 175, 175))
        return int(d), int(h), int(w)

    @property
    def ct_window(self) -> tuple[float, float] | None:
        """The Hounsfield units that were 0 and 1 in training; None: not stated."""
        return self._range("ct_window")

    @property
    def quantile_range(self) -> tuple[float, float] | None:
        """The quantiles of an MRI that were 0 and 1 in training; None: not stated."""
        return self._range("mri_quantiles")

    @property
    def foreground(self) -> bool:
        """Whether these quantiles were of the voxels above 0 alone."""
        return bool(self.bundle.preprocessing.get("mri_foreground", False))

    @property
    def mask_inputs(self) -> bool:
        """Whether it was trained on scans that are 0 outside their masks."""
        return bool(self.bundle.preprocessing.get("mask_inputs", False))

    @property
    def orientation(self) -> str | None:
        """How the scans of its training lay: "RAS", "any" if all ways; None: not said.

        See `preprocess.Placement`.
        """
        return self.bundle.preprocessing.get("orientation")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks it was trained on, in the order of its prompt bank."""
        return tuple(self.bundle.preprocessing.get("tasks", ()))

    @property
    def validation_scans(self) -> frozenset[str]:
        """Scans, see `files.scan_name`, of the subjects on which it was chosen."""
        return frozenset(self.bundle.preprocessing.get(VALIDATION_SCANS, ()))

    def _range(self, name: str) -> tuple[float, float] | None:
        stated = self.bundle.preprocessing.get(name)
        if stated is None:
            return None
        low, high = stated
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How networks of one architecture are converted.

    Attributes:
      read_config: PyTorch's tensors -> config fields.
      to_variables: PyTorch's tensors, config fields -> variables.
      from_variables: the reverse.
      check_variables: raises UserError where variables do not fit config fields.
      preprocessing: variables -> that of weights that do not say their own.
      wrapper: the entry of a PyTorch file that holds the tensors, if they are not
        all of it.
      beside: further entries of such a file.
      names: the entry of the preprocessing, and of such a file, that names the prompts
        or the regions of the weights, in their order.
      in_order: variables and these names -> both in the order of the released code;
        raises UserError where it cannot hold them. None where it has no order.
    """

    read_config: Callable[..., dict[str, Any]]
    to_variables: Callable[..., Variables]
    from_variables: Callable[..., dict[str, Any]]
    check_variables: Callable[..., None]
    preprocessing: Callable[[Variables], Mapping[str, Any]]
    wrapper: str | None = None
    beside: Mapping[str, Any] | None = None
    names: str | None = None
    in_order: Callable[..., tuple[Variables, tuple[str, ...]]] | None = None


_GRADICON_CONFIG = {
    "channels_down": (2, 16, 32, 64, 256, 512),
    "channels_up": (16, 32, 64, 128, 256),
    "halvings": 2,
    "refinements": 1,
}
GRADICON_PREPROCESSING = {
    "shape": [175, 175, 175],
    "axes": "D H W: NIfTI's i, j, k reversed; the image's direction is not used",
    "resize": "linear, half-pixel",
    "resize_labels": "nearest, floor",
    "ct_window": [-1000.0, 1000.0],
    "mri_quantiles": [0.0, 0.99],
}
PROMPTREG_PREPROCESSING = {
    "axes": "I J K: NIfTI's order; the image's direction is not used",
    "resize": "linear, aligned",
    "resize_labels": "nearest, aligned",
    "ct_window": [-1024.0, 1024.0],
    "mri_quantiles": [0.01, 0.99],
}


def _promptreg_preprocessing(variables: Variables) -> dict[str, Any]:
    """Returns the released code's, on the grid that the bank of prompts is made for."""
    shape = promptreg.network_shape(variables)
    return {**PROMPTREG_PREPROCESSING, "shape": list(shape)}


_PUBLISHED_GRADICON = {**GRADICON_PREPROCESSING, "orientation": ANY_ORIENTATION}
"""All turns and mirrorings were part of the training's augmentation."""

UNIREG_RPN_PREPROCESSING = {
    "shape": [160, 192, 192],
    "axes": "D H W: NIfTI's i, j, k reversed; the image's direction is not used",
    "resize": "linear, aligned",
    "resize_labels": "nearest, aligned",
    "ct_window": [-150.0, 250.0],
    "mri_quantiles": [0.005, 0.995],
    "mri_foreground": True,
}


def _unireg_rpn_preprocessing(variables: Variables) -> dict[str, Any]:
    """Returns the released code's, with its tasks' names where they are the six."""
    sizes = unireg_rpn.variable_sizes(variables, source="the weights")
    names = list(unireg_rpn.REGIONS)
    known = sizes.regions == len(names)
    named = {"tasks": names, "regions": names} if known else {}
    return {**UNIREG_RPN_PREPROCESSING, **named}


SAM = "sam"
"""The kind of network that finds places in scans and registers nothing."""
SAM_PREPROCESSING = {
    **ResamplingRule("pad_crop", "spl", SPACING_MM).to_dict(),
    "ct_window": list(HU_RANGE),
}
"""Of the released network, which knows CT alone: it has no quantiles of MR scans."""


def _no_torch(*_: Any, source: str = "the weights", **__: Any) -> Any:
    raise UserError(
        f"{source}: there is no PyTorch file of the network unireg, whose weights were "
        "not released; keep it as a checkpoint folder"
    )


def _check_unireg(
    variables: Variables, config: Mapping[str, Any] | None = None, *, source: str
) -> None:
    """Checks UniReg's variables, and SAM's where they hold a SAM network.

    Raises:
      UserError: leaves are unknown, missing or misshapen.
    """
    network = paper_lib.UniReg(registry.config_of("unireg", config or {}))  # pyright: ignore
    fresh = jax.eval_shape(network.init, jax.random.key(0))
    shapes = [
        {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        for leaves in (
            jax.tree_util.tree_flatten_with_path(tree.get("params"))[0]
            for tree in (fresh, variables)
        )
    ]
    expected, got = shapes
    wrong = [k for k in expected | got if expected.get(k) != got.get(k)]
    wrong += [name for name in variables if name not in ("params", paper_lib.SAM)]
    if wrong:
        raise UserError(
            f"{source} does not hold the variables of this UniReg network ({wrong[0]} "
            "is missing, misshapen or unknown); give its own weights"
        )
    if paper_lib.SAM in variables:
        sam.check_variables(variables[paper_lib.SAM], source=f"{source}, sam")


# The LICENSE file in unigradicon 1.0.6; the index entry of the same package says MIT.
_UNIGRADICON_LICENCE = "Apache-2.0"

KINDS = {
    "gradicon": Kind(
        read_config=gradicon.gradicon_config,
        to_variables=gradicon.to_variables,
        from_variables=gradicon.from_variables,
        check_variables=gradicon.check_variables,
        preprocessing=lambda _: GRADICON_PREPROCESSING,
    ),
    **{
        name: Kind(
            read_config=functools.partial(promptreg.read_config, kind=name),
            to_variables=promptreg.to_variables,
            from_variables=promptreg.from_variables,
            check_variables=promptreg.check_variables,
            preprocessing=_promptreg_preprocessing,
            wrapper="model_state_dict",
            names="tasks" if name == "promptreg" else None,
        )
        for name in ("promptreg", "rdp")
    },
    "unireg": Kind(
        read_config=_no_torch,
        to_variables=_no_torch,
        from_variables=_no_torch,
        check_variables=_check_unireg,
        preprocessing=lambda _: {},
    ),
    "unireg_rpn": Kind(
        read_config=unireg_rpn.read_config,
        to_variables=unireg_rpn.to_variables,
        from_variables=unireg_rpn.from_variables,
        check_variables=unireg_rpn.check_variables,
        preprocessing=_unireg_rpn_preprocessing,
        wrapper="model_state_dict",
        names="regions",
        in_order=unireg_rpn.in_released_order,
    ),
    SAM: Kind(
        read_config=sam.read_config,
        to_variables=sam.to_variables,
        from_variables=sam.from_variables,
        check_variables=sam.check_variables,
        preprocessing=lambda _: SAM_PREPROCESSING,
        wrapper="state_dict",
        beside={"meta": {}},
    ),
}


# No digest of the two files is published with the release, so none is stated here.
ZOO = {
    "unigradicon": ModelCard(
        title="uniGradICON",
        model="gradicon",
        config=_GRADICON_CONFIG,
        preprocessing=_PUBLISHED_GRADICON,
        parameters=70_680_916,
        tasks="lung CT, knee MR, brain MR, abdomen CT; two scans of one modality",
        licence=_UNIGRADICON_LICENCE,
        paper="Tian et al., MICCAI 2024, https://arxiv.org/abs/2403.05780",
        asset="unigradicon_weights/Step_2_final.trch",
    ),
    "multigradicon": ModelCard(
        title="multiGradICON",
        model="gradicon",
        config=_GRADICON_CONFIG,
        preprocessing=_PUBLISHED_GRADICON,
        parameters=70_680_916,
        tasks="lung, knee, brain, abdomen; CT, CBCT, MR, also across modalities",
        licence=_UNIGRADICON_LICENCE,
        paper="Demir et al., WBIR 2024, https://arxiv.org/abs/2408.00221",
        asset="multigradicon_weights/Step_2_final.trch",
    ),
}


def sam_of(model: LoadedModel) -> TrainedSam | None:
    """Returns the SAM network that a UniReg holds, None where there is none.

    What the weights do not say of its scans is that of the released network.

    Raises:
      UserError: what they hold in its place is something else.
    """
    held = model.variables.get(paper_lib.SAM)
    if held is None:
        return None
    return with_rule(config_of(held), held, model.bundle.preprocessing.get(SAM, {}))


def sam_rule(trained: TrainedSam) -> dict[str, Any]:
    """Returns which scans a SAM network knows, as the preprocessing of its weights."""
    rule = ResamplingRule("pad_crop", "spl", trained.spacing_mm).to_dict()
    rule["ct_window"] = list(trained.ct_window)
    if trained.quantile_range is not None:
        rule["mri_quantiles"] = list(trained.quantile_range)
    return rule


def with_rule(
    config: SamConfig, variables: Variables, said: Mapping[str, Any]
) -> TrainedSam:
    """Returns SAM with what `sam_rule` says of it."""
    said = {**SAM_PREPROCESSING, **said}
    window, quantiles = (
        None if (ends := said.get(name)) is None else (float(ends[0]), float(ends[1]))
        for name in ("ct_window", "mri_quantiles")
    )
    return TrainedSam(
        config,
        variables,
        spacing_mm=ResamplingRule.of_weights(said).spacing_mm,
        ct_window=window or HU_RANGE,
        quantile_range=quantiles,
    )


def no_registration(name: str) -> UserError:
    """Returns the error of SAM's weights where a network is to register."""
    return UserError(
        f"{name} is SAM, which finds places of one scan in another and registers "
        "nothing; pass it as --sam-weights beside the network of --model, or to jaxreg "
        "match as its --model"
    )


def url_of(card: ModelCard, base_url: str | None) -> str:
    """Returns where a model's file is published."""
    return f"{(base_url or BASE_URL).rstrip('/')}/{card.asset}"


def kind_named(model: str, source: str) -> Kind:
    """Returns the kind of network of a name; `UserError` if there is none."""
    if model not in KINDS:
        raise UserError(
            f"{source}: {model!r} is not a kind of network that jaxreg knows"
            f"{near_match(model, KINDS, most=2)}; expected one of {', '.join(KINDS)}"
        )
    return KINDS[model]


def published(card: ModelCard, file: pathlib.Path, source: str, origin: str) -> Bundle:
    """Reads the file of a published network and checks that it is the one."""
    digest = files.sha256(file)
    if card.sha256 is not None and digest != card.sha256:
        raise UserError(
            f"{source} has the sha256 {digest}, expected {card.sha256}; it was damaged "
            "on its way or exchanged: download it again"
        )
    kind = KINDS[card.model]
    state = state_lib.read_state_dict(file, source=source)
    config = kind.read_config(state, source=source)
    variables = kind.to_variables(state, config, source=source)
    check_sizes(card, config, source)
    note = "" if card.sha256 else " as first seen (no published one to compare with)"
    return Bundle(
        variables=variables,
        model=card.model,
        config=config,
        preprocessing=card.preprocessing,
        source=f"{origin}; sha256 {digest}{note}",
        licence=card.licence,
    )


def check_sizes(card: ModelCard, config: Mapping[str, Any], source: str) -> None:
    """Raises UserError where a network is not of the published sizes."""
    known = dataclasses.asdict(registry.config_of(card.model, config))
    got = {name: known[name] for name in card.config}
    if got != dict(card.config):
        raise UserError(
            f"{source} holds a network of the sizes {got}, {card.title} has "
            f"{dict(card.config)}; give its published weights, or load yours by path"
        )


def is_torch(path: pathlib.Path) -> bool:
    """Returns whether weights are a PyTorch file; anything else that exists must be
    a folder.
    """
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        return False
    if path.suffix.lower() in TORCH_SUFFIXES:
        return True
    what = "is a file of another kind" if os.path.exists(path) else "does not exist"
    raise UserError(
        f"{path} {what}; give a checkpoint folder or a PyTorch file "
        f"({', '.join(TORCH_SUFFIXES)})"
    )
