"""The cache of lowered programs that outlives a process.

JAX's own cache saves the compiler; before that a program is traced and lowered at every
start, in Python: seconds for a training step. Here its StableHLO is kept beside the
compiled programs, under a name that is a digest of everything it comes from.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import export

from jaxreg.xla import compilation_cache, fingerprint

try:
    # JAX writes lowered programs by its means.
    import flatbuffers  # pyright: ignore[reportMissingImports]
except ImportError:
    flatbuffers = None

_HEAD = b"jaxreg lowered 1\n"
_FOLDER, _SUFFIX = "lowered", ".stablehlo"
_MOST = 200  # files; a training step has 1 MB
# Settings of JAX that shape no program.
_WHERE = ("compilation_cache", "persistent_cache", "log", "dump", "profil", "traceback")


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program, as it is on disk.

    Attributes:
      about: "tree" of its results, see `_written`, and "generators" of the random keys
        among them.
      module: as `jax.export` writes it; None for a function that cannot be kept.
    """

    about: dict[str, Any]
    module: bytes | None


def kept(function: Callable) -> Callable:
    """Returns a function to be jitted whose lowered form is kept, and read again.

    Its numbers are the same to the bit. It is traced at every start where it refers to
    something whose effect is not known, see `fingerprint`, or returns containers other
    than tuples, lists, dicts and its own arguments; where several processes take part;
    outside of a run, see `compilation_cache.kept`; and under `jax.default_device`.

    Args:
      function: pure, of trees of arrays on one device; not differentiated further.
    """

    @functools.wraps(function)
    def standing_for(*args):
        folder = _folder()
        if folder is None:
            return function(*args)
        try:
            name = _name(function, args)
        except fingerprint.UnknownKindError:
            return function(*args)
        path = folder / f"{name}{_SUFFIX}"
        program = _read(path)
        if program is None:
            with _uncollected():
                program = _lower(function, args)
            _write(path, program)
        return function(*args) if program.module is None else _call(program, args)

    return standing_for


def _folder() -> pathlib.Path | None:
    """Returns the folder of lowered programs, None where none is kept."""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    wanted = compilation_cache.keeps() and config.jax_enable_compilation_cache
    wanted = wanted and flatbuffers is not None and not config.jax_disable_jit
    # Lowered for another device than it would be kept for, as to count arithmetic.
    wanted = wanted and config.jax_default_device is None
    # Processes must all compile the same, and one alone might have it.
    if not wanted or not folder or "://" in folder or jax.process_count() > 1:
        return None
    return pathlib.Path(folder, _FOLDER)


def _name(function: Callable, args: tuple) -> str:
    """Returns a digest of what the program comes from."""
    leaves, tree = jax.tree.flatten(args)
    kinds = [(repr(jax.typeof(leaf)), _generator(leaf)) for leaf in leaves]
    device = jax.devices()[0]
    where = (device.platform, device.device_kind, device.client.platform_version)
    return fingerprint.fingerprint(function, kinds, _nodes(tree), where, _settings())


def _settings() -> list[tuple[str, str]]:
    """Returns JAX's settings, those of the moment too."""
    names = sorted(n for n in jax.config.values if not any(w in n for w in _WHERE))
    return [(name, str(getattr(jax.config, name, None))) for name in names]


def _nodes(tree: Any) -> Any:
    """Returns the containers of a tree: kinds, fields that are no arrays, members."""
    data = tree.node_data()
    return (data, [_nodes(child) for child in tree.children()])


def _generator(leaf: Any) -> str | None:
    """Returns the name of a random key's generator, None for numbers."""
    if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return None
    return str(jax.random.key_impl(leaf))


def _bare(leaf: Any) -> Any:
    """Returns a random key's numbers; others as they are."""
    return leaf if _generator(leaf) is None else jax.random.key_data(leaf)


def _whole(array: Any, generator: str | None) -> Any:
    """Returns the random key again, where there is a generator."""
    if generator is None:
        return array
    return jax.random.wrap_key_data(array, impl=generator)


def _lower(function: Callable, args: tuple) -> Program:
    """Traces and lowers a function."""
    leaves, tree = jax.tree.flatten(args)
    generators = [_generator(leaf) for leaf in leaves]
    shapes = [
        jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)
        for kind in map(jax.typeof, leaves)
    ]
    about: dict[str, Any] = {}

    def bare(*arrays):
        given = map(_whole, arrays, generators)
        results = function(*jax.tree.unflatten(tree, given))
        found, out = jax.tree.flatten(results)
        about["tree"] = _written(out, [jax.tree.structure(arg) for arg in args])
        about["generators"] = [_generator(leaf) for leaf in found]
        return tuple(map(_bare, found))

    # The name of the file holds the version, so that no call need be stable.
    allowed = [export.DisabledSafetyCheck.custom_call("ALL")]
    try:
        lowered = export.export(jax.jit(bare), disabled_checks=allowed)(
            *jax.eval_shape(lambda *a: tuple(map(_bare, a)), *shapes)
        )
        return Program(about, bytes(lowered.serialize()))
    except (NotImplementedError, ValueError):
        return Program({}, None)


def _call(program: Program, args: tuple) -> Any:
    module = export.deserialize(bytearray(program.module or b""))
    results = module.call(*map(_bare, jax.tree.leaves(args)))
    leaves = map(_whole, results, program.about["generators"])
    trees = [jax.tree.structure(arg) for arg in args]
    return jax.tree.unflatten(_structure(program.about["tree"], trees), leaves)


def _written(tree: Any, arguments: list[Any]) -> Any:
    """Returns a tree as JSON: None for an array, a number for an argument's tree.

    Raises:
      NotImplementedError: it has containers of other kinds.
    """
    if tree.num_nodes == 1 and tree.num_leaves == 1:
        return None
    if tree.num_leaves and tree in arguments:
        return arguments.index(tree)
    kind, keys = tree.node_data() or (type(None), ())
    members = [_written(child, arguments) for child in tree.children()]
    if kind is dict and all(isinstance(key, str) for key in keys):
        return {"dict": dict(zip(keys, members, strict=True))}
    if kind in (tuple, list, type(None)):
        return {kind.__name__: members}
    raise NotImplementedError(f"results in {kind.__qualname__} are not kept")


def _structure(written: Any, arguments: list[Any]) -> Any:
    """Returns the tree that `_written` wrote."""

    def filled(written):
        if written is None:
            return 0
        if isinstance(written, int):
            return jax.tree.unflatten(
                arguments[written], [0] * arguments[written].num_leaves
            )
        ((kind, members),) = written.items()
        if kind == "dict":
            return {key: filled(member) for key, member in members.items()}
        made = [filled(member) for member in members]
        return {"tuple": tuple(made), "list": made, "NoneType": None}[kind]

    return jax.tree.structure(filled(written))


def _write(path: pathlib.Path, program: Program) -> None:
    """Writes a program as a whole; a folder that cannot be written stays as it is."""
    about = json.dumps(program.about).encode()
    body = len(about).to_bytes(8, "little") + about + (program.module or b"")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_HEAD + hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
        entries = sorted(path.parent.glob(f"*{_SUFFIX}"), key=os.path.getmtime)
        for unused in entries[:-_MOST]:
            unused.unlink()
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _read(path: pathlib.Path) -> Program | None:
    """Returns what `_write` wrote; None where there is nothing, or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    start = len(_HEAD) + hashlib.sha256().digest_size
    body = content[start:]
    if content[:start] != _HEAD + hashlib.sha256(body).digest():
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # in use
    end = 8 + int.from_bytes(body[:8], "little")
    return Program(json.loads(body[8:end]), body[end:] or None)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collects no cyclic garbage: tracing makes many objects and little garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
