"""Reading and preprocessing of pairs into batches of NumPy arrays.

Global batch b holds the sampler's indices ``b * batch_size`` and up; a process reads
its contiguous share of it. What a batch holds depends on nothing else, so that a run
continues identically on another number of processes, workers or threads, and its whole
state is the number of batches consumed.

Nothing here starts a JAX backend: Grain's worker processes import JAX, but must not
take memory on the GPU that the run trains on.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.data import cache as cache_lib
from jaxreg.data import modality as modality_lib
from jaxreg.data import network_grid, pair_source, preprocess
from jaxreg.data.manifest.records import Record
from jaxreg.data.pair_source import Batch, PairSource, ReadyPairs, Storage
from jaxreg.data.pairs import ImageRef, PairPlan, Task
from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.space.grid import Shape, Volume


@dataclasses.dataclass(frozen=True)
class Loading:
    """How scans become arrays, and with what means.

    In memory are at most ``prefetch + 1`` batches; a pair of 175^3 float32 images has
    43 MB. Threads are enough to read what is in the cache; workers pay while it fills,
    which is computation. Without a cache, and for pairs made ready, workers hand
    batches over in shared memory (/dev/shm), about four per worker.

    Attributes:
      shape: the network grid, voxels along the network's array axes: (D, H, W), or
        the reverse with `axes` "ijk".
      cache_dir: folder of preprocessed volumes; None preprocesses each time.
      cache_limit_gb: size of the cache (10^9 bytes), None for what the disk takes.
      storage: of images in cache and batch: "uint16" is ``round(65535 x)``, half the
        bytes; the device converts back.
      ct_window: the Hounsfield values that become 0 and 1.
      quantile_range: the quantiles that become 0 and 1 in other images; the minimum
        and the 0.99 quantile if None.
      foreground: those quantiles are of the voxels above 0 alone.
      canonical: the same as the orientation "RAS".
      orientation: reorient every scan to these directions first, so that scans stored
        in different orders look alike, see `network_grid.ResamplingRule`; as stored if
        None. Training chooses it where it is not set, see `datasets.seen_orientation`.
      resize: see `network_grid.ResamplingRule`.
      axes: see `network_grid.ResamplingRule`.
      spacing_mm: see `network_grid.ResamplingRule`.
      workers: processes that preprocess (or make pairs); 0 for threads of this process
        alone.
      read_threads: batches read at a time in this process, at most `prefetch`.
      prefetch: batches read ahead, 0 to read each on demand.
      use_labels: put label maps into the batch.
      use_masks: put masks into the batch.
      mask_inputs: set images to 0 outside their masks, after scaling; images without a
        mask stay.
    """

    shape: Shape = (175, 175, 175)
    cache_dir: str | os.PathLike[str] | None = None
    cache_limit_gb: float | None = None
    storage: Storage = "float32"
    ct_window: tuple[float, float] = (-1000.0, 1000.0)
    quantile_range: tuple[float, float] | None = None
    foreground: bool = False
    canonical: bool = False
    orientation: str | None = None
    resize: network_grid.Resize = "half_pixel"
    axes: network_grid.Axes = "kji"
    spacing_mm: float = 2.0
    workers: int = 0
    read_threads: int = 2
    prefetch: int = 2
    use_labels: bool = False
    use_masks: bool = False
    mask_inputs: bool = False

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: one is out of its range.
        """
        try:
            shape = tuple(int(n) for n in self.shape)
        except (TypeError, ValueError):
            shape = ()
        if len(shape) != 3 or min(shape) < 2:
            raise UserError(
                f"shape is {self.shape}, expected three numbers of at least 2 (depth, "
                "height, width); the released models have 175, 175, 175"
            )
        object.__setattr__(self, "shape", shape)
        if self.storage not in ("float32", "uint16"):
            raise UserError(
                f'storage is "{self.storage}", expected "float32" or "uint16"; give one'
            )
        for name, least in (("workers", 0), ("prefetch", 0), ("read_threads", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{name} is {getattr(self, name)}, expected at least {least}; "
                    "raise it"
                )
        if self.cache_limit_gb is not None and not self.cache_limit_gb > 0:
            raise UserError(
                f"cache_limit_gb is {self.cache_limit_gb:g}, expected more than 0; "
                "leave cache_dir out to cache nothing"
            )
        self.rule("mri")
        _ = self.placement  # which checks its own
        if self.canonical and self.orientation not in (None, network_grid.CANONICAL):
            raise UserError(
                f"orientation is {self.orientation}, but canonical means "
                f"{network_grid.CANONICAL}; leave one of the two out"
            )

    @property
    def placement(self) -> network_grid.ResamplingRule:
        """How scans become arrays on the network grid."""
        orientation = network_grid.CANONICAL if self.canonical else self.orientation
        return network_grid.ResamplingRule(
            self.resize, self.axes, self.spacing_mm, orientation
        )

    def rule(self, modality: str, task: Task | None = None) -> preprocess.IntensityRule:
        """Returns the intensity rule of a modality, see `modality.kind`.

        Args:
          modality: of the scan.
          task: its ranges take precedence.
        """
        own = (task.ct_window, task.quantile_range) if task else (None, None)
        return preprocess.IntensityRule(
            modality=modality_lib.kind(modality),
            ct_window=own[0] or self.ct_window,
            quantile_range=own[1] or self.quantile_range,
            foreground=self.foreground,
        )


def batch_kinds(
    source: PairSource | ReadyPairs, loading: Loading
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns the arrays of a batch, see `Batches`: (shape without N, type) by name.

    Scans are not read, and need not be there; of pairs made ready the first is made.
    """
    if isinstance(source, PairSource):
        return _scan_kinds(source, loading)
    first = ReadyReader(source, loading).batch([0])
    return {name: (array.shape[1:], array.dtype) for name, array in first.items()}


def _scan_kinds(
    source: PairSource, loading: Loading
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    grid = (*loading.shape, 1)
    tasks = source.sampler.tasks
    randomised = any(task.randomise != "B" for task in tasks)
    images = pair_source.IMAGES if randomised else pair_source.SIDES
    out = {key: (grid, np.dtype(loading.storage)) for key in images}
    if any(task.invert_ct for task in tasks):
        out |= {f"{key}_inverted": ((), np.dtype(bool)) for key in images}
    if loading.use_labels:
        out |= {f"{key}_labels": (grid, source.label_type) for key in pair_source.SIDES}
    if loading.use_masks:
        out |= {f"{key}_mask": (grid, np.dtype(np.uint8)) for key in pair_source.SIDES}
    # Numbers of tasks, and of pairs.
    return out | {"task": ((), np.dtype(np.int32)), "index": ((), np.dtype(np.int64))}


# --- one pair -------------------------------------------------------------------------


class ScanReader:
    """Fills batches from a `PairSource`."""

    def __init__(self, source: PairSource, loading: Loading):
        """Opens the cache that `loading` names, if any."""
        self.source = source
        self.loading = loading
        self.kinds = _scan_kinds(source, loading)
        self.cache = None
        if loading.cache_dir is not None:
            limit = loading.cache_limit_gb
            self.cache = cache_lib.Cache(
                pathlib.Path(loading.cache_dir),
                limit_bytes=None if limit is None else int(limit * 1e9),
            )

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the pairs of some indices as one batch."""
        out = self._empty(len(indices))
        out["index"][:] = indices
        for row, index in enumerate(indices):
            plan = self.source.plan(index)
            with self._naming(index):
                rows = {key: array[row, ...] for key, array in out.items()}
                self._fill(rows, plan)
            out["task"][row] = plan.task
        return out

    def prepare(self, indices: Sequence[int]) -> None:
        """Fills the cache with what `batch` will read."""
        for index in indices:
            plan = self.source.plan(index)
            with self._naming(index):
                for _, read, record in self._parts(plan):
                    read(record, None)

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            named = self.source.named(index)
            raise UserError(f"{error} [pair {index}: {named}]") from error

    def _empty(self, count: int) -> Batch:
        several = self.kinds.items()
        return {name: np.zeros((count, *n), kind) for name, (n, kind) in several}

    def _parts(self, plan: PairPlan) -> Iterator[tuple[str, Callable, Record]]:
        """Yields what is read for a pair: its key, how, and of which record."""
        records, task = self.source.records, self.source.sampler.tasks[plan.task]
        for key in pair_source.SIDES:
            network, target = getattr(plan, key), getattr(plan, f"{key}_target")
            record = records[network.record]
            yield key, self._image_reader(network, task), record
            if target is not None and (
                target.record != network.record
                or self._inverts(target) != self._inverts(network)
            ):
                yield (
                    f"{key}_target",
                    self._image_reader(target, task),
                    records[target.record],
                )
            if self.loading.use_labels:
                yield f"{key}_labels", self._labels, record
            if self.loading.use_masks:
                yield f"{key}_mask", self._mask, record

    def _fill(self, out: Batch, plan: PairPlan) -> None:
        """Fills one pair's rows: views D H W 1, and views of single numbers."""
        read = set()
        for key, reader, record in self._parts(plan):
            reader(record, out[key])
            read.add(key)
        for key in pair_source.IMAGES:
            network = key.removesuffix("_target")
            if key in out and key not in read:
                out[key][...] = out[network]
            if f"{key}_inverted" in out:
                image_ref = getattr(plan, key) or getattr(plan, network)
                out[f"{key}_inverted"][...] = image_ref.inverted and not self._inverts(
                    image_ref
                )

    def _inverts(self, image_ref: ImageRef) -> bool:
        """Whether an image is inverted here: the device would make 1 of a mask's 0."""
        record = self.source.records[image_ref.record]
        masked = self.loading.mask_inputs and record.mask
        return image_ref.inverted and bool(masked)

    def _image_reader(
        self, image_ref: ImageRef, task: Task
    ) -> Callable[[Record, np.ndarray | None], None]:
        return functools.partial(
            self._image, task=task, inverted=self._inverts(image_ref)
        )

    def _image(
        self, record: Record, out: np.ndarray | None, *, task: Task, inverted: bool
    ) -> None:
        rule = self.loading.rule(record.modality, task)
        mask = record.mask if self.loading.mask_inputs else None

        def build() -> tuple[np.ndarray, dict[str, Any]]:
            array = preprocess.network_image(
                self._volume(record.image, "image"),
                self.loading.shape,
                rule,
                mask=None if mask is None else self._volume(mask, "mask"),
                inverted=inverted,
                placement=self.loading.placement,
            )
            return stored(array[0, ..., 0], self.loading.storage), {}

        fields = {"kind": "image", "rule": rule.to_dict()}
        fields["storage"] = self.loading.storage
        if inverted:
            fields["inverted"] = True
        self._fetch(out, fields, {"image": record.image, "mask": mask}, build)

    def _labels(self, record: Record, out: np.ndarray | None) -> None:
        label = record.label
        if label is None:
            if out is not None:
                out[...] = 0
            return

        def build() -> tuple[np.ndarray, dict[str, Any]]:
            volume = self._on_image_grid(label, "labels", record)
            array = preprocess.network_labels(
                volume, self.loading.shape, placement=self.loading.placement
            )[0, ..., 0]
            values = [int(value) for value in np.unique(array)]
            return array.astype(pair_source.label_type(values[-1])), {"values": values}

        sources = {"label map": label, "image": record.image}
        notes = self._fetch(out, {"kind": "labels"}, sources, build)
        allowed = self.source.classes.get(record.dataset)
        found = notes.get("values", ())
        unknown = set(found) - {0, *allowed} if allowed else set()
        if unknown:
            raise UserError(
                f"label map {label} has labels {_listed(unknown)}, which are not among "
                f"those of dataset {record.dataset} ({_listed(allowed)}); add them to "
                "the list or correct the file"
            )

    def _mask(self, record: Record, out: np.ndarray | None) -> None:
        mask = record.mask
        if mask is None:
            if out is not None:
                out[...] = 1
            return

        def build() -> tuple[np.ndarray, dict[str, Any]]:
            volume = self._on_image_grid(mask, "mask", record)
            inside = preprocess.network_mask(
                volume, self.loading.shape, placement=self.loading.placement
            )[0, ..., 0]
            return inside.astype(np.uint8), {}

        sources = {"mask": mask, "image": record.image}
        self._fetch(out, {"kind": "mask"}, sources, build)

    def _fetch(
        self,
        out: np.ndarray | None,
        fields: Mapping[str, Any],
        sources: Mapping[str, pathlib.Path | None],
        build: Callable[[], tuple[np.ndarray, dict[str, Any]]],
    ) -> dict[str, Any]:
        """Fills `out`, D H W 1, from the cache or anew; None just fills the cache.

        Returns:
          The entry's notes; {} for an entry that was not read.
        """
        name = self._entry_name(fields, sources)
        cache = self.cache if name is not None else None
        if cache is not None and name is not None:
            if out is None and cache.has(name):
                return {}
            notes = None if out is None else cache.read(name, out)
            if notes is not None:
                return notes
        array, notes = build()
        if cache is not None and name is not None:
            cache.write(name, array, notes)
        if out is not None:
            out[..., 0] = array
        return notes

    def _entry_name(
        self, fields: Mapping[str, Any], sources: Mapping[str, pathlib.Path | None]
    ) -> str | None:
        if self.cache is None:
            return None
        given = {what: path for what, path in sources.items() if path is not None}
        several = (
            p.is_dir() or p.suffix.lower() in cache_lib.DETACHED for p in given.values()
        )
        if any(several):  # files, of which a digest of one says nothing
            return None
        digests = {what: self.cache.digest(p, what) for what, p in given.items()}
        settings = {
            "shape": list(self.loading.shape),
            "canonical": self.loading.canonical,
            "sources": digests,
        }
        # As an older jaxreg named them, where it could make the same.
        placement = dataclasses.replace(self.loading.placement, orientation=None)
        if placement != network_grid.AS_GRADICON:
            settings |= dataclasses.asdict(placement)
            del settings["orientation"]
        if self.loading.orientation is not None:
            settings["orientation"] = self.loading.orientation
        return cache_lib.entry_name({**fields, **settings})

    def _volume(self, path: pathlib.Path, kind: volumes.Kind) -> Volume:
        return self.loading.placement.reoriented(volumes.read_volume(path, kind=kind))

    def _on_image_grid(
        self, path: pathlib.Path, kind: volumes.Kind, record: Record
    ) -> Volume:
        """Reads a label map or mask and compares its grid with the image's header."""
        volume = self._volume(path, kind)
        grid = volumes.read_grid(record.image)
        header = Volume(np.broadcast_to(False, grid.shape), grid, str(record.image))
        header = self.loading.placement.reoriented(header)
        what = {"labels": "label map"}.get(kind, kind)
        preprocess.check_same_grid(volume, header, what=what)
        return volume


def _listed(values: Any) -> str:
    values = sorted(values)
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    return ", ".join(map(str, values[:8])) + more


def stored(image: np.ndarray, storage: Storage) -> np.ndarray:
    """Returns intensities of [0, 1] in the type that cache and batch hold."""
    if storage == "float32":
        return np.asarray(image, np.float32)
    scaled = np.clip(image, 0.0, 1.0) * np.float32(pair_source.QUANTA)
    return np.rint(scaled).astype(np.uint16)


class ReadyReader:
    """Stacks pairs that a source hands out ready."""

    def __init__(self, source: ReadyPairs, loading: Loading):
        """Keeps where pairs come from, and how they are stored."""
        self.source = source
        self.loading = loading

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the pairs of some indices as one batch."""
        pairs = []
        for index in indices:
            try:
                pairs.append(self._pair(index))
            except UserError as error:
                raise UserError(f"{error} [pair {index}]") from error
        return {key: np.stack([pair[key] for pair in pairs]) for key in pairs[0]}

    def _pair(self, index: int) -> Batch:
        out: Batch = {"task": np.zeros((), np.int32)}
        for key, value in self.source[index].items():
            unused = (key.endswith("_labels") and not self.loading.use_labels) or (
                key.endswith("_mask") and not self.loading.use_masks
            )
            if not unused:
                out[key] = np.asarray(value)
        out["index"] = np.asarray(index, np.int64)
        for key in pair_source.IMAGES:
            if key in out and out[key].dtype != self.loading.storage:
                out[key] = stored(out[key], self.loading.storage)
        self._check(out)
        return out

    def _check(self, pair: Batch) -> None:
        required = [
            f"{key}_labels" for key in pair_source.SIDES if self.loading.use_labels
        ]
        required += [
            f"{key}_mask" for key in pair_source.SIDES if self.loading.use_masks
        ]
        missing = [key for key in (*pair_source.SIDES, *required) if key not in pair]
        if missing:
            raise UserError(
                f"a pair of {type(self.source).__name__} has no "
                f"{', '.join(missing)}; switch off what asks for it (use_labels, "
                "use_masks) or let the source make it"
            )
        shape = (*self.loading.shape, 1)
        if pair["moving"].shape != shape:
            raise UserError(
                f"a pair of {type(self.source).__name__} has shape "
                f"{pair['moving'].shape}, loading's shape asks for {shape}; make them "
                "equal"
            )
