"""Models by name: what there is, where its weights come from, and loading them.

The only place that downloads. A name is fetched once into the cache, converted from
PyTorch's format to a checkpoint (`io.checkpoints`), and read from there afterwards:

    CACHE/NAME/        the converted checkpoint
    CACHE/NAME.trch    a file put there by hand, used where nothing can be fetched
"""

import dataclasses
import difflib
import functools
import http.client
import os
import pathlib
import tempfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import platformdirs

from jaxreg.data.preprocess import ANY_ORIENTATION, Placement
from jaxreg.errors import UserError
from jaxreg.io import (
    checkpoints,
    files,
    released,
    released_promptreg,
    released_sam,
    released_unireg,
)
from jaxreg.io.checkpoints import Bundle
from jaxreg.models import kinds, unireg
from jaxreg.models.base import Registration
from jaxreg.models.sam import (
    HU_RANGE,
    SPACING_MM,
    SamConfig,
    TrainedSam,
    config_of,
)
from jaxreg.typing import Variables

CACHE_VARIABLE = "JAXREG_CACHE"
VALIDATION_SCANS = "validation_scans"
"""Under this name weights tell what chose them, beside their preprocessing."""
BASE_URL = "https://github.com/uncbiag/uniGradICON/releases/download"
TORCH_SUFFIXES = (".trch", ".pth", ".pt")
_OTHER_SUFFIXES = (".safetensors", ".onnx", ".npz", ".h5", ".ckpt", ".bin", ".pkl")

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int | None], None]
"""Called with the bytes received so far and, where it is known, how many there are."""


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
    model: Registration
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
class ModelRow:
    """What `jaxreg models` prints of a network; `location` is a path or a sentence."""

    name: str
    title: str
    parameters: int
    grid: tuple[int, ...]
    tasks: str
    licence: str
    paper: str
    location: str


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
    shape = released_promptreg.network_shape(variables)
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
    sizes = released_unireg.variable_sizes(variables, source="the weights")
    names = list(released_unireg.REGIONS)
    known = sizes.regions == len(names)
    named = {"tasks": names, "regions": names} if known else {}
    return {**UNIREG_RPN_PREPROCESSING, **named}


SAM = "sam"
"""The kind of network that finds places in scans and registers nothing."""
SAM_PREPROCESSING = {
    **Placement("pad_crop", "spl", SPACING_MM).to_dict(),
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
    network = unireg.UniReg(kinds.config_of("unireg", config or {}))  # pyright: ignore
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
    wrong += [name for name in variables if name not in ("params", unireg.SAM)]
    if wrong:
        raise UserError(
            f"{source} does not hold the variables of this UniReg network ({wrong[0]} "
            "is missing, misshapen or unknown); give its own weights"
        )
    if unireg.SAM in variables:
        released_sam.check_variables(variables[unireg.SAM], source=f"{source}, sam")


# The LICENSE file in unigradicon 1.0.6; the index entry of the same package says MIT.
_UNIGRADICON_LICENCE = "Apache-2.0"

KINDS = {
    "gradicon": Kind(
        read_config=released.gradicon_config,
        to_variables=released.to_variables,
        from_variables=released.from_variables,
        check_variables=released.check_variables,
        preprocessing=lambda _: GRADICON_PREPROCESSING,
    ),
    **{
        name: Kind(
            read_config=functools.partial(released_promptreg.read_config, kind=name),
            to_variables=released_promptreg.to_variables,
            from_variables=released_promptreg.from_variables,
            check_variables=released_promptreg.check_variables,
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
        read_config=released_unireg.read_config,
        to_variables=released_unireg.to_variables,
        from_variables=released_unireg.from_variables,
        check_variables=released_unireg.check_variables,
        preprocessing=_unireg_rpn_preprocessing,
        wrapper="model_state_dict",
        names="regions",
        in_order=released_unireg.in_released_order,
    ),
    SAM: Kind(
        read_config=released_sam.read_config,
        to_variables=released_sam.to_variables,
        from_variables=released_sam.from_variables,
        check_variables=released_sam.check_variables,
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


def cache_dir() -> pathlib.Path:
    """Returns the folder of fetched weights: $JAXREG_CACHE or the user's own cache."""
    folder = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("jaxreg")
    return pathlib.Path(folder).expanduser()


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
    if name.lower() == SAM and not os.path.exists(name):
        raise _no_registration(name)
    if name in ZOO:
        folder = _cache(cache_dir)
        bundle = _from_cache(name, folder)
        if bundle is None:
            bundle = _fill_cache(name, folder, base_url, timeout_s, progress)
    else:
        bundle = _from_path(name)
    if bundle.model == SAM:
        raise _no_registration(name)
    kind = _kind(bundle.model, name)
    kind.check_variables(bundle.variables, bundle.config, source=name)
    model = kinds.build(kinds.config_of(bundle.model, bundle.config))
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
        Placement.of_weights(stated)
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
    if bundle.model != SAM:
        raise UserError(
            f"{name} holds a {bundle.model} network, which registers scans and "
            "describes no places; give the weights of SAM"
        )
    released_sam.check_variables(bundle.variables, bundle.config, source=name)
    config = kinds.read_fields(SamConfig, bundle.config)
    return _with_rule(config, bundle.variables, bundle.preprocessing)


def sam_of(model: LoadedModel) -> TrainedSam | None:
    """Returns the SAM network that a UniReg holds, None where there is none.

    What the weights do not say of its scans is that of the released network.

    Raises:
      UserError: what they hold in its place is something else.
    """
    held = model.variables.get(unireg.SAM)
    if held is None:
        return None
    return _with_rule(config_of(held), held, model.bundle.preprocessing.get(SAM, {}))


def sam_rule(trained: TrainedSam) -> dict[str, Any]:
    """Returns which scans a SAM network knows, as the preprocessing of its weights."""
    rule = Placement("pad_crop", "spl", trained.spacing_mm).to_dict()
    rule["ct_window"] = list(trained.ct_window)
    if trained.quantile_range is not None:
        rule["mri_quantiles"] = list(trained.quantile_range)
    return rule


def _with_rule(
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
        spacing_mm=Placement.of_weights(said).spacing_mm,
        ct_window=window or HU_RANGE,
        quantile_range=quantiles,
    )


def _no_registration(name: str) -> UserError:
    return UserError(
        f"{name} is SAM, which finds places of one scan in another and registers "
        "nothing; pass it as --sam-weights beside the network of --model, or to jaxreg "
        "match as its --model"
    )


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
        model = ZOO[model].model if model in ZOO else model
        _kind(model, "--model")
    from_torch, to_torch = _is_torch(source), target.suffix.lower() in TORCH_SUFFIXES
    if from_torch == to_torch:
        what = "PyTorch files" if to_torch else "checkpoint folders"
        raise UserError(
            f"{source} and {target} are both {what}; one of them must be a folder and "
            f"the other a file with the extension {' or '.join(TORCH_SUFFIXES)}"
        )
    if target.suffix.lower() in _OTHER_SUFFIXES:
        raise UserError(
            f"{target} has the extension {target.suffix}, which jaxreg does not write; "
            f"give a folder or a file with {' or '.join(TORCH_SUFFIXES)}"
        )
    if from_torch:
        checkpoints.check_checkpoint_path(target)
        checkpoints.save_bundle(target, _from_torch(source, model))
        return
    files.check_writable(target, "the target")
    released.require_torch(f"write {target}")
    bundle = checkpoints.load_bundle(source)
    if model not in (None, bundle.model):
        raise UserError(
            f"{source} holds a {bundle.model} network, --model says {model}; "
            f"give --model {bundle.model}"
        )
    kind = _kind(bundle.model, str(source))
    variables, beside = bundle.variables, dict(kind.beside or {})
    names = tuple(bundle.preprocessing.get(kind.names, ())) if kind.names else ()
    if kind.names and names:
        variables, names = _in_order(kind, variables, names, str(source))
        beside[kind.names] = list(names)
    state = kind.from_variables(variables, bundle.config, source=str(source))
    released.write_state_dict(target, state, wrapper=kind.wrapper, beside=beside)
    lost = _unlike_released(bundle, kind)
    if lost:
        warnings.warn(
            f"{target} cannot say how its network sees scans; who reads it takes "
            f"{'; '.join(lost)}; keep {source} for use in jaxreg",
            stacklevel=2,
        )


def _in_order(
    kind: Kind, variables: Variables, names: tuple[str, ...], source: str
) -> tuple[Variables, tuple[str, ...]]:
    """Returns weights and their prompts' or regions' names as the released code orders.

    Raises:
      UserError: there are other names than prompts, or see `Kind.in_order`.
    """
    if kind.in_order is not None:
        return kind.in_order(variables, names, source=source)
    count = kinds.prompts_in(variables)
    if len(names) != count or len(set(names)) < count:
        raise UserError(
            f"{source} names the prompts {', '.join(names)}, but its weights hold "
            f"{count}; give a name of its own to each"
        )
    return variables, names


def _unlike_released(bundle: Bundle, kind: Kind) -> list[str]:
    """Returns what a reader of the PyTorch file takes for weights' preprocessing.

    Where it differs from theirs alone: the file holds tensors and names.
    """
    stated, found = bundle.preprocessing, []
    assumed_by_reader = kind.preprocessing(bundle.variables)
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
    if kind.in_order and "regions" not in stated and "regions" in assumed_by_reader:
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


def describe(*, cache_dir: PathLike | None = None) -> tuple[ModelRow, ...]:
    """Returns one row for every network of `ZOO`; nothing is fetched.

    Args:
      cache_dir: where fetched weights are kept; `cache_dir()` if None.
    """
    folder = _cache(cache_dir)
    rows = []
    for name, card in ZOO.items():
        location = f"not downloaded: {_url(card, None)}"
        for place in (folder / name, _by_hand(folder, name)):
            if place.exists():
                location = str(place)
                break
        rows.append(
            ModelRow(
                name=name,
                title=card.title,
                parameters=card.parameters,
                grid=tuple(card.preprocessing["shape"]),
                tasks=card.tasks,
                licence=card.licence,
                paper=card.paper,
                location=location,
            )
        )
    return tuple(rows)


def _cache(folder: PathLike | None) -> pathlib.Path:
    return cache_dir() if folder is None else pathlib.Path(folder).expanduser()


def _by_hand(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where a user puts a file that could not be fetched."""
    return folder / f"{name}.trch"


def _url(card: ModelCard, base_url: str | None) -> str:
    return f"{(base_url or BASE_URL).rstrip('/')}/{card.asset}"


def _kind(model: str, source: str) -> Kind:
    if model not in KINDS:
        raise UserError(
            f"{source}: {model!r} is not a kind of network that jaxreg knows"
            f"{_near(model, KINDS)}; expected one of {', '.join(KINDS)}"
        )
    return KINDS[model]


def _near(word: str, choices: Mapping[str, Any]) -> str:
    """Returns ", did you mean ...?" or nothing."""
    near = difflib.get_close_matches(word.lower(), list(choices), n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _from_cache(name: str, folder: pathlib.Path) -> Bundle | None:
    """Returns the checkpoint of a name, or None where there is none yet."""
    place = folder / name
    if not place.exists():
        return None
    try:
        bundle = checkpoints.load_bundle(place)
    except UserError as error:
        raise UserError(f"{error}. Remove {place} to fetch it anew") from error
    _check_sizes(ZOO[name], bundle.config, f"{place} (remove it to fetch it anew)")
    # An older jaxreg knew less of the published networks.
    said = {**ZOO[name].preprocessing, **bundle.preprocessing}
    return dataclasses.replace(bundle, preprocessing=said)


def _fill_cache(
    name: str,
    folder: pathlib.Path,
    base_url: str | None,
    timeout_s: float,
    progress: Progress | None,
) -> Bundle:
    """Converts the file of a name, fetched unless it was put into the cache by hand."""
    card = ZOO[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to a folder that you can write"
        ) from error
    by_hand, url = _by_hand(folder, name), _url(card, base_url)
    if by_hand.exists():
        files.check_readable(by_hand, "the file of weights")
        bundle = _published(card, by_hand, str(by_hand), f"{url}, put there by hand")
        checkpoints.save_bundle(folder / name, bundle, replace=False)
        return bundle
    checkpoints.check_checkpoint_path(folder / name)
    # A folder of its own, so that two processes at once stay out of each other's way.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as temporary:
        file = pathlib.Path(temporary) / "fetched.trch"
        try:
            _download(url, file, timeout_s, progress)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or repr(error)
            code = getattr(error, "code", None)
            reason = f"HTTP {code} {reason}" if code else reason
            raise UserError(
                f"the weights of {name} are not in the cache and cannot be fetched "
                f"({reason}); download {url} and put it at {by_hand}, where "
                "jaxreg finds and converts it, or register without weights by "
                "--io-target displacement"
            ) from error
        bundle = _published(card, file, url, url)
    checkpoints.save_bundle(folder / name, bundle, replace=False)
    return bundle


def _download(
    url: str, file: pathlib.Path, timeout_s: float, progress: Progress | None
) -> None:
    """Copies an address to a file; raises OSError when bytes are missing."""
    received = 0
    with (
        urllib.request.urlopen(url, timeout=timeout_s) as answer,
        open(file, "wb") as f,
    ):
        length = answer.headers.get("Content-Length")
        expected = None if length is None else int(length)
        while chunk := answer.read(1 << 20):
            received += len(chunk)
            f.write(chunk)
            if progress is not None:
                progress(received, expected)
    if expected is not None and received != expected:
        raise OSError(f"got {received} of {expected} bytes")


def _published(card: ModelCard, file: pathlib.Path, source: str, origin: str) -> Bundle:
    """Reads the file of a published network and checks that it is the one."""
    digest = files.sha256(file)
    if card.sha256 is not None and digest != card.sha256:
        raise UserError(
            f"{source} has the sha256 {digest}, expected {card.sha256}; it was damaged "
            "on its way or exchanged: download it again"
        )
    kind = KINDS[card.model]
    state = released.read_state_dict(file, source=source)
    config = kind.read_config(state, source=source)
    variables = kind.to_variables(state, config, source=source)
    _check_sizes(card, config, source)
    note = "" if card.sha256 else " as first seen (no published one to compare with)"
    return Bundle(
        variables=variables,
        model=card.model,
        config=config,
        preprocessing=card.preprocessing,
        source=f"{origin}; sha256 {digest}{note}",
        licence=card.licence,
    )


def _check_sizes(card: ModelCard, config: Mapping[str, Any], source: str) -> None:
    """Raises UserError where a network is not of the published sizes."""
    known = dataclasses.asdict(kinds.config_of(card.model, config))
    got = {name: known[name] for name in card.config}
    if got != dict(card.config):
        raise UserError(
            f"{source} holds a network of the sizes {got}, {card.title} has "
            f"{dict(card.config)}; give its published weights, or load yours by path"
        )


def _is_torch(path: pathlib.Path) -> bool:
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


def _from_path(name: str) -> Bundle:
    """Reads weights that are not in the zoo."""
    path = pathlib.Path(name).expanduser()
    looks_like_path = path.suffix.lower() in TORCH_SUFFIXES or len(path.parts) > 1
    if not os.path.exists(path) and not looks_like_path:
        raise UserError(
            f"there is no model {name!r}{_near(name, ZOO)}; expected one of "
            f"{', '.join(ZOO)}, a checkpoint folder or a PyTorch file"
        )
    if _is_torch(path):
        return _from_torch(path, None)
    return checkpoints.load_bundle(path)


def _kind_of(state: Mapping[str, Any]) -> str:
    """Says whose network the names of a PyTorch file are."""
    if any(key.startswith(("backbone.conv1.conv.", "read_out_head.")) for key in state):
        return SAM
    if any(key.startswith("prompt_generator.") for key in state):
        return "promptreg"
    if any(key.startswith("encoder_moving.") for key in state):
        return "rdp"
    return "unireg_rpn" if released_unireg.is_released(state) else "gradicon"


def _from_torch(path: pathlib.Path, model: str | None) -> Bundle:
    """Reads a user's own PyTorch file."""
    state = released.read_state_dict(path)
    model = model or _kind_of(state)
    kind = KINDS[model]
    config = kind.read_config(state, source=str(path))
    variables = kind.to_variables(state, config, source=str(path))
    preprocessing = dict(kind.preprocessing(variables))
    if kind.names and (names := released.read_names(path, kind.names)):
        # What else is said of the tasks goes by the released order.
        variables, names = _in_order(kind, variables, names, str(path))
        preprocessing[kind.names] = list(names)
    return Bundle(
        variables=variables,
        model=model,
        config=config,
        preprocessing=preprocessing,
        source=f"{path.name}; sha256 {files.sha256(path)}",
        licence="not stated by the file",
    )
