"""Parts of a list: which rows they have, how a process finds its own, bad ones."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from jaxreg.cli.options import Division
from jaxreg.errors import UserError
from jaxreg.registration import parts
from jaxreg.registration.parts import Part

PROCESS = pathlib.Path(__file__).parent / "programs" / "part_of_process.py"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 20])
def test_parts_have_every_row_once(count):
    rows = list(range(12))
    shares = [part.of(rows) for part in parts.every(count)]
    assert sorted(sum(shares, [])) == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == sorted(share) for share in shares)


def test_a_part_is_read_and_named():
    part = parts.read_part("3/16")
    assert part == Part(3, 16)
    assert str(part) == "part 3 of 16"
    assert part.of("abcdefghijklmnopqrst") == ["c", "s"]
    assert part.file("out/results.csv") == pathlib.Path("out/results.part-3-of-16.csv")
    assert parts.read_part("16/16") == Part(16, 16)
    assert parts.read_part("Auto") == "auto"


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "x", "", "3", "3/", "/4", "-1/4", "1/0", "1.0/4", "1/2/3"]
)
def test_what_is_no_part_is_refused(text):
    with pytest.raises(UserError, match=r"`part` is .*expected K/N"):
        parts.read_part(text)


def test_one_part_and_merging_exclude_each_other():
    with pytest.raises(UserError, match="--merge-parts"):
        Division(part=Part(1, 2), merge_parts=2)
    with pytest.raises(UserError, match="`merge_parts` is 0"):
        Division(merge_parts=0)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}


def test_the_part_of_a_task_of_srun():
    step = SLURM | {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "16"}
    assert parts.part_of_process(step) == Part(3, 16)


def test_a_shell_in_an_allocation_has_the_whole_list():
    """As salloc starts it: a step of one task, whatever the job may start."""
    step = SLURM | {"SLURM_STEP_NUM_TASKS": "1"}
    assert parts.part_of_process(step) == Part(1, 1)


def test_a_script_without_srun_loses_no_pair():
    """Its SLURM_PROCID is 0 and SLURM_NTASKS 16, but there are no other processes."""
    with pytest.raises(UserError, match="without srun"):
        parts.part_of_process(SLURM)


def test_a_task_of_an_array_says_its_part():
    step = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_ARRAY_TASK_ID": "3"}
    for environment in (step, SLURM | {"SLURM_ARRAY_TASK_ID": "3"}):
        with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID/N"):
            parts.part_of_process(environment)


@pytest.mark.parametrize("launcher", ["OMPI_COMM_WORLD", "PMI"])
def test_the_part_of_a_rank_of_mpirun_in_slurm(launcher):
    """The daemons that mpirun starts by srun are one a node, its ranks are more."""
    ranks = {f"{launcher}_RANK": "5", f"{launcher}_SIZE": "8"}
    step = SLURM | {"SLURM_STEP_NUM_TASKS": "2"}
    assert parts.part_of_process(step | ranks) == Part(6, 8)


def started(*arguments: str) -> subprocess.Popen:
    hidden = ("SLURM_", "OMPI_", "PMI_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment["JAX_PLATFORMS"] = "cpu"
    return subprocess.Popen(
        [sys.executable, PROCESS, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_jax_joins_share_the_list():
    """And one that is done waits for the other, which takes longer."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    both = [started(coordinator, str(index)) for index in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [out.split()[-1] for out, _ in said] == ["1/2", "2/2"]


def test_a_process_alone_is_told_so():
    process = started()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "`part` auto finds no other processes" in out
    assert len(out.splitlines()) == 1
