"""The best smoothness of a task, by sweeping what a network is asked for."""

import dataclasses

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from jaxreg import cli, evaluate, register, tuning, zoo
from jaxreg.errors import UserError
from jaxreg.io import checkpoints
from jaxreg.models.base import Prediction
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.unireg_rpn import UniRegRpnConfig
from jaxreg.nn.dynamic import SmoothnessRange
from jaxreg.space.transform import Displacement, Transform

SHAPE = (8, 8, 16)
CONFIG = UniRegRpnConfig(
    channels=1, regions=1, tasks=((0, "inter"), (0, "intra")),
    smoothness_range=SmoothnessRange(0.1, 10.0),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Obedient:
    """Shifts along axis 2 by as many voxels as the smoothness asked for."""

    config: UniRegRpnConfig = CONFIG

    def init(self, key, shape):
        return {}

    def apply(self, variables, moving, fixed, *, smoothness, **_):
        shape = fixed.shape[1:4]
        voxels = smoothness.reshape(-1, 1, 1, 1, 1) * jnp.array([0.0, 0.0, 1.0])
        field = jnp.zeros((len(fixed), *shape, 3)) + voxels / (shape[2] - 1)
        return Prediction(Transform((Displacement(field),))), variables


def model(config=CONFIG):
    preprocessing = {"shape": list(SHAPE), "tasks": ["near", "far"]}
    preprocessing["regions"] = ["box"]
    bundle = checkpoints.Bundle({}, "unireg_rpn", {}, preprocessing, "a test", "none")
    return zoo.LoadedModel("obedient", Obedient(config), {}, bundle)


@pytest.fixture
def pairs(tmp_path):
    """Boxes that lie 1 voxel apart in one task, and 4 in the other."""
    specs = []

    def box(name, start):
        array = np.zeros(SHAPE[::-1], np.uint8)
        array[start : start + 4, 2:6, 2:6] = 1
        path = tmp_path / f"{name}.nii.gz"
        nib.Nifti1Image(array, np.eye(4)).to_filename(path)
        return path

    for task, gap in (("near", 1), ("far", 4)):
        fixed, moving = box(f"{task}_fixed", 4), box(f"{task}_moving", 4 + gap)
        specs.append(
            evaluate.PairSpec(
                fixed=fixed, moving=moving, fixed_label=fixed, moving_label=moving,
                task=task, pairing="inter",
            )
        )  # fmt: skip
    return specs


@pytest.fixture(autouse=True)
def obedient(monkeypatch):
    monkeypatch.setattr("jaxreg.tasks.kinds.build", Obedient)


OPTIONS = register.Options(shape=SHAPE, io_iterations=None, inverse=False)


def test_each_task_gets_the_weight_that_overlaps_most(tmp_path, pairs):
    found = tuning.sweep(
        pairs, model(), OPTIONS, (0.2, 1.0, 4.0), out=tmp_path / "rows.csv"
    )
    assert found.best == {"near": 1.0, "far": 4.0}
    assert found.dice == {"near": 1.0, "far": 1.0}
    methods = [m for m in found.result.methods if m.startswith("obedient")]
    assert methods == [f"obedient, smoothness {w}" for w in ("0.2", "1", "4")]
    # All told to be of one task.
    options = dataclasses.replace(OPTIONS, task="box", pairing="inter")
    found = tuning.sweep(pairs, model(), options, (1.0, 4.0), out=tmp_path / "rows.csv")
    assert set(found.best) == {"box"}


def test_weights_to_try_span_the_range_and_need_one():
    tried = tuning.weights_to_try(model(), 3)
    np.testing.assert_allclose(tried, [0.1, 1.0, 10.0])
    with pytest.raises(UserError, match="at least 2"):
        tuning.weights_to_try(model(), 1)
    for config in (
        dataclasses.replace(CONFIG, smoothness_range=None),
        GradIconConfig(),
    ):
        with pytest.raises(UserError, match="not trained to be asked"):
            tuning.weights_to_try(model(config), 3)


def test_pairs_without_labels_are_refused(tmp_path, pairs):
    bare = dataclasses.replace(pairs[0], fixed_label=None, moving_label=None)
    with pytest.raises(UserError, match="no label maps"):
        tuning.sweep([bare], model(), OPTIONS, (1.0,), out=tmp_path / "rows.csv")


def test_the_verb_prints_and_stores_the_best(tmp_path, pairs, monkeypatch, capsys):
    folder = tmp_path / "weights"
    bundle = dataclasses.replace(
        model().bundle, variables={"params": {"a": np.ones(2)}}
    )
    checkpoints.save_bundle(folder, bundle)
    monkeypatch.setattr(
        zoo, "load", lambda path: dataclasses.replace(model(), name=str(path))
    )
    rows = ["fixed,moving,fixed_label,moving_label,task,pairing"]
    rows += [
        f"{p.fixed},{p.moving},{p.fixed_label},{p.moving_label},{p.task},{p.pairing}"
        for p in pairs
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    status = cli.main(
        ["tune-lambda", "--model", str(folder), "--pairs", str(tmp_path / "pairs.csv"),
         "--fixed-modality", "mri", "--moving-modality", "mri", "--weights", "1,4",
         "--out", str(tmp_path / "rows.csv"), "--write"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0
    assert "near: smoothness 1, Dice 100.00 %" in printed
    assert "far: smoothness 4, Dice 100.00 %" in printed
    stored = checkpoints.load_bundle(folder).preprocessing["smoothness"]
    assert stored == {"near": 1.0, "far": 4.0}
    assert (tmp_path / "rows.md").is_file()
