"""Annotations hold, and ranks are never promoted, in all that is traced."""

import pathlib
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).parent / "programs" / "traced.py"


def test_networks_losses_and_optimisations_keep_their_annotations():
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "refused", "gradicon", "rdp", "promptreg", "unireg", "unireg_mind",
        "unireg_rpn", "similarities", "displacement", "features",
    ]  # fmt: skip
