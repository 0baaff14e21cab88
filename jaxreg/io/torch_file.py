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
import dataclasses
import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxreg.errors import UserError

LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How a file of the format before torch 1.6 starts."""
_ZIP_MAGIC = b"PK\x03\x04"
_DTYPES: Mapping[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
_STORAGES = {
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# Real ones have thousands; and a pickle may not take minutes to say that it is none.
_MOST_OPCODES = 1_000_000
_MOST_PICKLED = 1 << 26  # bytes
_MOST_AXES = 32
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


class _Refused(Exception):
    """Why a file is not read, as a part of a sentence."""


class _Foreign(_Refused):
    """A name that is more than a tensor's."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle calls a class or function; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Elements in the file, one after the other.

    Attributes:
      key: its name in the file.
      dtype: of the elements; None for bytes whose type the tensor says.
      count: elements, or bytes.
      start: elements before the first, of a part of a storage (older files).
    """

    key: str
    dtype: np.dtype | None
    count: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A dense tensor that has not been read.

    Attributes:
      storage: where its elements are.
      dtype: of the elements.
      offset: elements of the storage before the first.
      shape: elements along each axis.
      strides: elements from one to the next along each axis.
      conjugated: whether the complex conjugate is meant.
      negated: whether the negative is meant.
    """

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool = False
    negated: bool = False

    @property
    def bytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class OtherTensor:
    """A tensor that is not plain: sparse, quantised, without elements, a subclass."""

    kind: str


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
    except _Foreign as error:
        raise UserError(
            f"{source} is not a plain tensor file: it holds {error}, which is never "
            "loaded; save net.regis_net.state_dict() alone"
        ) from error
    except _Refused as error:
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
        raise _Refused("two members of the archive have one name")
    for member in members:
        parts = member.filename.split("/")
        if "" in parts[:-1] or ".." in parts or "\\" in member.filename:
            raise _Refused(f"the member {member.filename[:80]!r} is no name in it")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _Refused("a member is compressed or encrypted, as none of torch.save")
    # Members that overlap would give more bytes than there are.
    if sum(member.file_size for member in members) > size:
        raise _Refused("its members are larger than the file")


class _Reader:
    """What both formats share: a budget, and arrays from bytes."""

    content: Any
    _swapped = False

    def __init__(self, size: int):
        self._budget = _MOST_TIMES_FILE * size + _SPARE_BYTES

    def _bytes(self, storage: _Storage) -> np.ndarray:
        """Returns the whole of a storage, uint8."""
        raise NotImplementedError

    def load(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor's elements."""
        self._budget -= tensor.bytes
        if self._budget < 0:
            raise _Refused("its tensors repeat their elements beyond measure")
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
            raise _Refused(f"it has {len(names)} members data.pkl, expected one")
        self._folder = names[0].removesuffix("data.pkl")
        members = {member.filename: member for member in archive.infolist()}
        self._sizes = {name: member.file_size for name, member in members.items()}
        if f"{self._folder}constants.pkl" in members:
            raise _Refused("it is a TorchScript program")
        order = b"little"
        if f"{self._folder}byteorder" in members:
            order = self._archive.read(f"{self._folder}byteorder")[:16]
        if order not in (b"little", b"big"):
            raise _Refused(f"its byte order is {order!r}")
        self._swapped = order.decode() != sys.byteorder
        if self._sizes[names[0]] > _MOST_PICKLED:
            raise _Refused(f"its pickle has {self._sizes[names[0]]} bytes")
        self._last: tuple[str, np.ndarray] | None = None
        pickled = io.BytesIO(archive.read(names[0]))
        self.content = _Machine(pickled, self._check).run()

    def _check(self, storage: _Storage) -> None:
        name = f"{self._folder}data/{storage.key}"
        itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
        if storage.start or self._sizes.get(name) != storage.count * itemsize:
            raise _Refused(f"the storage {storage.key} is missing or of another size")

    def _bytes(self, storage: _Storage) -> np.ndarray:
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
        self._declared: dict[str, _Storage] = {}
        self._wholes: dict[str, int] = {}
        # In memory, where a length beyond the end allocates nothing.
        pickled = io.BytesIO(file.read(_MOST_PICKLED))
        values = [_Machine(pickled, self._declare).run() for _ in range(3)]
        if values[1] != 1001:
            raise _Refused("its version is not 1001")
        self.content = _Machine(pickled, self._declare).run()
        keys = _Machine(pickled, self._declare).run()
        self._places = self._find(keys, pickled.tell(), size)

    def _declare(self, storage: _Storage) -> None:
        known = self._declared.setdefault(storage.key, storage)
        if known.dtype != storage.dtype or storage.dtype is None:
            raise _Refused(f"the storage {storage.key} has two types or none")
        end = storage.start + storage.count
        self._wholes[storage.key] = max(end, self._wholes.get(storage.key, 0))

    def _find(self, keys: Any, place: int, size: int) -> dict[str, tuple[int, int]]:
        """Returns (first byte, bytes) of each storage."""
        if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
            raise _Refused("it has no list of storages")
        found: dict[str, tuple[int, int]] = {}
        for key in keys:
            if key not in self._declared or key in found:
                raise _Refused(f"the storage {key[:40]} belongs to nothing")
            self._file.seek(place)
            count = int.from_bytes(self._file.read(8), "little", signed=True)
            length = count * _itemsize(self._declared[key])
            place += 8
            if count < self._wholes[key] or place + length > size:
                raise _Refused(f"the storage {key[:40]} is incomplete")
            found[key] = place, length
            place += length
        missing = self._declared.keys() - found.keys()
        if missing:
            raise _Refused(f"the storage {min(missing)[:40]} is missing")
        return found

    def _bytes(self, storage: _Storage) -> np.ndarray:
        place, _ = self._places[storage.key]
        itemsize = _itemsize(storage)
        self._file.seek(place + storage.start * itemsize)
        content = self._file.read(storage.count * itemsize)
        return np.frombuffer(content, np.uint8)


def _itemsize(storage: _Storage) -> int:
    return 1 if storage.dtype is None else storage.dtype.itemsize


# --- the pickle -----------------------------------------------------------------------

_MARK = object()
_PICKLE_ERRORS = (ValueError, TypeError, LookupError, OverflowError, MemoryError)
_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING STRING".split()
)
_SILENT = frozenset(("PROTO", "FRAME"))


class _Machine:
    """Runs one pickle, in the opcodes that plain values and tensors need.

    Args:
      pickled: starts at the pickle; afterwards it stands behind it.
      check: raises `_Refused` where a storage is not in the file.
    """

    def __init__(self, pickled: io.BytesIO, check: Callable[[_Storage], None]):
        self._pickled = pickled
        self._check = check
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._left = _MOST_OPCODES
        self._opcodes: Mapping[str, Callable[[Any], object]] = {
            "MARK": lambda _: self._push(_MARK),
            "POP": lambda _: self._pop(),
            "POP_MARK": lambda _: self._marked(),
            "EMPTY_TUPLE": lambda _: self._push(()),
            "EMPTY_LIST": lambda _: self._push([]),
            "EMPTY_DICT": lambda _: self._push({}),
            "TUPLE": lambda _: self._push(tuple(self._marked())),
            "LIST": lambda _: self._push(self._marked()),
            "DICT": lambda _: self._push(_dictionary(self._marked())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "APPEND": lambda _: self._append([self._pop()]),
            "APPENDS": lambda _: self._append(self._marked()),
            "SETITEM": lambda _: self._set([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._set(self._marked()),
            "PUT": self._put,
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "GET": self._get,
            "BINGET": self._get,
            "LONG_BINGET": self._get,
            "GLOBAL": self._global,
            "STACK_GLOBAL": self._stack_global,
            "BINPERSID": lambda _: self._push(self._storage(self._pop())),
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def run(self) -> Any:
        """Returns the value.

        Raises:
          _Refused: the pickle is damaged or names other things.
        """
        try:
            for opcode, argument, _ in pickletools.genops(self._pickled):
                self._spend(1)
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument)
            return self._pop()
        except _PICKLE_ERRORS as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise _Refused(f"its pickle is damaged: {text[:120]}") from error

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _Refused("its pickle is endless")

    def _step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name in self._opcodes:
            self._opcodes[name](argument)
        elif name not in _SILENT:
            raise _Foreign(f"Python objects (by the opcode {name})")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def _top(self, kind: type) -> Any:
        value = self._stack[-1]
        if type(value) is not kind:
            raise ValueError(f"a {type(value).__name__} in place of a {kind.__name__}")
        return value

    def _marked(self) -> list[Any]:
        """Returns what is above the last mark, and takes both away."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _tuple(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._push(tuple(values[::-1]))

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _set(self, flat: list[Any]) -> None:
        self._top(dict).update(_dictionary(flat))

    def _put(self, index: int) -> None:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        self._memo[index] = value

    def _get(self, index: int) -> None:
        self._push(self._memo[index])

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push(_known(_Name(module, name)))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        self._push(_known(_Name(module, name)))

    def _storage(self, told: Any) -> _Storage:
        """Returns what a persistent id says: kind, type, key, device, elements."""
        if not isinstance(told, tuple) or told[:1] != ("storage",):
            raise _Foreign("an object that is no storage")
        if len(told) not in (5, 6):
            raise ValueError("a storage with other parts")
        _, name, key, _, count = told[:5]
        if not isinstance(name, _Name) or name not in _STORAGE_NAMES:
            raise ValueError("a storage without a type")
        if not isinstance(key, str) or not _whole(count):
            raise ValueError("a storage without name or size")
        whole = _Storage(key, _STORAGE_NAMES[name], count)
        self._check(whole)
        if len(told) == 5 or told[5] is None:
            return whole
        match told[5]:
            case (str(), start, part) if _whole(start) and _whole(part):
                if start + part > count:
                    raise ValueError("a part of a storage beyond its end")
                return dataclasses.replace(whole, start=start, count=part)
        raise ValueError("a part of a storage without a place")

    def _reduce(self, _: Any) -> None:
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        if name == _ORDERED:
            # Pairs may come from the memo, again and again.
            self._spend(len(arguments[0]) if arguments else 0)
            self._push(_ordered(arguments))
        elif name == _PARAMETER and arguments:
            if not isinstance(arguments[0], Tensor | OtherTensor):
                raise ValueError("a parameter without a tensor")
            self._push(arguments[0])
        elif name in _PLAIN:
            self._push(_tensor(arguments, typed=name == _TYPED))
        elif name in _OTHERS:
            self._push(OtherTensor(str(name)))
        elif name in _BESIDE:
            self._push(name)
        else:
            raise ValueError(f"a call of {name}")

    def _build(self, _: Any) -> None:
        """Drops an object's further attributes, as a state dict's versions."""
        self._pop()
        self._top(dict)


def _dictionary(flat: list[Any]) -> dict[Any, Any]:
    """Returns a dictionary of keys and values in turn."""
    if len(flat) % 2:
        raise ValueError("a key without a value")
    for key in flat[::2]:
        # Others may take for ever to hash, as tuples of tuples of tuples.
        if not isinstance(key, str) and not (_whole(key, 1 << 53) or key is None):
            raise _Foreign(f"a dictionary by {type(key).__name__}")
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case ():
            return {}
        case ([*pairs],):
            flat: list[Any] = []
            for pair in pairs:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise ValueError("an ordered dictionary of no pairs")
                flat.extend(pair)
            return _dictionary(flat)
    raise ValueError("an ordered dictionary of no pairs")


def _whole(value: Any, below: int = 1 << 62) -> bool:
    return type(value) is int and 0 <= value < below


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MOST_AXES:
        raise ValueError("a tensor without a shape")
    if not all(_whole(n) for n in value):
        raise ValueError("a tensor with a size that is no whole number")
    return tuple(value)


def _tensor(arguments: tuple[Any, ...], *, typed: bool) -> Tensor:
    """Returns what _rebuild_tensor_v2 would: storage, offset, shape, strides, ..."""
    if len(arguments) < 4 + 3 * typed:
        raise ValueError("a tensor without a shape")
    storage, offset = arguments[:2]
    shape, strides = (_sizes(value) for value in arguments[2:4])
    if not isinstance(storage, _Storage) or not _whole(offset):
        raise ValueError("a tensor without a storage")
    if len(shape) != len(strides):
        raise ValueError("a tensor with strides of other axes")
    dtype, count, rest = storage.dtype, storage.count, arguments[6:]
    if typed:
        dtype, rest = _DTYPE_NAMES.get(arguments[6]), arguments[7:]
        count = 0 if dtype is None else count // dtype.itemsize
    if dtype is None or (typed and storage.dtype is not None):
        raise ValueError("a tensor without a type")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= count:
        raise _Refused("a tensor reaches beyond its storage")
    # Of an empty one NumPy, too, wants the other axes to be countable.
    if math.prod(filter(None, shape)) * dtype.itemsize >= 1 << 62:
        raise _Refused("a tensor with a size beyond measure")
    told = rest[0] if rest and isinstance(rest[0], dict) else {}
    if told.keys() - {"conj", "neg"} or (told.get("neg") and dtype == np.bool_):
        raise _Refused("a tensor with attributes that are not known")
    return Tensor(
        storage, dtype, offset, shape, strides,
        bool(told.get("conj")), bool(told.get("neg")),
    )  # fmt: skip


def _known(name: _Name) -> _Name:
    """Returns the name if it is one of a tensor's parts.

    Raises:
      _Foreign: it is not.
    """
    if name in _NAMES:
        return name
    raise _Foreign(str(name)[:120])


def _utils(*names: str) -> frozenset[_Name]:
    return frozenset(_Name("torch._utils", name) for name in names)


_ORDERED = _Name("collections", "OrderedDict")
_PARAMETER = _Name("torch._utils", "_rebuild_parameter")
_TYPED = _Name("torch._utils", "_rebuild_tensor_v3")
_PLAIN = _utils("_rebuild_tensor", "_rebuild_tensor_v2") | {_TYPED}
_OTHERS = _utils(
    "_rebuild_sparse_tensor",
    "_rebuild_nested_tensor",
    "_rebuild_meta_tensor_no_storage",
)
_STORAGE_NAMES: Mapping[_Name, np.dtype | None] = {
    **{_Name("torch", name): _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    _Name("torch.storage", "UntypedStorage"): None,
}
_DTYPE_NAMES = {_Name("torch", name): dtype for name, dtype in _DTYPES.items()}
# Words beside the parts of tensors that are not plain.
_BESIDE = {_Name("torch", "Size"), _Name("torch.serialization", "_get_layout")}
_NAMES = (
    {_ORDERED, _PARAMETER}
    | _PLAIN
    | _OTHERS
    | _STORAGE_NAMES.keys()
    | _DTYPE_NAMES.keys()
    | _BESIDE
)
