"""A new network is one module: it trains, registers, converts and is evaluated."""

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

import jaxreg
from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.evaluation import run as evaluation
from jaxreg.experiments import files, run
from jaxreg.models import registry
from jaxreg.space.grid import Grid, Volume
from jaxreg.weights import convert

SHAPE = (8, 10, 12)
CONFIG = """
from jaxreg.data.loading import Loading
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from toy_network import ToyConfig


def get_config():
    return Experiment(
        name="toy",
        model=ToyConfig(channels=3),
        data=DataConfig(
            synthetic=("inter_mono",), synthetic_labels=2, pairs_per_epoch=2,
            validation_pairs=1,
        ),
        loading=Loading(shape=(8, 10, 12)),
        objective=Objective(similarity="mse"),
        train=TrainConfig(batch=1),
        stages=(Stage("one", 1),),
    )
"""
OPTIONS = jaxreg.Options(
    fixed_modality="mri", moving_modality="mri", io_iterations=None, inverse=False
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights after two steps, and the folder around them."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(pathlib.Path(__file__).parent)
        outcome = run.run(
            files.load(folder / "toy.py"), folder / "run", report=lambda _: None
        )
        assert outcome.steps == 2 and np.isfinite(outcome.scores["loss"])
        yield outcome.weights
        sys.modules.pop("toy_network")
        registry._KINDS.pop("toy")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two pairs of boxes with label maps."""
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)

    def write(name, start):
        labels = np.zeros((9, 11, 10), np.uint8)
        labels[3:6, 3:8, start : start + 4] = 1
        image = 100.0 * labels + rng.uniform(0, 50, labels.shape)
        for suffix, array in (("", image.astype(np.float32)), ("_labels", labels)):
            path = folder / f"{name}{suffix}.nii.gz"
            jaxreg.write_volume(path, Volume(array, Grid(array.shape, np.eye(4))))
        return folder / f"{name}.nii.gz", folder / f"{name}_labels.nii.gz"

    specs = []
    for number in (1, 2):
        (fixed, fixed_label), (moving, moving_label) = (
            write(f"{side}{number}", start) for side, start in (("f", 2), ("m", 4))
        )
        specs.append(
            PairSpec(
                fixed=fixed, moving=moving, fixed_label=fixed_label,
                moving_label=moving_label, fixed_modality="mri", moving_modality="mri",
            )
        )  # fmt: skip
    return specs


def test_it_trains_and_its_weights_load(trained):
    loaded = jaxreg.load(trained)
    assert type(loaded.model).__name__ == "Toy"
    assert dataclasses.asdict(loaded.model.config) == {"channels": 3}
    assert loaded.shape == SHAPE
    fresh = loaded.model.init(jax.random.split(jax.random.key(0))[0], SHAPE)
    changed = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), dict(fresh), dict(loaded.variables)
    )
    assert all(jax.tree.leaves(changed))


def test_it_registers_and_is_optimised_for_a_pair(trained, pairs):
    options = dataclasses.replace(OPTIONS, io_iterations=1)
    found = jaxreg.register(pairs[0].moving, pairs[0].fixed, str(trained), options)
    assert found.fixed_grid.shape == SHAPE
    moving, fixed = (
        jaxreg.read_volume(path) for path in (pairs[0].moving, pairs[0].fixed)
    )
    warped = jaxreg.warp_volume(moving, found.transform, fixed.grid)
    assert np.isfinite(warped.array).all() and np.any(warped.array != moving.array)
    with pytest.raises(UserError, match="8 x 9 x 10, Toy needs a multiple of 2"):
        jaxreg.register(
            pairs[0].moving,
            pairs[0].fixed,
            str(trained),
            dataclasses.replace(OPTIONS, shape=(8, 9, 10)),
        )


def test_it_is_evaluated(trained, pairs):
    result = evaluation.evaluate(pairs, jaxreg.load(trained), OPTIONS)
    mine = [row for row in result.rows if "initial" not in row.method]
    assert len(mine) == 2
    assert all(0 <= row.mean_dice <= 1 for row in mine)


def test_it_goes_to_a_pytorch_file_and_back(trained, tmp_path):
    if not importlib.util.find_spec("torch"):
        pytest.skip("writing needs torch")
    with pytest.warns(UserWarning, match="cannot say how its network sees scans"):
        convert.convert(trained, tmp_path / "toy.pth")
    convert.convert(tmp_path / "toy.pth", tmp_path / "toy")  # known by its names
    before, after = jaxreg.load(trained), jaxreg.load(tmp_path / "toy")
    jax.tree.map(np.testing.assert_array_equal, before.variables, after.variables)
    assert after.model == before.model
    assert after.ct_window == (-500.0, 500.0)
