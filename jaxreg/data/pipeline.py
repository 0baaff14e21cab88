"""From sampler indices to batches of NumPy arrays: read, preprocess, cache, prefetch.

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
import gc
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import grain
import numpy as np
from absl import flags

from jaxreg.data import cache as cache_lib
from jaxreg.data import preprocess
from jaxreg.data.manifest import Record
from jaxreg.data.pairs import PairPlan, Task, View
from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.space.grid import Shape, Volume

Storage = Literal["float32", "uint16"]
Batch = dict[str, np.ndarray]

QUANTA = 65535
"""What intensity 1 becomes in "uint16" storage; a step is 1.5e-5."""

_IMAGES = ("moving", "fixed", "moving_target", "fixed_target")
_SIDES = ("moving", "fixed")
_ENDLESS = 2**40
_AHEAD = 2
"""Batches that each worker prepares ahead; they lie in the cache, not in memory."""


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
      orientation: turn every scan to these directions first, so that scans stored in
        different orders look alike, see `preprocess.Placement`; as stored if None.
        Training decides it where it is not given, see `sources.seen_orientation`.
      resize: see `preprocess.Placement`.
      axes: see `preprocess.Placement`.
      spacing_mm: see `preprocess.Placement`.
      workers: processes that preprocess (or make pairs); 0 for threads of this process
        alone.
      read_threads: batches read at a time in this process, at most `prefetch`.
      prefetch: batches read ahead, 0 to read each when asked for.
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
    resize: preprocess.Resize = "half_pixel"
    axes: preprocess.Axes = "kji"
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
        if self.canonical and self.orientation not in (None, preprocess.CANONICAL):
            raise UserError(
                f"orientation is {self.orientation}, but canonical means "
                f"{preprocess.CANONICAL}; leave one of the two out"
            )

    @property
    def placement(self) -> preprocess.Placement:
        """How scans become arrays on the network grid."""
        orientation = preprocess.CANONICAL if self.canonical else self.orientation
        return preprocess.Placement(
            self.resize, self.axes, self.spacing_mm, orientation
        )

    def rule(self, modality: str, task: Task | None = None) -> preprocess.Preprocessing:
        """Returns the intensity rule of a modality, see `preprocess.kind`.

        Args:
          modality: of the scan.
          task: whose own ranges come first.
        """
        own = (task.ct_window, task.quantile_range) if task else (None, None)
        return preprocess.Preprocessing(
            modality=preprocess.kind(modality),
            ct_window=own[0] or self.ct_window,
            quantile_range=own[1] or self.quantile_range,
            foreground=self.foreground,
        )


class Plans(Protocol):
    """What `PairSource` needs of a sampler; see `data.pairs.Sampler`."""

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks that `PairPlan.task` counts."""
        ...

    def __getitem__(self, index: int, /) -> PairPlan:
        """Returns pair `index`, for any index >= 0."""
        ...


class ReadyPairs(Protocol):
    """Pairs that are made instead of read: dicts of arrays D H W 1, without N."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Returns pair `index` with the keys of a batch."""
        ...


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Pairs of scans on disk.

    Attributes:
      records: what ``View.record`` counts.
      sampler: the plan of pair i.
      classes: the label values that a dataset may have besides 0, by dataset (a
        manifest's ``labels`` will do); what is not listed is not checked.
    """

    records: Sequence[Record]
    sampler: Plans
    classes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plan(self, index: int) -> PairPlan:
        """Returns pair `index` of the sampler."""
        return self.sampler[index]

    def named(self, index: int) -> str:
        """Returns "moving FILE, fixed FILE (dataset D)" for a sampler index."""
        plan = self.plan(index)
        names = [
            f"{key.replace('_', ' ')} {self.records[view.record].image}"
            for key in _IMAGES
            if (view := getattr(plan, key)) is not None
        ]
        dataset = self.records[plan.fixed.record].dataset
        return f"{', '.join(names)} (dataset {dataset})"

    @property
    def label_type(self) -> np.dtype:
        """The integer type of label maps in a batch; small if all classes are known."""
        labelled = {r.dataset for r in self.records if r.label is not None}
        if not all(self.classes.get(dataset) for dataset in labelled):
            return np.dtype(np.int32)
        highest = max((max(self.classes[dataset]) for dataset in labelled), default=0)
        return _label_type(highest)


def _label_type(highest: int) -> np.dtype:
    for candidate in (np.uint8, np.uint16):
        if highest <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    return np.dtype(np.int32)


def batch_kinds(
    source: PairSource | ReadyPairs, loading: Loading
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns the arrays of a batch, see `Batches`: (shape without N, type) by name.

    Scans are not read, and need not be there; of pairs made ready the first is made.
    """
    if isinstance(source, PairSource):
        return _scan_kinds(source, loading)
    first = _ReadyReader(source, loading).batch([0])
    return {name: (array.shape[1:], array.dtype) for name, array in first.items()}


def _scan_kinds(
    source: PairSource, loading: Loading
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    grid = (*loading.shape, 1)
    tasks = source.sampler.tasks
    randomised = any(task.randomise != "B" for task in tasks)
    images = _IMAGES if randomised else _SIDES
    out = {key: (grid, np.dtype(loading.storage)) for key in images}
    if any(task.invert_ct for task in tasks):
        out |= {f"{key}_inverted": ((), np.dtype(bool)) for key in images}
    if loading.use_labels:
        out |= {f"{key}_labels": (grid, source.label_type) for key in _SIDES}
    if loading.use_masks:
        out |= {f"{key}_mask": (grid, np.dtype(np.uint8)) for key in _SIDES}
    # Numbers of tasks, and of pairs.
    return out | {"task": ((), np.dtype(np.int32)), "index": ((), np.dtype(np.int64))}


# --- one pair -------------------------------------------------------------------------


class _ScanReader:
    """Fills batches from a `PairSource`."""

    def __init__(self, source: PairSource, loading: Loading):
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
        """Sees to it that the cache has what `batch` will read."""
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
        for key in _SIDES:
            network, target = getattr(plan, key), getattr(plan, f"{key}_target")
            record = records[network.record]
            yield key, self._shown(network, task), record
            if target is not None and (
                target.record != network.record
                or self._hides(target) != self._hides(network)
            ):
                yield f"{key}_target", self._shown(target, task), records[target.record]
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
        for key in _IMAGES:
            network = key.removesuffix("_target")
            if key in out and key not in read:
                out[key][...] = out[network]
            if f"{key}_inverted" in out:
                view = getattr(plan, key) or getattr(plan, network)
                out[f"{key}_inverted"][...] = view.inverted and not self._hides(view)

    def _hides(self, view: View) -> bool:
        """Whether a view is inverted here: the device would turn a mask's 0 into 1."""
        masked = self.loading.mask_inputs and self.source.records[view.record].mask
        return view.inverted and bool(masked)

    def _shown(
        self, view: View, task: Task
    ) -> Callable[[Record, np.ndarray | None], None]:
        return functools.partial(self._image, task=task, inverted=self._hides(view))

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
            return array.astype(_label_type(values[-1])), {"values": values}

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
          The entry's notes; none of them for an entry that was not looked into.
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
        if placement != preprocess.AS_GRADICON:
            settings |= dataclasses.asdict(placement)
            del settings["orientation"]
        if self.loading.orientation is not None:
            settings["orientation"] = self.loading.orientation
        return cache_lib.entry_name({**fields, **settings})

    def _volume(self, path: pathlib.Path, kind: volumes.Kind) -> Volume:
        return self.loading.placement.turned(volumes.read_volume(path, kind=kind))

    def _on_image_grid(
        self, path: pathlib.Path, kind: volumes.Kind, record: Record
    ) -> Volume:
        """Reads a label map or mask and compares its grid with the image's header."""
        volume = self._volume(path, kind)
        grid = volumes.read_grid(record.image)
        header = Volume(np.broadcast_to(False, grid.shape), grid, str(record.image))
        header = self.loading.placement.turned(header)
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
    scaled = np.clip(image, 0.0, 1.0) * np.float32(QUANTA)
    return np.rint(scaled).astype(np.uint16)


class _ReadyReader:
    """Stacks pairs that a source hands out ready."""

    def __init__(self, source: ReadyPairs, loading: Loading):
        self.source = source
        self.loading = loading

    def batch(self, indices: Sequence[int]) -> Batch:
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
        for key in _IMAGES:
            if key in out and out[key].dtype != self.loading.storage:
                out[key] = stored(out[key], self.loading.storage)
        self._check(out)
        return out

    def _check(self, pair: Batch) -> None:
        asked = [f"{key}_labels" for key in _SIDES if self.loading.use_labels]
        asked += [f"{key}_mask" for key in _SIDES if self.loading.use_masks]
        missing = [key for key in (*_SIDES, *asked) if key not in pair]
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


# --- batches --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Share:
    """One process's part of the global batches `first` to `last`, for Grain."""

    reader: _ScanReader | _ReadyReader
    batch_size: int
    process_index: int
    process_count: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def indices(self, index: int) -> range:
        """Returns the sampler's indices of this process in a batch."""
        share = self.batch_size // self.process_count
        begin = (self.first + index) * self.batch_size + self.process_index * share
        return range(begin, begin + share)

    def __getitem__(self, index: int) -> Batch:
        return self.reader.batch(self.indices(index))


@dataclasses.dataclass(frozen=True)
class _Preparation:
    """What workers do for a share where there is a cache: fill it, send nothing.

    A volume that went from process to process would be written to fresh pages of shared
    memory, which takes longer than to read it from the cache.
    """

    share: _Share
    reader: _ScanReader

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, index: int) -> int:
        self.reader.prepare(self.share.indices(index))
        return index


class _Prepared:
    """A share whose batches are read in this process once a worker prepared them."""

    def __init__(self, share: _Share, prepared: grain.DatasetIterator[int]):
        self._share = share
        self._prepared = prepared
        self._count = 0
        self._closed = False
        self._failure: Exception | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._share)

    def __getitem__(self, index: int) -> Batch:
        with self._lock:
            if self._failure is not None:  # of another thread, which came first
                raise self._failure
            try:
                while self._count <= index and not self._closed:
                    self._count = next(self._prepared) + 1
            except Exception as error:
                self._failure = error
                raise
        return self._share[index]

    def close(self) -> None:
        # With the lock: a thread that waits for a worker would wait for ever.
        with self._lock:
            self._closed = True
            self._failure = None
            self._prepared.close()


def _start_worker(index: int, count: int) -> None:
    """Runs in each worker process: no JAX in it may take an accelerator."""
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax  # Grain has imported it already, so the variable alone is too late

    jax.config.update("jax_platforms", "cpu")


class Batches(Iterator[Batch]):
    """This process's share of each global batch, read ahead.

    An element is a dict of NumPy arrays whose first axis is ``batch_size //
    process_count`` long:

    * moving, fixed: N D H W 1, float32 in [0, 1] or uint16 (`QUANTA` times that).
    * moving_target, fixed_target: the same, where a task draws them.
    * moving_inverted and so on, one for each image: N, bool, where a task inverts CT:
      the image is to become ``1 - x``.
    * moving_labels, fixed_labels: N D H W 1, integer, with `use_labels`; 0 without a
      label map.
    * moving_mask, fixed_mask: N D H W 1, uint8, with `use_masks`; 1 without a mask.
    * task: N, int32. index: N, int64, the sampler's index.

    Reading begins at once. Use it as a context manager or call `close`.

    Attributes:
      waited_s: seconds spent in waiting for batches so far.
    """

    def __init__(
        self,
        source: PairSource | ReadyPairs,
        loading: Loading,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
        stop: int | None = None,
    ):
        """Starts reading.

        Args:
          source: scans on disk, or pairs made ready.
          loading: how.
          batch_size: pairs of the global batch.
          process_index: this process's number.
          process_count: the processes that share a global batch.
          start: the first global batch, ``state()["batches"]`` of the run that this
            one continues.
          stop: the global batch before which to end; None for no end.

        Raises:
          UserError: the processes cannot share the batch equally, or `start` is
            negative.
        """
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise UserError(
                f"batch_size is {batch_size}, which {process_count} processes cannot "
                f"share equally; give a multiple of {process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        if start < 0:
            raise UserError(
                f"start is {start}, expected the number of batches consumed so far (0 "
                "or more)"
            )
        self._source = source
        self._loading = loading
        self._next = start
        self._batch_size = batch_size
        self.waited_s = 0.0
        reader = (
            _ScanReader(source, loading)
            if isinstance(source, PairSource)
            else _ReadyReader(source, loading)
        )
        self._last = start + _ENDLESS if stop is None else max(start, stop)
        share = _Share(
            reader, batch_size, process_index, process_count, start, self._last
        )
        self._workers = None
        if not loading.workers:
            self._iterator = _by_threads(share, loading)
        elif isinstance(reader, _ScanReader) and reader.cache is not None:
            ahead = max(loading.prefetch, _AHEAD * loading.workers)
            preparation = _Preparation(share, reader)
            workers = _by_workers(preparation, loading, ahead=ahead)
            self._workers = _Prepared(share, workers)
            self._iterator = _by_threads(self._workers, loading)
        else:
            self._iterator = _by_workers(share, loading, ahead=loading.prefetch)

    def __iter__(self) -> Self:
        """Returns itself."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          UserError: a file is missing, unreadable or wrong (the message names it, the
            pair and the dataset), or a worker process died. Reading has ended then.
        """
        if self._next >= self._last:
            self.close()
            raise StopIteration
        began = time.perf_counter()
        wrong = None
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise RuntimeError(f"no batch {self._next}") from None
            except UserError as error:
                wrong = str(error)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                wrong = (
                    "a worker process that reads data was ended by the system "
                    f"({str(error).split('. ')[0]}), most often for want of memory or "
                    "of shared memory (/dev/shm); lower workers, prefetch or "
                    "batch_size, or set workers to 0"
                )
            # Said anew, without the worker's traceback and the batches that it holds.
            if wrong is not None:
                raise UserError(wrong)
            on_failure.pop_all()
        self.waited_s += time.perf_counter() - began
        self._next += 1
        return batch

    def state(self) -> dict[str, int]:
        """Returns what to keep in a checkpoint: batches consumed, not those read ahead.

        ``batches`` is the `start` of a continuation, on any number of processes and
        workers; ``batch_size`` tells whether that number still means the same pairs.
        """
        return {"batches": self._next, "batch_size": self._batch_size}

    def named(self, index: int) -> str:
        """Names the pair of a sampler index for a message, its files if it has any."""
        named = getattr(self._source, "named", None)
        return named(index) if named is not None else f"pair {index}"

    def close(self) -> None:
        """Ends worker processes and threads; may be called again."""
        self._iterator.close()
        if self._workers is not None:
            self._workers.close()
        if self._loading.workers:
            # Exceptions in Grain's threads hold the last batch, in cycles: its shared
            # memory would be reported as leaked when the program ends.
            gc.collect()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()


def _by_threads(batches: Any, loading: Loading) -> grain.DatasetIterator[Any]:
    """Returns an iterator that reads ahead in threads of this process."""
    options = grain.ReadOptions(
        num_threads=min(loading.read_threads, loading.prefetch),
        prefetch_buffer_size=loading.prefetch,
    )
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    iterator.start_prefetch()
    return iterator


def _by_workers(
    elements: Any, loading: Loading, *, ahead: int
) -> grain.DatasetIterator[Any]:
    """Returns an iterator whose elements worker processes make."""
    if not flags.FLAGS.is_parsed():  # in notebooks and tests nobody does
        flags.FLAGS.mark_as_parsed()
    at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    workers = grain.MultiprocessingOptions(
        num_workers=loading.workers,
        per_worker_buffer_size=max(1, ahead // loading.workers),
    )
    dataset = grain.MapDataset.source(elements).to_iter_dataset(at_once)
    iterator = iter(dataset.mp_prefetch(workers, worker_init_fn=_start_worker))
    # Asking for the state makes the iterator take hold of every worker before it starts
    # any, so that `close` ends them all even if the first batch fails.
    iterator.get_state()
    iterator.start_prefetch()
    return iterator
