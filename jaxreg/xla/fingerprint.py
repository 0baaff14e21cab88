"""A digest of what a function does: its code, what it closes over, and what they call.

Two functions of one digest trace to one program. Code is followed as it is in this
process, so that what somebody's own module defines or replaces counts; libraries count
by their version and the state of their files.
"""

import collections
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.core
import numpy as np

_WATCHED = ("jax", "flax", "optax")  # whose Python code makes programs
_LIBRARIES = frozenset({
    *_WATCHED, "jaxlib", "numpy", "ml_dtypes", "jaxtyping", "typing_extensions",
    *sys.stdlib_module_names,
})  # fmt: skip
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_SAID_BY_TEXT = (types.GenericAlias, types.UnionType, np.dtype)
_CUSTOM = (jax.custom_vjp, jax.custom_jvp)
_CONTAINERS = (tuple, list, dict, types.MappingProxyType, set, frozenset)
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.BuiltinFunctionType,
    np.ufunc,
    type(collections.namedtuple("_", "x").x),  # pyright: ignore
)
# Of a class: what Python adds, and what says nothing of what it does.
_NO_CODE = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__",
    "__dataclass_fields__", "__dataclass_params__", "__abstractmethods__", "_abc_impl",
    "__parameters__", "__orig_bases__", "__protocol_attrs__", "__annotate__",
    "__firstlineno__", "__static_attributes__", "__type_params__",
})  # fmt: skip


class UnknownKindError(TypeError):
    """Something is reached whose effect on a program is not known."""


def fingerprint(*values: Any) -> str:
    """Returns a digest of functions and what they work on; of this jaxreg, too.

    Args:
      *values: functions, frozen settings, arrays, and containers of these.

    Raises:
      UnknownKindError: one of them, or what it refers to, is of another kind.
    """
    walk = _Walk()
    try:
        walk.take(values)
    except RecursionError as error:
        raise UnknownKindError("too much inside each other") from error
    walk.add(_versions())
    return walk.digest.hexdigest()


@functools.cache
def _versions() -> str:
    """Returns a digest of the package's files, and of the libraries below it."""
    found = hashlib.sha256(sys.version.encode())
    package = pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    for name in ("jaxlib", "numpy", "ml_dtypes", *_WATCHED):
        found.update(f"{name} {importlib.metadata.version(name)}\0".encode())
    for name in _WATCHED:
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(pathlib.Path(folder).rglob("*.py")):
                state = path.stat()
                found.update(f"{path} {state.st_size} {state.st_mtime_ns}\0".encode())
    return found.hexdigest()


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


class _Walk:
    """One walk over what can be reached, each thing once."""

    def __init__(self):
        self.digest = hashlib.sha256()
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []  # or another object could get the same id

    def add(self, *words: Any) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode()
            self.digest.update(f"{len(data)}:".encode() + data)

    def take(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self.add(type(value).__name__, repr(value))
            return
        if id(value) in self.seen:
            self.add("again", self.seen[id(value)])
            return
        self.seen[id(value)] = len(self.alive)
        self.alive.append(value)
        self.add(type(value).__qualname__)
        for part in self._parts(value):
            self.take(part)
        # Whether Python shares equal constants is its own affair.
        if isinstance(value, _CONTAINERS):
            del self.seen[id(value)]

    def _parts(self, value: Any) -> Iterable[Any]:
        """Adds what the value is by itself; returns what it refers to."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            return self._array(value)
        return self._object(value)

    def _array(self, value: Any) -> Iterable[Any]:
        if isinstance(value, jax.core.Tracer):
            raise UnknownKindError("a value that is being traced")
        if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            self.add(jax.random.key_impl(value))
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise UnknownKindError("an array of objects")
        self.add(array.dtype, array.shape, array.tobytes())
        return ()

    def _code(self, code: types.CodeType) -> Iterable[Any]:
        self.add(code.co_code, code.co_flags, code.co_argcount)
        self.add(code.co_kwonlyargcount, code.co_exceptiontable)
        return (code.co_names, code.co_varnames, code.co_freevars, code.co_consts)

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        self.add(function.__module__, function.__qualname__)
        yield function.__defaults__
        yield function.__kwdefaults__
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                content = None
            yield content
        if _is_library(function.__module__):
            return
        yield function.__code__
        names = sorted(_names(function.__code__))
        for name in names:
            if name in function.__globals__:
                yield from self._named(function.__globals__[name], names)
            elif name in sys.modules:  # imported inside the function
                yield from self._named(sys.modules[name], names)

    def _named(
        self, value: Any, names: Iterable[str], within: tuple[Any, ...] = ()
    ) -> Iterator[Any]:
        """Yields a global value; of a module what has one of the names."""
        if not _is_module(value):
            yield value
            return
        self.add(value.__name__)
        if _is_library(value.__name__) or value in within:
            return
        for name in names:
            if name in vars(value):
                yield from self._named(vars(value)[name], names, (*within, value))

    def _class(self, kind: type) -> Iterator[Any]:
        self.add(kind.__module__, kind.__qualname__)
        if _is_library(kind.__module__):
            return
        yield kind.__bases__
        for name, value in sorted(vars(kind).items()):
            if name not in _NO_CODE:
                self.add(name)
                yield value
        for field in vars(kind).get("__dataclass_fields__", {}).values():
            self.add(field.name)
            for given in (field.default, field.default_factory):
                yield None if given is dataclasses.MISSING else given

    def _object(self, value: Any) -> Iterable[Any]:
        if isinstance(value, _DESCRIPTORS):
            self.add(*(getattr(value, n, "") for n in ("__module__", "__name__")))
            owner = getattr(value, "__self__", None)
            return () if owner is None or _is_module(owner) else (owner,)
        if isinstance(value, _SAID_BY_TEXT):
            self.add(value)
            return ()
        for kinds, parts in _PARTS:
            if isinstance(value, kinds):
                return parts(value)
        return self._state(value)

    def _state(self, value: Any) -> Iterable[Any]:
        """Returns the class and the fields of some other object."""
        kind = type(value)
        if dataclasses.is_dataclass(kind):
            fields = [getattr(value, f.name, None) for f in dataclasses.fields(kind)]
            return (kind, *fields)
        if kind.__module__ == "typing":
            self.add(value)
            return ()
        wrapped = getattr(value, "__wrapped__", None)
        # Of `jax.jit` and `functools.cache`: the function says it all.
        if wrapped is not None and not isinstance(value, _CUSTOM):
            return (kind, wrapped)
        if kind.__module__ == "jax._src.config":  # of `jax.make_user_context`
            return (kind.__qualname__, value.value)
        state = getattr(value, "__dict__", None)
        if state is None or _is_module(value):
            raise UnknownKindError(f"{kind.__module__}.{kind.__qualname__}")
        return (kind, dict(sorted(state.items())))


def _is_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType)


def _alone(value: Any) -> str:
    """Returns the digest of one member of a set, which has no order."""
    walk = _Walk()
    walk.take(value)
    return walk.digest.hexdigest()


def _names(code: types.CodeType) -> set[str]:
    """Returns the names that code and the functions in it look up."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


_PARTS: tuple[tuple[Any, Callable[[Any], Iterable[Any]]], ...] = (
    ((tuple, list), lambda a: (len(a), type(a), *a)),
    ((dict, types.MappingProxyType), lambda a: (len(a), *a.keys(), *a.values())),
    ((set, frozenset), lambda a: sorted(map(_alone, a))),
    (enum.Enum, lambda a: (type(a), a.name)),
    (slice, lambda a: (a.start, a.stop, a.step)),
    (functools.partial, lambda a: (a.func, a.args, a.keywords)),
    (types.MethodType, lambda a: (a.__func__, a.__self__)),
    ((staticmethod, classmethod), lambda a: (a.__func__,)),
    (property, lambda a: (a.fget,)),
    (functools.cached_property, lambda a: (a.func,)),
)
"""Of objects of these kinds, what else a walk looks at."""
