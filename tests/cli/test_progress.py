"""What long verbs say: lines at intervals, time left, a word in silence, after ^C."""

import os
import time

import pytest

from jaxreg.cli import evaluate, main, progress
from jaxreg.cli.progress import Bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_from_the_second_step_on(clock, capsys):
    bar = Bar("optimise", shorter="smaller: --shape 96,96,96")
    for step in range(1, 4):
        clock[0] += 100 if step == 1 else 34  # the first one compiles
        bar.step(step, 50, {"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "optimise: 1 of 50, loss 1.0000"
    assert lines[1] == "optimise: about 27 min left; smaller: --shape 96,96,96"
    # In a log too, where each step takes longer than lines are apart.
    assert lines[2].startswith("optimise: 3 of 50, loss 1.0000, about 27 min left")


def test_quick_steps_say_little(clock, capsys):
    bar = Bar("optimise", shorter="smaller")
    for step in range(1, 101):
        clock[0] += 0.1
        bar.step(step, 100, {})
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 7
    assert "smaller" not in "".join(lines)
    assert "left" not in lines[-1]


def test_silence_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_FIRST_WORD_S", 0.1)
    with Bar("optimise", waiting="compiling for 175^3 on cpu"):
        deadline = time.monotonic() + 10
        while not (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert said.startswith("optimise: compiling for 175^3 on cpu (")


def test_what_takes_long_before_the_first_step():
    large = progress.compiling((175, 175, 175), network=True)
    assert "175^3 on" in large
    assert ("usually 1 to 3 minutes" in large) == ("on cpu" in large)
    small = progress.compiling((16, 20, 24), network=True)
    assert "16x20x24" in small and "minutes" not in small


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40.4, "about 40 s"), (1680, "about 28 min"), (9000, "about 2.5 h")],
)
def test_times_in_words(seconds, words):
    assert progress.about(seconds) == words


def test_an_interrupt_says_what_is_kept(monkeypatch, tmp_path, capsys):
    from jaxreg.experiments import run

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stop)
    argv = ["train", "--config", "configs/demo.py", "--out", str(tmp_path / "run")]
    assert main.main(argv) == 130
    said = capsys.readouterr().err
    assert str(tmp_path / "run") in said and "--resume" in said


def test_an_interrupt_is_never_silent(monkeypatch, capsys):
    """Also where no verb says what is kept, as before it has begun."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxreg.weights.listing.describe", stop)
    assert main.main(["models"]) == 130
    assert capsys.readouterr().err.strip() == "jaxreg: interrupted"


@pytest.mark.parametrize("done", [False, True])
def test_an_evaluation_says_what_is_written(tmp_path, capsys, done):
    out = tmp_path / "scores.csv"
    out.write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt), evaluate._shown(out):
        if done:
            os.utime(out, ns=(1, 1))
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "--count" in said
    assert (str(out) in said) == done
