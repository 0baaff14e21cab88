"""From pairs to rows, with models and transforms whose result is known beforehand."""

import dataclasses
import json
import math
import pathlib
import warnings

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from jaxreg.cli import main
from jaxreg.data import network_grid, pair_list
from jaxreg.data.manifest import read
from jaxreg.data.manifest import records as records_lib
from jaxreg.data.pair_list import PairSpec
from jaxreg.errors import UserError
from jaxreg.evaluation import cases
from jaxreg.evaluation import pairs as pairs_lib
from jaxreg.evaluation import run as run_lib
from jaxreg.evaluation import table as table_lib
from jaxreg.io import transforms, volumes
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.space import sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo

SHAPE = (10, 12, 9)
SPACING_MM = (2.0, 1.0, 1.5)
SHIFT = 2  # voxels along axis 2, from fixed to moving
OPTIONS = options_lib.Options(shape=SHAPE, io_iterations=None)


def make_grid(*, stretch=1.0, origin=(-8.0, 5.0, 3.0), turn=0.3) -> Grid:
    c, s = np.cos(turn), np.sin(turn)
    affine = np.eye(4)
    affine[:3, :3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ np.eye(3)[:, ::-1]
    affine[:3, :3] *= stretch * np.asarray(SPACING_MM)
    affine[:3, 3] = origin
    return Grid(SHAPE, affine)


def label_map(shift=0) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:6, 4:8, 2:6] = 1
    labels[7:9, 2:4, 1:3] = 2
    return np.roll(labels, shift, axis=2)


def write_scan(path: pathlib.Path, labels: np.ndarray, grid: Grid) -> None:
    """Writes a scan and its label map; the label's brightness is its number."""
    image = 100.0 * labels + np.arange(labels.size).reshape(labels.shape) % 7
    volumes.write_volume(path, Volume(image.astype(np.float32), grid))
    label_path = path.with_name(path.name.replace(".", "_label.", 1))
    volumes.write_volume(label_path, Volume(labels, grid))


def write_points(path: pathlib.Path, ras_mm) -> None:
    lines = [f"{-x!r},{-y!r},{z!r}" for x, y, z in np.asarray(ras_mm).tolist()]
    path.write_text("\n".join(["x,y,z", *lines]))


POINTS = np.array([[4.0, 5.0, 3.0], [3.0, 4.0, 5.0], [6.0, 6.0, 2.0]])  # voxels
MISSED_MM = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fixed, and moving: the same anatomy two voxels further along axis 2."""
    folder = tmp_path_factory.mktemp("scans")
    grid = make_grid()
    write_scan(folder / "fixed.nii.gz", label_map(), grid)
    write_scan(folder / "moving.nii.gz", label_map(SHIFT), grid)
    places = POINTS @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]
    write_points(folder / "fixed.csv", places)
    moved = places + SHIFT * grid.affine_mm[:3, 2] + MISSED_MM
    write_points(folder / "moving.csv", moved)
    mask = Volume(np.ones(SHAPE, np.uint8), grid)
    volumes.write_volume(folder / "mask.nii.gz", mask)
    return folder


@pytest.fixture(scope="module")
def spec(folder):
    return PairSpec(
        fixed=folder / "fixed.nii.gz",
        moving=folder / "moving.nii.gz",
        fixed_label=folder / "fixed_label.nii.gz",
        moving_label=folder / "moving_label.nii.gz",
        fixed_landmarks=folder / "fixed.csv",
        moving_landmarks=folder / "moving.csv",
        task="boxes",
    )


@dataclasses.dataclass(frozen=True)
class Shifting(RegistrationModel):
    """A model that always answers with one shift along axis 2, in voxels.

    And waves across it, of a height in unit coordinates.
    """

    voxels: float = SHIFT
    wave: float = 0.0

    def init(self, key, shape):
        return {}

    def apply(self, variables, moving, fixed, **_):
        shape = fixed.shape[1:4]
        shift = jnp.asarray([0.0, 0.0, self.voxels / (shape[2] - 1)])
        field = jnp.zeros((fixed.shape[0], *shape, 3)) + shift
        field += self.wave * jnp.sin(9 * sampling.identity(shape)[..., ::-1])
        return Prediction(Transform((transform_lib.Displacement(field),))), variables


def loaded(model, name="known", **preprocessing) -> zoo.LoadedModel:
    preprocessing = {"orientation": "any", **preprocessing}
    bundle = bundle_lib.Bundle({}, "known", {}, preprocessing, "a test", "none")
    return zoo.LoadedModel(name, model, {}, bundle)


@pytest.fixture(scope="module")
def result(spec):
    return run_lib.evaluate([spec], loaded(Shifting()), OPTIONS)


# --- rows ----------------------------------------------------------------------------


def test_a_known_shift_makes_the_labels_coincide(result):
    initial, resized, known = result.rows
    assert [r.method for r in result.rows] == ["initial", "initial, resized", "known"]
    assert {(r.task, r.pair) for r in result.rows} == {("boxes", "moving to fixed")}
    # Two of four voxels of label 1 overlap, none of label 2.
    assert initial.dice == {1: 0.5, 2: 0.0}
    assert initial.mean_dice == 0.25
    assert known.dice == {1: 1.0, 2: 1.0}
    # More than 5 % of either box's surface is 2 voxels of 1.5 mm away.
    assert initial.hd95_mm == pytest.approx({1: 3.0, 2: 3.0})
    assert known.hd95_mm == {1: 0.0, 2: 0.0}
    # One grid, so that headers and extents say the same.
    assert resized.dice == initial.dice


def test_landmarks_of_a_known_shift(result):
    initial, _, known = result.rows
    assert known.tre_mm == pytest.approx((5 + 1 + 2) / 3, abs=1e-4)
    shift = SHIFT * make_grid().affine_mm[:3, 2]
    expected = np.linalg.norm(shift + MISSED_MM, axis=1).mean()
    assert initial.tre_mm == pytest.approx(expected, abs=1e-9)


def test_a_shift_neither_folds_nor_stretches(result):
    for row in result.rows:
        assert row.folding_percent == 0.0
        assert row.sdlogj == pytest.approx(0.0, abs=1e-4)


def test_a_shift_beyond_a_networks_box_has_no_spread(tmp_path):
    """0 for a shift, and always the same numbers as `register` gives."""
    grid = Grid((30, 34, 28), make_grid().affine_mm)
    array = np.random.default_rng(0).uniform(0, 1000, grid.shape).astype(np.float32)
    for name in ("fixed", "moving"):
        volumes.write_volume(tmp_path / f"{name}.nii.gz", Volume(array, grid))
    pair = PairSpec(tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz")
    box = network_grid.ResamplingRule("pad_crop", "spl", 2.0)
    options = dataclasses.replace(OPTIONS, shape=(8, 10, 9))
    scan = volumes.read_volume(pair.fixed)
    for wave in (0.0, 0.2):
        weights = loaded(Shifting(wave=wave), **box.to_dict())
        *_, row = run_lib.evaluate([pair], weights, options).rows
        found = pair_lib.register(scan, scan, weights, options)
        assert row.folding_percent == found.folding_percent
        assert row.sdlogj == found.sdlogj
        if wave:
            assert row.sdlogj > 0.1
        else:
            assert row.folding_percent == 0
            assert row.sdlogj < 1e-6


def test_seconds_are_those_of_registering(result):
    initial, resized, known = result.rows
    assert math.isnan(initial.seconds)
    assert math.isnan(resized.seconds)
    assert known.seconds > 0
    assert [row.first for row in result.rows] == [False, False, True]


def test_measures_are_on_the_fixed_grid_whatever_the_network_s(spec):
    pair = dataclasses.replace(spec, fixed_landmarks=None, moving_landmarks=None)
    options = dataclasses.replace(OPTIONS, shape=(8, 8, 8))
    # 0.28 voxels of the scan: nearest neighbour leaves every label where it was.
    found = run_lib.evaluate([pair], loaded(Shifting(0.25)), options).rows[-1]
    assert found.dice == {1: 0.5, 2: 0.0}
    assert math.isnan(found.tre_mm)


def test_initial_rows_by_headers_and_by_extents(tmp_path, folder):
    """The same array at another place, size and storage order."""
    grid = make_grid(stretch=1.5, origin=(40.0, 0.0, 0.0), turn=0.3)
    flip = np.diag([1.0, -1.0, 1.0, 1.0])
    flip[1, 3] = SHAPE[1] - 1
    stored = Grid(SHAPE, grid.affine_mm @ flip)
    write_scan(tmp_path / "far.nii.gz", label_map()[:, ::-1].copy(), stored)
    pair = PairSpec(
        fixed=folder / "fixed.nii.gz",
        moving=tmp_path / "far.nii.gz",
        fixed_label=folder / "fixed_label.nii.gz",
        moving_label=tmp_path / "far_label.nii.gz",
    )
    others = {"nothing": lambda moving, fixed: Transform(())}
    found = run_lib.evaluate([pair], None, OPTIONS, others=others)
    headers, extents, nothing = found.rows
    assert headers.dice == {1: 0.0, 2: 0.0}
    assert extents.dice == {1: 1.0, 2: 1.0}
    assert nothing.dice == headers.dice
    assert math.isnan(headers.hd95_mm[1])  # warping lost it
    as_stored = dataclasses.replace(OPTIONS, stored_orientation=True)
    kept = run_lib.evaluate([pair], None, as_stored, others=others).rows[1]
    assert kept.dice[2] == 0.0


def scaled(moving: Volume, fixed: Volume) -> Transform:
    """Another tool: twice as large around the origin, and mirrored along x."""
    return Transform((Affine(np.diag([-2.0, 1.0, 1.0, 1.0])),))


def test_other_tools_are_measured_alike(spec):
    rows = run_lib.evaluate([spec], None, OPTIONS, others={"tool": scaled}).rows
    tool = rows[-1]
    assert tool.method == "tool"
    assert not tool.first
    assert 0 <= tool.seconds < 10
    assert tool.folding_percent == 100.0
    here = cases.read_landmarks(spec.fixed_landmarks)
    there = cases.read_landmarks(spec.moving_landmarks)
    expected = np.linalg.norm(here * [-2, 1, 1] - there, axis=1).mean()
    assert tool.tre_mm == pytest.approx(expected)


def test_labels_that_are_given_or_found(tmp_path, spec, folder):
    lone = label_map(SHIFT)
    lone[0, 0, 0] = 4  # moving alone has it, and the shift leaves it behind
    volumes.write_volume(tmp_path / "lone.nii.gz", Volume(lone, make_grid()))
    pair = dataclasses.replace(spec, moving_label=tmp_path / "lone.nii.gz")
    model = loaded(Shifting())
    found = run_lib.evaluate([pair], model, OPTIONS).rows[-1]
    assert found.dice == {1: 1.0, 2: 1.0, 4: 0.0}
    assert math.isnan(found.hd95_mm[4])
    assert found.mean_dice == pytest.approx(2 / 3)
    given = run_lib.evaluate([pair], model, OPTIONS, labels=(2, 9)).rows[-1]
    assert list(given.dice) == [2, 9]
    assert math.isnan(given.dice[9])
    assert given.mean_dice == 1.0
    # Rows of one task have the same labels, so that a table has no holes.
    both = run_lib.evaluate(
        [dataclasses.replace(spec, fixed=spec.moving, fixed_label=spec.moving_label),
         pair], model, OPTIONS,
    )  # fmt: skip
    assert all(list(row.dice) == [1, 2, 4] for row in both.rows)
    assert [row.first for row in both.select(method="known")] == [True, False]


def test_progress_hears_of_every_row(spec):
    heard = []
    other = dataclasses.replace(spec, fixed=spec.moving)
    found = run_lib.evaluate(
        [spec, other], loaded(Shifting()), OPTIONS, name="mine",
        progress=lambda done, total, row: heard.append((done, total, row.method)),
    )  # fmt: skip
    methods = ["initial", "initial, resized", "mine"]
    assert heard == [(i + 1, 6, m) for i, m in enumerate(methods * 2)]
    assert found.methods == tuple(methods)
    assert [r.pair for r in found.rows[:2]] == ["moving to fixed", "moving to moving"]


def test_a_second_pair_of_the_same_sizes_compiles_nothing(spec):
    compiled = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    counts = []
    pairs = [spec, dataclasses.replace(spec, fixed=spec.moving)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run_lib.evaluate(
            pairs, loaded(Shifting(1.25)), OPTIONS,
            progress=lambda *_: counts.append(len(compiled)),
        )  # fmt: skip
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts[2] > 0
    assert counts[-1] == counts[2]


def test_transform_and_warped_scan_are_written(tmp_path, spec):
    pair = dataclasses.replace(
        spec, transform_out=tmp_path / "t.h5", warped_out=tmp_path / "w.nii.gz"
    )
    run_lib.evaluate([pair], loaded(Shifting()), OPTIONS)
    mapping = transforms.read_transform(tmp_path / "t.h5")
    place = make_grid().affine_mm[:3, 3] + make_grid().affine_mm[:3, 1]
    moved = np.asarray(mapping.map_points(place[None, None]))[0, 0]
    expected = place + SHIFT * make_grid().affine_mm[:3, 2]
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    warped = volumes.read_volume(tmp_path / "w.nii.gz").array
    moving = volumes.read_volume(spec.moving).array
    np.testing.assert_allclose(warped[..., :-SHIFT], moving[..., SHIFT:], atol=0.1)


@pytest.mark.parametrize("suffix", [".h5", ".nii.gz"])
def test_the_warped_scan_is_the_one_that_warp_gives(tmp_path, spec, suffix):
    """Of a CT that is stored from -1024 on, with waves in the map."""
    stored = volumes.read_volume(spec.moving, kind="stored")
    top = float(stored.array.max())
    hounsfield = np.rint(stored.array / top * 1500 - 1024).astype(np.int16)
    hounsfield[:2] = -1024
    hounsfield[:, :2] = -1024
    ct = Volume(hounsfield, stored.grid)
    volumes.write_volume(tmp_path / "ct.nii.gz", ct)
    pair = dataclasses.replace(
        spec, moving=tmp_path / "ct.nii.gz", moving_modality="ct",
        transform_out=tmp_path / f"t{suffix}", warped_out=tmp_path / "w.nii.gz",
    )  # fmt: skip
    run_lib.evaluate([pair], loaded(Shifting(wave=0.02)), OPTIONS)
    line = f"""warp --fixed {spec.fixed} --moving {pair.moving} --linear
        --transform {pair.transform_out} --warped-moving-out {tmp_path}/again.nii.gz"""
    assert main.main(line.split()) == 0
    once, again = (
        volumes.read_volume(tmp_path / name, kind="stored").array
        for name in ("w.nii.gz", "again.nii.gz")
    )
    np.testing.assert_array_equal(again, once)
    assert np.all(once[..., -1] == -1024)


# --- what is passed on to the registration -------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Answers every registration with the identity and notes what was asked."""
    calls = []

    def stand_in(moving, fixed, model, options, *, regions=None, sam=None, start=None):
        calls.append((model, options, regions))
        return type("Found", (), {
            "transform": Transform(()),
            "seconds": {"preprocess": 1.0, "register": 2.0, "score": 50.0},
        })()  # fmt: skip

    monkeypatch.setattr(pair_lib, "register", stand_in)
    return calls


def test_with_optimisation_there_is_a_row_more(asked, spec):
    options = options_lib.Options(shape=SHAPE, io_iterations=5, io_lr=0.1)
    model = loaded(Shifting(), name="runs/best")
    found = run_lib.evaluate([spec], model, options, with_optimisation=True)
    assert found.methods == ("initial", "initial, resized", "best", "best + IO")
    assert [o.io_iterations for _, o, _ in asked] == [None, 5]
    assert not any(o.inverse for _, o, _ in asked)
    assert [r.seconds for r in found.rows[2:]] == [3.0, 3.0]
    asked.clear()
    run_lib.evaluate([spec], model, options)
    assert [o.io_iterations for _, o, _ in asked] == [None]


def test_displacement_optimisation_needs_no_model(asked, spec):
    options = options_lib.Options(
        shape=SHAPE, io_iterations=5, io_target="displacement",
        fixed_modality="ct", moving_modality="ct", intensity_conservation_loss=True,
    )  # fmt: skip
    found = run_lib.evaluate([spec], None, options)
    assert found.methods[2:] == ("displacement",)
    assert asked[0][0] is None
    asked.clear()
    found = run_lib.evaluate(
        [spec], loaded(Shifting()), options, with_optimisation=True
    )
    assert found.methods[2:] == ("known", "displacement")
    (_, predicted, _), (_, optimised, _) = asked
    assert predicted.io_target == "network"
    assert not predicted.intensity_conservation_loss
    assert optimised.intensity_conservation_loss


def test_pre_alignment_has_a_row_of_its_own(asked, spec):
    """Translated boxes, but not what is behind them: some of the way is found."""
    options = dataclasses.replace(OPTIONS, prealign="centre")
    found = run_lib.evaluate([spec], loaded(Shifting()), options)
    assert found.methods[2:] == ("pre-aligned, centre", "known")
    row = found.rows[2]
    assert row.mean_dice > found.rows[0].mean_dice + 0.2
    assert row.seconds > 0
    assert asked[0][1].prealign == "centre"


def test_a_pre_alignment_is_looked_for_once_for_all_rows(asked, spec, monkeypatch):
    found, original = [], pair_lib.prealigned

    def search(*scans, **more):
        found.append(scans)
        return original(*scans, **more)

    monkeypatch.setattr(pair_lib, "prealigned", search)
    options = dataclasses.replace(OPTIONS, prealign="centre", io_iterations=2)
    pairs = [spec, dataclasses.replace(spec, fixed=spec.moving, task="other")]
    result = run_lib.evaluate(
        pairs, loaded(Shifting()), options, with_optimisation=True
    )
    assert len(asked) == 4 and len(found) == 2
    assert all(r.seconds > 3.0 for r in result.rows if r.method.startswith("known"))


def test_a_pre_alignment_alone(spec, tmp_path):
    pair = dataclasses.replace(spec, transform_out=tmp_path / "t.tfm")
    options = dataclasses.replace(OPTIONS, prealign="centre")
    found = run_lib.evaluate([pair], None, options)
    assert found.methods == ("initial", "initial, resized", "pre-aligned, centre")
    written = transforms.read_transform(tmp_path / "t.tfm")
    moved = np.asarray(written.map_points(np.zeros((1, 1, 3))))[0, 0]
    # Towards the boxes, two voxels along axis 2.
    assert moved @ make_grid().affine_mm[:3, 2] > 0
    optimised = dataclasses.replace(options, io_iterations=3)
    with pytest.raises(UserError, match="no network to optimise"):
        run_lib.evaluate([pair], None, optimised, with_optimisation=True)


def test_modalities_and_masks_of_a_pair(asked, spec, folder):
    pair = dataclasses.replace(
        spec, fixed_modality="ct", fixed_mask=folder / "mask.nii.gz"
    )
    with pytest.warns(UserWarning, match="masks have no effect"):
        run_lib.evaluate([pair], loaded(Shifting()), OPTIONS)
    options = dataclasses.replace(OPTIONS, input_masking=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_lib.evaluate([pair], loaded(Shifting()), options)
    (_, first, bare), (_, _, masked) = asked
    assert (first.fixed_modality, first.moving_modality) == ("ct", "auto")
    assert bare.fixed_mask is None
    assert masked.fixed_mask.source == str(folder / "mask.nii.gz")
    assert masked.moving_mask is None


def wrong(spec, tmp_path):
    """Yields (what the message says, pairs, the other arguments)."""
    other = make_grid(origin=(0.0, 0.0, 0.0))
    volumes.write_volume(tmp_path / "off.nii.gz", Volume(label_map(), other))
    (tmp_path / "two.csv").write_text("1,2,3\n4,5,6\n")
    (tmp_path / "far.csv").write_text("1,2,3000\n4,5,6000\n")
    model, out = loaded(Shifting()), tmp_path / "out.h5"

    def pair(**fields):
        return dataclasses.replace(spec, **fields)

    def options(**fields):
        return dataclasses.replace(OPTIONS, **fields)

    known = {"model": model, "options": OPTIONS}
    for message, *pairs in (
        ("no pairs",),
        ("pair moving to fixed: fixed_label .*off.nii.gz lies on another grid",
         spec, pair(fixed_label=tmp_path / "off.nii.gz", task="b")),
        ("has 3 landmarks, .*two.csv 2", pair(moving_landmarks=tmp_path / "two.csv")),
        ("one file of landmarks", pair(moving_landmarks=None)),
        ("2 of 2 points of .*far.csv lie outside .*fixed.nii.gz, read as lps; no other",
         pair(fixed_landmarks=tmp_path / "far.csv",
              moving_landmarks=tmp_path / "far.csv")),
        ("one label map", pair(moving_label=None)),
        ("listed twice", spec, spec),
        ("out.h5 is an output twice",
         pair(transform_out=out), pair(transform_out=out, task="b")),
        ("cannot hold a displacement", pair(transform_out=tmp_path / "out.mat")),
        ("folder that does not exist", pair(warped_out=tmp_path / "no" / "w.nii")),
        ("does not exist", pair(moving=tmp_path / "a.nii")),
    ):  # fmt: skip
        yield message, pairs, known
    for message, changes in (
        ("nothing to evaluate", {"model": None}),
        ("optimise what it measures",
         {"options": options(io_iterations=3, dice_loss_weight=1.0)}),
        ("number of steps", {"with_optimisation": True}),
        ("two rows would be called initial", {"name": "initial"}),
        ("needs both `fixed_mask`", {"options": options(loss_function_masking=True)}),
    ):  # fmt: skip
        yield message, [spec], known | changes


def test_mistakes_are_found_before_the_first_registration(asked, spec, tmp_path):
    for message, pairs, arguments in wrong(spec, tmp_path):
        with pytest.raises(UserError, match=message):
            run_lib.evaluate(pairs, **arguments)
    assert asked == []


def test_what_fails_on_one_pair_is_missing_there_alone(spec):
    def fail_on_fixed(moving, fixed):
        if fixed.source == str(spec.fixed):
            raise UserError("the tool is tired")
        return Transform(())

    other = dataclasses.replace(spec, fixed=spec.moving, fixed_label=spec.moving_label)
    with pytest.warns(UserWarning, match="pair moving to fixed: tool failed: the tool"):
        found = run_lib.evaluate(
            [spec, other], loaded(Shifting()), OPTIONS, others={"tool": fail_on_fixed}
        )
    assert [row.failed for row in found.select(method="tool")] == [True, False]
    assert not any(row.failed for row in found.rows if row.method != "tool")
    assert found.failed == found.select(method="tool")[:1]
    assert list(found.failed[0].dice) == [1, 2]
    assert "Pairs that failed and are in no mean: tool 1." in table_lib.markdown(found)


def test_scans_label_maps_and_masks_may_be_dicom_folders(tmp_path, dicom_series):
    for name, shift in (("11", 0), ("12", SHIFT)):
        labels = label_map(shift).astype(np.int16)
        brightness = 100 * labels + np.arange(labels.size).reshape(SHAPE) % 7
        dicom_series(tmp_path / f"1.2.{name}", brightness.astype(np.int16), 0)
        dicom_series(tmp_path / f"label{name}", labels, 0)
    (tmp_path / "pairs.csv").write_text(
        "fixed,moving,fixed_label,moving_label,fixed_mask,moving_mask\n"
        "1.2.11,1.2.12,label11,label12,label11,label12\n"
        "1.2.12,1.2.11,label12,label11,,\n"
    )
    pairs = pair_list.read_pairs(tmp_path / "pairs.csv")
    options = dataclasses.replace(OPTIONS, input_masking=True)
    found = run_lib.evaluate(pairs[:1], loaded(Shifting()), options).rows[-1]
    assert found.dice == {1: 1.0, 2: 1.0}
    assert pair_list.pair_names(pairs) == ("1.2.12 to 1.2.11", "1.2.11 to 1.2.12")


def test_a_pair_that_cannot_be_read_fails_in_every_way(spec, tmp_path, folder):
    """The header is sound, the voxels are cut off."""
    path = tmp_path / "cut.nii"
    volumes.write_volume(path, volumes.read_volume(folder / "moving.nii.gz"))
    path.write_bytes(path.read_bytes()[:-200])
    cut = dataclasses.replace(spec, moving=path)
    with pytest.warns(UserWarning, match="pair cut to fixed is left out: .*cut.nii"):
        found = run_lib.evaluate([cut, spec], loaded(Shifting()), OPTIONS)
    assert {row.pair for row in found.failed} == {"cut to fixed"}
    assert len(found.failed) == 3
    # The first pair that was registered has the seconds of compilation.
    assert [row.first for row in found.select(method="known")] == [False, True]


def test_negative_labels_are_no_background(spec, tmp_path):
    """Of a set with -1 where nothing is labelled, or of 255 stored as int8."""
    labels = label_map().astype(np.int8)
    labels[0] = -1
    volumes.write_volume(tmp_path / "minus.nii.gz", Volume(labels, make_grid()))
    pair = dataclasses.replace(spec, fixed_label=tmp_path / "minus.nii.gz")
    said = r"left out: label map .*minus.nii.gz has negative labels \(down to -1\)"
    with pytest.warns(UserWarning, match=said):
        found = run_lib.evaluate([pair], loaded(Shifting()), OPTIONS)
    assert all(row.failed for row in found.rows)


# --- lists of pairs ------------------------------------------------------------------


def test_read_pairs_of_csv(tmp_path, folder):
    listing = folder / "pairs.csv"
    listing.write_text(
        "moving,fixed,fixed_modality,moving_modality,task,fixed_label,moving_label,"
        "transform_out\n"
        " moving.nii.gz ,fixed.nii.gz,CT,t2,lungs,fixed_label.nii.gz,"
        "moving_label.nii.gz,t.h5\n"
        "\n"
        f"{folder}/fixed.nii.gz,moving.nii.gz,,,,,,\n",
        encoding="utf-8-sig",
    )
    first, second = pair_list.read_pairs(listing)
    assert first == PairSpec(
        fixed=folder / "fixed.nii.gz",
        moving=folder / "moving.nii.gz",
        fixed_label=folder / "fixed_label.nii.gz",
        moving_label=folder / "moving_label.nii.gz",
        fixed_modality="ct",
        moving_modality="t2",
        task="lungs",
        transform_out=folder / "t.h5",
    )
    assert second == PairSpec(folder / "moving.nii.gz", folder / "fixed.nii.gz")


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"pairs": rows}])
def test_read_pairs_of_json(folder, wrap):
    listing = folder / "pairs.json"
    rows = [{"fixed": "fixed.nii.gz", "moving": "moving.nii.gz", "task": "lungs",
             "pairing": "intra", "fixed_mask": None}]  # fmt: skip
    listing.write_text(json.dumps(wrap(rows)))
    (pair,) = pair_list.read_pairs(listing)
    assert (pair.task, pair.pairing, pair.fixed_mask) == ("lungs", "intra", None)
    assert pair.moving == folder / "moving.nii.gz"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "fixed,moving\n", "extension .txt, expected .csv or .json"),
        ("p.csv", "fixed,moving\n", "lists no pairs"),
        ("p.csv", "fixed,movin\na,b\n", '"movin", which is unknown .did you mean mov'),
        ("p.csv", "fixed,task\na,b\n", 'lacks "moving"'),
        ("p.csv", "fixed,moving,fixed\na,b,c\n", '"fixed" twice'),
        ("p.csv", "fixed,moving\nfixed.nii.gz\n", "row 2 has 1 cells, the header 2"),
        ("p.csv", "fixed,moving\nfixed.nii.gz, \n", "row 2 names no moving scan"),
        ("p.csv", "fixed,moving\n\nfixed.nii.gz,gone.nii\n",
         "row 3: moving .*gone.nii does not exist"),
        ("p.csv", f"fixed,moving\nfixed.nii.gz,{'a' * 300}.nii\n",
         "row 2: moving .*a.nii does not exist"),
        ("p.csv", "fixed,moving,fixed_label\nfixed.nii.gz,moving.nii.gz,fixed.nii.gz\n",
         "row 2 has fixed_label alone"),
        ("p.csv", "fixed,moving,pairing\nfixed.nii.gz,moving.nii.gz,both\n",
         "row 2: pairing is both"),
        ("p.csv", "fixed,moving\nfixed.nii.gz,moving.nii.gz\nfixed.nii.gz,"
         "moving.nii.gz\n", "row 3 repeats the pair of .*row 2"),
        ("p.json", "[", "no JSON text"),
        ("p.json", '{"rows": []}', "no list of pairs"),
        ("p.json", "[3]", "pair 1 is 3"),
        ("p.json", '[{"fixed": "a", "moving": 3}]', "pair 1: moving is 3"),
        ("p.json", '[{"fixed": "a", "moving": "b", "tsk": "c"}]', "did you mean task"),
        ("p.json", '[{"fixed": "a"}]', 'pair 1 lacks "moving"'),
    ],
)  # fmt: skip
def test_read_pairs_refuses(folder, name, text, message):
    listing = folder / name
    listing.write_text(text)
    with pytest.raises(UserError, match=message):
        pair_list.read_pairs(listing)


def record(name, **fields) -> records_lib.Record:
    return records_lib.Record(
        image=pathlib.Path(f"{name}.nii"),
        dataset=fields.pop("dataset", "d"),
        subject=fields.pop("subject", name),
        split=fields.pop("split", "val"),
        **fields,
    )


def test_pairs_of_a_manifest():
    def of(records, **options):
        manifest = records_lib.Manifest(tuple(records), "m.csv")
        return pairs_lib.pairs_of_manifest(manifest, **options)

    scans = [
        record("c", label=pathlib.Path("c_label.nii"), mask=pathlib.Path("c_mask.nii")),
        record("a", label=pathlib.Path("a_label.nii"), modality="T2"),
        record("b", modality="CT", region="head"),
        record("t", split="train"),
    ]
    scans[1:3] = [dataclasses.replace(s, modality="mri", region="") for s in scans[1:3]]
    pairs = of(scans)
    assert [(p.fixed.stem, p.moving.stem) for p in pairs] == [
        ("a", "b"), ("a", "c"), ("b", "c"), ("b", "a"), ("c", "a"), ("c", "b"),
    ]  # fmt: skip
    with_labels = [(p.fixed.stem, p.moving.stem) for p in pairs if p.fixed_label]
    assert with_labels == [("a", "c"), ("c", "a")]
    assert pairs[4].fixed_mask == pathlib.Path("c_mask.nii")
    assert pairs[4].moving_mask is None
    assert {(p.task, p.pairing) for p in pairs} == {("d", "inter")}
    assert len(of(scans, neighbours=1)) == 3
    within = [
        record(f"s{n}{v}", subject=f"s{n}", pairing="intra", modality="ct", session=v)
        for n in (1, 2)
        for v in "xy"
    ]
    pairs = of(within)
    assert [(p.fixed.stem, p.moving.stem) for p in pairs] == [
        ("s1x", "s1y"), ("s1y", "s1x"), ("s2x", "s2y"), ("s2y", "s2x"),
    ]  # fmt: skip
    assert {(p.fixed_modality, p.moving_modality) for p in pairs} == {("ct", "ct")}
    several = [record("a", modality="ct"), record("b", modality="t1")]
    pairs = of(several, across_modalities=True)
    assert [(p.fixed_modality, p.moving_modality) for p in pairs] == [
        ("ct", "t1"), ("t1", "ct"),
    ]  # fmt: skip
    with pytest.raises(UserError, match='m.csv has 1 scans of the split "train"'):
        of(scans, split="train")


def test_pair_names_do_not_depend_on_the_place():
    def names(root, *scans):
        return pair_list.pair_names(
            [PairSpec(pathlib.Path(root, f), pathlib.Path(root, m)) for f, m in scans]
        )

    assert names("/x", ("i/a.nii.gz", "i/b.nrrd")) == ("b to a",)
    for root in ("/x", "/y/z"):
        assert names(root, ("s1/t1.nii", "s2/t1.nii"), ("s2/t1.nii", "s3/t2.nii")) == (
            "s2/t1 to s1/t1",
            "s3/t2 to s2/t1",
        )


# --- landmarks -----------------------------------------------------------------------


def test_landmarks_of_every_frame(tmp_path, spec):
    """nibabel's affine says where voxel i, j, k is, in RAS mm."""
    ijk = np.array([[0.0, 1.0, 2.0], [3.5, 4.0, 1.0]])
    ras = apply_affine(nib.load(spec.fixed).affine, ijk)
    for frame, numbers in (("voxel", ijk), ("ras", ras), ("lps", ras * [-1, -1, 1])):
        path = tmp_path / f"{frame}.csv"
        np.savetxt(path, numbers, delimiter=",", fmt="%.17g")
        grid = volumes.read_grid(spec.fixed)
        found = cases.read_landmarks(path, frame=frame, grid=grid)
        np.testing.assert_allclose(found, ras, atol=1e-5)
    with pytest.raises(ValueError, match="needs the scan's grid"):
        cases.read_landmarks(tmp_path / "voxel.csv", frame="voxel")


def test_landmarks_by_column_name(tmp_path):
    path = tmp_path / "points.csv"
    # As a spreadsheet saves it.
    path.write_text("X,name,Z,Y\n1,left,3,2\n\n", encoding="utf-8-sig")
    np.testing.assert_array_equal(
        cases.read_landmarks(path, frame="ras"), [[1.0, 2.0, 3.0]]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,t\n1,2,3\n", "columns x, y, t, expected x, y and z"),
        ("x,y,z\n1,2,3\n1,b,3\n", "row 3: 1, b, 3 are not three finite numbers"),
        ("1,2,inf\n", "row 1"),
        ("1,2\n", "row 1"),
        ("x,y,z\n", "holds no points"),
    ],
)
def test_landmarks_refused(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        cases.read_landmarks(path)


# --- the verb ------------------------------------------------------------------------


def test_evaluate_files_writes_rows_and_tables(asked, tmp_path, spec):
    out = tmp_path / "result.csv"
    found = run_lib.evaluate_files(
        [spec], loaded(Shifting()), OPTIONS, out=out, name="mine",
        label_names={"boxes": {1: "large"}},
    )  # fmt: skip
    assert table_lib.read_csv(out) == found
    text = (tmp_path / "result.md").read_text(encoding="utf-8")
    assert "### boxes (1 pair)" in text
    assert "| large % |" in text
    assert table_lib.read_csv(out).methods == ("initial", "initial, resized", "mine")
    with pytest.raises(UserError, match="extension .txt, expected .csv"):
        run_lib.evaluate_files([spec], None, OPTIONS, out=tmp_path / "result.txt")
    with pytest.raises(UserError, match="does not exist"):
        run_lib.evaluate_files([spec], None, OPTIONS, out=tmp_path / "no" / "r.csv")


def test_an_interrupt_loses_the_pair_under_way_alone(tmp_path, spec):
    out = tmp_path / "result.csv"
    other = dataclasses.replace(spec, fixed=spec.moving, fixed_label=spec.moving_label)

    def interrupted(moving, fixed):
        if fixed.source == str(other.fixed):
            raise KeyboardInterrupt
        return Transform(())

    with pytest.raises(KeyboardInterrupt):
        run_lib.evaluate_files(
            [spec, other], None, OPTIONS, out=out, others={"tool": interrupted}
        )
    kept = table_lib.read_csv(out)
    assert {row.pair for row in kept.rows} == {"moving to fixed"}
    assert kept.methods == ("initial", "initial, resized", "tool")
    assert "### boxes (1 pair)" in (tmp_path / "result.md").read_text()


# --- what a network with heads for tasks is told --------------------------------------


def with_heads(
    names=("lungs", "liver"), regions=("chest", "belly"), pairings=("inter", "intra")
) -> zoo.LoadedModel:
    config = UniRegRpnConfig(
        channels=1,
        regions=len(regions),
        tasks=tuple((i, pairing) for i, pairing in enumerate(pairings)),
    )
    return loaded(config.build(), tasks=list(names), regions=list(regions))


@pytest.fixture
def told(monkeypatch):
    """Evaluates without registering; returns task and pairing of each registration."""
    asked = []

    def noting(moving, fixed, model, options, **rest):
        asked.append((options.task, options.pairing))
        raise UserError("enough")

    monkeypatch.setattr(pair_lib, "register", noting)

    def run(pairs, model, **options):
        asked.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*failed: enough")
            run_lib.evaluate(pairs, model, dataclasses.replace(OPTIONS, **options))
        return asked

    return run


def test_a_list_without_tasks_is_refused_before_the_first_registration(spec, told):
    pair = dataclasses.replace(spec, task=None)
    said = "pair moving to fixed: without a column task, `task` is auto, .* lungs, liv"
    with pytest.raises(UserError, match=said):
        told([pair], with_heads())
    assert told([pair], with_heads(), task="liver") == [("liver", None)]
    other = dataclasses.replace(spec, task="knee")
    with pytest.raises(UserError, match="the column task is knee, .* lungs, liver"):
        told([other], with_heads())
    other = dataclasses.replace(spec, task=None, region="knee")
    with pytest.raises(UserError, match="the column region is knee"):
        told([other], with_heads())


def test_a_network_of_one_task_needs_no_word(spec, told):
    pair = dataclasses.replace(spec, task=None)
    one = with_heads(("liver",), ("belly",), ("intra",))
    assert told([pair], one) == [("auto", None)]
    assert pair.table == "all"


def test_a_region_is_what_a_network_is_told(spec, told):
    pair = dataclasses.replace(spec, task="unheard of", region="belly")
    assert told([pair], with_heads()) == [("belly", None)]
    # Its own task says more: the pairing, the window and the smoothness.
    pair = dataclasses.replace(spec, task="liver", region="belly")
    assert told([pair], with_heads()) == [("liver", None)]


def test_a_pairing_that_training_did_not_have_is_warned_about(spec, told):
    pair = dataclasses.replace(spec, task="liver", pairing="inter")
    with pytest.warns(UserWarning, match="liver is told to known as belly, inter, wh"):
        told([pair], with_heads())
    with pytest.warns(UserWarning, match="liver is inter in the list, but `pairing`"):
        told([pair], with_heads(), pairing="intra")


def test_pairs_of_a_manifest_are_those_of_the_training(tmp_path):
    table = tmp_path / "m.csv"
    rows = [f"{s}{v}.nii,{s},{v},liver,val" for s in "ab" for v in "xy"]
    table.write_text("\n".join(["image,subject,session,dataset,split", *rows]))

    def of(model, **options):
        found = pairs_lib.pairs_of_manifest(
            read.read_manifest(table),
            model=model,
            options=dataclasses.replace(OPTIONS, **options),
            neighbours=1,
        )
        return {(p.fixed.stem, p.moving.stem) for p in found}, {
            p.pairing for p in found
        }

    within = {("ax", "ay"), ("ay", "ax"), ("bx", "by"), ("by", "bx")}
    between = {("ax", "bx"), ("bx", "ax"), ("ay", "by"), ("by", "ay")}
    assert of(with_heads()) == (within, {"intra"})
    assert of(with_heads(), pairing="inter") == (between, {"inter"})
    assert of(with_heads(("liver", "liver")), task="chest") == (between, {"inter"})
    # What is not sure stays open, and is refused by name later.
    assert of(with_heads(("liver", "liver"))) == (between, {None})
    assert of(None) == (between, {None})
    table.write_text(table.read_text().replace("\n", ",inter\n") + ",inter")
    table.write_text(table.read_text().replace("split,inter", "split,pairing"))
    assert of(with_heads()) == (between, {"inter"})


def test_the_message_about_missing_pairs_names_the_option(tmp_path):
    table = tmp_path / "m.csv"
    table.write_text("image,subject\na.nii,a\nb.nii,b\n")
    with pytest.raises(UserError, match="give `holdout` 5, `split` train"):
        pairs_lib.pairs_of_manifest(read.read_manifest(table))


def test_the_prealigned_row_sees_the_tasks_window(spec, monkeypatch):
    model = with_heads()
    rules = [{"ct_window": [-150, 250]}, {"ct_window": None}]
    stored = {**model.bundle.preprocessing, "task_rules": rules, "ct_window": [-9, 9]}
    bundle = dataclasses.replace(model.bundle, preprocessing=stored)
    model = dataclasses.replace(model, bundle=bundle)
    seen = []

    def noting(moving, fixed, model, options, *_):
        seen.append(options.ct_window)
        raise UserError("enough")

    monkeypatch.setattr(pair_lib, "_prealigned", noting)
    options = dataclasses.replace(OPTIONS, prealign="centre")
    pairs = [dataclasses.replace(spec, task=task) for task in ("lungs", "liver")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_lib.evaluate(pairs, model, options)
    # The row of its own, and within the registration.
    assert seen == [(-150, 250), (-150, 250), (-9, 9), (-9, 9)]
