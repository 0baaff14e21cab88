"""What pyproject.toml promises: dependencies, tested versions, a wheel."""

import ast
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator

import pytest
from packaging import requirements, utils, version

import jaxreg

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")


def asked_for(texts: list[str]) -> dict[str, requirements.Requirement]:
    needs = [requirements.Requirement(text) for text in texts]
    return {utils.canonicalize_name(need.name): need for need in needs}


def imports(body: list[ast.stmt], *, guarded: bool) -> Iterator[tuple[str, bool]]:
    """Yields what is imported, and whether its absence is foreseen."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((name.name.partition(".")[0], guarded) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0], guarded
        elif isinstance(node, ast.Try):
            catches = ast.unparse(ast.Module([*node.handlers], []))
            yield from imports(node.body, guarded=guarded or "ImportError" in catches)
            yield from imports([*node.orelse, *node.finalbody], guarded=guarded)
            for handler in node.handlers:
                yield from imports(handler.body, guarded=guarded)
        else:
            for child in ast.iter_child_nodes(node):
                yield from imports([child], guarded=guarded)  # type: ignore[list-item]


def imported() -> tuple[set[str], set[str]]:
    """Returns the packages of others that jaxreg cannot do without, and all."""
    needed, every = set(), set()
    for path in (ROOT / "jaxreg").rglob("*.py"):
        for name, guarded in imports(ast.parse(path.read_text()).body, guarded=False):
            every.add(name)
            if not guarded:
                needed.add(name)
    ours = {"jaxreg", *sys.stdlib_module_names}
    return needed - ours, every - ours


def test_every_import_is_declared_and_every_declared_one_imported():
    needed, every = imported()
    distributions = importlib.metadata.packages_distributions()

    def origin(module: str) -> set[str]:
        return {utils.canonicalize_name(name) for name in distributions[module]}

    declared = set(asked_for(PROJECT["dependencies"]))
    undeclared = {module for module in needed if not origin(module) & declared}
    assert undeclared == set()
    found = set().union(*(origin(module) for module in every & set(distributions)))
    assert declared - found == set(), "declared, but never imported"


def test_an_import_counts_unless_its_absence_is_foreseen():
    text = """
import a.b
from c import d
def f():
    try:
        import e
    except ImportError:
        import g
    try:
        import h
    except OSError: ...
"""
    found = dict(imports(ast.parse(text).body, guarded=False))
    assert found == {"a": False, "c": False, "e": True, "g": False, "h": False}


def test_constraints_fit_the_project():
    asked = [*asked_for(PROJECT["dependencies"]).values()]
    for group in PROJECT["optional-dependencies"].values():
        asked += asked_for(group).values()
    pinned = {}
    for text in (ROOT / "constraints.txt").read_text().splitlines():
        if text and not text.startswith("#"):
            name, _, number = text.partition("==")
            pinned[utils.canonicalize_name(name)] = version.Version(number)
    for need in asked:
        name = utils.canonicalize_name(need.name)
        assert name in pinned, f"{need.name} has no tested version"
        assert need.specifier.contains(pinned[name], prereleases=True), str(need)


@pytest.mark.parametrize("name", PROJECT["dependencies"])
def test_a_dependency_states_its_oldest_version_alone(name):
    """What benchmarks/lower_bounds.py installs."""
    (bound,) = requirements.Requirement(name).specifier
    assert bound.operator == ">="


def test_the_wheel_installs_and_runs_without_the_checkout(tmp_path):
    checkout, fresh = tmp_path / "checkout", tmp_path / "fresh"
    checkout.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(
        ROOT / "jaxreg", checkout / "jaxreg",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def said(*command) -> str:
        return subprocess.run(
            command, cwd=tmp_path, env=clean, check=True, capture_output=True, text=True
        ).stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    alone = ("--no-deps", "--no-index")
    said(*pip, "wheel", *alone, "--no-build-isolation", checkout, "-w", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(checkout)
    modules = (path.relative_to(ROOT) for path in ROOT.glob("jaxreg/**/*.py"))
    pages = (f.relative_to(ROOT) for f in (ROOT / "jaxreg").rglob("*.[cj]s*"))
    expected = {"jaxreg/py.typed", *(path.as_posix() for path in (*modules, *pages))}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())

    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    said(*pip, "--python", python, "install", *alone, "--no-compile", wheel)
    # The dependencies are this environment's. Its own jaxreg, where it has one, is
    # found after the wheel's.
    (packages,) = fresh.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others))
    place, number = said(
        python, "-c", "import jaxreg; print(jaxreg.__file__, jaxreg.__version__)"
    ).split()
    assert pathlib.Path(place).parents[1] == packages
    assert number == jaxreg.__version__
    assert "register" in said(fresh / "bin" / "jaxreg", "--help")
