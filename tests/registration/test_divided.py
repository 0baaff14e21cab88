"""Lists that several processes share: the same files as one makes, and mistakes."""

import csv
import dataclasses
import pathlib

import numpy as np
import pytest

from jaxreg.cli import main
from jaxreg.data import pair_list
from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration import many
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo

GRID = Grid((9, 8, 10), np.diag([1.0, 1.1, 0.9, 1.0])[[2, 1, 0, 3]])
NAMES = "abcde"
TEXT = "fixed,moving\n" + "".join(
    f"{fixed}.nii.gz,{moving}.nii.gz\n"
    for fixed, moving in ("ab", "cd", "ea", "bc", "de", "ac", "bd")
)
MRI = ("--fixed-modality", "mri", "--moving-modality", "mri")


@dataclasses.dataclass(frozen=True)
class Bending(RegistrationModel):
    """A stand-in for a network: a displacement that depends on both images."""

    def apply(self, variables, moving, fixed, **_):
        step = 0.1 * (moving - fixed) * variables["params"]["scale"]
        return Prediction(Transform((Displacement(step.repeat(3, -1)),))), {}


@pytest.fixture(autouse=True)
def network(monkeypatch):
    variables = {"params": {"scale": np.ones((), np.float32)}}
    rule = {"shape": [8, 8, 8], "orientation": "any"}
    bundle = bundle_lib.Bundle(variables, "gradicon", {}, rule, "a test", "none")
    found = zoo.LoadedModel("bending", Bending(), variables, bundle)
    monkeypatch.setattr(load, "load", lambda *_, **__: found)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name in NAMES:
        array = generator.integers(0, 1000, (9, 8, 10)).astype(np.int16)
        volumes.write_volume(tmp_path / f"{name}.nii.gz", Volume(array, GRID))
    (tmp_path / "pairs.csv").write_text(TEXT)
    return tmp_path


def register(folder: pathlib.Path, out: str, *more: str) -> int:
    return main.main(
        ["register", "--model", "w.trch", "--io-iterations", "None",
         "--io-sim", "mse", *MRI,
         "--pairs", f"{folder}/pairs.csv", "--out-dir", f"{folder}/{out}",
         "--summary", f"{folder}/{out}.csv", *more]
    )  # fmt: skip


def lines(path: pathlib.Path, *, without=("seconds",)) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [
            {name: cell for name, cell in row.items() if name not in without}
            for row in csv.DictReader(file)
        ]


def test_three_parts_make_what_one_run_makes(folder, capsys):
    assert register(folder, "out") == 0
    whole = lines(folder / "out.csv")
    written = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}
    assert len(written) == 14
    for path in (folder / "out").iterdir():
        path.unlink()
    (folder / "out.csv").unlink()
    for part in ("3/3", "1/3", "2/3"):
        capsys.readouterr()
        assert register(folder, "out", "--part", part) == 0
    said = capsys.readouterr().out
    assert "part 2 of 3: 2 of 7 pairs" in said
    assert f"--merge-parts 3 in place of --part makes {folder}/out.csv" in said
    assert not (folder / "out.csv").exists()
    sizes = [len(lines(folder / f"out.part-{k}-of-3.csv")) for k in (1, 2, 3)]
    assert sizes == [3, 2, 2]
    assert register(folder, "out", "--merge-parts", "3") == 0
    assert lines(folder / "out.csv") == whole
    again = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}
    assert again == written


def test_files_are_called_as_in_the_whole_list(folder):
    """Two scans of one name, of which a part has one alone."""
    (folder / "other").mkdir()
    other = folder / "other" / "a.nii.gz"
    other.write_bytes((folder / "a.nii.gz").read_bytes())
    (folder / "pairs.csv").write_text(
        "fixed,moving\na.nii.gz,b.nii.gz\nother/a.nii.gz,b.nii.gz\n"
    )
    assert register(folder, "out", "--part", "2/2") == 0
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["b_to_other-a_transform.h5", "b_to_other-a_warped.nii.gz"]


def test_a_part_that_was_killed_goes_on(folder, capsys, monkeypatch):
    """After a kill there is no summary yet, or one of the first pairs."""
    monkeypatch.setattr("jaxreg.cli.many._SUMMARY_S", 0.0)
    write, count = many.write_summary, [0]

    def killed(path, outcomes):
        count[0] += 1
        if count[0] > 2:  # as SIGKILL, after which nothing is written
            raise SystemExit(9)
        write(path, outcomes)

    monkeypatch.setattr(many, "write_summary", killed)
    with pytest.raises(SystemExit):
        register(folder, "out", "--part", "1/2")
    monkeypatch.setattr(many, "write_summary", write)
    own = folder / "out.part-1-of-2.csv"
    kept = lines(own, without=())
    assert [row["row"] for row in kept] == ["row 2", "row 4"]
    assert register(folder, "out", "--part", "2/2") == 0
    assert register(folder, "out", "--merge-parts", "2") == 2
    said = capsys.readouterr().err
    assert "lacks row 6; finish part 1 of 2" in said
    assert not (folder / "out.csv").exists()
    assert register(folder, "out", "--part", "1/2", "--skip-existing") == 0
    assert register(folder, "out", "--merge-parts", "2") == 0
    found = lines(folder / "out.csv", without=())
    assert [row["row"] for row in found] == [f"row {n}" for n in range(2, 9)]
    assert found[0] == kept[0] | {"status": "skipped"}


def test_more_parts_than_pairs(folder, capsys):
    assert register(folder, "out", "--part", "9/9") == 0
    assert "part 9 of 9: 0 of 7 pairs" in capsys.readouterr().out
    for number in range(1, 8):
        assert register(folder, "out", "--part", f"{number}/9") == 0
    assert register(folder, "out", "--merge-parts", "9") == 0
    assert len(lines(folder / "out.csv")) == 7


def test_what_failed_in_a_part_is_said_when_merging(folder, capsys):
    whole = (folder / "d.nii.gz").read_bytes()
    (folder / "d.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert register(folder, "out", "--part", "1/2") == 2
    assert register(folder, "out", "--part", "2/2") == 2
    capsys.readouterr()
    assert register(folder, "out", "--merge-parts", "2") == 2
    assert "3 of 7 pairs failed" in capsys.readouterr().err
    status = [row["status"] for row in lines(folder / "out.csv")]
    assert status == ["done", "failed", "done", "done", "failed", "done", "failed"]


def test_parts_do_not_write_one_file(folder):
    """Two rows of one output are found, also where they belong to two parts."""
    text = "fixed,moving,transform_out\na.nii.gz,b.nii.gz,t.h5\n"
    (folder / "pairs.csv").write_text(text + "a.nii.gz,c.nii.gz,t.h5\n")
    assert register(folder, "out", "--part", "1/2") == 2
    assert not (folder / "out").exists()


WRONG = {
    "no such part": (("--part", "5/4"), "--part is 5/4, expected K/N"),
    "no part": (("--part", "x"), "--part is x, expected K/N"),
    "part nought": (("--part", "0/4"), "--part is 0/4, expected K/N"),
    "no number of parts": (("--merge-parts", "0"), "--merge-parts is 0"),
    "both": (("--part", "1/2", "--merge-parts", "2"), "leave one of them out"),
    "not done": (("--merge-parts", "2"), "out.part-1-of-2.csv does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_sentence(case, folder, capsys, monkeypatch):
    more, named = WRONG[case]
    monkeypatch.setattr(load, "load", None)
    before = sorted(folder.iterdir())
    assert register(folder, "out", *more) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert named in line
    assert captured.out == ""
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("more", [("--part", "1/2"), ("--merge-parts", "2")])
def test_parts_are_those_of_a_list(more, capsys):
    argv = ["register", *MRI, "--fixed", "a", "--moving", "b", *more]
    assert main.main(argv) == 2
    assert f"{more[0]} is for a list" in capsys.readouterr().err


def test_merging_needs_a_summary(folder, capsys):
    argv = ["register", "--pairs", f"{folder}/pairs.csv", "--merge-parts", "2"]
    assert main.main(argv) == 2
    assert "give --summary" in capsys.readouterr().err


def test_parts_of_another_list_are_refused(folder):
    for part in ("1/2", "2/2"):
        assert register(folder, "out", "--part", part) == 0
    head, first, *others = TEXT.splitlines(keepends=True)
    (folder / "pairs.csv").write_text("".join([head, *others, first]))
    rows = pair_list.read_rows(folder / "pairs.csv")
    with pytest.raises(UserError, match="as fixed scan of row 2"):
        many.merge_summaries(folder / "out.csv", rows, 2)


def test_a_damaged_part_is_named(folder):
    for part in ("1/2", "2/2"):
        assert register(folder, "out", "--part", part) == 0
    rows = pair_list.read_rows(folder / "pairs.csv")
    own = folder / "out.part-2-of-2.csv"
    for text in (own.read_text()[:-9].rstrip(",") + ",,,,,,\n", "x,y\n1,2\n"):
        own.write_text(text)
        with pytest.raises(UserError, match=r"part-2-of-2.csv is no summary"):
            many.merge_summaries(folder / "out.csv", rows, 2)
