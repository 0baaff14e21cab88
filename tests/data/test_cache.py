"""The disk cache: hits, misses, eviction, damage, many writers, full disks."""

import contextlib
import errno
import os
import pickle
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from jaxreg.data import cache as cache_lib
from jaxreg.data.cache import Cache, entry_name
from jaxreg.errors import UserError
from jaxreg.io import files

SHAPE = (4, 3, 5)


def array(seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).random(SHAPE) * 100).astype(dtype)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", reserve_bytes=0)


def read(cache, name, dtype=np.float32):
    """Returns (notes, voxels) of an entry, or None."""
    out = np.full((*SHAPE, 1), 77, dtype)
    notes = cache.read(name, out)
    return None if notes is None else (notes, out[..., 0])


def entry(cache, name):
    return cache.folder / "entries" / f"{name}.npy"


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.uint8, np.int32])
def test_round_trip(cache, dtype):
    assert read(cache, "a") is None
    assert not cache.has("a")
    cache.write("a", array(dtype=dtype), {"values": [1, 2]})
    assert cache.has("a")
    notes, got = read(cache, "a", dtype)
    assert notes == {"values": [1, 2]}
    np.testing.assert_array_equal(got, array(dtype=dtype))
    assert sorted(os.listdir(cache.folder / "entries")) == ["a.npy"]


def test_an_entry_is_a_plain_npy_file(cache):
    cache.write("a", array())
    mapped = np.load(entry(cache, "a"), mmap_mode="r")
    np.testing.assert_array_equal(mapped, array())


def test_small_integers_widen(cache):
    cache.write("a", array(dtype=np.uint8))
    _, got = read(cache, "a", np.int32)
    np.testing.assert_array_equal(got, array(dtype=np.uint8))


def test_part_of_a_larger_array_is_filled(cache):
    cache.write("a", array())
    batch = np.zeros((3, *SHAPE, 1), np.float32)
    cache.read("a", batch[1])
    np.testing.assert_array_equal(batch[1, ..., 0], array())
    assert not batch[0].any() and not batch[2].any()
    with pytest.raises(ValueError, match="contiguous"):
        cache.read("a", np.zeros((*SHAPE, 2), np.float32)[..., 0])


def test_names_depend_on_fields_alone(monkeypatch):
    name = entry_name({"a": 1, "b": [2]})
    assert name == entry_name({"b": [2], "a": 1})
    assert name != entry_name({"a": 1, "b": [3]})
    monkeypatch.setattr(cache_lib, "VERSION", cache_lib.VERSION + 1)
    assert name != entry_name({"a": 1, "b": [2]})


# --- damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 100, 128, 200, -1, -20])
@pytest.mark.parametrize("fresh", [True, False])
def test_truncation_is_a_miss_and_mended_by_writing(cache, keep, fresh):
    cache.write("a", array())
    assert read(cache, "a") is not None
    whole = entry(cache, "a").read_bytes()
    entry(cache, "a").write_bytes(whole[:keep])
    again = Cache(cache.folder, reserve_bytes=0) if fresh else cache
    assert read(again, "a") is None
    again.write("a", array())
    np.testing.assert_array_equal(read(again, "a")[1], array())


@pytest.mark.parametrize("place", [0, 8, 20, 100, 130, 250, -1, -10, -15, -30, -60])
def test_one_wrong_byte_is_a_miss(cache, place):
    cache.write("a", array(), {"values": [3]})
    damaged = bytearray(entry(cache, "a").read_bytes())
    damaged[place] ^= 0x55
    entry(cache, "a").write_bytes(damaged)
    assert read(Cache(cache.folder), "a") is None


def test_voxels_are_compared_with_their_checksum_once(cache, monkeypatch):
    cache.write("a", array())
    calls = []
    crc32 = cache_lib.zlib.crc32
    size = array().nbytes
    monkeypatch.setattr(
        cache_lib.zlib,
        "crc32",
        lambda data: calls.append(memoryview(data).nbytes) or crc32(data),
    )
    for _ in range(3):
        read(cache, "a")
    assert calls.count(size) == 1
    cache.write("a", array(1))  # a new version: one for writing, one for reading
    read(cache, "a")
    read(cache, "a")
    assert calls.count(size) == 3


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00\xff\xff"])
def test_other_files_are_misses(cache, content):
    cache.write("a", array())
    entry(cache, "a").write_bytes(content)
    assert read(cache, "a") is None


def test_other_voxel_counts_are_misses(cache):
    cache.write("a", np.zeros((2, 2, 2), np.float32))
    assert read(cache, "a") is None


def test_arrays_of_objects_are_not_read(cache):
    cache.write("a", array())
    np.save(entry(cache, "a"), np.full(SHAPE, None), allow_pickle=True)
    assert read(cache, "a", object) is None


# --- eviction -------------------------------------------------------------------------


def limited(folder, count):
    """A cache for so many entries; the limit counts files, footers included."""
    probe = Cache(folder / "probe", reserve_bytes=0)
    probe.write("a", array())
    size = entry(probe, "a").stat().st_size
    return Cache(folder / "cache", limit_bytes=count * size, reserve_bytes=0)


def test_the_least_recently_used_go_first(tmp_path):
    cache = limited(tmp_path, 3)
    for k, name in enumerate("abc"):
        cache.write(name, array(k))
    assert read(cache, "a") is not None
    assert cache.has("b")  # both now younger than c
    cache.write("d", array(3))
    assert [name for name in "abcd" if cache.has(name)] == ["a", "b", "d"]
    cache.write("e", array(4))
    cache.write("f", array(5))
    assert [name for name in "abcdef" if cache.has(name)] == ["d", "e", "f"]
    np.testing.assert_array_equal(read(cache, "d")[1], array(3))


def test_no_limit_no_eviction(cache):
    for k in range(20):
        cache.write(str(k), array(k))
    assert all(cache.has(str(k)) for k in range(20))


def test_a_reader_keeps_what_is_evicted_meanwhile(tmp_path):
    cache = limited(tmp_path, 1)
    cache.write("a", array())
    with open(entry(cache, "a"), "rb", buffering=0) as file:
        cache.write("b", array(1))
        assert not cache.has("a")
        out = np.empty(SHAPE, np.float32)
        cache_lib._read_entry(file, out, verify=True)
    np.testing.assert_array_equal(out, array())


def test_a_volume_beyond_the_limit_is_not_kept(tmp_path):
    cache = Cache(tmp_path, limit_bytes=100)
    with pytest.warns(UserWarning, match="0.000 GB"):
        cache.write("a", array())
    assert not cache.has("a")


def test_left_overs_of_killed_processes_go(tmp_path):
    cache = limited(tmp_path, 3)
    cache.write("a", array())
    old, new = (cache.folder / "entries" / f".{n}-1234.npy" for n in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.write("b", array())
    assert not old.exists()
    assert new.exists()


# --- several processes ----------------------------------------------------------------

_WRITER = """
import sys
import numpy as np
from jaxreg.data.cache import Cache
assert "jax" not in sys.modules
cache = Cache(sys.argv[1], limit_bytes=int(sys.argv[2]), reserve_bytes=0)
rng = np.random.default_rng(int(sys.argv[3]))
hits = 0
out = np.empty((20, 20, 20), np.float32)
for name in rng.integers(6, size=150):
    expected = np.full((20, 20, 20), name, np.float32)
    if cache.read(str(name), out) is None:
        cache.write(str(name), expected, {"name": int(name)})
    else:
        hits += 1
        assert (out == expected).all()
assert cache._writable
print(hits)
"""


def test_many_writers_and_evictions_at_once(tmp_path):
    script = tmp_path / "writer.py"
    script.write_text(_WRITER)
    limit = 4 * 32300  # of six volumes of 32000 bytes
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, tmp_path / "c", str(limit), str(k)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for k in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert int(out) > 0
    left = list((tmp_path / "c" / "entries").iterdir())
    assert all(not path.name.startswith(".") for path in left)
    assert sum(path.stat().st_size for path in left) <= limit + 2 * 32300


def test_it_travels_to_workers(cache):
    cache.write("a", array())
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(read(again, "a")[1], array())


# --- content --------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """Lists the files that were hashed."""
    calls = []
    sha256 = files.sha256
    monkeypatch.setattr(
        files, "sha256", lambda path: calls.append(path) or sha256(path)
    )
    return calls


def test_unchanged_files_are_hashed_once(cache, tmp_path, hashed):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"one")
    first = cache.digest(path)
    assert first == files.sha256(path)
    hashed.clear()
    assert cache.digest(path) == first
    assert Cache(cache.folder).digest(path) == first  # another process
    assert hashed == []


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("content", [b"two", b"longer"])
def test_changed_content_is_noticed(cache, tmp_path, content, fresh):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    first = cache.digest(path)
    path.write_bytes(content)
    again = Cache(cache.folder) if fresh else cache
    assert again.digest(path) == files.sha256(path) != first


def test_a_touched_file_has_its_old_digest(cache, tmp_path, hashed):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"one")
    first = cache.digest(path)
    os.utime(path, (0, 0))
    assert cache.digest(path) == first
    assert len(hashed) == 2


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b"null", b'{"stamp": 3}', b'{"stamp": [3, 4]}']
)
def test_a_damaged_index_is_rebuilt(cache, tmp_path, note):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"one")
    first = cache.digest(path)
    (index,) = (cache.folder / "index").iterdir()
    index.write_bytes(note)
    assert Cache(cache.folder).digest(path) == first
    assert index.read_bytes() != note


def test_a_missing_file_is_named_whether_known_or_not(cache, tmp_path):
    path = tmp_path / "scan.nii"
    with pytest.raises(UserError, match=r"mask .*scan\.nii does not exist"):
        cache.digest(path, "mask")
    path.write_bytes(b"one")
    cache.digest(path)
    path.unlink()
    with pytest.raises(UserError, match=r"image .*scan\.nii does not exist"):
        cache.digest(path, "image")


def test_a_file_on_a_failing_disk_is_named(cache, tmp_path, monkeypatch):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"one")

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sha256", fail)
    with pytest.raises(UserError, match=r"scan\.nii cannot be read .Input/output"):
        cache.digest(path)


# --- disks that take no more ----------------------------------------------------------


@contextlib.contextmanager
def full(path):
    """In place of `files.atomic_path`: opens what takes no byte, where there is one."""
    if not os.path.exists("/dev/full"):
        raise OSError(errno.ENOSPC, "No space left on device")
    yield "/dev/full"


def test_a_full_disk_is_said_once_and_nothing_is_left(cache, tmp_path, monkeypatch):
    cache.write("a", array())
    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_path", full)
        with pytest.warns(UserWarning, match="No space left.*going on without"):
            cache.write("b", array())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.write("b", array())  # there would be space, but it had its chance
        path = tmp_path / "scan.nii"
        path.write_bytes(b"one")
        assert cache.digest(path) == files.sha256(path)
    assert os.listdir(cache.folder / "entries") == ["a.npy"]
    np.testing.assert_array_equal(read(cache, "a")[1], array())
    assert not (cache.folder / "index").exists()


def test_space_is_left_for_others(tmp_path):
    cache = Cache(tmp_path, reserve_bytes=2**62)
    with pytest.warns(UserWarning, match="GiB are free"):
        cache.write("a", array())
    assert not cache.has("a")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    scan = tmp_path / "scan.nii"
    scan.write_bytes(b"one")
    with pytest.warns(UserWarning, match="file.cache takes no more volumes"):
        assert cache.digest(scan) == files.sha256(scan)
    cache.write("a", array())
    assert read(cache, "a") is None
