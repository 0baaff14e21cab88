"""Whole files or none."""

import errno
import hashlib

import pytest

from jaxreg.errors import UserError
from jaxreg.io import files


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.nii.gz", ".nii.gz"),
        ("a.b.NII.GZ", ".NII.GZ"),
        ("scan.1.nii", ".nii"),
        ("a.h5", ".h5"),
        ("a", ""),
        (".hidden", ""),
    ],
)
def test_full_suffix(name, suffix):
    assert files.full_suffix(name) == suffix


@pytest.mark.parametrize("name", ["out.nii.gz", "out.h5", "out"])
def test_atomic_path_is_beside_with_same_suffix_and_takes_the_place(tmp_path, name):
    target = tmp_path / name
    target.write_text("old")
    with files.atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary != target
        assert files.full_suffix(temporary) == files.full_suffix(name)
        assert not temporary.exists()
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_atomic_path_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "out.nii.gz"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_keeps_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    with files.atomic_path(tmp_path / "out.txt") as temporary:
        temporary.write_text("")
    mode = (tmp_path / "out.txt").stat().st_mode
    assert mode == (tmp_path / "plain").stat().st_mode


def test_full_disk_is_the_users_to_mend_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(UserError, match="out.h5 cannot be written: No space left"),
        files.atomic_path(tmp_path / "out.h5") as temporary,
    ):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_other_os_errors_stay_defects(tmp_path):
    with (
        pytest.raises(FileNotFoundError),
        files.atomic_path(tmp_path / "out.h5"),
    ):
        open(tmp_path / "missing")


def test_check_writable_names_option_and_path(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, text in {
        "none/out.h5": "--out .*none/out.h5 is in a folder that does not exist",
        "file/out.h5": "--out .*file/out.h5 lies below .*file, which is a file",
        "folder": "--out .*folder is a folder, expected a file name",
    }.items():
        with pytest.raises(UserError, match=text):
            files.check_writable(tmp_path / name, "--out")
    assert files.check_writable(tmp_path / "new.h5") == tmp_path / "new.h5"
    assert not (tmp_path / "new.h5").exists()
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission to create files"):
        files.check_writable(tmp_path / "new.h5")


def test_check_readable_sentences(tmp_path, monkeypatch):
    (tmp_path / "empty.nii").write_text("")
    (tmp_path / "long.nii").write_text("12345")
    for name, text in {
        "none.nii": "image .*none.nii does not exist",
        ".": "is a folder, expected a file",
        "empty.nii": "is empty",
        "long.nii": "has 5 bytes, at most 4",
    }.items():
        with pytest.raises(UserError, match=text):
            files.check_readable(tmp_path / name, "image", limit_bytes=4)
    assert files.check_readable(tmp_path / "long.nii") == tmp_path / "long.nii"
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be read"):
        files.check_readable(tmp_path / "long.nii")


def test_sha256(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
