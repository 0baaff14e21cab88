"""The plan of the TPU's compiler for a small training step, against a stored ceiling.

    JAXREG_TPU_PYTHON=tpu/bin/python python tests/test_compiled_tpu.py

stores what it is now in compiled_tpu.json. The test lets memory and estimated cycles
grow by a tenth, and asks for new values where one has halved.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import compiled

FILE = pathlib.Path(__file__).with_name("compiled_tpu.json")
STORED = json.loads(FILE.read_text())
MARGIN = 1.1


def version() -> str | None:
    """Returns the version of an interpreter's libtpu, None where there is none."""
    code = "import importlib.metadata as m, libtpu; print(m.version('libtpu'))"
    asked = subprocess.run([python(), "-c", code], capture_output=True, text=True)
    return None if asked.returncode else asked.stdout.strip()


def python() -> str:
    return os.environ.get("JAXREG_TPU_PYTHON") or sys.executable


def compile_it(path: pathlib.Path) -> dict[str, Any]:
    """Returns the record of the stored command; the file at the path has it, too."""
    argv = shlex.split(STORED["command"])[2:]
    assert compiled.main([*argv, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_training_step_for_tpu_costs_no_more_than_it_did(tmp_path, monkeypatch):
    found = version()
    if found is None:
        pytest.skip(
            f"{python()} has no libtpu: install `.[tpu-compile]` in an environment of "
            "its own and name its interpreter by JAXREG_TPU_PYTHON"
        )
    if found != STORED["libtpu"]:
        pytest.skip(f"libtpu is {found}, the ceiling is of {STORED['libtpu']}")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # those of tests are for CPUs
    # A file: pytest's own stand-in for it belongs to no process that is started.
    monkeypatch.setattr(sys, "stderr", (tmp_path / "said").open("w"))
    record = compile_it(tmp_path / "record.json")
    assert record["status"] == "fits"
    for name, stored in STORED["ceiling"].items():
        assert record[name] <= MARGIN * stored, name
        assert record[name] > stored / 2, f"{name} has halved: store what it is now"


if __name__ == "__main__":
    new = compile_it(FILE.with_suffix(".new"))
    FILE.with_suffix(".new").unlink()
    ceiling = {name: new[name] for name in STORED["ceiling"]}
    stored = {**STORED, "libtpu": new["versions"]["libtpu"], "ceiling": ceiling}
    FILE.write_text(json.dumps(stored, indent=1) + "\n")
