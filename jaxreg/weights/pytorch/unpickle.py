"""A restricted reader of PyTorch's pickles: tensors and dicts alone."""

import dataclasses
import io
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

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
MOST_PICKLED = 1 << 26  # bytes
_MOST_AXES = 32


class Refused(Exception):
    """Why a file is not read, as a part of a sentence."""


class Foreign(Refused):
    """A name that is more than a tensor's."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle calls a class or function; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Storage:
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

    storage: Storage
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


class Machine:
    """Runs one pickle, in the opcodes that plain values and tensors need.

    Args:
      pickled: starts at the pickle; afterwards it stands behind it.
      check: raises `Refused` where a storage is not in the file.
    """

    def __init__(self, pickled: io.BytesIO, check: Callable[[Storage], None]):
        """See the class."""
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
            raise Refused(f"its pickle is damaged: {text[:120]}") from error

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise Refused("its pickle is endless")

    def _step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name in self._opcodes:
            self._opcodes[name](argument)
        elif name not in _SILENT:
            raise Foreign(f"Python objects (by the opcode {name})")

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

    def _storage(self, persistent_id: Any) -> Storage:
        """Returns what a persistent id says: kind, type, key, device, elements."""
        if not isinstance(persistent_id, tuple) or persistent_id[:1] != ("storage",):
            raise Foreign("an object that is no storage")
        if len(persistent_id) not in (5, 6):
            raise ValueError("a storage with other parts")
        _, name, key, _, count = persistent_id[:5]
        if not isinstance(name, _Name) or name not in _STORAGE_NAMES:
            raise ValueError("a storage without a type")
        if not isinstance(key, str) or not _whole(count):
            raise ValueError("a storage without name or size")
        whole = Storage(key, _STORAGE_NAMES[name], count)
        self._check(whole)
        if len(persistent_id) == 5 or persistent_id[5] is None:
            return whole
        match persistent_id[5]:
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
            raise Foreign(f"a dictionary by {type(key).__name__}")
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
    if not isinstance(storage, Storage) or not _whole(offset):
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
        raise Refused("a tensor reaches beyond its storage")
    # Of an empty one NumPy, too, wants the other axes to be countable.
    if math.prod(filter(None, shape)) * dtype.itemsize >= 1 << 62:
        raise Refused("a tensor with a size beyond measure")
    persistent_id = rest[0] if rest and isinstance(rest[0], dict) else {}
    if persistent_id.keys() - {"conj", "neg"} or (
        persistent_id.get("neg") and dtype == np.bool_
    ):
        raise Refused("a tensor with attributes that are not known")
    return Tensor(
        storage, dtype, offset, shape, strides,
        bool(persistent_id.get("conj")), bool(persistent_id.get("neg")),
    )  # fmt: skip


def _known(name: _Name) -> _Name:
    """Returns the name if it is one of a tensor's parts.

    Raises:
      _Foreign: it is not.
    """
    if name in _NAMES:
        return name
    raise Foreign(str(name)[:120])


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
