"""Model zoo: published networks, their preprocessing, licences and sources.

The only place that downloads. A name is fetched once into the cache, converted from
PyTorch's format to a checkpoint (`weights.bundle`), and read from there afterwards:

    CACHE/NAME/        the converted checkpoint
    CACHE/NAME.trch    a file put there by hand, used where nothing can be fetched
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxreg.data.network_grid import ANY_ORIENTATION, ResamplingRule
from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.models import registry
from jaxreg.models.base import NetworkConfig, RegistrationModel
from jaxreg.models.sam import HU_RANGE, SAM, SamConfig, TrainedSam, config_of
from jaxreg.typing import Variables
from jaxreg.weights.bundle import Bundle, tree_checksum
from jaxreg.weights.pytorch import gradicon, sam
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.table import table_of

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
      model: kind of network, see `models.registry`.
      config: fields of the kind's config; the weights must have these sizes.
      preprocessing: what its input must look like.
      parameters: number of trained numbers.
      coverage: anatomies and modalities, one line.
      across: whether its training had pairs of two modalities.
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
    coverage: str
    across: bool
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
    def described(self) -> str:
        """Name, source (with the digest of a file) and licence, in one line."""
        return f"{self.name}; {self.bundle.source}; licence: {self.bundle.licence}"

    @property
    def checksum(self) -> str:
        """CRC-32 of the weights, as their checkpoint has it, in hexadecimal."""
        return f"{tree_checksum(self.bundle.variables):08x}"

    def with_config(self, config: NetworkConfig) -> "LoadedModel":
        """Returns the network as another configuration with the same weights has it."""
        fields = dataclasses.asdict(config)
        return dataclasses.replace(
            self,
            model=config.build(),
            bundle=dataclasses.replace(self.bundle, config=fields),
        )

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

        See `network_grid.ResamplingRule`.
        """
        return self.bundle.preprocessing.get("orientation")

    @property
    def task_names(self) -> tuple[str, ...]:
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


_PUBLISHED_GRADICON = {
    "config": {
        "channels_down": (2, 16, 32, 64, 256, 512),
        "channels_up": (16, 32, 64, 128, 256),
        "downsampled_steps": 2,
        "fullres_steps": 1,
    },
    # All turns and mirrorings were part of the training's augmentation.
    "preprocessing": {
        **gradicon.TABLE.preprocessing({}),
        "orientation": ANY_ORIENTATION,
    },
    "parameters": 70_680_916,
    # The LICENSE file in unigradicon 1.0.6; the index entry of the same package says
    # MIT.
    "licence": "Apache-2.0",
}
# No digest of the two files is published with the release, so none is stated here.
ZOO = {
    "unigradicon": ModelCard(
        title="uniGradICON",
        model="gradicon",
        coverage="lung CT, knee MR, brain MR, abdomen CT; two scans of one modality",
        across=False,
        paper="Tian et al., MICCAI 2024, https://arxiv.org/abs/2403.05780",
        asset="unigradicon_weights/Step_2_final.trch",
        **_PUBLISHED_GRADICON,
    ),
    "multigradicon": ModelCard(
        title="multiGradICON",
        model="gradicon",
        coverage="lung, knee, brain, abdomen; CT, CBCT, MR, also across modalities",
        across=True,
        paper="Demir et al., WBIR 2024, https://arxiv.org/abs/2408.00221",
        asset="multigradicon_weights/Step_2_final.trch",
        **_PUBLISHED_GRADICON,
    ),
}


def sam_of(model: LoadedModel) -> TrainedSam | None:
    """Returns the SAM network that a UniReg holds, None where there is none.

    What the weights do not say of its scans is that of the released network.

    Raises:
      UserError: what they hold in its place is something else.
    """
    held = model.variables.get(SAM)
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
    said = {**sam.TABLE.preprocessing({}), **said}
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
        "nothing; pass it as `sam_weights` beside the network of `model`, or to jaxreg "
        "match as its `model`"
    )


def url_of(card: ModelCard, base_url: str | None) -> str:
    """Returns where a model's file is published."""
    return f"{(base_url or BASE_URL).rstrip('/')}/{card.asset}"


def published(card: ModelCard, file: pathlib.Path, source: str, origin: str) -> Bundle:
    """Reads the file of a published network and checks that it is the one."""
    digest = files.sha256(file)
    if card.sha256 is not None and digest != card.sha256:
        raise UserError(
            f"{source} has the sha256 {digest}, expected {card.sha256}; it was damaged "
            "on its way or exchanged: download it again"
        )
    table = table_of(registry.kind_named(card.model, source), source=source)
    state = state_lib.read_state_dict(file, source=source)
    config = table.read_config(state, source=source)
    variables = table.to_variables(state, source=source)
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
