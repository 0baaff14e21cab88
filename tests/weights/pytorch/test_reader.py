"""PyTorch's files without PyTorch: against torch.load, by hand, and hostile ones."""

import collections
import io
import os
import pathlib
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.weights.pytorch import reader
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.unpickle import Tensor


def read(path):
    """Returns the content with arrays in place of tensors, which may be nested."""

    def arrays(value):
        if isinstance(value, Tensor):
            return load(value)
        if isinstance(value, dict):
            return {key: arrays(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(arrays(item) for item in value)
        return value

    with reader.opened(path) as (content, load):
        return arrays(content)


# ---- against torch.load --------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def kinds(torch):
    """One tensor of every kind, by name."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, 4, generator=draw)
    big = torch.arange(24.0).reshape(4, 6)
    types = (
        "float16 float32 float64 bfloat16 uint8 int8 int16 int32 int64 bool uint16 "
        "uint32 uint64 complex64 complex128"
    ).split()
    found = {name: (10 * base).abs().to(getattr(torch, name)) for name in types}
    return found | {
        "transposed": base.permute(2, 0, 1),
        "strided": base[1::2, ::3, 1:],
        "offset": base[2:],
        "row": big[2],
        "column": big[:, 3],
        "shared": big.T,
        "expanded": torch.ones(3, 1).expand(3, 7),
        "no axes": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.zeros(0),
        "empty, with axes": torch.zeros(3, 0, 2),
        "empty slice": base[6:],
        "parameter": torch.nn.Parameter(base.clone()),
        "conjugate": torch.view_as_complex(base[..., :2].contiguous()).conj(),
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def as_array(torch, tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_as_torch(torch, path):
    expected = torch.load(path, weights_only=True, map_location="cpu")
    got = read(path)
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        want = as_array(torch, tensor)
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape), name
        assert got[name].dtype.isnative
        assert got[name].tobytes() == np.ascontiguousarray(want).tobytes(), name


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True])
def test_every_kind_is_as_torch_reads_it(torch, tmp_path, legacy):
    path = tmp_path / "weights.pth"
    state = collections.OrderedDict(kinds(torch))
    if legacy:  # which has no name for these types
        state = {k: v for k, v in state.items() if "uint" not in k or k == "uint8"}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert_as_torch(torch, path)
    expected = read(path)
    for protocol in () if legacy else (3, 4, 5):  # which torch.load may refuse
        torch.save(
            state, path, pickle_protocol=protocol,
            _use_new_zipfile_serialization=not legacy,
        )  # fmt: skip
        for name, array in read(path).items():
            assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True])
def test_module_states_and_plain_values(torch, tmp_path, legacy):
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.BatchNorm3d(3))
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    assert_as_torch(torch, path)
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2, 4, 4, 4)).sum().backward()
    adam.step()
    meta = {"epoch": 3, "lr": 1e-3, "names": ["a", "b"], "none": None, "big": 1 << 70}
    whole = {"state_dict": net.state_dict(), "optimizer": adam.state_dict()} | meta
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    got, expected = read(path), torch.load(path, weights_only=True)
    assert {name: got[name] for name in meta} == meta
    moments, theirs = (found["optimizer"]["state"][0] for found in (got, expected))
    np.testing.assert_array_equal(moments["exp_avg"], theirs["exp_avg"].numpy())


def test_published_weights_of_other_networks():
    torch = pytest.importorskip("torch")
    folder = os.environ.get("JAXREG_TORCH_FILES")
    if folder is None:
        pytest.skip("JAXREG_TORCH_FILES names no folder of .pth files")
    for path in sorted(pathlib.Path(folder).glob("*.pth")):
        assert_as_torch(torch, path)


@pytest.mark.torch
def test_big_endian_files(torch, tmp_path):
    """The archive that a big-endian machine writes holds swapped elements."""
    state = {k: v for k, v in kinds(torch).items() if "complex" not in k}
    state.pop("conjugate")
    little, big = tmp_path / "little.pth", tmp_path / "big.pth"
    torch.save({k: v.contiguous().clone() for k, v in state.items()}, little)
    with reader.opened(little) as (content, _):
        widths = {t.storage.key: t.dtype.itemsize for t in content.values()}
    with zipfile.ZipFile(little) as source, zipfile.ZipFile(big, "w") as target:
        for member in source.infolist():
            data = source.read(member)
            place, _, key = member.filename.rpartition("/")
            if place.endswith("/data"):
                data = np.frombuffer(data, f"u{widths[key]}").byteswap().tobytes()
            target.writestr(member, b"big" if key == "byteorder" else data)
    expected, got = read(little), read(big)
    theirs = torch.load(big, weights_only=True)
    for name, array in got.items():
        assert array.dtype.isnative
        assert array.tobytes() == expected[name].tobytes(), name
        if name not in ("uint16", "uint32", "uint64"):  # which torch does not swap
            assert array.tobytes() == as_array(torch, theirs[name]).tobytes(), name


def test_a_training_checkpoint_reads_the_weights_alone(tmp_path):
    """Loads nothing but what is asked for."""
    path = archive(
        tmp_path / "a.pth",
        {"a": tensor("0"), "b": tensor("1")},
        {"0": bytes(40), "1": bytes(40)},
    )
    with reader.opened(path) as (content, load):
        assert load(content["a"]).shape == (10,)
        assert isinstance(content["b"], Tensor)


# ---- by hand -------------------------------------------------------------------------


class Call:
    """A call in a pickle: a name and its arguments."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Name(str):
    """A global in a pickle, "module name"."""


class Stored(tuple):
    """A persistent id."""


def pickled(value) -> bytes:
    """Returns the opcodes of a value; any name can be called in it."""

    def of(value) -> bytes:
        if isinstance(value, Name):
            module, name = value.split(" ")
            return f"c{module}\n{name}\n".encode()
        if isinstance(value, Call):
            return of(value.name) + of(value.arguments) + b"R"
        if isinstance(value, Stored):
            return of(tuple(value)) + b"Q"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(of, value)) + b"t"
        if isinstance(value, dict):
            items = b"".join(of(k) + of(v) for k, v in value.items())
            return b"}(" + items + b"u"
        return pickle.dumps(value, 2)[2:-1]

    return b"\x80\x02" + of(value) + b"."


def storage(key="0", count=10, kind="torch FloatStorage"):
    return Stored(("storage", Name(kind), key, "cpu", count))


def tensor(
    key="0", *, shape=(10,), strides=(1,), offset=0, count=10, told=None, **kind
):
    return Call(
        Name("torch._utils _rebuild_tensor_v2"),
        storage(key, count, **kind), offset, shape, strides, False,
        Call(Name("collections OrderedDict")), told,
    )  # fmt: skip


def archive(path, content, storages=None, *, more=(), compression=zipfile.ZIP_STORED):
    """Writes a zip as torch.save does; the content is a value or a pickle."""
    data = content if isinstance(content, bytes) else pickled(content)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", data)
        for key, raw in ({"0": bytes(40)} if storages is None else storages).items():
            file.writestr(f"a/data/{key}", raw)
        for name, raw in more:
            file.writestr(name, raw)
    return path


def test_the_hand_made_archive_is_a_good_one(tmp_path):
    raw = np.arange(10, dtype="<f4").tobytes()
    state = {"a": tensor(shape=(2, 3), strides=(1, 2), offset=3)}
    path = archive(tmp_path / "a.pth", state, {"0": raw})
    np.testing.assert_array_equal(read(path)["a"], [[3, 5, 7], [4, 6, 8]])


def test_a_stride_along_one_element_is_of_no_account(tmp_path):
    state = {"a": tensor(shape=(1, 10), strides=(1 << 61, 1))}
    path = archive(tmp_path / "a.pth", state)
    np.testing.assert_array_equal(read(path)["a"], np.zeros((1, 10)))


TOUCHED = []


class Touching:
    """An object whose loading would be noticed."""

    def __setstate__(self, state):
        TOUCHED.append(state)


def _deep(opcode: bytes, count: int) -> bytes:
    return b"\x80\x02N" + opcode * count + b"."


def _laughs() -> bytes:
    """A tuple of two of itself, fifty times, as a key: 2^50 steps to hash."""
    return b"\x80\x02}N" + b"q\x00h\x00\x86" * 50 + b"Ns."


_RENAMED = b"\x80\x02ccollections\nOrderedDict\n}X\x04\x00\x00\x00keysNsb."


def _many_pairs() -> bytes:
    """One list of pairs in the memo, made a dictionary again and again."""
    pairs = b"](" + b"NN\x86" * 50_000 + b"e\x85q\x00"
    call = b"ccollections\nOrderedDict\nh\x00R0"
    return b"\x80\x02" + pairs + b"0" + call * 50_000 + b"N."


HOSTILE = {
    "os.system": Call(Name("os system"), "touch touched"),
    "posix.system": Call(Name("posix system"), "touch touched"),
    "eval": Call(Name("builtins eval"), "open('touched', 'w')"),
    "python 2's eval": Call(Name("__builtin__ eval"), "open('touched', 'w')"),
    "getattr": Call(Name("builtins getattr"), Name("os system"), "__call__"),
    "torch.load": Call(Name("torch load"), "touched"),
    "import": Call(Name("importlib import_module"), "antigravity"),
    "dotted": Call(Name("collections OrderedDict.fromkeys"), "ab"),
    "in a state dict": {"a": tensor(), "b": Call(Name("os system"), "touch touched")},
    "name alone": {"a": Name("os system")},
    "setstate": pickle.dumps(Touching(), 2),
    "setstate, protocol 4": pickle.dumps(Touching(), 4),
    "array of objects": pickle.dumps(np.array([Touching()], object), 2),
    "instance": b"(ios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch touched'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "build on a name": _RENAMED,
    "build on a tensor": pickled(tensor())[:-1] + b"}b.",
    "call of a text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "call of a tensor": pickled(tensor())[:-1] + b")R.",
    "call of a storage's class": Call(Name("torch FloatStorage"), 1 << 60),
    "memo that is empty": b"\x80\x02h\x05.",
    "mark in the memo": b"\x80\x02(q\x00h\x00t.",
    "stack that is empty": b"\x80\x02tR0.",
    "no end": b"\x80\x02" + b"N0" * 100,
    "endless": _deep(b"0N", 1_000_000),
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"a.",
    "keys that are slow": _laughs(),
    "pairs again and again": _many_pairs(),
    "nested": _deep(b"\x85", 200_000),
    "huge": {"a": tensor(shape=(1 << 40,))},
    "huge, repeated": {"a": tensor(shape=(1 << 40,), strides=(0,))},
    "huger, repeated": {"a": tensor(shape=(1 << 40,) * 4, strides=(0,) * 4)},
    "many repeated": {
        str(i): tensor(shape=(1 << 20,), strides=(0,)) for i in range(100)
    },
    "many axes": {"a": tensor(shape=(1,) * 1000, strides=(1,) * 1000)},
    "huge and empty": {"a": tensor(shape=(0, 1 << 61), strides=(1, 1))},
    "negative booleans": {
        "a": tensor(shape=(40,), count=40, kind="torch BoolStorage", told={"neg": True})
    },
    "outside": {"a": tensor(shape=(11,))},
    "outside by strides": {"a": tensor(shape=(4, 4), strides=(3, 1))},
    "outside by offset": {"a": tensor(shape=(1,), offset=10)},
    "before": {"a": tensor(shape=(1,), offset=-1)},
    "negative stride": {"a": tensor(strides=(-1,), offset=9)},
    "negative size": {"a": tensor(shape=(-1,))},
    "overflow": {"a": tensor(shape=(2,), strides=(1 << 63,))},
    "true for a size": {"a": tensor(shape=(True,))},
    "axes without strides": {"a": tensor(shape=(2, 5))},
    "storage too large": {"a": tensor(count=1 << 40)},
    "storage that is missing": {"a": tensor("7")},
    "storage elsewhere": {"a": tensor("../data.pkl")},
    "storage of another type": {"a": tensor(kind="torch DoubleStorage")},
    "storage of no type": {"a": tensor(kind="torch OrderedDict")},
    "tensor for a storage": Call(
        Name("torch._utils _rebuild_tensor_v2"), tensor(), 0, (1,), (1,), False, None
    ),
    "persistent id of a module": Stored(("module", Name("os system"), "f", "source")),
    "persistent id of a text": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "persistent id in text": b"Pos system\n.",
}


LARGE = [kind for kind in HOSTILE if kind.startswith(("huge", "long", "many", "sto"))]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_and_do_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = archive(pathlib.Path("weights.pth"), HOSTILE[kind])
    before, modules = time.perf_counter(), set(sys.modules)
    if kind in LARGE:  # it takes time
        tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            state_lib.read_state_dict(path)
        peak = tracemalloc.get_traced_memory()[1] if kind in LARGE else 0
    finally:
        tracemalloc.stop()
    assert "weights.pth" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert os.listdir() == ["weights.pth"]
    assert not TOUCHED
    assert not {"antigravity"} & (set(sys.modules) - modules)
    assert collections.OrderedDict.keys is not None
    assert peak < 1 << 29
    assert time.perf_counter() - before < 20


def _twice(path):
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, {"a": tensor()}, more=[("a/data/0", bytes(40))])


def _two_pickles(path):
    archive(path, {"a": tensor()}, more=[("b/data.pkl", pickled({}))])


def _bomb(path):
    archive(path, {"a": tensor()}, compression=zipfile.ZIP_DEFLATED)


def _overlapping(path):
    """Two members at one place: more bytes than the file has."""
    archive(path, {"a": tensor()}, {"0": bytes(4000), "1": b""})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        first = file.getinfo("a/data/0")
    at = data.rindex(b"a/data/1") - 46
    data[at + 16 : at + 28] = struct.pack("<III", first.CRC, 4000, 4000)
    data[at + 42 : at + 46] = struct.pack("<I", first.header_offset)
    path.write_bytes(data)


MEMBERS = {
    "two of one name": _twice,
    "two pickles": _two_pickles,
    "compressed": _bomb,
    "overlapping": _overlapping,
    "absolute": lambda path: archive(path, {}, more=[("/etc/touched", b"a")]),
    "above": lambda path: archive(path, {}, more=[("a/../../touched", b"a")]),
    "TorchScript": lambda path: archive(path, {}, more=[("a/constants.pkl", b"")]),
    "byte order": lambda path: archive(path, {}, more=[("a/byteorder", b"middle")]),
    "pickle elsewhere": lambda path: archive(path, {}, more=[]).write_bytes(
        path.read_bytes().replace(b"a/data.pkl", b"adata.pkl/")
    ),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_archives_that_torch_does_not_write_are_refused(kind, tmp_path):
    path = tmp_path / "weights.pth"
    MEMBERS[kind](path)
    with pytest.raises(UserError, match=r"weights\.pth"):
        read(path)
    assert os.listdir(tmp_path) == ["weights.pth"]


def legacy(content, keys=("0",), storages=((10, bytes(40)),)) -> bytes:
    parts = [reader.LEGACY_MAGIC, pickled(1001), pickled({"little_endian": True})]
    parts += [pickled(content), pickled(list(keys))]
    parts += [struct.pack("<q", count) + raw for count, raw in storages]
    return b"".join(parts)


def old(key="0", count=10, part=None, shape=(10,)):
    name = Name("torch._utils _rebuild_tensor_v2")
    where = Stored(("storage", Name("torch FloatStorage"), key, "cpu", count, part))
    return Call(name, where, 0, shape, (1,), False, None)


def test_parts_of_storages_in_older_files(tmp_path):
    raw = np.arange(10, dtype="<f4").tobytes()
    path = tmp_path / "weights.pth"
    state = {"a": old(), "b": old(part=("5", 4, 3), shape=(3,))}
    path.write_bytes(legacy(state, storages=[(10, raw)]))
    found = read(path)
    np.testing.assert_array_equal(found["a"], np.arange(10))
    np.testing.assert_array_equal(found["b"], [4, 5, 6])


@pytest.mark.parametrize(
    "data",
    [
        legacy({"a": old()}, storages=[(1 << 60, bytes(40))]),
        legacy({"a": old()}, storages=[(-10, bytes(40))]),
        legacy({"a": old()}, storages=[(5, bytes(40))]),
        legacy({"a": old()}, storages=[(10, bytes(30))]),
        legacy({"a": old(count=11)}),
        legacy({"a": old()}, keys=()),
        legacy({"a": old()}, keys=("0", "0")),
        legacy({"a": old("1")}),
        legacy({"a": old(part=("5", 8, 3))}),
        legacy({"a": old(part=("5", -1, 3))}),
        legacy({"a": Call(Name("os system"), "touch touched")}),
        legacy({"a": old()}, keys=(Call(Name("os system"), "touch touched"),)),
        reader.LEGACY_MAGIC + pickled(Call(Name("os system"), "touch touched")),
        reader.LEGACY_MAGIC + pickled(1 << 20_000),
        reader.LEGACY_MAGIC,
    ],
)
def test_hostile_older_files(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"weights\.pth"):
        read(path)
    assert os.listdir() == ["weights.pth"]


def test_every_opcode_is_known_or_refused(tmp_path):
    """One opcode alone, whatever its argument: never another error."""
    for opcode in pickletools.opcodes:
        data = io.BytesIO(opcode.code.encode("latin-1") + b"\x01\n\x00\n" + bytes(9))
        path = archive(tmp_path / "weights.pth", data.getvalue() + b".")
        try:
            read(path)
        except UserError as error:
            assert "weights.pth" in str(error)
