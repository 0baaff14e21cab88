"""Lists of pairs: the same files as single calls, mistakes, failures, restarts."""

import csv
import dataclasses
import pathlib
import re
import threading
import time

import jax
import numpy as np
import pytest

from jaxreg.cli import main
from jaxreg.data import pair_list
from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration import many, scan_pair
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo

SIZES = ((14, 12, 13), (11, 15, 12), (12, 13, 16), (16, 11, 14))
GRID = (10, 9, 8)


@dataclasses.dataclass(frozen=True)
class Bending(RegistrationModel):
    """A stand-in for a network: a displacement that depends on both images."""

    def apply(self, variables, moving, fixed, **_):
        step = 0.2 * (moving - fixed) * variables["params"]["scale"]
        return Prediction(Transform((Displacement(step.repeat(3, -1)),))), {}


def loaded() -> zoo.LoadedModel:
    variables = {"params": {"scale": np.ones((), np.float32)}}
    rule = {"shape": list(GRID)}
    bundle = bundle_lib.Bundle(variables, "gradicon", {}, rule, "a test", "none")
    return zoo.LoadedModel("bending", Bending(), variables, bundle)


def place(shape, offset=0.0) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * [1.0, 1.1, 0.9]
    affine[:3, 3] = [-7.0 + offset, 5.0, 3.0]
    return Grid(shape, affine)


def scan(path: pathlib.Path, shape, seed: int) -> None:
    """A bright ellipsoid of its own place and size, in int16."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    generator = np.random.default_rng(seed)
    centre = (np.array(shape) - 1) / 2 + generator.uniform(-1, 1, 3)
    distance = (((at - centre) / generator.uniform(3, 5, 3)) ** 2).sum(-1)
    array = (1000 * np.exp(-distance)).astype(np.int16)
    volumes.write_volume(path, Volume(array, place(shape)))


@pytest.fixture
def folder(tmp_path):
    """Scans a to d of four sizes, a mask of a, and a scan that breaks off."""
    for seed, (name, shape) in enumerate(zip("abcd", SIZES, strict=True)):
        scan(tmp_path / f"{name}.nii.gz", shape, seed)
    inside = np.ones(SIZES[0], np.uint8)
    volumes.write_volume(tmp_path / "mask.nii.gz", Volume(inside, place(SIZES[0])))
    elsewhere = Volume(inside, place(SIZES[0], offset=9.0))
    volumes.write_volume(tmp_path / "elsewhere.nii.gz", elsewhere)
    whole = (tmp_path / "d.nii.gz").read_bytes()
    (tmp_path / "broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.fixture(autouse=True)
def network(monkeypatch):
    monkeypatch.setattr(load, "load", lambda *_, **__: loaded())


def listed(folder: pathlib.Path, text: str) -> str:
    path = folder / "pairs.csv"
    path.write_text(text)
    return str(path)


def command(*more: str) -> list[str]:
    return ["register", "--model", "w.trch", "--io-iterations", "None",
            "--io-sim", "mse", *more]  # fmt: skip


MRI = ("--fixed-modality", "mri", "--moving-modality", "mri")
PAIRS = "fixed,moving\na.nii.gz,b.nii.gz\nc.nii.gz,d.nii.gz\nb.nii.gz,c.nii.gz\n"


def rows_of(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def leftovers(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_a_list_writes_what_single_calls_write(folder, capsys):
    """Byte for byte, with what a row says of itself and what the options say."""
    text = (
        "fixed,moving,fixed_modality,moving_modality,fixed_mask,transform_out,"
        "warped_out,inverse_out\n"
        "a.nii.gz,b.nii.gz,,ct,mask.nii.gz,1.h5,1.nii.gz,1i.h5\n"
        "c.nii.gz,d.nii.gz,ct,,mask_c.nii.gz,2.tfm,2.nii.gz,\n"
    )
    mask = Volume(np.ones(SIZES[2], np.uint8), place(SIZES[2]))
    volumes.write_volume(folder / "mask_c.nii.gz", mask)
    ct = volumes.read_volume(folder / "b.nii.gz", kind="stored")
    ct = dataclasses.replace(ct, array=ct.array - np.int16(1024))
    volumes.write_volume(folder / "b.nii.gz", ct)
    how = ("--input-masking", "--ct-window", "-1000", "900")
    assert main.main(command(*MRI, *how, "--pairs", listed(folder, text))) == 0
    assert "registered 2 pairs" in capsys.readouterr().out

    def alone(scans, modalities, mask, *outputs):
        argv = ["--fixed-mask", f"{folder}/{mask}.nii.gz"]
        for side, name, modality in zip(
            ("fixed", "moving"), scans, modalities, strict=True
        ):
            argv += [f"--{side}", f"{folder}/{name}.nii.gz"]
            argv += [f"--{side}-modality", modality]
        names = ("--transform-out", "--warped-moving-out", "--inverse-out")
        for name, output in zip(names, outputs, strict=False):
            argv += [name, f"{folder}/alone_{output}"]
        assert main.main(command(*how, *argv)) == 0

    alone("ab", ("mri", "ct"), "mask", "1.h5", "1.nii.gz", "1i.h5")
    alone("cd", ("ct", "mri"), "mask_c", "2.tfm", "2.nii.gz")
    for name in ("1.h5", "1.nii.gz", "1i.h5", "2.tfm", "2.nii.gz"):
        here, there = folder / name, folder / f"alone_{name}"
        assert here.read_bytes() == there.read_bytes(), name
    # And what warp makes of the written transforms, which knows no modality.
    for fixed, moving, transform, number in (
        ("a", "b", "1.h5", 1),
        ("c", "d", "2.tfm", 2),
    ):
        line = f"""warp --fixed {folder}/{fixed}.nii.gz --linear --moving
            {folder}/{moving}.nii.gz --transform {folder}/{transform}
            --warped-moving-out {folder}/again.nii.gz"""
        assert main.main(line.split()) == 0
        again, first = (
            volumes.read_volume(folder / f"{name}.nii.gz", kind="stored").array
            for name in ("again", number)
        )
        np.testing.assert_array_equal(again, first)
    # The network's answer is in the files: none of them is the identity.
    moved = transforms.read_transform(folder / "1.h5")
    points = place(SIZES[0]).affine_mm[:3, 3] + np.array([[[6.0, 6.6, 5.4]]])
    assert np.abs(np.asarray(moved.map_points(points)) - points).max() > 0.01


def test_scans_of_other_sizes_compile_nothing(folder):
    count = [0]

    def listen(event, seconds, **_):
        count[0] += event.endswith("backend_compile_duration")

    rows = pair_list.read_rows(listed(folder, PAIRS))
    rows = {
        row: dataclasses.replace(pair, inverse_out=folder / f"{index}.nii.gz")
        for index, (row, pair) in enumerate(many.with_outputs(rows, folder).items())
    }
    # A grid of its own: other tests have compiled theirs already.
    options = options_lib.Options(
        io_iterations=None, shape=(9, 11, 13), prealign="centre"
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = dict(list(rows.items())[:1])
        assert [o.status for o in many.register_all(first, loaded(), options)] == [
            "done"
        ]
        before = count[0]
        outcomes = list(many.register_all(rows, loaded(), options))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    assert before > 0
    assert count[0] == before


def test_a_pair_that_fails_leaves_the_others_alone(folder, capsys, monkeypatch):
    text = PAIRS + "a.nii.gz,broken.nii.gz\na.nii.gz,d.nii.gz\n"
    write = volumes.write_volume

    def full(path, volume):
        if path.name.startswith("c_to_b"):
            raise UserError(f"{path} cannot be written: the disk is full")
        write(path, volume)

    monkeypatch.setattr(volumes, "write_volume", full)
    argv = command(*MRI, "--pairs", listed(folder, text), "--out-dir",
                   f"{folder}/out", "--summary", f"{folder}/s.csv")  # fmt: skip
    assert main.main(argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "failed:" in line]
    assert [line.split(" failed:")[0] for line in said] == [
        "jaxreg: row 4", "jaxreg: row 5"
    ]  # fmt: skip
    assert "the disk is full" in said[0]
    assert "broken.nii.gz" in said[1]
    rows = rows_of(folder / "s.csv")
    assert [(row["row"], row["status"]) for row in rows] == [
        ("row 2", "done"), ("row 3", "done"), ("row 4", "failed"),
        ("row 5", "failed"), ("row 6", "done"),
    ]  # fmt: skip
    assert float(rows[0]["before"]) > 0
    assert float(rows[0]["folding_percent"]) >= 0
    assert float(rows[0]["seconds"]) > 0
    assert rows[3]["before"] == rows[3]["transform_out"] == ""
    written = {path.name for path in (folder / "out").iterdir()}
    stems = {"b_to_a", "d_to_c", "d_to_a"}
    ends = ("_transform.h5", "_warped.nii.gz")
    assert written == {stem + end for stem in stems for end in ends} | {
        "c_to_b_transform.h5"
    }
    assert leftovers(folder) == []


def test_the_count_of_the_failed_is_the_last_word(folder, capsys):
    text = PAIRS + "a.nii.gz,broken.nii.gz\n"
    argv = command(*MRI, "--pairs", listed(folder, text), "--out-dir", str(folder))
    assert main.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("jaxreg: 1 of 4 pairs")


def test_existing_results_are_passed_over(folder, capsys, monkeypatch):
    argv = command(*MRI, "--pairs", listed(folder, PAIRS), "--out-dir",
                   f"{folder}/out", "--skip-existing")  # fmt: skip
    assert main.main(argv) == 0
    assert "passed over 0 of 3 pairs" in capsys.readouterr().out
    (folder / "out" / "d_to_c_warped.nii.gz").unlink()
    kept = (folder / "out" / "b_to_a_transform.h5").stat().st_mtime_ns
    assert main.main([*argv, "--summary", f"{folder}/s.csv"]) == 0
    assert "passed over 2 of 3 pairs" in capsys.readouterr().out
    assert (folder / "out" / "b_to_a_transform.h5").stat().st_mtime_ns == kept
    assert (folder / "out" / "d_to_c_warped.nii.gz").is_file()
    statuses = [row["status"] for row in rows_of(folder / "s.csv")]
    assert statuses == ["skipped", "done", "skipped"]
    assert [bool(row["before"]) for row in rows_of(folder / "s.csv")] == [0, 1, 0]
    measured = rows_of(folder / "s.csv")[1]
    (folder / "out" / "b_to_a_warped.nii.gz").unlink()
    assert main.main([*argv, "--summary", f"{folder}/s.csv"]) == 0
    first, second, third = rows_of(folder / "s.csv")
    assert [row["status"] for row in (first, second, third)] == [
        "skipped" if row is not first else "done" for row in (first, second, third)
    ]
    assert second == measured | {"status": "skipped"}
    assert first["before"] and not third["before"]

    def never(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(load, "load", never)
    assert main.main(argv) == 0


# The text of the list, further options, and what the sentence must name.
WRONG = {
    "nothing to write": (PAIRS, MRI, "--out-dir"),
    "no modality": (PAIRS, ("--out-dir", "%"), "--fixed-modality"),
    "one scan": (PAIRS, (*MRI, "--out-dir", "%", "--fixed", "a.nii.gz"), "--fixed"),
    "one output": (
        PAIRS,
        (*MRI, "--out-dir", "%", "--transform-out", "t.h5"),
        "--transform-out",
    ),
    "one mask": (PAIRS, (*MRI, "--out-dir", "%", "--fixed-mask", "m"), "--fixed-mask"),
    "summary is no table": (
        PAIRS,
        (*MRI, "--out-dir", "%", "--summary", "%/s.txt"),
        "s.txt",
    ),
    "pages below a file": (
        PAIRS,
        (*MRI, "--report-dir", "%/a.nii.gz/out"),
        "--report-dir",
    ),
    "folder below a file": (PAIRS, (*MRI, "--out-dir", "%/a.nii.gz/out"), "--out-dir"),
    "unknown column": ("fixed,moving,transform\na,b,c\n", MRI, "transform_out"),
    "no such scan": ("fixed,moving\na.nii.gz,x.nii.gz\n", MRI, "row 2"),
    "no scan": (
        "fixed,moving\na.nii.gz,pairs.csv\n", (*MRI, "--out-dir", "%"), "row 2"
    ),
    "output twice": (
        "fixed,moving,transform_out\na.nii.gz,b.nii.gz,t.h5\na.nii.gz,c.nii.gz,t.h5\n",
        MRI,
        "row 3: transform_out",
    ),
    "output is an input": (
        "fixed,moving,warped_out\na.nii.gz,b.nii.gz,c.nii.gz\nc.nii.gz,a.nii.gz,w.mha\n",
        MRI,
        "an input of row 3",
    ),
    "output is the list": (
        "fixed,moving,transform_out\na.nii.gz,b.nii.gz,s.h5\n",
        (*MRI, "--summary", "%/pairs.csv"),
        "--summary",
    ),
    "output's kind": (
        "fixed,moving,warped_out\na.nii.gz,b.nii.gz,w.png\n", MRI, "row 2: warped_out"
    ),
    "output's folder": (
        "fixed,moving,warped_out\na.nii.gz,b.nii.gz,no/w.mha\n", MRI, "no/w.mha"
    ),
    "mask elsewhere": (
        "fixed,moving,fixed_mask,warped_out\n"
        "a.nii.gz,b.nii.gz,elsewhere.nii.gz,w.mha\n",
        (*MRI, "--input-masking"),
        "elsewhere.nii.gz",
    ),
    "mask missing": (
        "fixed,moving,fixed_mask\na.nii.gz,b.nii.gz,mask.nii.gz\nb.nii.gz,c.nii.gz,\n",
        (*MRI, "--input-masking", "--out-dir", "%"),
        "row 3: --input-masking",
    ),
    "window of no CT": (
        "fixed,moving,fixed_modality\na.nii.gz,b.nii.gz,ct\nb.nii.gz,c.nii.gz,\n",
        (*MRI, "--ct-window", "0", "9", "--out-dir", "%"),
        "row 3: --ct-window",
    ),
    "words for no network of tasks": (
        PAIRS,
        (*MRI, "--out-dir", "%", "--task", "chest"),
        "chest",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_found_before_the_first_pair(case, folder, capsys, monkeypatch):
    text, more, named = WRONG[case]
    monkeypatch.setattr(many, "register_all", None)
    argv = [part.replace("%", str(folder)) for part in more]
    before = sorted(folder.iterdir())
    assert main.main(command("--pairs", listed(folder, text), *argv)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert named in line
    assert captured.out == ""
    assert set(folder.iterdir()) - set(before) == {folder / "pairs.csv"}


@pytest.mark.parametrize(
    "more",
    [
        ("--out-dir", "x"),
        ("--report-dir", "x"),
        ("--summary", "s.csv"),
        ("--skip-existing",),
    ],
)
def test_options_of_lists_need_one(more, capsys):
    assert main.main(command(*MRI, "--fixed", "a", "--moving", "b", *more)) == 2
    assert f"{more[0]} is for a list" in capsys.readouterr().err


def test_a_page_of_each_pair_and_one_that_lists_them(folder, capsys):
    """Alone, without other files; a pair that fails is in the list without a page."""
    for name, shape in zip("ab", SIZES, strict=False):
        array = np.zeros(shape, np.uint8)
        array[4:8, 4:8, 4:8] = 1
        volumes.write_volume(folder / f"l{name}.nii.gz", Volume(array, place(shape)))
    text = (
        "fixed,moving,fixed_label,moving_label\na.nii.gz,b.nii.gz,la.nii.gz,lb.nii.gz\n"
        "c.nii.gz,broken.nii.gz,,\nd.nii.gz,a.nii.gz,,\n"
    )
    out = folder / "pages"
    argv = command(*MRI, "--pairs", listed(folder, text), "--report-dir", str(out))
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    assert f"wrote {out}/index.html" in captured.out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "index.html", "b_to_a.html", "b_to_a.png", "a_to_d.html", "a_to_d.png",
    }  # fmt: skip
    page = (out / "b_to_a.html").read_text()
    assert '"labels_fixed":"' in page
    assert "--report-dir" in page
    assert f"bending; a test; licence: none; CRC-32 {loaded().checksum}" in page
    assert '"labels_fixed":"' not in (out / "a_to_d.html").read_text()
    index = (out / "index.html").read_text()
    assert set(re.findall(r'(?:href|src)="([^"]*)"', index)) == {
        f"./{name}" for name in names - {"index.html"}
    }
    assert "2 of 3 pairs have a report" in index
    assert "broken.nii.gz" in index
    assert index.index("b to a") < index.index("broken to c") < index.index("a to d")
    # Again: what has a page is passed over, and stays in the list.
    (out / "a_to_d.html").unlink()
    assert main.main([*argv, "--skip-existing"]) == 2
    assert "passed over 1 of 3 pairs" in capsys.readouterr().out
    assert "2 of 3 pairs have a report" in (out / "index.html").read_text()


def test_parts_have_lists_of_their_own(folder):
    out = folder / "pages"
    argv = command(*MRI, "--pairs", listed(folder, PAIRS), "--report-dir", str(out))
    argv += ["--summary", f"{folder}/s.csv"]
    for part in ("1/2", "2/2"):
        assert main.main([*argv, "--part", part]) == 0
    assert not (out / "index.html").exists()
    assert (out / "index.part-2-of-2.html").exists()
    assert main.main([*argv, "--merge-parts", "2"]) == 0
    index = (out / "index.html").read_text()
    count = len(rows_of(folder / "s.csv"))
    assert f"{count} of {count} pairs have a report" in index
    assert index.count("<tr><td><a") == count
    assert 'data-value=""' not in index


def test_files_are_called_by_their_scans(folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "t1.nii.gz").write_bytes(b"x")
    text = "fixed,moving,warped_out\none/t1.nii.gz,two/t1.nii.gz,my.mha\n"
    rows = pair_list.read_rows(listed(folder, text))
    (pair,) = many.with_outputs(rows, pathlib.Path("out")).values()
    assert pair.transform_out == pathlib.Path("out/two-t1_to_one-t1_transform.h5")
    assert pair.warped_out == folder / "my.mha"


SCANLESS = scan_pair.ScanPair(None, None, options_lib.Regions(), None, "mri")


def test_reading_and_writing_keep_a_bounded_distance(folder, monkeypatch):
    """Two pairs are read ahead in a thread, and two at most wait to be written."""
    rows = pair_list.read_rows(listed(folder, PAIRS))
    rows = {f"row {i}": pair for i, pair in enumerate(list(rows.values()) * 4)}
    count = dict.fromkeys(("read", "registered", "written"), 0)
    threads, ahead, behind = set(), [], []

    def read(pair, *_):
        threads.add(threading.current_thread().name)
        count["read"] += 1
        return SCANLESS

    def register(*_, **__):
        time.sleep(0.01)
        ahead.append(count["read"] - count["registered"])
        behind.append(count["registered"] - count["written"])
        count["registered"] += 1

    def write(row, pair, *_):
        threads.add(threading.current_thread().name)
        time.sleep(0.05)
        count["written"] += 1
        return many.Outcome(row, pair.fixed, pair.moving, "done")

    monkeypatch.setattr(many, "_read", read)
    monkeypatch.setattr(many, "_write", write)
    monkeypatch.setattr(pair_lib, "register", register)
    options = options_lib.Options(io_iterations=None)
    found = [o.row for o in many.register_all(rows, loaded(), options)]
    assert found == list(rows)
    assert max(ahead) == 3  # its own, and two
    assert max(behind) == 2
    assert {name.partition("_")[0] for name in threads} == {"read", "write"}


def test_an_interrupt_leaves_no_written_pair_out(folder, monkeypatch):
    """What waits to be written when Ctrl-C comes is written, and in the summary."""
    rows = pair_list.read_rows(listed(folder, PAIRS))
    rows = {f"row {i}": pair for i, pair in enumerate(list(rows.values()) * 4)}
    registered, written, found = [], [], []

    def register(*_, **__):
        if len(registered) == 3:
            raise KeyboardInterrupt
        registered.append(1)

    def write(row, pair, *_):
        time.sleep(0.05)
        written.append(row)
        return many.Outcome(row, pair.fixed, pair.moving, "done")

    monkeypatch.setattr(many, "_read", lambda *_: SCANLESS)
    monkeypatch.setattr(many, "_write", write)
    monkeypatch.setattr(pair_lib, "register", register)
    options = options_lib.Options(io_iterations=None)
    with pytest.raises(KeyboardInterrupt):
        for outcome in many.register_all(rows, loaded(), options):
            found.append(outcome.row)
    assert found == written == list(rows)[:3]


def test_a_defect_is_no_failed_pair(folder, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(pair_lib, "register", broken)
    argv = command(*MRI, "--pairs", listed(folder, PAIRS), "--out-dir", str(folder))
    with pytest.raises(ZeroDivisionError):
        main.main([*argv, "--summary", f"{folder}/s.csv"])
    assert rows_of(folder / "s.csv") == []
