"""The best smoothness of a task, by sweeping what a network is asked for."""

import dataclasses

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from jaxreg.cli import main
from jaxreg.data import pair_list
from jaxreg.errors import UserError
from jaxreg.evaluation import run as run_lib
from jaxreg.evaluation import sweep, table
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.nn.heads import SmoothnessRange
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration.prealign import select
from jaxreg.space.transform import Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo

SHAPE = (8, 8, 16)
CONFIG = UniRegRpnConfig(
    channels=1, regions=2, tasks=((0, "inter"), (1, "inter")),
    smoothness_range=SmoothnessRange(0.1, 10.0),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Obedient(RegistrationModel):
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
    preprocessing["regions"] = ["box", "tube"]
    bundle = bundle_lib.Bundle({}, "unireg_rpn", {}, preprocessing, "a test", "none")
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
            pair_list.PairSpec(
                fixed=fixed, moving=moving, fixed_label=fixed, moving_label=moving,
                task=task, pairing="inter",
            )
        )  # fmt: skip
    return specs


@pytest.fixture(autouse=True)
def obedient(monkeypatch):
    monkeypatch.setattr(UniRegRpnConfig, "build", Obedient)


OPTIONS = options_lib.Options(shape=SHAPE, io_iterations=None, inverse=False)


def test_each_task_gets_the_weight_that_overlaps_most(tmp_path, pairs):
    found = sweep.sweep(
        pairs, model(), OPTIONS, (0.2, 1.0, 4.0), out=tmp_path / "rows.csv"
    )
    assert found.best == {"box, inter": 1.0, "tube, inter": 4.0}
    assert found.dice == {"box, inter": 1.0, "tube, inter": 1.0}
    assert found.pairs == {"box, inter": 1, "tube, inter": 1}
    methods = [m for m in found.result.methods if m.startswith("obedient")]
    assert methods == [f"obedient, smoothness {w}" for w in ("0.2", "1", "4")]
    # All told to be of one task.
    options = dataclasses.replace(OPTIONS, task="box", pairing="inter")
    found = sweep.sweep(pairs, model(), options, (1.0, 4.0), out=tmp_path / "rows.csv")
    assert set(found.best) == {"box, inter"}
    assert found.pairs == {"box, inter": 2}


def test_each_structure_has_a_best_weight_of_its_own(tmp_path):
    """Two boxes of one scan, of which one moved by 1 voxel and the other by 4."""

    def write(name, starts):
        array = np.zeros(SHAPE[::-1], np.uint8)
        for label, start in enumerate(starts, start=1):
            array[start : start + 4, 4 * label - 4 : 4 * label, 2:6] = label
        path = tmp_path / f"{name}.nii.gz"
        nib.Nifti1Image(array, np.eye(4)).to_filename(path)
        return path

    fixed, moving = write("fixed", (4, 4)), write("moving", (5, 8))
    pair = pair_list.PairSpec(
        fixed=fixed, moving=moving, fixed_label=fixed, moving_label=moving,
        task="near", pairing="inter",
    )  # fmt: skip
    found = sweep.sweep(
        [pair], model(), OPTIONS, (1.0, 2.5, 4.0), out=tmp_path / "rows.csv"
    )
    weights = {s.label: (s.weight, s.dice, s.pairs) for s in found.structures}
    assert weights == {1: (1.0, 1.0, 1), 2: (4.0, 1.0, 1)}
    lines = sweep.lines_of(found, label_names={"near": {1: "box"}})
    assert [line.split(",")[0] for line in lines] == [
        "box",
        "  box: smoothness 1",
        "  label 2: smoothness 4",
    ]
    assert "Dice 100.00 % of 1 pairs" in lines[1]


def test_weights_to_try_span_the_range_and_need_one():
    tried = sweep.weights_to_try(model(), 3)
    np.testing.assert_allclose(tried, [0.1, 1.0, 10.0])
    with pytest.raises(UserError, match="at least 2"):
        sweep.weights_to_try(model(), 1)
    for config in (
        dataclasses.replace(CONFIG, smoothness_range=None),
        GradIconConfig(),
    ):
        with pytest.raises(UserError, match="not trained to be asked"):
            sweep.weights_to_try(model(config), 3)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0.5, 50.0), "`smoothness` has 50, .* 0.1 to 10"),
        ((0.5, float("nan")), "`smoothness` has nan"),
        ((-1.0, 1.0), "`smoothness` has -1"),
        ((1.0, 1.0), "`smoothness` is 1,1, expected two or more unlike"),
        ((1.0,), "`smoothness` is 1, expected two or more"),
    ],
)
def test_weights_that_cannot_be_compared_are_refused_first(weights, said, tmp_path):
    with pytest.raises(UserError, match=said):
        sweep.check_weights(model(), weights)
    with pytest.raises(UserError, match=said):  # before pairs are looked at
        sweep.sweep([], model(), OPTIONS, weights, out=tmp_path / "rows.csv")


def test_weights_are_compared_over_the_pairs_that_all_have(
    tmp_path, pairs, monkeypatch
):
    """A weight that failed on the hard pair is not best for the easy one alone."""
    hard = dataclasses.replace(pairs[1], task="near")
    original = run_lib.evaluate_files

    def failing(*arguments, **settings):
        found = original(*arguments, **settings)
        rows = [
            table.EvalRecord(r.method, r.task, r.pair)
            if r.pair == "far_moving to far_fixed" and r.method.endswith("smoothness 1")
            else r
            for r in found.rows
        ]
        return table.Result(tuple(rows))

    monkeypatch.setattr(run_lib, "evaluate_files", failing)
    found = sweep.sweep(
        [pairs[0], hard], model(), OPTIONS, (1.0, 4.0), out=tmp_path / "rows.csv"
    )
    assert found.pairs == {"box, inter": 1}
    with pytest.raises(UserError, match="1 of 8 rows failed .* nothing is stored"):
        sweep.check_found(found)
    found = sweep.sweep(
        [pairs[0], pairs[1]], model(), OPTIONS, (1.0, 4.0), out=tmp_path / "rows.csv"
    )
    assert found.best == {"box, inter": 1.0}
    assert found.unscored == ("tube, inter",)
    whole = dataclasses.replace(found, result=table.Result(()))
    with pytest.raises(UserError, match="tube, inter has no pair with a Dice"):
        sweep.check_found(whole)


def test_pairs_without_labels_are_refused(tmp_path, pairs):
    bare = dataclasses.replace(pairs[0], fixed_label=None, moving_label=None)
    with pytest.raises(UserError, match="no label maps"):
        sweep.sweep([bare], model(), OPTIONS, (1.0, 2.0), out=tmp_path / "rows.csv")


@pytest.fixture
def tune(tmp_path, pairs, monkeypatch, capsys):
    """Runs ``jaxreg tune-lambda``; returns (status, stdout, stderr, what is stored)."""
    folder = tmp_path / "weights"
    bundle = dataclasses.replace(
        model().bundle, variables={"params": {"a": np.ones(2)}}
    )
    bundle_lib.save_bundle(folder, bundle)
    monkeypatch.setattr(
        load, "load", lambda path: dataclasses.replace(model(), name=str(path))
    )

    def run(*arguments):
        rows = ["fixed,moving,fixed_label,moving_label,task,pairing"]
        rows += [
            f"{p.fixed},{p.moving},{p.fixed_label},{p.moving_label},{p.task},"
            f"{p.pairing}"
            for p in pairs
        ]
        (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
        status = main.main(
            ["tune-lambda", "--model", str(folder), "--pairs",
             str(tmp_path / "pairs.csv"), "--fixed-modality", "mri",
             "--moving-modality", "mri", "--out", str(tmp_path / "rows.csv"),
             *arguments]
        )  # fmt: skip
        said = capsys.readouterr()
        stored = bundle_lib.load_bundle(folder).preprocessing.get("smoothness")
        return status, said.out, said.err, stored

    return run


def test_the_verb_prints_and_stores_the_best(tmp_path, tune):
    status, printed, _, stored = tune("--smoothness", "1,4", "--write")
    assert status == 0
    assert "box, inter: smoothness 1, Dice 100.00 % of 1 pairs" in printed
    assert "tube, inter: smoothness 4, Dice 100.00 %" in printed
    assert printed.count("  label 1: smoothness") == 2
    assert stored == {"box, inter": 1.0, "tube, inter": 4.0}
    assert (tmp_path / "rows.md").is_file()


def test_nothing_is_stored_where_a_registration_failed(tune, monkeypatch):
    original = pair_lib.register

    def failing(moving, fixed, loaded, options, **rest):
        if options.smoothness == 4.0 and options.task == "far":
            raise UserError("no luck")
        return original(moving, fixed, loaded, options, **rest)

    monkeypatch.setattr(pair_lib, "register", failing)
    status, printed, said, stored = tune("--smoothness", "1,4", "--write")
    assert (status, stored) == (2, None)
    assert "rows failed" in said and "stored in" not in printed


def test_the_verb_registers_as_evaluate_does(tune, monkeypatch):
    asked = []

    def noting(moving, fixed, loaded, options, **rest):
        asked.append((options, rest["sam"]))
        raise UserError("enough")

    monkeypatch.setattr(pair_lib, "register", noting)
    monkeypatch.setattr(load, "load_sam", lambda path: f"SAM of {path}")
    nothing = select.Prealignment(np.eye(4))
    monkeypatch.setattr(pair_lib, "prealigned", lambda *_, **__: nothing)
    arguments = [
        "--prealign", "sam", "--sam-weights", "w.pth", "--shape", "16,8,8",
        "--quantile-range", "0", "0.9", "--level-iterations", "3",
        "--steps", "2", "--count", "1", "--task", "far", "--pairing", "intra",
    ]  # fmt: skip
    assert tune(*arguments)[0] == 2
    assert len(asked) == 2
    options, sam = asked[0]
    assert sam == "SAM of w.pth"
    assert (options.prealign, options.shape) == ("sam", (16, 8, 8))
    assert (options.quantile_range, options.level_iterations) == ((0.0, 0.9), 3)
    assert (options.task, options.pairing, options.io_iterations) == (
        "far", "intra", None
    )  # fmt: skip
    assert [o.smoothness for o, _ in asked] == pytest.approx([0.1, 10.0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "3", "--smoothness", "1,2"], "give one"),
        (["--smoothness", "1,x"], "--smoothness is 1,x"),
        (["--smoothness", "1,50"], "--smoothness has 50"),
        (["--steps", "1"], "--steps is 1"),
    ],
)
def test_the_verb_refuses_what_it_cannot_try(tune, arguments, words):
    status, _, said, stored = tune(*arguments, "--write")
    assert (status, stored) == (2, None)
    assert words in said
