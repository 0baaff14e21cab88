"""Compiles one program for one device, in a process of its own.

    python compiled_worker.py '{"network": "gradicon", "device": "v5e"}' RECORD.json

Started by `compiled`: a failed check in a compiler ends this process alone.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

import compiled_records
import compiled_text
import counting
import devices
import jax
import numpy as np
import programs
from compiled_records import Record, Spec
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Sharding
from roofline import Clock

from jaxreg.errors import UserError
from jaxreg.experiments import config, dry_run, files, overrides
from jaxreg.xla import platforms

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BYTES = r"([\d.]+)([KMGT]?)"
_ASKED = (
    re.compile(rf"\({_BYTES}\) exceeds available HBM \({_BYTES}\)"),
    re.compile(rf"Used {_BYTES} of {_BYTES} hbm", re.IGNORECASE),
)


def main() -> None:
    """Reads what is asked for, compiles it, writes the record."""
    said = json.loads(sys.argv[1])
    if said.get("mesh") is not None:
        said["mesh"] = tuple(said["mesh"])
    said["settings"] = tuple(map(tuple, said.get("settings", ())))
    spec = Spec(**said)
    record = {**dataclasses.asdict(spec), "title": spec.title()}
    try:
        record |= measure(spec)
    except (devices.NotThere, UserError, ValueError) as error:
        record |= {"status": "not there", "reason": str(error)}
    compiled_records.write(record, pathlib.Path(sys.argv[2]))


def measure(spec: Spec) -> Record:
    """Returns what a compiler says of a program; see `compiled_records.report`.

    Args:
      spec: which, and for what.

    Raises:
      devices.NotThere: its compiler is not installed, or has no such devices.
      UserError: the recipe and the mesh do not fit together.
      ValueError: the network has no such task.
    """
    chosen, options = devices.described(spec.device, spec.chips)
    began = time.perf_counter()
    highest = "highest" if spec.precision == "float32" else None
    program = _program(spec)
    platform = devices.TARGETS[spec.device].platform
    with jax.default_matmul_precision(highest), platforms.tracing_for(platform):
        lowered = _lowered(spec, program, chosen)
    traced, worked = time.perf_counter(), time.process_time()
    print(f"  traced in {traced - began:.0f} s", flush=True)
    found: Record = {
        "title": program.title,
        "grid": list(_grid(spec, program)),
        "pairs": _pairs(program),
        "batch": _pairs(program) // (spec.mesh[0] if spec.mesh else 1),
        "activations": getattr(program.config, "precision", "float32"),
        "remat": getattr(program.config, "remat", None),
        "memory": devices.TARGETS[spec.device].memory,
        "versions": _versions(),
        "trace_s": traced - began,
        "options": {name: str(value) for name, value in options.items()},
        **_bound(spec, program),
    }
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        return found | _refusal(str(error))
    found["compile_s"] = time.perf_counter() - traced
    found["compile_cpu_s"] = time.process_time() - worked
    text = compiled.as_text() or ""
    if "JAXREG_HLO" in os.environ:
        pathlib.Path(os.environ["JAXREG_HLO"]).write_text(text)
    return found | _said(spec, compiled, text)


def _program(spec: Spec) -> programs.Program:
    data, space = spec.mesh or (1, 1)
    batch = spec.batch
    if spec.mesh is not None:
        batch = (batch or 1) * data
    task: Any = spec.task
    precision: Any = spec.precision
    return programs.build(
        spec.network,
        size=spec.size,
        task=task,
        precision=precision,
        batch=batch,
        remat=spec.remat,
        settings=spec.settings,
    )


def _lowered(
    spec: Spec, program: programs.Program, chosen: list[Any]
) -> jax.stages.Lowered:
    if spec.mesh is not None:
        return _sharded(spec, program, chosen)
    alone = NamedSharding(Mesh(np.array(chosen[:1]), ("one",)), Sharding())
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=alone),
        program.whole_args,
    )
    return jax.jit(program.whole, donate_argnums=program.donate).lower(*args)


def _sharded(
    spec: Spec, program: programs.Program, chosen: list[Any]
) -> jax.stages.Lowered:
    """Returns the training step of a recipe's last stage, for a mesh."""
    assert spec.mesh is not None
    if spec.task != "train" or spec.network == "sam":
        raise ValueError(
            f"a mesh is for training steps on pairs, not for {spec.task} of "
            f"{spec.network}; leave it out"
        )
    recipe, _, _ = programs.MODELS[spec.network]
    found = files.load(programs.ROOT / "configs" / f"{recipe}.py")
    last, during = config.stages(found)[-1]
    data, space = spec.mesh
    changes: list[tuple[str, Any]] = [
        ("stages", (type(last)(last.name, last.epochs),)),
        ("loading.shape", _grid(spec, program)),
        ("train.batch", (spec.batch or 1) * data),
        ("train.accumulate", 1),
        ("train.replicas", data if during.train.replicas else 0),
        ("train.parallel", "mesh"),
        ("train.space", space),
        ("train.start", None),
    ]
    during = overrides.override(during, changes)
    during = dataclasses.replace(during, model=program.config)
    (step,) = dry_run.traced_steps(during, devices=chosen)
    return step.lowered


def _grid(spec: Spec, program: programs.Program) -> tuple[int, int, int]:
    """Returns the grid: that of the only image, or the first one."""
    leaves = jax.tree.leaves(program.args[1])
    d, h, w = next(a.shape[1:4] for a in leaves if a.ndim == 5)
    return d, h, w


def _pairs(program: programs.Program) -> int:
    return next(len(a) for a in jax.tree.leaves(program.args[1]) if a.ndim == 5)


def _bound(spec: Spec, program: programs.Program) -> Record:
    """Returns what the layers need at least, on each device."""
    rates, share = devices.TARGETS[spec.device].rates, spec.chips
    layers = program.layers()
    precision: Any = spec.precision
    bound = None
    if rates is not None:
        bound = counting.total(layers, Clock(rates, precision).bound) / share
    return {
        "bound": bound,
        "flops": counting.total(layers, lambda layer: layer.flops) / share,
        "least_bytes": counting.total(layers, lambda layer: layer.bytes) / share,
    }


def _said(spec: Spec, compiled: jax.stages.Compiled, text: str) -> Record:
    """Returns memory and cost of a compiled program, on each device."""
    target = devices.TARGETS[spec.device]
    plan: Any = compiled.memory_analysis()
    found: Record = {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes,
        "aliased": plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "code": plan.generated_code_size_in_bytes,
    }
    found["needed"] = sum(found.values()) - 2 * found["aliased"]
    fits = target.memory is None or found["needed"] <= target.memory
    found |= {"status": "fits" if fits else "too large", "asked": found["needed"]}
    found |= compiled_text.summary(compiled_text.cost_of(text))
    cycles, rates = found["cycles"], target.rates
    found["seconds"] = cycles / target.clock if cycles and target.clock else None
    found["memory_seconds"] = found["moved"] / rates.bandwidth if rates else None
    counted = compiled.cost_analysis() or {}
    found["compiler_flops"] = counted.get("flops")
    found["compiler_bytes"] = counted.get("bytes accessed")
    return found


def _refusal(message: str) -> Record:
    """Returns why a program did not compile."""
    if "RESOURCE_EXHAUSTED" not in message:
        return {"status": "failed", "reason": message.strip().splitlines()[0]}
    found: Record = {"status": "too large", "reason": message.splitlines()[0]}
    for pattern in _ASKED:
        said = pattern.search(message)
        if said:
            asked, memory = (
                float(number) * _UNITS[unit.upper()]
                for number, unit in (said.groups()[:2], said.groups()[2:])
            )
            return found | {"asked": asked, "memory": memory}
    return found | {"asked": None}


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
