"""One of two processes that watch each other; how the first ends is the argument.

    python watched.py PORT PROCESS FOLDER done | error | defect | wait

No network and no step: what is watched is the processes.
"""

import pathlib
import sys
import time

import jax

jax.config.update("jax_platforms", "cpu")

from jaxreg.errors import UserError
from jaxreg.training import parallel, peers

PATIENCE = 3.0


def main(port: str, index: str, folder: str, how: str) -> None:
    """Joins the other, says so by a file, and waits for what the test does."""
    parallel.start_processes(f"localhost:{port}", 2, int(index))
    with peers.watch(PATIENCE, lambda text: f"said: {text}"):
        pathlib.Path(folder, index).touch()
        if index == "1" and how == "error":
            raise UserError("a file is missing")
        if index == "1" and how == "defect":
            raise ValueError("a defect")
        if how == "wait":
            time.sleep(600)
        # Longer than the patience, the second a little longer than the first.
        time.sleep(PATIENCE * (1.5 + 0.5 * int(index)) if how == "done" else 60)
    print("went on to the end")


if __name__ == "__main__":
    main(*sys.argv[1:])
