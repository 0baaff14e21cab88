"""What README and documentation print: every example is read, and nearly all are run.

The examples of a page run in its order, in this process, in a folder with tiny scans
and random weights under the names that the pages use. Each page has one at least.
"""

import ast
import contextlib
import csv
import dataclasses
import functools
import pathlib
import pkgutil
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
import typer

import jaxreg
from jaxreg.cli import main
from jaxreg.data import network_grid, synthetic
from jaxreg.models import sam
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.sam import HU_RANGE, SamConfig
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.nn.heads import SmoothnessRange
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SHAPE = (16, 16, 16)
GRADICON = GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0)
SMALLER = {
    "64,80,64": "8,8,8",
    "(64, 80, 64)": "(8, 8, 8)",
    "--prealign affine": "--prealign centre",  # a search of 40 s
    "--io-iterations 100": "--io-iterations 3",
    "--io-iterations 50": "--io-iterations 3",
    "--io_iterations 50": "--io_iterations 3",
}
"""What stands in the pages, and what is run in its place: the work, not its kind."""
_TINY = (
    "--train.batch 1 --loop.image_every 0 --loading.shape 16,16,16 "
    "--data.pairs_per_epoch 2 --data.validation_pairs 0 --model.channels_down 2,4 "
    "--model.channels_up 4 --model.downsampled_steps 0 --model.fullres_steps 0 "
    "--objective.similarity mse --objective.similarity_options None "
    "--objective.dice_weight 0"
)
TRAINED_SMALLER = {
    "demo": f"{_TINY} --stages.stage_1.epochs 1",
    "finetune": f"{_TINY} --stages.finetune.epochs 1",
}
"""Options that a training run gets besides, by its configuration."""
NOT_RUN = {
    r"\S*jaxreg demo ": "takes minutes; tests/test_demo.py runs it on a small pair",
    r".* configs/sam": "compiles for long; tests/experiments/test_sam.py trains it",
    r".* --prealign sam ": "needs SAM as trained: random weights match nothing",
    r"jaxreg tune-lambda ": "takes minutes; tests/evaluation/test_sweep.py runs it",
    r".* --dry-run": "compiles for long; tests/experiments/test_configs.py has each",
    r".* --coordinator ": "needs two hosts; tests/training/test_parallel.py has them",
}
"""Beginnings of commands, and why they are not run."""
NO_EXAMPLE = {
    "accelerators": "compiles at full size; tests/test_compiled.py has it in small",
    "colab": "tests/test_notebooks.py runs the notebooks that it names",
}


# --- reading them ---------------------------------------------------------------------


def blocks_of(page: pathlib.Path) -> list[tuple[str, str]]:
    """Returns (language, text) of each fenced example."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S)


def commands_of(block: str) -> list[str]:
    """Returns the jaxreg commands of a shell block."""
    lines = block.replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in line.split("&&"))
    return [part for part in parts if re.match(r"(\S*/)?jaxreg(\s|$)", part)]


COMMANDS = sorted(
    {
        command
        for page in PAGES
        for language, block in blocks_of(page)
        for command in (commands_of(block) if language == "sh" else [])
    }
)


def parse(line: str) -> None:
    """Parses a command line as `main.main` does, without carrying it out."""
    argv = main._hyphens(shlex.split(line, comments=True)[1:])
    command = typer.main.get_command(main.app)
    while argv and argv[0] in (verbs := getattr(command, "commands", {})):
        command, argv = verbs[argv[0]], argv[1:]
    with command.make_context("jaxreg", list(argv), obj=argv):
        pass


def test_the_pages_show_every_verb():
    assert set(typer.main.get_command(main.app).commands) <= {
        command.split()[1] for command in COMMANDS
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line):
    try:
        parse(line)
    except typer.Exit as stop:  # --help and --version
        assert stop.exit_code == 0


def test_parse_refuses_an_unknown_option():
    with pytest.raises(main._ClickException):
        parse("jaxreg models --no-such-option")


def blocks_of_python() -> list[str]:
    return [
        text for page in PAGES for kind, text in blocks_of(page) if kind == "python"
    ]


@pytest.mark.parametrize("block", blocks_of_python())
def test_python_uses_what_is_public(block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert [name.name for name in node.names] == ["jaxreg"]
        assert not isinstance(node, ast.ImportFrom)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "jaxreg"
    }
    assert used
    assert used <= set(jaxreg.__all__)


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_page_of_python_has_what_is_public():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, re.M)}
    assert set(jaxreg.__all__) <= shown


def test_files_and_modules_that_are_named_exist():
    """`jaxreg/losses/similarity.py`, `jaxreg.models.sam`, `configs/demo.py`."""
    rooms = "benchmarks|colab|configs|docs|jaxreg|tests|weights"
    found = 0
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(rf"`((?:{rooms})/[\w/.]+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
            found += 1
        for name in re.findall(r"(?:`|::: )(jaxreg\.[\w.]+)", text):
            assert pkgutil.resolve_name(name) is not None, f"{page}: {name}"
            found += 1
    assert found > 30


# --- running them ---------------------------------------------------------------------


def save_weights(path, config, scans, init=None):
    """Writes random weights of a network, and what its scans must look like."""
    init = init or (lambda key: config.build().init(key, SHAPE))
    variables = jax.tree.map(np.asarray, init(jax.random.key(0)))
    said = {"shape": SHAPE, "ct_window": (-1000, 1000), "mri_quantiles": (0, 0.99)}
    path.parent.mkdir(parents=True, exist_ok=True)
    bundle_lib.save_bundle(
        path,
        bundle_lib.Bundle(
            variables, config.kind, dataclasses.asdict(config), {**said, **scans},
            "a test", "none",
        ),
    )  # fmt: skip


def write_scans(folder: pathlib.Path) -> None:
    """Writes two labelled bodies of 24 x 20 x 22 voxels about the pages' points."""
    config = synthetic.SyntheticConfig(shape=(24, 24, 24), labels=3, noise=0.0)
    pair = synthetic.pair(config, seed=0, index=0)
    # LPS (-12.5, 40, 230), which `jaxreg match` is shown, is the centre.
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[:3, :3] = 2.0 * np.eye(3)[:, ::-1]
    affine[:3, 3] = np.array([12.5, -40.0, 230.0]) - 2.0 * 11.5
    grid = jaxreg.Grid(config.shape, affine)
    arrays = {
        # Hounsfield units, which serve as intensities of MR as well.
        "fixed": np.rint(2000 * pair.fixed - 1000).astype(np.int16),
        "moving": np.rint(2000 * pair.moving - 1000).astype(np.int16),
        "fixed_labels": pair.fixed_labels.astype(np.uint8),
        "moving_labels": pair.moving_labels.astype(np.uint8),
    }
    for name, array in arrays.items():
        volume = jaxreg.Volume(array[..., 0], grid)
        jaxreg.write_volume(folder / f"{name}.nii.gz", volume)
    jaxreg.write_transform(folder / "transform.h5", jaxreg.Transform(()), grid)
    shutil.copy(folder / "transform.h5", folder / "transform.hdf5")
    shutil.copy(folder / "transform.h5", folder / "inverse.h5")
    points = "x,y,z\n12.5,-40,230\n14,-38,232\n"
    (folder / "fixed_points.csv").write_text(points)
    (folder / "moving_points.csv").write_text("x,y,z\n-12.5,40,230\n")
    (folder / "pairs.csv").write_text(
        "fixed,moving,fixed_label,moving_label\n"
        "fixed.nii.gz,moving.nii.gz,fixed_labels.nii.gz,moving_labels.nii.gz\n"
        "moving.nii.gz,fixed.nii.gz,moving_labels.nii.gz,fixed_labels.nii.gz\n"
    )


def write_manifests(folder: pathlib.Path) -> None:
    """Writes ten labelled subjects: scans.csv has a split, my_scans.csv has none."""
    config = synthetic.SyntheticConfig("chest", shape=SHAPE, labels=2)
    manifest = synthetic.write_dataset(folder, config, subjects=10)
    with open(manifest, newline="") as file:
        rows = [{**row, "region": "chest", "modality": "ct"}
                for row in csv.DictReader(file)]  # fmt: skip
    for name in ("scans.csv", "my_scans.csv"):
        columns = [c for c in rows[0] if c != "split" or name == "scans.csv"]
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages suppose to be there, small."""
    folder = tmp_path_factory.mktemp("pages")
    write_scans(folder)
    write_manifests(folder)
    for name in ("configs", "weights"):
        (folder / name).symlink_to(ROOT / name)
    for place in ("cache/unigradicon", "cache/multigradicon", "runs/finetuned/weights"):
        save_weights(folder / place, GRADICON, {"orientation": "any"})
    rule = network_grid.ResamplingRule("pad_crop", "spl", 2.0)
    box = {**rule.to_dict(), "ct_window": HU_RANGE}
    known = ["chest", "abdomen"]
    unireg = UniRegConfig(
        regions=2, tasks=((0, "intra"), (1, "inter")), features="mind",
        smoothness_range=SmoothnessRange(0.1, 10.0), form="native",
    )  # fmt: skip
    said = {**box, "tasks": known, "regions": known}
    save_weights(folder / "runs/unireg/weights", unireg, said)
    # A folder: a PyTorch file says neither a small grid nor a form that compiles fast.
    pyramid = UniRegRpnConfig(channels=1, form="native")
    known = ["chest", "abdomen", "head", "liver", "cardiac", "brain"]
    said = {"tasks": known, "regions": known}
    save_weights(folder / "unireg_rpn_6task.pth", pyramid, said)
    config = SamConfig((2, 2, 3, 3), 4, form="native")
    init = functools.partial(sam.init, config)
    save_weights(folder / "runs/sam/weights", config, box, init)
    return folder


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """Commands that succeeded: the README's are other pages' as well."""
    return set()


@pytest.fixture
def work(folder, monkeypatch):
    """The folder as the working directory; the published networks are small ones."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAXREG_CACHE", str(folder / "cache"))
    for name in ("unigradicon", "multigradicon"):
        fields = dataclasses.asdict(GRADICON)
        card = dataclasses.replace(zoo.ZOO[name], config=fields)
        monkeypatch.setitem(zoo.ZOO, name, card)
    return folder


TORCH_FILES = {
    "Step_2_final.trch": "cache/unigradicon",
    "finetuned.trch": "runs/finetuned/weights",
    "sam.pth": "runs/sam/weights",
}


def smaller(text: str) -> str:
    for shown, run in SMALLER.items():
        text = text.replace(shown, run)
    return text


def run_command(command: str) -> None:
    """Carries out a command of a page; PyTorch's files that it reads are made."""
    argv = shlex.split(smaller(command), comments=True)[1:]
    for name in set(TORCH_FILES) & set(argv):
        if not pathlib.Path(name).exists():
            pytest.importorskip("torch")
            made = ["convert", "--from", TORCH_FILES[name], "--to", name]
            assert main.main(made) == 0
        if argv[0] == "register" and name != "sam.pth":
            argv += ["--shape", "16"]  # which such a file cannot say
    if argv[0] == "register" and not {"--io-iterations", "--io_iterations"} & set(argv):
        argv += ["--io-iterations", "3"]
    if "--io-target map" in command:
        argv += ["--shape", "16"]  # 175 where no network says it
    if argv[0] == "train":
        if "--out" in argv:  # what stands there in place of a run for other pages
            shutil.rmtree(argv[argv.index("--out") + 1], ignore_errors=True)
        config = pathlib.Path(argv[argv.index("--config") + 1]).stem
        argv += TRAINED_SMALLER[config].split()
    assert main.main(argv) == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, work, ran, capsys):
    done, left_out = 0, []
    for language, block in blocks_of(page):
        if language == "python":
            exec(compile(smaller(block), page.name, "exec"), {})
            done += 1
        for command in commands_of(block) if language == "sh" else []:
            reason = next((r for c, r in NOT_RUN.items() if re.match(c, command)), None)
            if reason is not None:
                left_out.append(f"not run: {command}: it {reason}")
                continue
            if command not in ran:
                run_command(command)
                ran.add(command)
            done += 1
    with capsys.disabled(), contextlib.suppress(BrokenPipeError):
        print(*left_out, sep="\n", end="\n" if left_out else "")
    assert (done > 0) != (page.stem in NO_EXAMPLE)


def test_what_is_left_out_is_there():
    for beginning in NOT_RUN:
        assert any(re.match(beginning, command) for command in COMMANDS)
    assert set(NO_EXAMPLE) <= {page.stem for page in PAGES}
