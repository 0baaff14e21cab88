"""The notebooks run from top to bottom, at a small grid."""

import importlib.util
import json
import pathlib

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
    printed = run(
        "export_to_pytorch.ipynb", tmp_path, monkeypatch, JAXREG_NOTEBOOK_SIZE="66"
    )
    assert "largest difference" in printed
    assert (tmp_path / "out" / "weights.trch").is_file()


def test_train_notebook(tmp_path, monkeypatch):
    printed = run(
        "train.ipynb", tmp_path, monkeypatch,
        JAXREG_NOTEBOOK_SHAPE="10,12,8", JAXREG_NOTEBOOK_EPOCHS="2",
        JAXREG_NOTEBOOK_PAIRS="4", JAXREG_NOTEBOOK_SUBJECTS="10",
    )  # fmt: skip
    assert "lncc loss after" in printed
    assert "8 train" in printed and "2 val" in printed
    assert (tmp_path / "out" / "before_after.png").is_file()
    assert (tmp_path / "out" / "run" / "weights" / "jaxreg.json").is_file()
