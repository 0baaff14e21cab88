"""benchmarks/real_sets.py on two tiny sets, without the peers."""

import dataclasses
import json
import math
import pathlib
import sys
import time
import types

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import real_sets
import real_sets_cases
import real_sets_methods
import real_sets_ours
import real_sets_process
import real_sets_report

from jaxreg.errors import UserError
from jaxreg.io import displacements, itk_transforms, volumes
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Transform

SHAPE, SPACING_MM = (12, 14, 13), 2.0
# Along the array's axes, which are x, y and z.
SHIFTS_VOXEL = {"a": (0, 0, 0), "b": (2, 0, 0), "c": (0, 1, -2), "d": (1, -1, 0)}


def grid() -> Grid:
    return Grid(SHAPE, np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0]))


def blob(shift_voxel) -> np.ndarray:
    """A box with a bright half, labels 1 and 2, moved."""
    labels = np.zeros(SHAPE, np.int16)
    labels[4:8, 4:9, 4:7], labels[4:8, 4:9, 7:9] = 1, 2
    return np.roll(labels, shift_voxel, axis=(0, 1, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """A set of labels in images/ and labels/, and one of landmarks in a list."""
    root = tmp_path_factory.mktemp("sets")
    for folder in ("plain/images", "plain/labels", "marked/images", "marked/points"):
        (root / folder).mkdir(parents=True)
    for name, shift in SHIFTS_VOXEL.items():
        labels = blob(shift)
        scan = Volume((100.0 * labels).astype(np.float32), grid(), name)
        for folder in ("plain", "marked"):
            volumes.write_volume(root / folder / f"images/{name}.nii.gz", scan)
        path = root / f"plain/labels/{name}.nii.gz"
        volumes.write_volume(path, Volume(labels, grid(), name))
        points = SPACING_MM * (np.array([[4.0, 5, 6], [8, 7, 5]]) + shift)
        points *= (-1, -1, 1)  # LPS
        lines = ["x,y,z", *(",".join(map(str, p)) for p in points.tolist())]
        (root / f"marked/points/{name}.csv").write_text("\n".join(lines) + "\n")
    (root / "marked/pairs.csv").write_text(
        "fixed,moving,fixed_landmarks,moving_landmarks,fixed_modality,moving_modality\n"
        "images/a.nii.gz,images/b.nii.gz,points/a.csv,points/b.csv,mri,mri\n"
    )
    return root


PLAIN = real_sets_cases.RealSet("plain", holdout=2)
MARKED = real_sets_cases.RealSet("marked", measure="tre", modalities=("us", "mri"))


@dataclasses.dataclass
class Known:
    """A method that knows the answer, times a factor; None for failing."""

    factor: float | None
    setting: str = "as asked"
    asked: int = 0

    def settings(self):
        return {"setting": self.setting}

    def find(self, case):
        self.asked += 1
        if self.factor is None:
            raise real_sets_process.FailedError("took longer than 1 s")
        moving, fixed = (
            np.array(SHIFTS_VOXEL[p.name.split(".")[0]])
            for p in (case.spec.moving, case.spec.fixed)
        )
        matrix = np.eye(4)
        matrix[:3, 3] = self.factor * SPACING_MM * (moving - fixed)
        return real_sets_methods.Found(Transform((Affine(matrix),)), seconds=0.5)

    def stop(self):
        pass


@pytest.fixture
def bench(data, tmp_path, monkeypatch):
    """Runs the command on the two sets with methods that know the answer."""
    methods = {
        "start": real_sets_methods.Start(),
        "right": Known(1.0),
        "away": Known(-1.0),
        "failing": Known(None),
    }
    monkeypatch.setattr(real_sets, "SETS", (PLAIN, MARKED))
    monkeypatch.setattr(real_sets, "methods_of", lambda *_, **__: methods)
    records = tmp_path / "records"

    def run(*more):
        real_sets.main(["--data", str(data), "--records", str(records), *more])

    return run, methods, records


def table_of(text: str, title: str) -> dict[str, dict[str, str]]:
    """Returns the cells of a set's table by method and column."""
    lines = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    head, _, *rows = ([c.strip() for c in row.strip("|").split("|")] for row in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_every_pair_and_method_is_a_row(bench, capsys, tmp_path):
    run, _, records = bench
    run("--figure", str(tmp_path / "figure.png"))
    text = capsys.readouterr().out
    plain, marked = table_of(text, "plain"), table_of(text, "marked")
    assert list(plain) == ["start", "away", "failing", "right"]
    assert plain["right"]["Dice %"] == "100.0"
    assert plain["right"]["HD95 mm"] == "0.00"
    assert plain["right"]["SDlogJ"] == "0.000"
    assert plain["right"]["seconds"] == "0.5"
    assert float(plain["away"]["Dice %"]) < float(plain["start"]["Dice %"]) < 100
    assert marked["start"]["TRE mm"] == "4.00"
    assert marked["right"]["TRE mm"] == "0.00"
    assert marked["right"]["gain"] == "+4.00"
    assert marked["away"]["gain"] == "-4.00"
    pairs = int(plain["start"]["pairs"])
    for found, count in ((plain, pairs), (marked, 1)):
        failures = {method: cells["failures"] for method, cells in found.items()}
        assert failures == {
            "start": "0 + 0",
            "right": "0 + 0",
            "away": f"{count} + 0",
            "failing": f"0 + {count}",
        }
    assert "took longer than 1 s" in text
    assert len(list(records.rglob("*.json"))) == 4 * (pairs + 1)
    picture = matplotlib.image.imread(tmp_path / "figure.png")
    assert picture.min() < picture.max()


def test_a_row_is_measured_once(bench, capsys):
    run, methods, records = bench
    run("--sets", "marked")
    next(records.rglob("right--*.json")).unlink()
    run("--sets", "marked")
    assert (methods["right"].asked, methods["away"].asked) == (2, 1)
    assert capsys.readouterr().out.count("1/1 marked, right, b to a: TRE 0.00") == 1
    stored = json.loads(next(records.rglob("failing--*.json")).read_text())
    assert stored["error"] == "took longer than 1 s"
    assert stored["tre_mm"] is None
    for path in records.rglob("away--*.json"):
        path.unlink()
    methods["away"].factor = "no number"
    run("--sets", "marked")
    assert "away, b to a: TypeError: " in capsys.readouterr().out
    methods["right"].setting = "otherwise"
    with pytest.raises(SystemExit, match="2"):
        run("--sets", "marked")
    assert "name another folder with --records" in capsys.readouterr().err


def test_the_first_pairs_are_the_same_in_every_run(data):
    found = real_sets_cases.pairs_of(PLAIN, data)
    assert list(found) == list(real_sets_cases.pairs_of(PLAIN, data))
    assert all(pair.fixed_label is not None for pair in found.values())
    (pair,) = real_sets_cases.pairs_of(MARKED, data).values()
    assert real_sets_cases.kind_of(pair) == "across"  # not what the list says
    assert {real_sets_cases.kind_of(pair) for pair in found.values()} == {"same"}
    with pytest.raises(UserError, match="no folder .*absent"):
        real_sets_cases.pairs_of(real_sets_cases.RealSet("absent"), data)


# --- methods --------------------------------------------------------------------------

COMMON = {"peers_python": None, "threads": 1, "limit_s": 1.0}


def test_ours_is_what_a_user_gets_who_says_nothing():
    found = real_sets_methods.methods_of(
        ["affine", "ours"],
        weights=["weights/net"],
        variants=[["mind", "io_sim=mind", "shape=96"]],
        **COMMON,
    )
    assert list(found) == ["start", "affine", "ours", "net", "net + IO", "mind"]
    options = {
        name: found[name].settings()["options"] for name in ("affine", "ours", "mind")
    }
    assert options["ours"] == {"inverse": False}
    assert options["mind"] == {"inverse": False, "io_sim": "mind", "shape": (96,) * 3}
    assert options["affine"]["prealign"] == "affine"
    assert options["affine"]["io_iterations"] is None


@pytest.mark.parametrize(
    ("names", "variants", "message"),
    [
        (["SyN-MI"], [], "SyN-MI needs --peers-python"),
        (["afine"], [], r"afine is unknown \(did you mean affine\?\)"),
        (["ours"], [["ours"]], "two methods would be called ours"),
        ([], [["mind", "io_simm=mind"]], r"io_simm .* \(did you mean io_sim"),
    ],
)
def test_wrong_methods_are_refused(names, variants, message):
    with pytest.raises(UserError, match=message):
        real_sets_methods.methods_of(names, variants=variants, **COMMON)


SHIFT = Transform((Affine(np.eye(4) + np.outer([5.0, 0, 0, 0], [0, 0, 0, 1])),))


class Answering:
    """Stands for the peers' process: writes the files that the tools would write."""

    def __init__(self):
        self.jobs = []

    def ask(self, job):
        self.jobs.append(job)
        if job["tool"] == "ants":
            path = pathlib.Path(f"{job['settings']['outprefix']}Composite.h5")
            itk_transforms.write(path, SHIFT)
        elif "-o" in (words := job["command"].replace('"', "").split()):
            path = pathlib.Path(words[words.index("-o") + 1])
            if path.suffix == ".mat":
                np.savetxt(path, SHIFT.steps[0].matrix)
            else:
                displacements.write_nifti(path, Transform(()), grid())
        return {"seconds": 2.0, "cpu_seconds": 3.0, "version": "1.0"}


@pytest.mark.parametrize(
    ("name", "calls", "asked"),
    [("SyN-MI", 1, "SyNRA"), ("greedy-NMI", 2, "-m NMI")],
)
def test_peers_are_asked_in_their_own_process(data, name, calls, asked):
    (pair,) = real_sets_cases.pairs_of(MARKED, data).items()
    case = real_sets.cases.read(pair[1], pair[0], real_sets.Options(), "lps")
    process = Answering()
    found = real_sets_methods.Peer(process, *real_sets_methods.PEERS[name]).find(case)
    mapped = np.asarray(found.transform.map_points(np.zeros((1, 1, 3))))
    np.testing.assert_allclose(mapped, [[[5.0, 0.0, 0.0]]], atol=1e-5)
    assert (found.seconds, found.cpu_seconds) == (2.0 * calls, 3.0 * calls)
    assert len(process.jobs) == calls
    assert asked in json.dumps(process.jobs)


def test_ours_registers_as_it_is_asked(data, tmp_path, monkeypatch):
    asked = []

    def register(moving, fixed, model, options):
        asked.append((moving.source, fixed.source, model, options))
        time.sleep(0.01)
        return types.SimpleNamespace(transform=SHIFT, seconds={"score": 5e-3})

    monkeypatch.setattr(real_sets_ours.pair_lib, "register", register)
    (called, spec), *_ = real_sets_cases.pairs_of(MARKED, data).items()
    case = real_sets.cases.read(spec, called, real_sets.Options(), "lps")
    process = types.SimpleNamespace(
        ask=lambda job: real_sets_ours.answer(json.loads(json.dumps(job)))
    )
    method = real_sets_methods.Ours(process, real_sets_methods.OURS)
    found = method.find(case)
    mapped = np.asarray(found.transform.map_points(np.zeros((1, 1, 3))))
    np.testing.assert_allclose(mapped, [[[5.0, 0.0, 0.0]]], atol=1e-5)
    assert 0.004 < found.seconds < 5
    assert found.version
    (moving, fixed, model, options), *_ = asked
    assert pathlib.Path(str(moving)).name == "b.nii.gz"
    assert pathlib.Path(str(fixed)).name == "a.nii.gz"
    assert model is None
    assert (options.fixed_modality, options.moving_modality) == ("us", "mri")
    assert options == dataclasses.replace(
        real_sets.Options(), fixed_modality="us", moving_modality="mri", inverse=False
    )


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=6)


@settings(max_examples=40, deadline=None)
@given(SPANS)
def test_time_in_two_spans_counts_once(drawn):
    spans = [(min(pair), max(pair)) for pair in drawn]
    by_unit = {n for start, end in spans for n in range(start, end)}
    assert real_sets_ours.covered(spans) == len(by_unit)


# --- processes ------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
sys.path.insert(0, {folder!r})
from real_sets_process import serve

def answer(job):
    print("chatter")
    os.write(1, b"more chatter")
    if job["do"] == "die":
        sys.stderr.write("out of luck")
        sys.stderr.flush()
        os._exit(3)
    if job["do"] == "sleep":
        time.sleep(60)
    return {{"half": 1 / job["do"]}}

serve(answer)
"""


def test_a_process_answers_fails_dies_and_is_too_slow(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=sys.path[0]))
    process = real_sets_process.Process(str(script), threads=1, limit_s=20.0)
    try:
        assert process.ask({"do": 2}) == {"half": 0.5}
        with pytest.raises(real_sets_process.FailedError, match="ZeroDivisionError"):
            process.ask({"do": 0})
        with pytest.raises(
            real_sets_process.FailedError, match="with 3: .*out of luck"
        ):
            process.ask({"do": "die"})
        assert process.ask({"do": 4}) == {"half": 0.25}
        process._limit_s = 0.2
        start = time.perf_counter()
        with pytest.raises(real_sets_process.FailedError, match="longer than 0.2 s"):
            process.ask({"do": "sleep"})
        assert time.perf_counter() - start < 10
    finally:
        process.stop()


def test_a_mean_leaves_out_what_is_missing():
    row = real_sets_report.Row("s", "m", "p", "dice", "same", {}, "here")
    rows = [dataclasses.replace(row, tre_mm=2.0), row]
    cell = real_sets_report.Cell(rows, {})
    assert cell.mean(lambda r: r.tre_mm) == 2.0
    assert math.isnan(cell.mean(lambda r: r.sdlogj))
    assert cell.failures == "0 + 0"
