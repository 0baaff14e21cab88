"""PyTorch's files of tensors, read without PyTorch.

A file of torch.save is a zip archive of a pickle and one member of raw bytes for each
storage; before torch 1.6 it was pickles one after the other with the storages behind
them. The pickle is a small program, and the usual interpreter of it imports and calls
whatever it names. The one here knows the opcodes that build plain values, and a name is
a word for it: those of storages and of how tensors are put together from them, and of
ordered dictionaries. Any other is refused; nothing is imported, called or changed.

Sizes are checked against the file before anything is allocated. Tensors stay
descriptions until they are asked for: of a training checkpoint, the optimiser's are
never read.

References:
  pickletools (the opcodes); torch/serialization.py and torch/_utils.py of PyTorch 2.13.
"""

import contextlib
import io
import os
import pathlib
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from jaxreg.errors import UserError
from jaxreg.weights.pytorch import unpickle
from jaxreg.weights.pytorch.unpickle import Tensor

LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How a file of the format before torch 1.6 starts."""
_ZIP_MAGIC = b"PK\x03\x04"
# Of all arrays that one file gives: tensors may share storages and repeat elements.
_SPARE_BYTES = 1 << 26
_MOST_TIMES_FILE = 8
# What zipfile raises on damaged bytes, as found by damaging files at random.
_ZIP_ERRORS = (
    EOFError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


Load = Callable[[Tensor], np.ndarray]


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str], *, source: str | None = None
) -> Iterator[tuple[Any, Load]]:
    """Opens a file of torch.save.

    Args:
      path: the file, in the zip or the older format.
      source: what to call the file in errors; its path if None.

    Yields:
      (content, load): the pickled value, of dictionaries, lists, tuples, numbers, texts
      and `Tensor`; and what reads one of those, an array in this machine's byte order.

    Raises:
      UserError: the file is missing, damaged, no such file, or holds other objects.
    """
    path = pathlib.Path(path)
    source = source or str(path)
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{source} {what}, expected a PyTorch file of weights (.trch)")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_MAGIC))
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if start == LEGACY_MAGIC:
                reader = _Legacy(file, size)
                yield reader.content, reader.load
            elif start.startswith(_ZIP_MAGIC):
                with _archive(file, size, source) as archive:
                    reader = _Zip(archive, size)
                    yield reader.content, reader.load
            else:
                raise UserError(
                    f"{source} is not a PyTorch file: it starts with {start[:8]!r}; "
                    "give a file written by torch.save, or download it again"
                )
    except unpickle.Foreign as error:
        raise UserError(
            f"{source} is not a plain tensor file: it holds {error}, which is never "
            "loaded; save net.regis_net.state_dict() alone"
        ) from error
    except unpickle.Refused as error:
        raise UserError(
            f"{source} cannot be read as PyTorch tensors ({error}); save "
            "net.regis_net.state_dict() alone, or download the file again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{source} cannot be read ({error.strerror or error})"
        ) from error


# --- the archive ----------------------------------------------------------------------


@contextlib.contextmanager
def _archive(file: BinaryIO, size: int, source: str) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive of plain members, whose checksums are right."""
    try:
        archive = zipfile.ZipFile(file)
        _check_members(archive.infolist(), size)
        broken = archive.testzip()
    except _ZIP_ERRORS as error:
        raise UserError(
            f"{source} is damaged or incomplete ({error}); download or save it again"
        ) from error
    if broken:
        raise UserError(
            f"{source} is damaged (checksum of {broken}); download or save it again"
        )
    if not any(name.endswith("data.pkl") for name in archive.namelist()):
        raise UserError(
            f"{source} is a zip archive without tensors; give a file written by "
            "torch.save"
        )
    with archive:
        yield archive


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Checks that an archive is as torch.save writes it, before a member is read."""
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise unpickle.Refused("two members of the archive have one name")
    for member in members:
        parts = member.filename.split("/")
        if "" in parts[:-1] or ".." in parts or "\\" in member.filename:
            raise unpickle.Refused(
                f"the member {member.filename[:80]!r} is no name in it"
            )
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise unpickle.Refused(
                "a member is compressed or encrypted, as none of torch.save"
            )
    # Members that overlap would give more bytes than there are.
    if sum(member.file_size for member in members) > size:
        raise unpickle.Refused("its members are larger than the file")


class _Reader:
    """What both formats share: a budget, and arrays from bytes."""

    content: Any
    _swapped = False

    def __init__(self, size: int):
        self._budget = _MOST_TIMES_FILE * size + _SPARE_BYTES

    def _bytes(self, storage: unpickle.Storage) -> np.ndarray:
        """Returns the whole of a storage, uint8."""
        raise NotImplementedError

    def load(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor's elements."""
        self._budget -= tensor.bytes
        if self._budget < 0:
            raise unpickle.Refused("its tensors repeat their elements beyond measure")
        raw = self._bytes(tensor.storage)
        elements = _elements(raw, tensor.dtype, swapped=self._swapped)
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, tensor.dtype)
        # Of one element nothing is next; the stride may be more than there are bytes.
        strides = [
            s * elements.itemsize if n > 1 else 0
            for n, s in zip(tensor.shape, tensor.strides, strict=True)
        ]
        view = np.lib.stride_tricks.as_strided(
            elements[tensor.offset :], tensor.shape, strides, writeable=False
        )
        array = np.array(view, order="C")
        if tensor.conjugated:
            array = array.conj()
        return -array if tensor.negated else array


def _elements(raw: np.ndarray, dtype: np.dtype, *, swapped: bool) -> np.ndarray:
    """Returns bytes as elements in this machine's order; a view where they are."""
    if dtype == np.bool_:
        return raw != 0
    # Of complex numbers, both halves are swapped; no other type has halves.
    word = np.dtype(f"u{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}")
    words = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(word)
    return (words.byteswap() if swapped else words).view(dtype)


class _Zip(_Reader):
    """The archive of torch 1.6 and later."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        super().__init__(size)
        self._archive = archive
        names = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
        if len(names) != 1:
            raise unpickle.Refused(
                f"it has {len(names)} members data.pkl, expected one"
            )
        self._folder = names[0].removesuffix("data.pkl")
        members = {member.filename: member for member in archive.infolist()}
        self._sizes = {name: member.file_size for name, member in members.items()}
        if f"{self._folder}constants.pkl" in members:
            raise unpickle.Refused("it is a TorchScript program")
        order = b"little"
        if f"{self._folder}byteorder" in members:
            order = self._archive.read(f"{self._folder}byteorder")[:16]
        if order not in (b"little", b"big"):
            raise unpickle.Refused(f"its byte order is {order!r}")
        self._swapped = order.decode() != sys.byteorder
        if self._sizes[names[0]] > unpickle.MOST_PICKLED:
            raise unpickle.Refused(f"its pickle has {self._sizes[names[0]]} bytes")
        self._last: tuple[str, np.ndarray] | None = None
        pickled = io.BytesIO(archive.read(names[0]))
        self.content = unpickle.Machine(pickled, self._check).run()

    def _check(self, storage: unpickle.Storage) -> None:
        name = f"{self._folder}data/{storage.key}"
        itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
        if storage.start or self._sizes.get(name) != storage.count * itemsize:
            raise unpickle.Refused(
                f"the storage {storage.key} is missing or of another size"
            )

    def _bytes(self, storage: unpickle.Storage) -> np.ndarray:
        # Tensors of one storage mostly follow each other.
        if self._last is None or self._last[0] != storage.key:
            content = self._archive.read(f"{self._folder}data/{storage.key}")
            self._last = storage.key, np.frombuffer(content, np.uint8)
        return self._last[1]


class _Legacy(_Reader):
    """The format before torch 1.6: magic number, version, machine, content, storages.

    After the pickled list of the storages' keys, each has its number of elements, int64
    and little-endian, and its elements. These are little-endian on every machine.
    """

    def __init__(self, file: BinaryIO, size: int):
        super().__init__(size)
        self._file = file
        self._swapped = sys.byteorder != "little"
        self._declared: dict[str, unpickle.Storage] = {}
        self._wholes: dict[str, int] = {}
        # In memory, where a length beyond the end allocates nothing.
        pickled = io.BytesIO(file.read(unpickle.MOST_PICKLED))
        values = [unpickle.Machine(pickled, self._declare).run() for _ in range(3)]
        if values[1] != 1001:
            raise unpickle.Refused("its version is not 1001")
        self.content = unpickle.Machine(pickled, self._declare).run()
        keys = unpickle.Machine(pickled, self._declare).run()
        self._places = self._find(keys, pickled.tell(), size)

    def _declare(self, storage: unpickle.Storage) -> None:
        known = self._declared.setdefault(storage.key, storage)
        if known.dtype != storage.dtype or storage.dtype is None:
            raise unpickle.Refused(f"the storage {storage.key} has two types or none")
        end = storage.start + storage.count
        self._wholes[storage.key] = max(end, self._wholes.get(storage.key, 0))

    def _find(self, keys: Any, place: int, size: int) -> dict[str, tuple[int, int]]:
        """Returns (first byte, bytes) of each storage."""
        if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
            raise unpickle.Refused("it has no list of storages")
        found: dict[str, tuple[int, int]] = {}
        for key in keys:
            if key not in self._declared or key in found:
                raise unpickle.Refused(f"the storage {key[:40]} belongs to nothing")
            self._file.seek(place)
            count = int.from_bytes(self._file.read(8), "little", signed=True)
            length = count * _itemsize(self._declared[key])
            place += 8
            if count < self._wholes[key] or place + length > size:
                raise unpickle.Refused(f"the storage {key[:40]} is incomplete")
            found[key] = place, length
            place += length
        missing = self._declared.keys() - found.keys()
        if missing:
            raise unpickle.Refused(f"the storage {min(missing)[:40]} is missing")
        return found

    def _bytes(self, storage: unpickle.Storage) -> np.ndarray:
        place, _ = self._places[storage.key]
        itemsize = _itemsize(storage)
        self._file.seek(place + storage.start * itemsize)
        content = self._file.read(storage.count * itemsize)
        return np.frombuffer(content, np.uint8)


def _itemsize(storage: unpickle.Storage) -> int:
    return 1 if storage.dtype is None else storage.dtype.itemsize
