"""Batches of pairs: one share a process, prefetched by threads or workers."""

import contextlib
import dataclasses
import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import grain
from absl import flags

from jaxreg.data import loading as loading_lib
from jaxreg.data.loading import Loading
from jaxreg.data.pair_source import Batch, PairSource, ReadyPairs
from jaxreg.errors import UserError

_ENDLESS = 2**40
_AHEAD = 2
"""Batches that each worker prepares ahead; they lie in the cache, not in memory."""


@dataclasses.dataclass(frozen=True)
class _Share:
    """One process's part of the global batches `first` to `last`, for Grain."""

    reader: loading_lib.ScanReader | loading_lib.ReadyReader
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
    reader: loading_lib.ScanReader

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

    * moving, fixed: N D H W 1, float32 in [0, 1] or uint16 (`pair_source.QUANTA` times
      that).
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
        _check_share(batch_size, process_index, process_count, start)
        self._source = source
        self._loading = loading
        self._next = start
        self._batch_size = batch_size
        self.waited_s = 0.0
        reader = (
            loading_lib.ScanReader(source, loading)
            if isinstance(source, PairSource)
            else loading_lib.ReadyReader(source, loading)
        )
        self._last = start + _ENDLESS if stop is None else max(start, stop)
        share = _Share(
            reader, batch_size, process_index, process_count, start, self._last
        )
        self._workers = None
        if not loading.workers:
            self._iterator = _by_threads(share, loading)
        elif isinstance(reader, loading_lib.ScanReader) and reader.cache is not None:
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
        workers; ``batch_size`` shows whether that number still means the same pairs.
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


def _check_share(
    batch_size: int, process_index: int, process_count: int, start: int
) -> None:
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
