"""Parts of a list of pairs, for processes and hosts that share it.

Part k of n has every n-th row from the k-th on, so that a list sorted by data set is
shared out evenly. It depends on a row's place in the whole list alone: a part that is
repeated finds its rows again. Each part writes a table of its own, and the tables are
put together by the whole list. Imports no JAX before it is needed.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from jaxreg.errors import UserError
from jaxreg.io import files

_Row = TypeVar("_Row")
AUTO = "auto"
# What tells a process which one it is. Not SLURM_NTASKS: it counts the job's tasks, and
# a script without srun would be the first of many that nobody starts.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
# How long a host that is done waits for the others, seconds: as long as it takes.
_PATIENCE_S = 30 * 24 * 3600


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of a list.

    Attributes:
      number: which one, from 1.
      count: of all parts.
    """

    number: int
    count: int

    def __str__(self) -> str:
        """Returns what to call it in a sentence."""
        return f"part {self.number} of {self.count}"

    def of(self, rows: Sequence[_Row]) -> list[_Row]:
        """Returns this part's rows of a whole list, in its order."""
        return list(rows[self.number - 1 :: self.count])

    def file(self, path: files.PathLike) -> pathlib.Path:
        """Returns this part's own file beside that of the whole list."""
        path = pathlib.Path(path)
        own = f"{path.stem}.part-{self.number}-of-{self.count}{path.suffix}"
        return path.with_name(own)


def read_part(text: str) -> Part | Literal["auto"]:
    """Returns the part of "3/16", or "auto".

    Raises:
      UserError: it is neither, or there is no such part.
    """
    if text.strip().lower() == AUTO:
        return AUTO
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text, re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(
            f"`part` is {text}, expected K/N with K from 1 to N, such as 3/16 for the "
            "third of sixteen parts, or auto"
        )
    return Part(int(found[1]), int(found[2]))


def every(count: int) -> list[Part]:
    """Returns all parts of a list that is shared among so many.

    Raises:
      UserError: there is none.
    """
    if count < 1:
        raise UserError(f"`merge_parts` is {count}, expected at least 1 part")
    return [Part(number, count) for number in range(1, count + 1)]


def part_of_process(environment: Mapping[str, str] | None = None) -> Part:
    """Returns the part of this process among those that were started with it.

    By what mpirun or srun tells it; else by `jax.distributed`, as on a TPU pod, where
    the processes are joined now unless they are already, and end together.

    Args:
      environment: variables of the process; its own if None.

    Raises:
      UserError: nothing tells which process this is, so that pairs might be lost or
        done twice.
    """
    known = os.environ if environment is None else environment
    for rank, size in _LAUNCHERS:
        if rank in known and size in known:
            if "SLURM_ARRAY_TASK_ID" in known:
                raise UserError(
                    "`part` auto would share the list anew in each task of a SLURM "
                    "array; give `part` $SLURM_ARRAY_TASK_ID/N, for N tasks"
                )
            return Part(int(known[rank]) + 1, int(known[size]))
    if "SLURM_JOB_ID" in known:
        raise UserError(
            "`part` auto stands in a SLURM job without srun, where this process is the "
            "only one and nobody would do the other parts; start it by srun, give "
            "`part` K/N (in an array $SLURM_ARRAY_TASK_ID/N), or leave it out"
        )
    import jax

    from jaxreg.training import parallel

    if not jax.distributed.is_initialized():
        try:
            parallel.start_processes(patience_s=_PATIENCE_S)
        except UserError as error:
            why = files.last_line(error.__cause__ or error)
            raise UserError(
                "`part` auto finds no other processes, neither of srun and mpirun nor "
                f"of a TPU pod ({why}); give `part` K/N such as 3/16"
            ) from error
    return Part(jax.process_index() + 1, jax.process_count())
