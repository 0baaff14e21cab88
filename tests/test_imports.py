"""Who may import whom, and whether README and constraints say what is true.

The table is read off the sources with `ast`, so that an import inside a function or
under TYPE_CHECKING counts as well.
"""

import ast
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import typer
from packaging import requirements, utils, version

from jaxreg.cli import main

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxreg"
TORCH = ("torch", "torchvision", "unigradicon", "icon_registration")
FILE_FORMATS = ("nibabel", "h5py", "SimpleITK", "orbax")


@dataclasses.dataclass(frozen=True)
class Room:
    """What a room may import besides itself, `typing` and `errors`.

    Attributes:
      jaxreg: modules or whole rooms of jaxreg, below the package's name.
      others: packages that only some rooms may import, see RATIONED.
    """

    jaxreg: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


# Packages that not every room may import. nibabel.orientations is arithmetic on affine
# matrices and opens no file, so it is listed by itself.
RATIONED = (*FILE_FORMATS, "nibabel.orientations", "flax", "optax", "grain",
            "matplotlib", "typer", "rich", "urllib", "platformdirs")  # fmt: skip

_TOP = (
    "models", "losses", "metrics", "training.step", "data.preprocess", "space", "io",
    "optimize", "zoo", "tasks", "register", "evaluate", "report",
)  # fmt: skip

TABLE = {
    "errors": Room(),
    "typing": Room(),
    "late": Room(),
    "space": Room(("late",)),
    "nn": Room(("late",), ("flax",)),
    "io": Room(("space",), FILE_FORMATS),
    "data": Room(
        ("space", "io.volumes", "io.files", "io.tables"),
        ("grain", "nibabel.orientations"),
    ),
    "models": Room(("nn", "space"), ("flax",)),
    "losses": Room(("space",)),
    "metrics": Room(("space",)),
    "training": Room(
        (
            "models.base",
            "losses",
            "metrics",
            "io.checkpoints",
            "io.runs",
            "io.files",
            "space",
        ),
        ("flax", "optax", "rich"),
    ),
    "matching": Room(("models.sam", "space")),
    "prealign": Room(("matching", "space"), ("optax",)),
    "affine_search": Room(("data.resize", "losses.similarity", "space"), ("optax",)),
    "points": Room(("matching", "models.sam", "data.preprocess", "space")),
    "optimize": Room(_TOP, ("optax",)),
    "tasks": Room((*_TOP, "nn.dynamic")),
    "prealignment": Room(
        (
            "affine_search",
            "points",
            "prealign",
            "matching",
            "models.sam",
            "data",
            "space",
        ),
        ("nibabel.orientations",),
    ),
    "refine": Room((*_TOP, "nn", "points"), ("optax",)),
    "register": Room(
        (*_TOP, "nn.dynamic", "affine_search", "prealignment", "refine", "compiled"),
        ("nibabel.orientations",),
    ),
    "pair_list": Room((*_TOP, "data.manifest", "results")),
    "evaluate": Room((*_TOP, "data.manifest", "pair_list", "prealignment", "results")),
    "batch": Room((*_TOP, "pair_list")),
    "compiled": Room(others=("platformdirs",)),
    "tuning": Room((*_TOP, "nn.dynamic", "results")),
    "results": Room(("metrics", "io.files")),
    "comparison": Room(("space", "io")),
    "report": Room(_TOP, ("nibabel.orientations", "matplotlib")),
    # The only room that downloads.
    "zoo": Room(_TOP, ("urllib", "platformdirs")),
    "demo": Room(_TOP),
}
# Nothing below imports these, so they may have anything.
_JOINING = (
    "experiment", "sources", "validation", "trainer", "dryrun", "cli_training",
    "cli_evaluation", "cli_batch",
    "cli_options", "cli_progress", "cli_matching", "sam_experiment", "sam_training",
)  # fmt: skip
TABLE |= dict.fromkeys((*_JOINING, "cli"), Room((*TABLE, *_JOINING), RATIONED))


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


def broken_rules(room: str, names: set[str]) -> list[str]:
    rule = TABLE[room]
    allowed = (room, "typing", "errors", *rule.jaxreg)
    broken = []
    for name in sorted(names):
        top, _, inner = name.partition(".")
        if top == "jaxreg":
            if inner != "__version__" and not below(inner, allowed):
                broken.append(name)
        elif below(name, RATIONED) and not below(name, rule.others):
            broken.append(name)
    return broken


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_only_what_the_table_allows(path):
    name = dotted(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imported(ast.walk(tree))
    if not name:  # jaxreg/__init__.py: importing it must stay free
        assert names == set()
        return
    room = name.split(".")[0]
    assert room in TABLE, f"{name} belongs to no room; add it to the table"
    assert broken_rules(room, names) == []


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
        "points",
        "prealign",
        "affine_search",
        "optimize",
        "register",
    ],  # fmt: skip
)
def test_rooms_without_files_open_none(room):
    for path in modules():
        if dotted(path).split(".")[0] != room:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "open" not in called, dotted(path)
        assert not below("pathlib", imported(ast.walk(tree))), dotted(path)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("space", "from jaxreg.io import files"),
        ("space", "from jaxreg import io"),
        ("nn", "from jaxreg.space import fields"),
        ("io", "from jaxreg.models.base import Prediction"),
        ("data", "from jaxreg.io import checkpoints"),
        ("data", "import flax"),
        ("models", "from jaxreg.losses import overlap"),
        ("losses", "import nibabel as nib"),
        ("training", "from jaxreg.data import preprocess"),
        ("training", "from jaxreg.models import gradicon"),
        ("register", "from jaxreg import cli"),
        ("register", "import nibabel as nib"),
        ("optimize", "import urllib.request"),
    ],
)
def test_the_table_refuses(room, line):
    """The check itself works: each of these would be reported."""
    assert broken_rules(room, imported(ast.walk(ast.parse(line)))) != []


def test_importing_jaxreg_leaves_torch_alone():
    code = (
        "import sys, jaxreg.cli.main, jaxreg.registration.pair, jaxreg.weights.zoo; "
        f"print([m for m in {TORCH} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_importing_the_command_line_is_quick():
    """--help needs no JAX."""
    code = "import sys, jaxreg.cli.main; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# --- what the documents print ---------------------------------------------------------


def shell_lines() -> list[str]:
    """Returns the jaxreg commands of the README's shell blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|shell)\n(.*?)^```", text, re.M | re.S)
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


def test_the_readme_shows_every_verb():
    assert set(typer.main.get_command(main.app).commands) <= {
        line.split()[1] for line in shell_lines()
    }


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_readme_command_parses(line):
    try:
        parse(line)
    except typer.Exit as stop:  # --help and --version
        assert stop.exit_code == 0


def test_parse_refuses_an_unknown_option():
    with pytest.raises(main._ClickException):
        parse("jaxreg models --no-such-option")


@pytest.mark.parametrize("number", [0, 1])
def test_readme_python_compiles(number):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names = imported(ast.walk(ast.parse(blocks[number])))
    assert any(below(name, ["jaxreg"]) for name in names)


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
