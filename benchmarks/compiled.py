"""What the compilers of TPU and GPU say of a program, without such a device.

    python benchmarks/compiled.py --network gradicon --task train --size 64 --device v5e
    python benchmarks/compiled.py --device h100 --precision bfloat16 --largest
    python benchmarks/compiled.py --device v5e --mesh data=1,space=4 --size 64
    python benchmarks/compiled.py --all --size 48 --records records --markdown
    python benchmarks/compiled.py --recipes records

Nothing runs: memory, cycles (TPU) and kernels are the compiler's plan, on each device.
Several networks, tasks and devices are compiled one after the other, each in a process
of its own; those whose record is in the folder --records already are not compiled
again. README.md beside this file says how the two compilers are installed;
$JAXREG_TPU_PYTHON and $JAXREG_CUDA_PYTHON name the interpreters that have them, where
that is not the one that runs this.

The bound is that of `roofline`: the layers at peak rates, not fused. A step on a mesh
is the one that `jaxreg train` compiles, with its augmentation; without --mesh it is
the step alone, as in `roofline`. $JAXREG_HLO names a file for the compiled text.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import compiled_records
from compiled_records import Record, Spec
from devices import TARGETS

NETWORKS = (
    "gradicon", "unireg-mind", "unireg-sam", "unireg-rpn", "promptreg", "rdp", "sam",
)  # fmt: skip
TASKS = ("forward", "train", "io")
_WORKER = pathlib.Path(__file__).with_name("compiled_worker.py")
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_INTERPRETERS = {"tpu": "JAXREG_TPU_PYTHON", "cuda": "JAXREG_CUDA_PYTHON"}
_FAILED = re.compile(r"^F\d{4}.*?\] (.*)$|^.*(Check failed: .*)$", re.MULTILINE)
LARGEST = 256
"""Where the search for the largest batch ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, compiles, prints; returns 1 if anything failed."""
    given = _arguments(argv)
    if given.recipes is not None:
        print(compiled_records.recipes(compiled_records.read(given.recipes)))
        return 0
    if given.table is not None:
        print(compiled_records.head())
        for record in compiled_records.read(given.table):
            print(compiled_records.row(record))
        return 0
    found = []
    for spec in _specs(given):
        record = _kept(spec, given)
        found.append(record)
        if not given.markdown:
            print(compiled_records.report(record), end="\n\n", flush=True)
    if given.json is not None:
        said = found[0] if len(found) == 1 else found
        given.json.write_text(json.dumps(said, indent=1) + "\n")
    if given.markdown:
        print(compiled_records.head())
        print("\n".join(map(compiled_records.row, found)))
    return int(any(record["status"] in ("failed", "not there") for record in found))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=NETWORKS, default=["gradicon"])
    add("--task", nargs="+", choices=TASKS, default=["train"])
    add("--size", type=int, help="longest axis; the published grid if absent")
    add("--batch", type=int, help="pairs on each device that shares the batch; 1")
    add(
        "--precision",
        choices=("float32", "default", "bfloat16"),
        default="default",
        help="float32: products at full precision; default: as JAX takes them; "
        "bfloat16: activations too, where a network can",
    )
    add("--remat", help="as the network's setting; its own default if absent")
    add(
        "--model",
        nargs="+",
        type=_setting,
        default=[],
        help="name=value of the network",
    )
    add("--device", nargs="+", choices=TARGETS, default=["v5e"])
    add("--mesh", type=_mesh, help="data=4,space=4: the training step on so many")
    add("--largest", action="store_true", help="find the largest batch that fits")
    add("--all", action="store_true", help="all networks, tasks, and devices but cpu")
    add("--records", type=pathlib.Path, help="folder of records to go on with")
    add("--timeout", type=float, help="seconds that one compilation may take")
    add("--json", type=pathlib.Path, help="file for the records")
    add("--markdown", action="store_true", help="a table instead of a report")
    add("--table", type=pathlib.Path, help="print the table of a folder of records")
    add("--recipes", type=pathlib.Path, help="print the fastest settings of a folder")
    given = parser.parse_args(argv)
    if given.all:
        devices = [name for name in TARGETS if name != "cpu"]
        given.network, given.task, given.device = NETWORKS, TASKS, devices
    for name in ("size", "batch"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, expected a positive number")
    for name in ("table", "recipes"):
        folder = getattr(given, name)
        if folder is not None and not any(folder.glob("*.json")):
            parser.error(f"--{name} {folder} has no records; --records makes some")
    return given


def _mesh(text: str) -> tuple[int, int]:
    """Returns (data, space) of "data=4,space=4"; one that is not named is 1."""
    found = {"data": 1, "space": 1}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in found or not number.isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"{text}, expected data=4,space=4")
        found[name] = int(number)
    return found["data"], found["space"]


def _setting(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not name or not found:
        raise argparse.ArgumentTypeError(f"{text}, expected NAME=VALUE")
    return name, value


def _specs(given: argparse.Namespace) -> list[Spec]:
    several = itertools.product(given.device, given.network, given.task)
    return [
        Spec(
            network, task, given.size, given.batch, given.precision, given.remat,
            device, given.mesh, tuple(given.model),
        )
        for device, network, task in several
        if (network, task) != ("sam", "io") or not given.all
    ]  # fmt: skip


def _kept(spec: Spec, given: argparse.Namespace) -> Record:
    """Returns a record from the folder, or makes it."""
    path = None if given.records is None else given.records / spec.file()
    if path is not None and path.exists():
        record = json.loads(path.read_text())
        if record["status"] != "not there":
            print(f"{path} is there", file=sys.stderr)
            if not given.largest or "largest_batch" in record:
                return record
    record = compile_apart(spec, given.timeout)
    if given.largest and record["status"] in ("fits", "too large"):
        record |= _largest(spec, record, given.timeout)
    if path is not None:
        compiled_records.write(record, path)
    return record


def _largest(spec: Spec, first: Record, timeout: float | None) -> Record:
    """Returns the record of the largest batch that fits, and its number."""
    made = {spec.batch or 1: first}

    def needed(batch: int) -> float | None:
        if batch not in made:
            one = dataclasses.replace(spec, batch=batch)
            made[batch] = compile_apart(one, timeout)
        record = made[batch]
        return record["needed"] if record["status"] == "fits" else None

    memory = TARGETS[spec.device].memory
    if memory is None:
        return {}
    found = largest_batch(needed, memory)
    failed = [batch for batch, record in made.items() if record["status"] == "failed"]
    if failed:
        print(f"batch {failed[0]}: {made[failed[0]]['reason']}", file=sys.stderr)
        return {}
    return {"largest_batch": found}


def largest_batch(
    needed: Callable[[int], float | None], memory: float, most: int = LARGEST
) -> int:
    """Returns the largest batch that fits, 0 if none does.

    Memory all but grows in proportion: the next one to try is where a straight line
    through the two largest that fit reaches the end, and never one that is known.

    Args:
      needed: batch to its bytes, or None where they do not fit; costs a compilation.
      memory: bytes that there are.
      most: where to stop.
    """
    fits: dict[int, float] = {}
    low, high = 0, most + 1
    guess = 1
    while high - low > 1:
        size = needed(guess)
        if size is None:
            high = guess
        else:
            low = guess
            fits[guess] = size
        guess = 2 * low if len(fits) < 2 else _reach(fits, memory)
        guess = min(max(guess, low + 1), high - 1)
    return low


def _reach(fits: dict[int, float], memory: float) -> int:
    first, last = sorted(fits)[-2:]
    slope = (fits[last] - fits[first]) / (last - first)
    return int(last + (memory - fits[last]) / slope) if slope > 0 else 2 * last


def compile_apart(spec: Spec, timeout: float | None = None) -> Record:
    """Returns what a compiler says, from a process of its own.

    Args:
      spec: which program, and for what.
      timeout: seconds that it may take.
    """
    print(f"compiling {spec.title()}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "record.json"
        log = pathlib.Path(folder) / "log"
        said = json.dumps(dataclasses.asdict(spec))
        command = [_interpreter(spec), str(_WORKER), said, str(path)]
        reason = ""
        with log.open("wb") as errors:
            try:
                status = subprocess.run(
                    command, env=_environment(spec), stdout=sys.stderr.fileno(),
                    stderr=errors, timeout=timeout, check=False,
                ).returncode  # fmt: skip
                reason = _why(status, log.read_text(errors="replace"))
            except subprocess.TimeoutExpired:
                reason = f"stopped after {timeout:.0f} s"
            except OSError as error:
                reason = f"{command[0]} cannot be started ({error.strerror})"
        if path.exists():
            return json.loads(path.read_text())
    return {
        **dataclasses.asdict(spec),
        "title": spec.title(),
        "status": "failed",
        "reason": reason,
        "seconds_spent": time.perf_counter() - began,
    }


def _interpreter(spec: Spec) -> str:
    variable = _INTERPRETERS.get(TARGETS[spec.device].platform, "")
    return os.environ.get(variable) or sys.executable


def _environment(spec: Spec) -> dict[str, str]:
    """Returns variables of a process that compiles and has no accelerator."""
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compilation is what is timed
        # No chip is asked for, so several processes may have the library at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
    }


def _why(status: int, log: str) -> str:
    """Returns in one sentence why a process left no record."""
    ended = f"ended with status {status}"
    if status < 0:
        ended = f"was ended by {signal.Signals(-status).name}"
    checks = [a or b for a, b in _FAILED.findall(log)]
    lines = checks[:1] or log.strip().splitlines()[-1:]
    said = f": {lines[0].strip()[:300]}" if lines else ""
    return f"the compiler's process {ended}{said}"


if __name__ == "__main__":
    sys.exit(main())
