"""Pairs that are registered at once, each on a device of its own."""

import pathlib
import types

import jax
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.io import volumes
from jaxreg.registration import options as options_lib
from jaxreg.registration import together
from jaxreg.registration.pair import Prepared
from jaxreg.space.grid import Grid, Volume
from jaxreg.typing import Pair
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
def found(tmp_path_factory, on_devices):
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
    return on_devices(DEVICES, PROGRAM, folder)


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


def prepared(weights=1.0, images=SHAPE, **options) -> Prepared:
    """As `pair.prepare` returns it, with what grouping looks at."""
    image = np.zeros((1, *images, 1), np.float32)
    shared = {"kernel": KERNEL, "prompts": np.full(3, weights)}
    model = types.SimpleNamespace(model="network", variables=shared)
    placed = types.SimpleNamespace(pair=Pair(image, image))
    chosen = options_lib.Options(**{"io_sim": "lncc", **options})
    chosen = options_lib.settled(chosen, network=True)
    return Prepared(None, model, chosen, None, None, placed, {})  # pyright: ignore


KERNEL = np.zeros((3, 3))


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        ({}, True),
        ({"io_iterations": None}, False),
        ({"io_lr": 1e-3}, False),
        ({"io_sim": "mse"}, False),
        ({"seed": 1}, False),
        ({"precision": "bfloat16"}, False),
        ({"fixed_modality": "ct"}, True),  # which the images show
        ({"weights": 2.0}, False),
        ({"images": (8, 8, 8)}, False),
        ({"io_target": "displacement"}, None),  # without the network
    ],
)
def test_what_goes_through_the_network_together(other, alike):
    first, failed = prepared(), UserError("unreadable")
    places = [sorted(g) for g in together._alike([first, failed, prepared(**other)])]
    expected = {True: [[0, 2]], False: [[0], [2]], None: [[0]]}
    assert places == expected[alike]


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
