"""Who may import whom, and what importing costs.

The contracts themselves are in pyproject.toml, for import-linter.
"""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest

import jaxreg

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxreg"
TORCH = ("torch", "torchvision", "unigradicon", "icon_registration")


def modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: pathlib.Path) -> str:
    """jaxreg/io/files.py is "io.files", jaxreg/io/__init__.py is "io"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(nodes) -> set[str]:
    """Returns what import statements name: modules, and names taken out of modules."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_import(tree: ast.AST):
    """Yields the nodes that run when a module is imported: no function bodies."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def below(name: str, prefixes) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def lint_imports(folder: pathlib.Path) -> subprocess.CompletedProcess:
    program = shutil.which("lint-imports", path=pathlib.Path(sys.executable).parent)
    if program is None:
        pytest.skip("import-linter is not installed")
    return subprocess.run(
        [program, "--no-cache"], cwd=folder, capture_output=True, text=True
    )


def test_contracts_hold():
    found = lint_imports(ROOT)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("space/grid.py", "from jaxreg.io import files"),
        ("models/rdp.py", "from jaxreg.losses import overlap"),
        ("data/pairs.py", "import flax"),
        ("metrics.py", "import nibabel"),
        ("registration/pair.py", "from jaxreg.cli import main"),
        ("training/step.py", "from jaxreg.experiments import run"),
    ],
)
def test_contracts_refuse(module, line, tmp_path):
    """The check itself works: each of these would be reported."""
    shutil.copytree(PACKAGE, tmp_path / "jaxreg")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "jaxreg" / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert "BROKEN" in lint_imports(tmp_path).stdout


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_no_module_needs_torch_to_be_imported(path):
    names = imported(at_import(ast.parse(path.read_text(encoding="utf-8"))))
    assert [name for name in sorted(names) if below(name, TORCH)] == []


@pytest.mark.parametrize(
    "room",
    [
        "space",
        "nn",
        "models",
        "losses",
        "metrics",
        "matching",
        "registration.pair",
        "registration.preparation",
        "registration.prealign",
        "registration.optimization",
    ],
)
def test_rooms_without_files_open_none(room):
    found = [path for path in modules() if below(dotted(path), [room])]
    assert found, f"there is no jaxreg.{room}"
    for path in found:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "open" not in called, dotted(path)
        assert not below("pathlib", imported(ast.walk(tree))), dotted(path)


def modules_after(code: str) -> set[str]:
    """Returns which modules are loaded once a new interpreter has run the code."""
    program = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_jaxreg_takes_no_jax():
    assert not {"jax", "numpy", *TORCH} & modules_after("import jaxreg")


def test_public_names_are_there():
    assert set(jaxreg.__all__) <= set(dir(jaxreg))
    for name in jaxreg.__all__:
        assert getattr(jaxreg, name) is not None, name
    with pytest.raises(AttributeError, match="no_such_name"):
        jaxreg.no_such_name  # noqa: B018


def test_the_main_path_leaves_torch_alone():
    code = "import jaxreg.cli.main, jaxreg.registration.pair, jaxreg.weights.load"
    assert not set(TORCH) & modules_after(code)


def test_a_log_for_tensorboard_leaves_torch_alone(tmp_path):
    pytest.importorskip("tensorboardX")
    code = f"from jaxreg.training.logging import RunLog; RunLog({str(tmp_path)!r})"
    assert not set(TORCH) & modules_after(code)


def test_importing_the_command_line_is_quick():
    """--help needs no JAX."""
    assert "jax" not in modules_after("import jaxreg.cli.main")
