"""Evaluations by parts, after an interrupt, and on several devices."""

import csv
import dataclasses
import math
import pathlib

import numpy as np
import pytest

from jaxreg.cli import main
from jaxreg.data import pair_list
from jaxreg.errors import UserError
from jaxreg.evaluation import run as run_lib
from jaxreg.evaluation import sharing
from jaxreg.evaluation import table as table_lib
from jaxreg.io import volumes
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration.parts import Part
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo

PROGRAM = pathlib.Path(__file__).parent / "programs" / "evaluate_devices.py"
SHAPE = (9, 8, 10)
GRID = Grid(SHAPE, np.diag([1.0, 1.1, 0.9, 1.0])[[2, 1, 0, 3]])
# Fixed, moving and task of seven pairs, of which the third part of three has two.
PAIRS = ("ab1", "bc1", "cd2", "da1", "ac2", "bd1", "ca1")
DEVICES = 4


@dataclasses.dataclass(frozen=True)
class Bending(RegistrationModel):
    """A stand-in for a network: a displacement that depends on both images."""

    def apply(self, variables, moving, fixed, **_):
        step = 0.1 * (moving - fixed)
        return Prediction(Transform((Displacement(step.repeat(3, -1)),))), {}


@pytest.fixture(autouse=True)
def network(monkeypatch):
    rule = {"shape": [8, 8, 8], "orientation": "any"}
    bundle = bundle_lib.Bundle({}, "gradicon", {}, rule, "a test", "none")
    found = zoo.LoadedModel("bending", Bending(), {}, bundle)
    monkeypatch.setattr(load, "load", lambda *_, **__: found)


@pytest.fixture
def folder(tmp_path):
    """Four scans; each has label 1 and another one of its own."""
    at = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    for number, name in enumerate("abcd"):
        centre = (np.array(SHAPE) - 1) / 2 + 0.3 * number
        far = (((at - centre) / (2.5 + 0.2 * number)) ** 2).sum(-1)
        image = Volume((1000 * np.exp(-far)).astype(np.float32), GRID)
        volumes.write_volume(tmp_path / f"{name}.nii.gz", image)
        labels = (far < 1).astype(np.uint8)
        labels[0, 0, : 3 + number] = 2 + number
        label = Volume(labels, GRID)
        volumes.write_volume(tmp_path / f"{name}_label.nii.gz", label)
    write_list(tmp_path, PAIRS)
    return tmp_path


def write_list(folder: pathlib.Path, pairs) -> None:
    lines = [
        f"{f}.nii.gz,{m}.nii.gz,{f}_label.nii.gz,{m}_label.nii.gz,mri,mri,task {task}"
        for f, m, task in pairs
    ]
    header = "fixed,moving,fixed_label,moving_label,fixed_modality,moving_modality,task"
    (folder / "pairs.csv").write_text("\n".join([header, *lines]) + "\n")


def evaluate(folder: pathlib.Path, *more: str, out: str = "out.csv") -> int:
    return main.main(
        ["evaluate", "--pairs", f"{folder}/pairs.csv", "--model", "w.trch",
         "--out", f"{folder}/{out}", *more]
    )  # fmt: skip


def cells(path: pathlib.Path) -> list[dict[str, str]]:
    """All that does not depend on time."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{n: c for n, c in r.items() if n not in ("seconds", "first")} for r in rows]


def test_three_parts_make_the_table_of_one_run(folder, capsys):
    assert evaluate(folder, out="whole.csv") == 0
    whole = cells(folder / "whole.csv")
    assert len(whole) == 3 * len(PAIRS)
    for part in ("2/3", "3/3", "1/3"):
        assert evaluate(folder, "--part", part) == 0
    said = capsys.readouterr().out
    assert "part 1 of 3: 3 of 7 pairs" in said
    assert f"--merge-parts 3 in place of --part makes {folder}/out.csv" in said
    assert not (folder / "out.csv").exists()
    assert len(cells(folder / "out.part-3-of-3.csv")) == 3 * 2
    assert (folder / "out.part-3-of-3.md").is_file()
    assert evaluate(folder, "--merge-parts", "3") == 0
    assert cells(folder / "out.csv") == whole
    # Labels of a task are known to all of its rows, also where no part has them all.
    names = {name for name in whole[0] if name.startswith("dice_")}
    assert names == {f"dice_{n}" for n in range(1, 6)}
    tables = [(folder / f"{name}.md").read_text() for name in ("out", "whole")]
    no_seconds = [
        [line.split("|")[:-2] for line in text.splitlines() if line.startswith("|")]
        for text in tables
    ]
    assert no_seconds[0] == no_seconds[1]
    # The seconds of each part's first pair hold its compilation.
    merged = table_lib.read_csv(folder / "out.csv")
    firsts = [row.pair for row in merged.select(method="bending") if row.first]
    assert firsts == ["b to a", "c to b", "d to c"]


def test_a_part_that_was_killed_goes_on(folder, capsys, monkeypatch):
    write, count = sharing.write_files, [0]

    def killed(*arguments, **named):
        count[0] += 1
        if count[0] > 2:
            raise SystemExit(9)
        write(*arguments, **named)

    monkeypatch.setattr(sharing, "write_files", killed)
    with pytest.raises(SystemExit):
        evaluate(folder, "--part", "1/2")
    monkeypatch.setattr(sharing, "write_files", write)
    own = folder / "out.part-1-of-2.csv"
    kept = table_lib.read_csv(own)
    assert len(kept.rows) == 3 * 2
    assert evaluate(folder, "--part", "2/2") == 0
    assert evaluate(folder, "--merge-parts", "2") == 2
    assert "finish part 1 of 2 first" in capsys.readouterr().err
    assert not (folder / "out.csv").exists()
    seen = []
    find = run_lib.cases.read
    monkeypatch.setattr(run_lib.cases, "read", lambda *a: seen.append(a[1]) or find(*a))
    assert evaluate(folder, "--part", "1/2", "--skip-existing") == 0
    assert seen == ["c to a", "a to c"]
    measured = {
        (row.method, row.pair): row.seconds
        for row in table_lib.read_csv(own).rows
        if row.method == "bending"
    }
    for row in kept.select(method="bending"):
        assert measured[row.method, row.pair] == row.seconds
    assert evaluate(folder, "--merge-parts", "2") == 0
    assert evaluate(folder, out="whole.csv") == 0
    assert cells(folder / "out.csv") == cells(folder / "whole.csv")


def test_what_failed_or_lacks_its_files_is_done_again(folder):
    row = table_lib.EvalRecord("m", "t", "p", tre_mm=1.0)
    empty = table_lib.EvalRecord("m", "t", "p")
    lines = pair_list.read_pairs(folder / "pairs.csv")
    there = dataclasses.replace(lines[0], warped_out=folder / "a.nii.gz")
    missing = dataclasses.replace(lines[0], warped_out=folder / "w.nii.gz")
    name = ("t", "p")

    def finished(row, pair, methods=("m",)):
        return sharing.Share(known=[row]).finished({name: pair}, methods)

    assert finished(row, lines[0]) == finished(row, there) == [row]
    assert finished(empty, lines[0]) == finished(row, missing) == []
    assert finished(row, lines[0], ("m", "other")) == []


def test_rows_of_another_evaluation_are_not_lost(folder, capsys):
    assert evaluate(folder, "--count", "1") == 0
    before = (folder / "out.csv").read_bytes()
    assert evaluate(folder, "--name", "other", "--skip-existing") == 2
    assert "has rows of bending" in capsys.readouterr().err
    write_list(folder, PAIRS[1:])
    assert evaluate(folder, "--skip-existing") == 2
    assert "has rows of the pair b to a" in capsys.readouterr().err
    assert (folder / "out.csv").read_bytes() == before


def test_more_parts_than_pairs(folder, capsys):
    write_list(folder, PAIRS[:2])
    for number in (1, 2, 3):
        assert evaluate(folder, "--part", f"{number}/3") == 0
    assert "part 3 of 3: 0 of 2 pairs" in capsys.readouterr().out
    assert not (folder / "out.part-3-of-3.csv").exists()
    assert evaluate(folder, "--merge-parts", "3") == 0
    assert len(cells(folder / "out.csv")) == 3 * 2


def rows(*named: tuple[str, str], folder: pathlib.Path, part: str) -> None:
    found = [table_lib.EvalRecord(m, "all", p, tre_mm=1.0) for m, p in named]
    path = folder / f"out.part-{part}-of-2.csv"
    table_lib.write_csv(path, table_lib.Result(tuple(found)))


MISMATCHED = {
    "other methods": ((("n", "c to b"),), "has the methods n, the parts before it m"),
    "another pair": ((("m", "x to y"),), "has x to y, which part 2 of 2"),
    "of another part": ((("m", "c to b"), ("m", "b to a")), "has b to a, which part 2"),
    "twice": ((("m", "c to b"), ("m", "c to b")), "has a row twice"),
}


@pytest.mark.parametrize("case", MISMATCHED)
def test_parts_that_do_not_belong_together(case, folder):
    second, message = MISMATCHED[case]
    write_list(folder, PAIRS[:2])
    listed = pair_list.read_pairs(folder / "pairs.csv")
    pairs = [dataclasses.replace(pair, task=None) for pair in listed]
    rows(("m", "b to a"), folder=folder, part="1")
    rows(*second, folder=folder, part="2")
    with pytest.raises(UserError, match=message):
        sharing.merge_files(pairs, 2, out=folder / "out.csv")
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize("part", ["0/4", "5/4", "x"])
def test_no_part_is_refused(part, folder, capsys):
    assert evaluate(folder, "--part", part) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--part is {part}, expected K/N" in line


def test_two_parts_do_not_write_one_file(folder):
    pairs = pair_list.read_pairs(folder / "pairs.csv")
    pairs = [dataclasses.replace(p, transform_out=folder / "t.h5") for p in pairs[:2]]
    with pytest.raises(UserError, match=r"c to b: .*t.h5 is an output twice"):
        run_lib.evaluate_files(
            pairs, load.load("w"), run_lib.options_lib.Options(io_iterations=None),
            out=folder / "out.csv", part=Part(1, 2),
        )  # fmt: skip


# --- several devices -----------------------------------------------------------------


@pytest.fixture
def tables(folder, on_devices):
    """Rows on one device and on four, of seven pairs, one of them broken."""
    whole = (folder / "d.nii.gz").read_bytes()
    (folder / "d.nii.gz").write_bytes(whole[: len(whole) // 2])
    return on_devices(DEVICES, PROGRAM, folder / "pairs.csv")


def test_devices_give_the_table_of_one(tables):
    """Numbers agree to rounding, and where nothing is measured both say so."""
    alone, each = tables["tables"]
    assert len(alone) == len(each) == 4 * len(PAIRS)
    for one, other in zip(alone, each, strict=True):
        for name in ("method", "task", "pair"):
            assert one[name] == other[name]
        for name in ("dice", "hd95_mm"):
            assert one[name].keys() == other[name].keys()
            for label, value in one[name].items():
                assert other[name][label] == pytest.approx(value, abs=1e-6, nan_ok=True)
        for name in ("tre_mm", "folding_percent", "sdlogj"):
            assert other[name] == pytest.approx(one[name], abs=1e-5, nan_ok=True)
    broken = [row["pair"] for row in each if math.isnan(row["sdlogj"])]
    assert set(broken) == {"d to c", "a to d", "d to b"}
    moved = {row["method"]: row["sdlogj"] for row in each if row["pair"] == "c to b"}
    assert moved["bending"] > 100 * 1e-5
    assert abs(moved["bending"] - moved["bending + IO"]) > 100 * 1e-5
    # Saved after each pair, or after each four.
    assert tables["saved"] == [[4 * n for n in range(1, 8)], [16, 28]]
    # The seconds of all pairs that wait for the compiler hold it.
    firsts = [[r["pair"] for r in t if r["first"]] for t in tables["tables"]]
    assert firsts[0] == ["b to a"] * 2
    assert firsts[1] == ["b to a", "c to b"] * 2
