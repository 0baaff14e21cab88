"""Who may import whom, what importing costs, and whether documents say what is true.

The contracts themselves are in pyproject.toml, for import-linter.
"""

import ast
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import typer
from packaging import requirements, utils, version

import jaxreg
from jaxreg.cli import main

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


def test_importing_the_command_line_is_quick():
    """--help needs no JAX."""
    assert "jax" not in modules_after("import jaxreg.cli.main")


# --- what the documents print ---------------------------------------------------------


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: pathlib.Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{language})\n(.*?)^```", text, re.M | re.S)


def shell_lines() -> list[str]:
    """Returns the jaxreg commands of the shell blocks of README and documentation."""
    blocks = [block for page in PAGES for block in blocks_of(page, "sh|bash|shell")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in line.split("&&"))
    return [part for part in parts if re.match(r"(\S*/)?jaxreg(\s|$)", part)]


def parse(line: str) -> None:
    """Parses a command line as `main.main` does, without carrying it out."""
    argv = main._hyphens(shlex.split(line, comments=True)[1:])
    command = typer.main.get_command(main.app)
    while argv and argv[0] in (verbs := getattr(command, "commands", {})):
        command, argv = verbs[argv[0]], argv[1:]
    with command.make_context("jaxreg", list(argv), obj=argv):
        pass


def test_the_documents_show_every_verb():
    assert set(typer.main.get_command(main.app).commands) <= {
        line.split()[1] for line in shell_lines()
    }


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_command_of_the_documents_parses(line):
    try:
        parse(line)
    except typer.Exit as stop:  # --help and --version
        assert stop.exit_code == 0


def test_parse_refuses_an_unknown_option():
    with pytest.raises(main._ClickException):
        parse("jaxreg models --no-such-option")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_documents_uses_what_is_public(page):
    for block in blocks_of(page, "python"):
        tree = ast.parse(block)
        assert imported(ast.walk(tree)) == {"jaxreg"}
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "jaxreg"
        }
        assert used
        assert used <= set(jaxreg.__all__)


def test_links_of_the_documents_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"


def test_constraints_fit_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        requirements.Requirement(text)
        for group in (
            project["dependencies"],
            *project["optional-dependencies"].values(),
        )
        for text in group
    ]
    pinned = {}
    for text in (ROOT / "constraints.txt").read_text().splitlines():
        if text and not text.startswith("#"):
            name, _, number = text.partition("==")
            pinned[utils.canonicalize_name(name)] = version.Version(number)
    for need in asked:
        name = utils.canonicalize_name(need.name)
        assert name in pinned, f"{need.name} has no tested version"
        assert need.specifier.contains(pinned[name], prereleases=True), str(need)
