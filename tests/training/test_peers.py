"""Processes that are killed, stand still or fail: the others end, and say why."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

from jaxreg.training import peers
from jaxreg.training.peers import Watch

PROGRAM = pathlib.Path(__file__).parent / "programs" / "watched.py"
ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 3.0  # of the program, seconds


# --- what is lost, and when -----------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(peers, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def watch(index, count=3):
    """A watch with 10 s of patience, that has heard all of them at second 1000."""
    found = Watch(None, index, count, 10.0, str)
    found._answered = 1000.0
    found._heard = {i: ("", 1000.0) for i in range(count) if i != index}
    return found


def after(found, clock, seconds, **said):
    """Moves the clock on and hears what processes p0, p1 and so on say then."""
    clock[0] += seconds
    found._hear({int(name[1:]): text for name, text in said.items()})
    return found._lost(clock[0])


def test_one_that_is_silent_for_longer_than_the_patience_is_named(clock):
    found = watch(0)
    assert after(found, clock, 9, p1="there 1", p2="there 1") is None
    assert after(found, clock, 9, p1="there 2", p2="there 1") is None
    lost = after(found, clock, 2, p1="there 3", p2="there 1")
    assert lost.startswith("process 2 of 3 (from 0) has not answered for 10 s")
    assert "the last checkpoint is whole" in lost and "`resume`" in lost


def test_one_that_was_never_heard_is_named(clock):
    found = watch(1)
    assert after(found, clock, 6, p0="there 1") is None
    assert "process 2 of 3" in after(found, clock, 6, p0="there 2")


def test_a_service_that_does_not_answer_is_that_of_process_0(clock):
    found = watch(2)
    assert after(found, clock, 1, p0="there 1", p1="there 1") is None
    # Of the others nothing is known then, and nothing is said.
    assert found._lost(clock[0] + 9.9) is None
    assert "process 0 of 3 has not answered" in found._lost(clock[0] + 10.1)


def test_one_that_is_done_may_be_silent(clock):
    found = watch(0)
    for _ in range(5):
        assert after(found, clock, 9, p1="done 7", p2="done 3") is None


def test_one_that_failed_is_named_once_this_one_could_have_failed_too(clock):
    found = watch(0)
    assert after(found, clock, 1, p1="failed 2", p2="there 1") is None
    lost = after(found, clock, 10.5, p1="failed 2", p2="there 2")
    assert "process 1 of 3 (from 0) has ended with an error" in lost


def test_one_that_stood_still_itself_accuses_nobody(monkeypatch):
    """Stopped for long and woken: all the others seem to have been silent."""
    now = [1000.0]
    monkeypatch.setattr(peers, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    found, ended = watch(0), []
    monkeypatch.setattr(found, "_end", ended.append)
    turns = []

    def wait(_):
        turns.append(now[0])
        now[0] += 500 if len(turns) == 1 else 1
        if len(turns) == 8:
            found._hear({1: "there 2", 2: "there 2"})
        return len(turns) > 12

    monkeypatch.setattr(found._over, "wait", wait)
    found._judge()
    assert ended == [] and len(turns) == 13


# --- two processes --------------------------------------------------------------------


def started(tmp_path, how):
    """Starts the two and waits until they have joined."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    pair = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(port), str(index), tmp_path, how],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    until = time.monotonic() + 300
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
        assert [process.poll() for process in pair if process.poll()] == []
        time.sleep(0.05)
    return pair


def ended(pair, index, *, within):
    """Returns what a process has said when it has ended by itself."""
    try:
        said, _ = pair[index].communicate(timeout=within)
    finally:
        for process in pair:
            process.kill()
    return said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_whose_peer_is_killed_or_stopped_ends_in_a_sentence(tmp_path, how):
    pair = started(tmp_path, "wait")
    began = time.monotonic()
    pair[1].send_signal(how)
    said = ended(pair, 0, within=120)
    assert pair[0].returncode == peers.STATUS
    (line,) = [line for line in said.splitlines() if line.startswith("said: ")]
    assert "process 1 of 2 (from 0) has not answered for 3 s" in line
    assert "Traceback" not in said
    assert time.monotonic() - began > PATIENCE - 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_the_first_process_is_said_as_well(tmp_path, how):
    pair = started(tmp_path, "wait")
    pair[0].send_signal(how)
    said = ended(pair, 1, within=120)
    assert pair[1].returncode not in (0, None)
    (line,) = [line for line in said.splitlines() if line.startswith("said: ")]
    assert "process 0" in line and "the last checkpoint is whole" in line


@pytest.mark.slow
def test_processes_that_are_done_end_one_after_the_other(tmp_path):
    pair = started(tmp_path, "done")
    texts = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    for text in texts:
        assert "went on to the end" in text and "said: " not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "own"), [("error", "a file is missing"), ("defect", "a defect")]
)
def test_an_error_of_one_ends_the_other(tmp_path, how, own):
    pair = started(tmp_path, how)
    said = ended(pair, 0, within=120)
    assert pair[0].returncode == peers.STATUS
    assert "process 1 of 2 (from 0) has ended with an error, which it has told" in said
    assert own in pair[1].communicate()[0]
