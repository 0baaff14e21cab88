"""Pairs that are registered at once, each on a device of its own."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxreg.io import volumes
from jaxreg.registration import together
from jaxreg.space.grid import Grid, Volume
from jaxreg.xla import spreading

PROGRAM = pathlib.Path(__file__).parent / "programs" / "many_devices.py"
SHAPE = (9, 8, 10)
DEVICES = 4
ROUNDING = 2e-5  # mm, of voxels of 1 mm, and of the objective, which is about 1


def blob(seed: int) -> np.ndarray:
    at = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    generator = np.random.default_rng(seed)
    centre = (np.array(SHAPE) - 1) / 2 + generator.uniform(-1, 1, 3)
    distance = (((at - centre) / generator.uniform(2, 4, 3)) ** 2).sum(-1)
    return (1000 * np.exp(-distance)).astype(np.int16)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process of four CPU devices says of its results and those of one."""
    folder = tmp_path_factory.mktemp("scans")
    grid = Grid(SHAPE, np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]])
    for number in range(5):
        volumes.write_volume(folder / f"{number}.nii.gz", Volume(blob(number), grid))
    whole = (folder / "4.nii.gz").read_bytes()
    (folder / "broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    names = ["1", "2", "broken", "3", "4", "0"]
    lines = [f"0.nii.gz,{name}.nii.gz,mri,mri" for name in names]
    header = "fixed,moving,fixed_modality,moving_modality"
    (folder / "pairs.csv").write_text("\n".join([header, *lines]))
    flag = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{flag}=\d+", "", os.environ["XLA_FLAGS"])
    done = subprocess.run(
        [sys.executable, PROGRAM, folder],
        env={
            **os.environ,
            "XLA_FLAGS": f"{flags} {flag}={DEVICES}",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["predict", "network", "map"])
def test_devices_give_what_one_gives(found, mode):
    """To rounding; two pairs differ by a thousand times as much, so none is another."""
    assert found[mode]["difference"] < ROUNDING
    assert found[mode]["apart"] > 1000 * ROUNDING


@pytest.mark.parametrize("mode", ["predict", "network", "map"])
def test_every_device_has_a_pair_of_its_own(found, mode):
    assert found[mode]["devices"] == DEVICES


def test_devices_tell_each_other_nothing(found):
    assert found["collectives"] == []


def test_a_list_on_devices_keeps_its_order_and_its_failures(found):
    assert found["in order"]
    status = [status for _, status in found["rows"]]
    assert status == ["done", "done", "failed", "done", "done", "done"]
    kinds = ["RegistrationResult", "UserError", "RegistrationResult"]
    assert found["one failing"] == kinds


def test_one_pair_takes_one_device():
    assert together.devices_for(1) == jax.local_devices()[:1]
    assert together.devices_for(0) == jax.local_devices()[:1]
    assert together.described(jax.local_devices()[:1]) == ""


def test_each_device_computes_its_own_entry():
    devices = jax.local_devices()
    mesh = spreading.mesh_of(devices)
    trees = [{"x": np.arange(3.0) + i, "s": np.float32(i)} for i in range(len(devices))]

    def function(shared, own):
        return {"sum": own["x"].sum() * shared, "s": own["s"]}

    placed = spreading.place(trees, mesh)
    result = jax.jit(spreading.each(function, mesh))(2.0, placed)
    for i, entry in enumerate(spreading.split(result, mesh, devices)):
        assert float(entry["sum"]) == 2.0 * (3 + 3 * i)
        assert float(entry["s"]) == i
