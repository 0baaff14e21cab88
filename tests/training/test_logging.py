"""A log is complete up to a kill; after resuming it reads as if there had been none."""

import csv
import io
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxreg.errors import UserError
from jaxreg.training.logging import (
    DeviceMemory,
    ProgressLine,
    RunLog,
    device_memory,
    middle_slices,
)


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def tell(log, steps):
    """What a run tells: a loss each step, a score every third, once a note."""
    for step in steps:
        log.scalars(step, {"loss": 1 / step, "rate": 0.1 * step})
        if step % 3 == 0:
            log.scalars(step, {"validation, mean": step / 7})
        if step == 5:
            log.scalars(step, {"once": math.nan})


def plain(folder, **options):
    return RunLog(folder, tensorboard=False, **options)


# --- CSV ------------------------------------------------------------------------------


def test_a_row_for_each_step_a_column_for_each_name(tmp_path):
    with plain(tmp_path / "deep" / "run") as log:
        tell(log, range(1, 8))
    rows = rows_of(tmp_path / "deep" / "run")
    assert [row["step"] for row in rows] == list("1234567")
    assert list(rows[0]) == ["step", "loss", "rate", "validation, mean", "once"]
    assert [float(row["loss"]) for row in rows] == [1 / step for step in range(1, 8)]
    scores = [row["validation, mean"] for row in rows]
    assert scores == ["", "", repr(3 / 7), "", "", repr(6 / 7), ""]
    assert [row["once"] for row in rows] == ["", "", "", "", "nan", "", ""]
    assert os.listdir(tmp_path / "deep" / "run") == ["log.csv"]


def test_a_value_told_twice_is_replaced(tmp_path):
    with plain(tmp_path) as log:
        log.scalars(1, {"a": 1.0})
        log.scalars(2, {"a": 0.123456789, "b": 2.0})
        log.scalars(2, {"a": 3.0})
    assert [list(row.values()) for row in rows_of(tmp_path)] == [
        ["1", "1.0", ""],
        ["2", "3.0", "2.0"],
    ]


def test_numbers_of_any_kind(tmp_path):
    with plain(tmp_path) as log:
        log.scalars(1, {"a": jax.numpy.float32(0.5), "b": np.int32(3), "c": 2})
    assert list(rows_of(tmp_path)[0].values()) == ["1", "0.5", "3.0", "2.0"]


@settings(max_examples=15, deadline=None)
@given(killed=st.integers(0, 9), kept=st.integers(0, 9), end=st.integers(1, 10))
def test_killed_and_resumed_is_the_same_file(tmp_path_factory, killed, kept, end):
    """Killed after `killed`, resumed from a checkpoint of `kept` at the latest."""
    folder = tmp_path_factory.mktemp("log")
    kept = min(kept, killed, end)
    with plain(folder / "one") as log:
        tell(log, range(1, end + 1))
    tell(plain(folder / "two"), range(1, killed + 1))
    with plain(folder / "two", start_step=kept) as log:
        tell(log, range(kept + 1, end + 1))
    expected = (folder / "one" / "log.csv").read_bytes()
    assert (folder / "two" / "log.csv").read_bytes() == expected


def test_the_step_resumed_at_may_be_told_more(tmp_path):
    with plain(tmp_path) as log:
        tell(log, range(1, 4))
    with plain(tmp_path, start_step=2) as log:
        log.scalars(2, {"late": 9.0})
    assert [row["late"] for row in rows_of(tmp_path)] == ["", "9.0"]


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_cut_last_line_is_dropped(tmp_path, cut):
    with plain(tmp_path) as log:
        tell(log, range(1, 3))
    file = tmp_path / "log.csv"
    file.write_bytes(file.read_bytes()[:-cut])
    with plain(tmp_path, start_step=2) as log:
        log.scalars(3, {"loss": 3.0})
    assert [row["step"] for row in rows_of(tmp_path)] == ["1", "3"]


def test_starting_anew_drops_the_old_log(tmp_path):
    with plain(tmp_path) as log:
        log.scalars(0, {"a": 1.0})
    with plain(tmp_path) as log:
        log.scalars(0, {"b": 2.0})
    assert rows_of(tmp_path) == [{"step": "0", "b": "2.0"}]


def test_a_kill_leaves_whole_rows(tmp_path):
    program = """
        import sys
        from jaxreg.training.logging import RunLog
        log = RunLog(sys.argv[1], tensorboard=False)
        for step in range(1, 10**6):
            log.scalars(step, {"a": step / 7, f"b{step // 500}": 1.0})
            if step == 400:
                print("go", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = rows_of(tmp_path)
    assert len(rows) >= 400
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(float(row["a"]) == int(row["step"]) / 7 for row in rows)


def test_steps_do_not_go_down(tmp_path):
    with plain(tmp_path, start_step=3) as log:
        with pytest.raises(ValueError, match="step 2 comes after step 3"):
            log.scalars(2, {"a": 1.0})
        with pytest.raises(ValueError, match="column of the step"):
            log.scalars(4, {"step": 1.0})


@pytest.mark.parametrize("start", [0, 5])
def test_a_foreign_file_is_not_written_over(tmp_path, start):
    (tmp_path / "log.csv").write_text("patient,age\n1,50\n")
    with pytest.raises(UserError, match=r"log\.csv is no log of a training run"):
        plain(tmp_path, start_step=start)
    assert (tmp_path / "log.csv").read_text() == "patient,age\n1,50\n"


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*Not a directory"):
        plain(tmp_path / "file" / "run")


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path):
    program = """
        import resource, sys
        from jaxreg.errors import UserError
        from jaxreg.training.logging import RunLog
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        log = RunLog(sys.argv[1], tensorboard=False)
        try:
            for step in range(1, 1000):
                log.scalars(step, {"a": step / 7})
        except UserError as error:
            print(step, error)
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    failed, sentence = done.stdout.split(" ", 1)
    assert f"the log {tmp_path / 'log.csv'} cannot be written" in sentence
    with plain(tmp_path, start_step=int(failed) - 1) as log:
        log.scalars(int(failed), {"a": 0.0})
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, int(failed) + 1))


def test_other_processes_write_nothing(tmp_path, capfd):
    with RunLog(tmp_path / "none", enabled=False) as log:
        log.scalars(1, {"a": 1.0})
        log.images(1, {"a": np.zeros((2, 2, 2))})
        log.progress(1, 2, {"loss": 1.0})
        log.note("hello")
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


# --- TensorBoard ----------------------------------------------------------------------


def events_of(folder):
    """Reads event files by their format: length, checksum, message, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    events = []
    for path in sorted(folder.glob("events.*"), key=os.path.getmtime):
        octets = path.read_bytes()
        at = 0
        while at < len(octets):
            (length,) = struct.unpack_from("<Q", octets, at)
            events.append(event_pb2.Event.FromString(octets[at + 12 :][:length]))
            at += 12 + length + 4
    return events


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    PIL = pytest.importorskip("PIL.Image")
    volume = np.random.default_rng(0).random((3, 4, 5))
    with RunLog(tmp_path) as log:
        log.scalars(1, {"loss/all": 0.5})
        log.scalars(2, {"loss/all": 0.25, "rate": 3.0})
        log.images(2, {"moving": volume})
    scalars, pictures = [], []
    for event in events_of(tmp_path):
        for value in event.summary.value:
            if value.HasField("image"):
                picture = PIL.open(io.BytesIO(value.image.encoded_image_string))
                pictures.append((event.step, value.tag, np.asarray(picture)))
            else:
                scalars.append((event.step, value.tag, value.simple_value))
    assert scalars == [(1, "loss/all", 0.5), (2, "loss/all", 0.25), (2, "rate", 3.0)]
    ((step, name, picture),) = pictures
    assert (step, name) == (2, "moving")
    grey = picture if picture.ndim == 2 else picture[..., 0]
    np.testing.assert_array_equal(grey, middle_slices(volume))


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX")
    for start, purged in ((0, 0), (4, 5)):
        folder = tmp_path / str(start)
        RunLog(folder, start_step=start).close()
        starts = [e.step for e in events_of(folder) if e.HasField("session_log")]
        assert starts == [purged]


def test_a_missing_tensorboardx_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        RunLog(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    plain(tmp_path / "run").close()


def test_middle_slices_are_where_they_are_said_to_be():
    volume = np.zeros((4, 5, 3))
    volume[2] = 0.2
    volume[:, 2] = 0.4
    volume[:, :, 1] = 0.6
    picture = middle_slices(volume)
    assert picture.dtype == np.uint8
    assert picture.shape == (5, 3 + 3 + 5)
    grey = np.round(volume * 255)
    np.testing.assert_array_equal(picture[:, :3], grey[2])
    np.testing.assert_array_equal(picture[:4, 3:6], grey[:, 2])
    np.testing.assert_array_equal(picture[:4, 6:], grey[:, :, 1])
    np.testing.assert_array_equal(picture[4, 3:], 0)


def test_grey_values():
    volume = np.zeros((1, 1, 3))
    assert middle_slices(volume).max() == 0
    volume[0, 0] = [0.5, 1.0, 0.0]
    assert middle_slices(volume)[0, :3].tolist() == [128, 255, 0]
    volume[0, 0] = [-1.0, 3.0, 1.0]
    assert middle_slices(volume)[0, :3].tolist() == [0, 255, 128]
    volume[0, 0] = [np.nan, np.inf, 1.0]
    assert middle_slices(volume)[0, :3].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="expected D H W"):
        middle_slices(np.zeros((2, 2)))


# --- progress -------------------------------------------------------------------------


def line_on(*, terminal, every=50):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200)
    seconds = iter(range(0, 10_000, 2))
    return file, ProgressLine(
        every=every, console=console, clock=lambda: float(next(seconds))
    )


ROW = {"loss": 0.25, "pairs_per_s": 3.14159, "data_wait_share": 0.04, "other": 1.0}


def test_plain_lines_every_so_many_steps():
    file, line = line_on(terminal=False, every=4)
    for step in (3, 5, 6, 7, 9, 11, 12):
        line.update(step, 12, ROW)
    line.close()
    assert file.getvalue().splitlines() == [
        "step 3 of 12, loss 0.2500, 3.14 pairs/s, waiting for data 4%",
        # 2 s at each call: 6 s for 4 steps, 5 are left.
        "step 7 of 12, loss 0.2500, 3.14 pairs/s, waiting for data 4%, 0:00:08 left",
        "step 11 of 12, loss 0.2500, 3.14 pairs/s, waiting for data 4%, 0:00:02 left",
        "step 12 of 12, loss 0.2500, 3.14 pairs/s, waiting for data 4%, 0:00:00 left",
    ]


def test_a_device_that_tells_more_is_shown_with_more():
    file, line = line_on(terminal=False)
    more = {"model_flops_utilisation": 0.384, "device_memory_peak_gb": 12.06}
    line.update(3, 12, {**ROW, **more, "device_memory_gb": 9.0})
    assert file.getvalue().splitlines() == [
        "step 3 of 12, loss 0.2500, 3.14 pairs/s, 38% of peak arithmetic, 12.1 GB, "
        "waiting for data 4%"
    ]


def test_one_line_on_a_terminal_with_notes_above_it():
    file, line = line_on(terminal=True)
    line.update(1, 3, ROW)
    line.note("validation [better]")
    line.update(2, 3, {"loss": 0.125})
    line.close()
    line.close()
    text = file.getvalue()
    assert "validation [better]" in text
    # The cursor goes back to the start of the line, which is erased.
    assert "\r\x1b[2K" in text
    assert text.rstrip("\n\x1b[?25h").endswith("step 2 of 3, loss 0.1250, 0:00:02 left")


def test_the_log_shows_progress_and_notes_on_stderr(tmp_path, capsys):
    with plain(tmp_path, every=2) as log:
        log.progress(1, 3, {"loss": 1.0})
        log.progress(2, 3, {"loss": 1.0})
        log.note("a [b] " + "long " * 40)
        log.progress(3, 3, {"loss": 0.5})
    out, err = capsys.readouterr()
    assert out == ""
    first, note, last = err.splitlines()
    assert first.startswith("step 1 of 3, loss 1.0000")
    assert note == "a [b] " + "long " * 40
    assert last.startswith("step 3 of 3, loss 0.5000")


# --- memory ---------------------------------------------------------------------------


def test_memory_of_the_fullest_device():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    devices = [
        device({"bytes_in_use": 5, "peak_bytes_in_use": 7}),
        device({"bytes_in_use": 3, "peak_bytes_in_use": 9}),
        device(None),
    ]
    assert device_memory(devices) == DeviceMemory(in_use=5, peak=9)
    assert device_memory([device(None)]) is None


def test_memory_is_unknown_on_the_cpu():
    assert device_memory(jax.devices("cpu")) is None
