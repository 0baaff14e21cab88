"""Where compiled programs are kept, by verbs and by Python, and how they are mended."""

import os
import pathlib
import subprocess
import sys
import zlib

import pytest

from jaxreg.cli import main
from jaxreg.xla import compilation_cache


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in (
        compilation_cache._FOLDER,
        compilation_cache._LEAST_SECONDS,
        compilation_cache.SWITCH,
    ):
        monkeypatch.setenv(name, "")  # remembered, and put back in the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # as before its import
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="XDG_CACHE_HOME is of Linux")
def test_programs_are_kept_in_the_users_cache(environment):
    compilation_cache.keep()
    folder = pathlib.Path(os.environ[compilation_cache._FOLDER])
    assert folder.parent == environment / "jaxreg" / "compiled"
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    assert os.environ[compilation_cache._LEAST_SECONDS] == "0"


@pytest.mark.parametrize("why", ["off", "named", "read-only"])
def test_programs_are_not_kept(why, environment, monkeypatch):
    if why == "off":
        monkeypatch.setenv(compilation_cache.SWITCH, "off")
    elif why == "named":
        monkeypatch.setenv(compilation_cache._FOLDER, "elsewhere")
    else:
        (environment / "jaxreg").write_text("a file where a folder should be")
    compilation_cache.keep()
    assert os.environ.get(compilation_cache._FOLDER) == (
        "elsewhere" if why == "named" else None
    )
    assert compilation_cache._LEAST_SECONDS not in os.environ


def entries(environment, sizes):
    """Writes entries of two machines; of them the first was used longest ago."""
    made = []
    for day, size in enumerate(sizes, start=1):
        machine = environment / "jaxreg" / "compiled" / f"machine-{day % 2}"
        machine.mkdir(parents=True, exist_ok=True)
        made.append(machine / f"jit_f-{day}-cache")
        made[-1].write_bytes(bytes(size))
        os.utime(made[-1], (86400 * day, 3600 * day))
    return made


@pytest.mark.skipif(os.name != "posix", reason="XDG_CACHE_HOME is of Linux")
@pytest.mark.parametrize(
    ("said", "left"), [("0.0000025", [4]), ("0.0000041", [2, 3, 4]), ("", [1, 2, 3, 4])]
)
def test_what_was_longest_unused_makes_room(environment, monkeypatch, said, left):
    """Sizes 2, 1, 1 and 2 kB: the first day's alone frees more than it must."""
    paths = entries(environment, [2000, 1000, 1000, 2000])
    other = paths[0].with_name("notes.txt")
    other.write_bytes(bytes(5000))
    monkeypatch.setenv(compilation_cache.SWITCH, said)
    compilation_cache.keep()
    assert [day for day, path in enumerate(paths, start=1) if path.exists()] == left
    assert other.exists()
    assert compilation_cache._FOLDER in os.environ


@pytest.mark.parametrize("said", ["on", "-1", "0", "nan"])
def test_a_limit_that_is_none_is_said(environment, monkeypatch, capsys, said):
    monkeypatch.setenv(compilation_cache.SWITCH, said)
    assert main.main(["--version"]) == 2
    error = capsys.readouterr().err
    assert (
        f"JAXREG_COMPILATION_CACHE is '{said}', expected off, or how many GB" in error
    )
    assert "Traceback" not in error


def test_the_command_line_asks_for_it(environment):
    assert main.main(["--version"]) == 0
    assert str(environment) in os.environ[compilation_cache._FOLDER]


# In processes of their own: JAX opens its cache once.
PROGRAM = """
import jax, os
{before}
from jaxreg.xla import compilation_cache

@compilation_cache.kept()
def work():
    return jax.jit(lambda x: 2 * x + 1)(jax.numpy.arange(5.0))

work()
print(jax.config.jax_compilation_cache_dir)
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""


def run(environment, before="", **variables):
    """Returns the two printed lines and what was written to stderr."""
    names = (compilation_cache._FOLDER, compilation_cache._LEAST_SECONDS)
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env=clean | {"XDG_CACHE_HOME": str(environment)} | variables,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines(), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="XDG_CACHE_HOME is of Linux")
def test_python_keeps_programs_where_the_command_line_does(tmp_path):
    (folder, least), _ = run(tmp_path)
    assert pathlib.Path(folder).parent == tmp_path / "jaxreg" / "compiled"
    assert list(pathlib.Path(folder).glob("*-cache"))
    assert float(least) == 0
    own = 'jax.config.update("jax_compilation_cache_dir", os.environ["XDG_CACHE_HOME"])'
    (folder, least), _ = run(tmp_path, own)
    assert folder == str(tmp_path)
    assert float(least) == 1.0
    own = 'jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)'
    (_, least), _ = run(tmp_path, own)
    assert float(least) == 7.0


@pytest.mark.parametrize("named", [False, True])
def test_damaged_programs_are_mended_by_the_first_run(tmp_path, named):
    folder = tmp_path / "named"
    own = (
        {compilation_cache._FOLDER: str(folder), compilation_cache._LEAST_SECONDS: "0"}
        if named
        else {}
    )
    run(tmp_path, **own)
    entries = list(tmp_path.rglob("*-cache"))
    assert entries
    sizes = {path: path.stat().st_size for path in entries}
    for path in entries:
        path.write_bytes(path.read_bytes()[: sizes[path] // 2])
    _, said = run(tmp_path, **own)
    assert said.count("damaged compiled programs") == 1
    assert "Error reading" not in said
    assert {p: p.stat().st_size for p in tmp_path.rglob("*-cache")} == sizes
    _, said = run(tmp_path, **own)
    assert "damaged" not in said and "cache" not in said


def test_only_damaged_entries_of_one_program_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.config", None)
    monkeypatch.setenv(compilation_cache._FOLDER, str(tmp_path))
    good = zlib.compress(bytes(1000))
    for name in ("jit_f-a", "jit_f-b", "jit_f-g-a", "jit_g-a"):
        cut = name != "jit_f-a"
        (tmp_path / f"{name}-cache").write_bytes(good[: -4 if cut else None])
    assert compilation_cache._remove_damaged("jit_f") == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "jit_f-a-cache", "jit_f-g-a-cache", "jit_g-a-cache",
    }  # fmt: skip
    assert compilation_cache._remove_damaged("jit_f") == 1  # damaged inside
    assert compilation_cache._remove_damaged("jit_f") == 0
