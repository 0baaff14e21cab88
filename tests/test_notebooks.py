"""The notebooks run from top to bottom, at a small grid."""

import importlib.machinery
import importlib.util
import json
import pathlib
import subprocess
import sys
import types
import zipfile

import nibabel as nib
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_clean(name):
    """No outputs, no pinned jax, and every code cell compiles."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    book = json.loads(text)
    assert text.endswith("}\n")
    assert "jax==" not in text
    assert "jax[" not in text
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            compile("".join(cell["source"]), name, "exec")


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("way", ["address", "upload"])
def test_set_up_on_colab_keeps_its_jax(name, way, tmp_path, monkeypatch, capsys):
    """The cell that installs: what is there already constrains pip."""
    book = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    stem = name.removesuffix(".ipynb")
    source = "".join(
        next(c["source"] for c in book["cells"] if c["id"] == f"{stem}-02")
    )
    source = source.replace("/content", str(tmp_path))
    if way == "address":
        source = source.replace('REPOSITORY = ""', 'REPOSITORY = "https://x/y.git"')
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("jaxreg-main/pyproject.toml", "")
    frozen = "jax==0.7.2\njax-cuda12-plugin==0.7.2\njaxlib @ file:///x\nnumpy==2.0.2\n"
    asked = []

    def called(command, **_):
        asked.append(command)
        if command[0] == "git":
            pathlib.Path(command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 0, frozen + "numpydoc==1.0\n")

    colab = types.ModuleType("google.colab")
    files = types.SimpleNamespace(upload=lambda: {str(tmp_path / "up.zip"): b""})
    monkeypatch.setattr(colab, "files", files, raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", called)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile(source, stem, "exec"), {})
    assert (tmp_path / "jaxreg-repository").is_dir()
    # Where pip fails, running the cell again must not take the folder for the package.
    assert importlib.machinery.PathFinder.find_spec("jaxreg", [str(tmp_path)]) is None
    assert [command[0] == "git" for command in asked].count(True) == (way == "address")
    assert asked[-1][asked[-1].index("-c") + 1] == str(tmp_path / "constraints.txt")
    assert (tmp_path / "constraints.txt").read_text() == (
        "jax==0.7.2\njax-cuda12-plugin==0.7.2\nnumpy==2.0.2\n"
    )


def run(name: str, folder: pathlib.Path, monkeypatch, **settings) -> str:
    """Runs a notebook in a fresh kernel and returns what its cells printed."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("JAXREG_NOTEBOOK_OUT", str(folder / "out"))
    # A notebook's kernel inherits the environment of this process; a backend chosen
    # there would keep the pictures out of the notebook.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    book = nbformat.read(FOLDER / name, as_version=4)
    nbclient.NotebookClient(
        book, timeout=900, kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()  # fmt: skip
    outputs = [o for c in book.cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    return "".join(o.get("text", "") for o in outputs)


def test_register_notebook(tmp_path, monkeypatch):
    for package in ("nilearn", "pydeface"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    printed = run(
        "register.ipynb", tmp_path, monkeypatch,
        JAXREG_NOTEBOOK_SHAPE="8,8,8", JAXREG_NOTEBOOK_STEPS="2",
    )  # fmt: skip
    assert "lncc loss after" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "transform.h5", "displacement.nii.gz", "inverse.h5", "warped.nii.gz",
        "before_after.png", "report.html",
    }  # fmt: skip


@pytest.mark.torch
def test_export_notebook(tmp_path, monkeypatch, unigradicon):
    printed = run("export_to_pytorch.ipynb", tmp_path, monkeypatch)  # as it is
    assert "largest difference" in printed
    assert (tmp_path / "out" / "weights.trch").is_file()


def look_at(scans: pathlib.Path) -> dict:
    """Runs the cell of the training notebook that reads and checks own scans."""
    book = json.loads((FOLDER / "train.ipynb").read_text(encoding="utf-8"))
    source = next(c["source"] for c in book["cells"] if c["id"] == "train-06")
    names = {"OWN_SCANS": str(scans), "pathlib": pathlib}
    exec(compile("".join(source), "train-06", "exec"), names)
    return names


def write_scans(folder: pathlib.Path, count: int) -> pathlib.Path:
    folder.mkdir()
    for n in range(count):
        array = np.random.default_rng(n).uniform(size=(8, 9, 10)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"s{n}.nii.gz")
    return folder


@pytest.mark.parametrize(
    ("count", "held_out"), [(3, 1), (4, 2), (5, 2), (9, 2), (10, 2), (15, 3)]
)
def test_own_scans_leave_a_pair_to_validate_with(tmp_path, count, held_out):
    names = look_at(write_scans(tmp_path / "scans", count))
    assert len(names["scans"].of_split("val")) == held_out


def test_own_scans_with_errors_stop_the_notebook(tmp_path, capsys):
    folder = write_scans(tmp_path / "scans", 4)
    nib.save(nib.Nifti1Image(np.ones((8, 9, 10)), np.eye(4)), folder / "s1.nii.gz")
    with pytest.raises(SystemExit, match="mend the files above"):
        look_at(folder)
    assert "s1.nii.gz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("subjects", "words"),
    [
        (10, ["8 train", "2 val"]),
        pytest.param(
            3, ["2 train", "1 val", "no two held-out scans"], marks=pytest.mark.slow
        ),
    ],
)
def test_train_notebook(tmp_path, monkeypatch, subjects, words):
    printed = run(
        "train.ipynb", tmp_path, monkeypatch,
        JAXREG_NOTEBOOK_SHAPE="10,12,8", JAXREG_NOTEBOOK_EPOCHS="2",
        JAXREG_NOTEBOOK_PAIRS="4", JAXREG_NOTEBOOK_SUBJECTS=str(subjects),
    )  # fmt: skip
    assert "lncc loss after" in printed
    for word in words:
        assert word in printed
    assert ("no two held-out" in printed) == (subjects == 3)
    assert (tmp_path / "out" / "before_after.png").is_file()
    assert (tmp_path / "out" / "run" / "weights" / "jaxreg.json").is_file()
