"""From two volumes to a transform in mm, with models whose answer is known."""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.data import network_grid
from jaxreg.errors import UserError
from jaxreg.io import transforms
from jaxreg.models import sam
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.models.promptreg import PromptReg, PromptRegConfig
from jaxreg.models.sam import HU_RANGE, SamConfig, TrainedSam
from jaxreg.models.unireg.paper import UniReg, UniRegConfig
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import preparation, without_network
from jaxreg.registration import result as result_lib
from jaxreg.registration.optimization import displacement as displacement_lib
from jaxreg.registration.prealign import affine as affine_lib
from jaxreg.registration.prealign import select
from jaxreg.space import sampling, warping
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo

SHAPE = (20, 24, 22)
NETWORK_GRID = (12, 14, 13)


def make_grid(spacing=(1.5, 1.0, 1.2), origin=(-10.0, -12.0, -14.0), turn=0.0) -> Grid:
    c, s = np.cos(turn), np.sin(turn)
    affine = np.eye(4)
    affine[:3, :3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ np.eye(3)[:, ::-1]
    affine[:3, :3] *= np.asarray(spacing)
    affine[:3, 3] = origin
    return Grid(SHAPE, affine)


def blobs(grid: Grid, shift_mm=(0.0, 0.0, 0.0)) -> Volume:
    """Bright blobs at fixed places in world space, moved by `shift_mm`."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    place = index @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]
    array = np.zeros(grid.shape)
    for centre, width, height in (
        ((3.0, 2.0, 0.0), 6.0, 1.0), ((7.0, -4.0, 5.0), 3.0, 0.7),
        ((-2.0, 4.0, -6.0), 3.0, 0.6),
    ):  # fmt: skip
        distance = np.sum((place - centre - np.asarray(shift_mm)) ** 2, axis=-1)
        array += height * np.exp(-distance / (2 * width**2))
    return Volume((1000 * array).astype(np.float32), grid, "blobs.nii.gz")


@dataclasses.dataclass(frozen=True)
class Shifting(RegistrationModel):
    """A model that always answers with one shift, in unit coordinates."""

    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    bend: float = 0.0

    def init(self, key, shape):
        return {}

    def apply(self, variables, moving, fixed, *, train=False, batching=None):
        grid = sampling.identity(fixed.shape[1:4])
        # Asked for the way back, it sees the scans exchanged and answers the reverse.
        brightness = [a.sum((1, 2, 3, 4), keepdims=True) for a in (moving, fixed)]
        sign = jnp.where(brightness[0] > brightness[1], -1.0, 1.0)
        field = jnp.zeros_like(grid) + jnp.asarray(self.shift)
        field += self.bend * jnp.sin(jnp.pi * grid[..., ::-1])
        displacement = transform_lib.Displacement(sign * field)
        return Prediction(transform_lib.Transform((displacement,))), variables


def loaded(model, **preprocessing) -> zoo.LoadedModel:
    preprocessing = {"orientation": "any", **preprocessing}
    bundle = bundle_lib.Bundle({}, "known", {}, preprocessing, "a test", "none")
    return zoo.LoadedModel("known", model, {}, bundle)


MRI = options_lib.Options(fixed_modality="mri", moving_modality="mri")
OPTIONS = dataclasses.replace(MRI, shape=NETWORK_GRID, io_iterations=None)


def test_predicted_shift_in_mm():
    """A shift by s of the unit cube is s times the network grid's extent in mm."""
    fixed, moving = blobs(make_grid()), blobs(make_grid(turn=0.3))
    model = loaded(Shifting((0.1, 0.0, 0.0)))

    result = pair_lib.register(moving, fixed, model, OPTIONS)

    first = result.fixed_grid.affine_mm[:3, 3]
    got = result.transform.map_points(first[None, None])[0, 0]
    extent = (NETWORK_GRID[0] - 1) * result.moving_grid.spacing_mm[0]
    expected = result.moving_grid.affine_mm @ [
        0.1 * (NETWORK_GRID[0] - 1),
        0,
        0,
        1,
    ]
    np.testing.assert_allclose(got, expected[:3], atol=1e-4)
    assert extent == pytest.approx(20 * 1.5 * 11 / 12)


def test_identity_of_one_scan_is_perfect():
    scan = blobs(make_grid())
    result = pair_lib.register(scan, scan, loaded(Shifting()), OPTIONS)
    assert result.similarity_before == pytest.approx(result.similarity_after, abs=1e-4)
    assert result.folding_percent == 0.0
    assert result.history == {}
    assert result.inverse_residual_mm is not None
    assert result.inverse_residual_mm[1] < 1e-3
    displacement = warping.displacement_mm(result.transform, scan.grid)
    np.testing.assert_allclose(displacement, 0.0, atol=1e-3)
    np.testing.assert_allclose(result.fixed_image, result.warped_after, atol=1e-4)
    assert set(result.seconds) == {"preprocess", "register", "score", "inverse"}


def test_inverse_undoes_the_transform():
    fixed = blobs(make_grid())
    moving = blobs(make_grid(spacing=(1.4, 1.1, 1.2)), (1.0, 0.0, 0.0))
    result = pair_lib.register(
        moving, fixed, loaded(Shifting((0.02, 0.01, 0.0), bend=0.05)), OPTIONS
    )
    assert result.inverse is not None
    assert result.inverse_residual_mm is not None
    # A shift moves border voxels outside the field, where only its edge is known.
    assert result.inverse_residual_mm[0] < 0.05
    points = np.array([[[3.0, 2.0, 0.0], [5.0, -1.0, 2.0], [-1.0, 1.0, 3.0]]])
    back = result.transform.map_points(result.inverse.map_points(points))
    np.testing.assert_allclose(back, points, atol=0.05)


def test_inverse_only_if_asked():
    scan = blobs(make_grid())
    options = dataclasses.replace(OPTIONS, inverse=False)
    result = pair_lib.register(scan, scan, loaded(Shifting()), options)
    assert result.inverse is None
    assert result.inverse_residual_mm is None
    assert "inverse" not in result.seconds
    assert not any("inverse" in name for name in result_lib.summary(result))


def test_summary_names_its_units():
    scan = blobs(make_grid())
    rows = result_lib.summary(
        pair_lib.register(scan, scan, loaded(Shifting()), OPTIONS)
    )
    assert rows["folded voxels"].endswith("%")
    assert "mm" in rows["inverse residual"]
    assert any(name.startswith("lncc loss") for name in rows)


def reorder(volume: Volume, axes, flips) -> Volume:
    """The same scan stored with permuted and reversed array axes."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3)[:, axes]
    for new, axis in enumerate(axes):
        if flips[new]:
            matrix[:3, new] *= -1
            matrix[axis, 3] = volume.array.shape[axis] - 1
    array = np.transpose(volume.array, axes)
    array = array[tuple(slice(None, None, -1 if f else None) for f in flips)]
    return Volume(array, Grid(array.shape, volume.grid.affine_mm @ matrix), "reordered")


ORDERS = [((0, 1, 2), (True, True, False)), ((2, 0, 1), (False, True, False))]


@pytest.mark.parametrize("stored", [False, True])
def test_stored_orientation_decides_what_the_network_sees(stored, monkeypatch):
    fixed = blobs(make_grid())
    moving = preparation.oriented_like(
        fixed, Grid(SHAPE, fixed.grid.affine_mm @ np.diag([-1.0, 1.0, 1.0, 1.0]))
    )
    assert not np.array_equal(moving.array, fixed.array)
    seen = {}

    def look(moving, fixed, options, regions, carried=None):
        seen["moving"] = moving
        raise UserError("seen")

    monkeypatch.setattr(preparation, "make_pair", look)
    options = options_lib.Options(shape=NETWORK_GRID, stored_orientation=stored)
    with pytest.raises(UserError, match="seen"):
        pair_lib.register(moving, fixed, loaded(Shifting()), options)
    expected = moving if stored else fixed
    np.testing.assert_array_equal(seen["moving"].array, expected.array)


# --- the orientation of the training --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaning(RegistrationModel):
    """A model whose answer depends on how the fixed scan lies in its array."""

    def apply(self, variables, moving, fixed, **_):
        shape = fixed.shape[1:4]
        grid = sampling.identity(shape)
        field = 0.05 * jnp.sin(3 * grid + jnp.asarray([0.1, 0.5, 0.9]))
        field = field * (1 + fixed)  # and on what it shows
        return Prediction(Transform((transform_lib.Displacement(field),))), variables


@pytest.mark.parametrize(
    ("orientation", "model"),
    [("RAS", "kji"), ("LPS", "ijk"), ("any", "kji"), (None, "kji")],
)
def test_a_network_sees_the_orientation_of_its_training(orientation, model):
    axes, flips = ORDERS[1]
    fixed, moving = blobs(make_grid(turn=0.2)), blobs(make_grid(), (2.0, 1.0, 0.0))
    said = {} if orientation is None else {"orientation": orientation}
    placement = network_grid.ResamplingRule(axes=model)
    weights = loaded(Leaning(), **{**placement.to_dict(), **said})
    if orientation is None:
        weights = dataclasses.replace(
            weights,
            bundle=dataclasses.replace(
                weights.bundle, preprocessing=placement.to_dict()
            ),
        )
    options = dataclasses.replace(OPTIONS, inverse=False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        results = [
            pair_lib.register(moving, scan, weights, options)
            for scan in (fixed, reorder(fixed, axes, flips))
        ]
    text = "does not say how the scans of its training were oriented"
    assert any(text in str(w.message) for w in heard) == (orientation is None)
    maps = [warping.displacement_mm(r.transform, fixed.grid) for r in results]
    if orientation in ("RAS", "LPS"):
        np.testing.assert_allclose(maps[1], maps[0], atol=1e-4)
        assert results[1].folding_percent == results[0].folding_percent
        np.testing.assert_allclose(results[1].sdlogj, results[0].sdlogj, rtol=1e-4)
    else:  # as it is stored
        assert np.abs(maps[1] - maps[0]).max() > 0.1


def test_stored_orientation_comes_before_that_of_the_training():
    scan = blobs(make_grid())
    turned = reorder(scan, (0, 1, 2), (True, True, False))
    as_stored = dataclasses.replace(OPTIONS, stored_orientation=True, inverse=False)
    weights = loaded(Leaning(), orientation="RAS")
    seen = [
        pair_lib.register(volume, volume, weights, options).fixed_image
        for volume, options in ((turned, as_stored), (turned, OPTIONS))
    ]
    np.testing.assert_allclose(seen[0], seen[1][::-1, ::-1], atol=1e-6)
    assert not np.allclose(seen[0], seen[1], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "flips"), ORDERS)
def test_without_weights_the_order_of_storage_decides_nothing(axes, flips):
    fixed, moving = blobs(make_grid(turn=0.2)), blobs(make_grid(), (2.0, 1.0, 0.0))
    options = dataclasses.replace(
        OPTIONS, io_target="displacement", io_iterations=4, io_sim="mse", inverse=False
    )
    maps = [
        warping.displacement_mm(
            pair_lib.register(moving, scan, None, options).transform, fixed.grid
        )
        for scan in (fixed, reorder(fixed, axes, flips))
    ]
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-4)


def test_a_pre_alignment_sees_what_the_network_sees(monkeypatch):
    """`prealigned`, of which evaluate keeps the result, turns scans as `register`."""
    scan = blobs(make_grid())
    turned = reorder(scan, (2, 0, 1), (False, True, False))
    seen = []

    def find(way, moving, fixed, **_):
        seen.append((moving.volume, fixed.volume))
        return select.Prealignment(np.eye(4))

    monkeypatch.setattr(select, "find", find)
    options = dataclasses.replace(OPTIONS, prealign="affine", inverse=False)
    weights = loaded(Leaning(), orientation="LPS")
    pair_lib.prealigned(turned, scan, weights, options)
    pair_lib.register(turned, scan, weights, options)
    for volumes in seen:
        for volume in volumes:
            assert network_grid.orientation_of(volume.grid) == "LPS"
    assert len(seen) == 2


# --- a scan that is larger than the network's box -------------------------------------

BOX = network_grid.ResamplingRule("pad_crop", "spl", 2.0)
BOX_SHAPE = (12, 14, 10)
BOXED = dataclasses.replace(OPTIONS, shape=BOX_SHAPE)


def large(shape=(34, 40, 36), spacing=(1.25, 1.5, 1.0), turn=0.0) -> Volume:
    """A scan of 42 x 60 x 36 mm; the box has 24 x 28 x 20."""
    grid = make_grid(spacing, (-22.0, -28.0, -16.0), turn)
    return blobs(Grid(shape, grid.affine_mm))


def itk_image(itk, volume: Volume):
    image = itk.GetImageFromArray(np.ascontiguousarray(volume.array))
    affine = np.diag([-1, -1, 1, 1]) @ volume.grid.affine_mm[:, [2, 1, 0, 3]]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image


@pytest.mark.parametrize("shape", [(34, 40, 36), (10, 40, 36), (9, 8, 14)])
def test_a_shift_is_a_shift_beyond_the_box(shape):
    scan = large(shape)
    model = loaded(Shifting((0.15, -0.1, 0.2)), **BOX.to_dict())
    result = pair_lib.register(scan, scan, model, BOXED)
    got = warping.displacement_mm(result.transform, scan.grid)
    expected = result.fixed_grid.unit_to_mm[:3, :3] @ [0.15, -0.1, 0.2]
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=1e-3)
    assert result.folding_percent == 0
    assert result.sdlogj < 1e-6
    assert result.inverse is not None
    back = warping.displacement_mm(result.inverse, scan.grid)
    np.testing.assert_allclose(back, np.broadcast_to(-expected, back.shape), atol=1e-3)


def test_what_is_written_maps_as_the_result_does_all_over_the_scan(tmp_path):
    """In memory, from both kinds of file, by our own and by ITK's resampling."""
    itk = pytest.importorskip("SimpleITK")
    fixed, moving = large(), large(turn=0.1)
    model = loaded(Shifting((0.05, -0.1, 0.08), bend=0.04), **BOX.to_dict())
    result = pair_lib.register(moving, fixed, model, BOXED)
    expected = warping.warp_volume(moving, result.transform, fixed.grid)
    voxels = np.indices(fixed.grid.shape).reshape(3, -1).T
    places = voxels @ fixed.grid.affine_mm[:3, :3].T + fixed.grid.affine_mm[:3, 3]
    mapped = result.transform.map_points(places[None])
    for name, tolerance_mm in (("a.h5", 1e-4), ("a.nii.gz", 1e-3)):
        path = tmp_path / name
        transforms.write_transform(path, result.transform, fixed.grid)
        read = transforms.read_transform(path)
        found = read.map_points(places[None])
        np.testing.assert_allclose(found, mapped, atol=tolerance_mm)
        warped = warping.warp_volume(moving, read, fixed.grid)
        # 1000 brightnesses over a few mm.
        np.testing.assert_allclose(warped.array, expected.array, atol=1.0)
    resampled = itk.Resample(
        itk_image(itk, moving),
        itk_image(itk, fixed),
        itk.ReadTransform(str(tmp_path / "a.h5")),
        itk.sitkLinear,
        0.0,
    )
    assert (expected.array > 0).mean() > 0.5
    np.testing.assert_allclose(
        itk.GetArrayFromImage(resampled), expected.array, atol=0.5
    )
    # And there and back, but for what leaves the moving scan.
    assert result.inverse is not None
    transforms.write_transform(tmp_path / "b.h5", result.inverse, moving.grid)
    inverse = transforms.read_transform(tmp_path / "b.h5")
    inside = ((voxels > 4) & (voxels < np.asarray(fixed.grid.shape) - 5)).all(1)
    again = inverse.map_points(mapped[:, inside])
    # Linear between voxels of 2 mm, with a kink at the box.
    np.testing.assert_allclose(again[0], places[inside], atol=0.1)


def test_the_map_does_not_tear_at_the_box():
    """Neighbouring voxels of a gentle field stay neighbours, whatever the box."""
    scan = large()
    model = loaded(Shifting((0.15, -0.1, 0.2), bend=0.04), **BOX.to_dict())
    result = pair_lib.register(scan, scan, model, BOXED)
    moved = warping.displacement_mm(result.transform, scan.grid)
    for axis in range(3):
        jump = np.linalg.norm(np.diff(moved, axis=axis), axis=-1).max()
        assert jump < 0.3 * scan.grid.spacing_mm[axis]
    determinant = warping.jacobian_map(result.transform, scan.grid)
    assert determinant.min() > 0.5


def test_a_prealigned_box_keeps_the_pre_alignment_beyond_it():
    fixed = large()
    world = np.eye(4)
    world[:3, :3] = make_grid(turn=0.2).affine_mm[:3, :3] / [1.5, 1.0, 1.2]
    world[:3, :3] = world[:3, :3][:, ::-1]
    world[:3, 3] = 3.0, -2.0, 1.0
    wider = fixed.grid.padded(np.full((3, 2), 8))
    moving = Volume(np.pad(fixed.array, 8), Grid(wider.shape, world @ wider.affine_mm))
    options = dataclasses.replace(BOXED, prealign="affine")
    model = loaded(Shifting((0.1, 0.05, -0.1)), **BOX.to_dict())
    start = select.Prealignment(world)
    result = pair_lib.register(moving, fixed, model, options, start=start)
    last = np.asarray(fixed.grid.shape) - 1
    corners = np.array(list(np.ndindex(2, 2, 2))) * last
    corners = corners @ fixed.grid.affine_mm[:3, :3].T + fixed.grid.affine_mm[:3, 3]
    # More background lowers the quantile: the moving scan is the brighter one.
    shift = -result.fixed_grid.unit_to_mm[:3, :3] @ [0.1, 0.05, -0.1]
    got = result.transform.map_points(corners[None])[0]
    expected = (corners + shift) @ world[:3, :3].T + world[:3, 3]
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert result.inverse is not None
    back = result.inverse.map_points(got[None])[0]
    np.testing.assert_allclose(back, corners, atol=1e-2)
    assert result.sdlogj < 1e-6


# --- the weights' own preprocessing ---------------------------------------------------


def seen_range(modality, model, **options) -> np.ndarray:
    """What the network sees of scans of -100 to about 900, by the order of storage."""
    scan = blobs(make_grid())
    scan = dataclasses.replace(scan, array=scan.array - 100)
    options = dataclasses.replace(
        OPTIONS, fixed_modality=modality, moving_modality=modality, **options
    )
    return pair_lib.register(scan, scan, model, options).fixed_image


@pytest.mark.parametrize(
    ("modality", "own", "option"),
    [
        ("ct", {"ct_window": [100.0, 300.0]}, {"ct_window": (100.0, 300.0)}),
        ("mri", {"mri_quantiles": [0.2, 0.6]}, {"quantile_range": (0.2, 0.6)}),
        ("mri", {"mri_foreground": True}, {"foreground": True}),
    ],
)
def test_the_weights_intensity_rule_holds_unless_an_option_says_other(
    modality, own, option
):
    usual = seen_range(modality, loaded(Shifting()))
    wanted = seen_range(modality, loaded(Shifting()), **option)
    assert not np.allclose(usual, wanted, atol=0.05)
    np.testing.assert_array_equal(
        seen_range(modality, loaded(Shifting(), **own)), wanted
    )
    other = {name: [0.0, 1.0] for name in own if name != "mri_foreground"}
    np.testing.assert_array_equal(
        seen_range(modality, loaded(Shifting(), **other), **option), wanted
    )


def test_published_weights_state_the_usual_rule():
    own = {"ct_window": [-1000.0, 1000.0], "mri_quantiles": [0.0, 0.99]}
    for modality in ("ct", "mri"):
        np.testing.assert_array_equal(
            seen_range(modality, loaded(Shifting(), **own)),
            seen_range(modality, loaded(Shifting())),
        )


def test_masks_that_training_had_are_asked_for():
    scan = blobs(make_grid())
    mask = Volume((scan.array > 100).astype(np.uint8), scan.grid, "mask")
    model = loaded(Shifting(), mask_inputs=True)
    with pytest.warns(UserWarning, match="known was trained on .* `input_masking`"):
        pair_lib.register(scan, scan, model, OPTIONS)
    masked = dataclasses.replace(OPTIONS, input_masking=True)
    regions = options_lib.Regions(fixed_mask=mask, moving_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair_lib.register(scan, scan, model, masked, regions=regions)


@pytest.mark.parametrize(("axes", "flips"), ORDERS)
def test_oriented_like_restores_the_order_without_moving_voxels(axes, flips):
    scan = blobs(make_grid(turn=0.2))
    again = preparation.oriented_like(reorder(scan, axes, flips), scan.grid)
    np.testing.assert_array_equal(again.array, scan.array)
    np.testing.assert_allclose(again.grid.affine_mm, scan.grid.affine_mm, atol=1e-9)


@pytest.mark.parametrize(("axes", "flips"), ORDERS)
def test_order_of_storage_does_not_change_the_result(axes, flips):
    fixed = blobs(make_grid())
    moving = blobs(make_grid(spacing=(1.4, 1.1, 1.2)), (1.0, 0.0, 0.0))
    mask = Volume((moving.array > 100).astype(np.uint8), moving.grid, "mask")
    model = loaded(Shifting((0.02, 0.01, 0.0)))
    options = dataclasses.replace(OPTIONS, input_masking=True)
    first, second = (
        pair_lib.register(
            change(moving), fixed, model, options,
            regions=options_lib.Regions(moving_mask=change(mask)),
        )
        for change in (lambda v: v, lambda v: reorder(v, axes, flips))
    )  # fmt: skip
    points = np.random.default_rng(0).normal(scale=4, size=(1, 10, 3))
    np.testing.assert_allclose(
        first.transform.map_points(points), second.transform.map_points(points),
        atol=1e-4,
    )  # fmt: skip
    assert first.similarity_after == pytest.approx(second.similarity_after)


def scans_of(fixed, moving):
    grids = fixed.grid.resized(NETWORK_GRID), moving.grid.resized(NETWORK_GRID)
    return without_network.Scans(moving, fixed, options_lib.Regions(), grids, None)


def test_starts_keep_lengths_and_meet_the_centres():
    fixed, moving = blobs(make_grid()), blobs(make_grid(turn=0.2), (4.0, 0.0, -3.0))
    scans = scans_of(fixed, moving)
    starts = without_network._starts(scans, *without_network._as_shown(scans, OPTIONS))
    assert list(starts) == ["headers", "centres of mass", "stretched extents"]
    np.testing.assert_array_equal(starts["headers"], np.eye(4))
    world = starts["centres of mass"]
    np.testing.assert_allclose(world[:3, :3], np.eye(3), atol=1e-9)
    np.testing.assert_allclose(world[:3, 3], [4.0, 0.0, -3.0], atol=1.5)
    corners = np.array([[0.0, 0, 0, 1], [1, 1, 1, 1]]).T
    np.testing.assert_allclose(
        starts["stretched extents"] @ fixed.grid.unit_to_mm @ corners,
        moving.grid.unit_to_mm @ corners,
        atol=1e-6,
    )
    wide = moving.grid.resized(tuple(2 * n for n in moving.grid.shape))
    wide = Grid(wide.shape, moving.grid.affine_mm)  # shows twice as much
    noise = np.random.default_rng(0).random(wide.shape, np.float32)
    scans = scans_of(fixed, Volume(noise, wide))
    starts = without_network._starts(scans, *without_network._as_shown(scans, OPTIONS))
    assert "stretched extents" not in starts


def test_dice_classes_are_those_of_both():
    scan = blobs(make_grid())
    labels = np.digitize(scan.array, [200, 500, 700])
    moving = Volume(labels.astype(np.int32), scan.grid, "m")
    fixed = Volume(np.where(labels == 3, 9, labels).astype(np.int32), scan.grid, "f")
    options = dataclasses.replace(MRI, shape=NETWORK_GRID, dice_loss_weight=1.0)
    regions = options_lib.Regions(fixed_segmentation=fixed, moving_segmentation=moving)
    pair = preparation.make_pair(scan, scan, options, regions)
    assert pair.moving_onehot is not None
    assert pair.moving_onehot.shape == (1, *NETWORK_GRID, 2)
    assert pair.valid is not None
    assert pair.valid.all()


def test_model_is_needed_for_the_network():
    scan = blobs(make_grid())
    options = dataclasses.replace(OPTIONS, io_target="network", io_iterations=2)
    with pytest.raises(UserError, match="displacement"):
        pair_lib.register(scan, scan, None, options)


def test_mask_elsewhere_is_refused():
    scan, other = blobs(make_grid()), blobs(make_grid(origin=(0.0, 0.0, 0.0)))
    options = dataclasses.replace(OPTIONS, input_masking=True)
    with pytest.raises(UserError, match="grid"):
        pair_lib.register(
            scan, scan, loaded(Shifting()), options,
            regions=options_lib.Regions(fixed_mask=other),
        )  # fmt: skip


def test_divergence_is_a_sentence():
    scan = blobs(make_grid())
    with pytest.raises(UserError, match="diverged"):
        pair_lib.register(scan, scan, loaded(Shifting((np.nan, 0, 0))), OPTIONS)


def test_folding_is_that_of_the_written_file_and_warned_about(tmp_path, capsys):
    """On the scan's grid, not the network's, as `jacobian` and SimpleITK have it."""
    sitk = pytest.importorskip("SimpleITK")
    from jaxreg.cli import main
    from jaxreg.io import volumes

    scan = blobs(make_grid(turn=0.1))
    with pytest.warns(UserWarning, match="folds: .* % of the fixed scan's voxels"):
        result = pair_lib.register(scan, scan, loaded(Shifting(bend=0.5)), OPTIONS)
    assert 1 < result.folding_percent < 99
    displacement = warping.displacement_mm(result.transform, scan.grid)
    spacing = scan.grid.spacing_mm
    # Along the array's axes in mm, and those reversed: x is the last.
    along = displacement @ (scan.grid.affine_mm[:3, :3] / spacing)
    image = sitk.GetImageFromArray(along.astype(np.float64)[..., ::-1], isVector=True)
    image.SetSpacing(spacing[::-1].tolist())
    found = sitk.DisplacementFieldJacobianDeterminant(image)
    determinant = sitk.GetArrayFromImage(found)[1:-1, 1:-1, 1:-1]
    own = warping.jacobian_map(result.transform, scan.grid)
    np.testing.assert_allclose(own[1:-1, 1:-1, 1:-1], determinant, atol=2e-3)
    assert result.folding_percent == pytest.approx(100 * (own < 0).mean())

    volumes.write_volume(tmp_path / "fixed.nii.gz", scan)
    transforms.write_transform(tmp_path / "t.h5", result.transform, scan.grid)
    files = ["--fixed", str(tmp_path / "fixed.nii.gz"), "--transform"]
    assert main.main(["jacobian", *files, str(tmp_path / "t.h5")]) == 0
    printed = capsys.readouterr().out.split("folded voxels")[1].split("%")[0]
    row = result_lib.summary(result)["folded voxels"]
    assert printed.strip() == row.removesuffix("%").strip()


def test_a_result_that_does_not_fold_is_not_warned_about():
    scan = blobs(make_grid())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair_lib.register(scan, scan, loaded(Shifting(bend=0.02)), OPTIONS)


@pytest.mark.slow
def test_displacement_finds_a_shift():
    """Scans that overlap by half in world space are brought together."""
    fixed = blobs(make_grid())
    shift = np.array([6.0, -5.0, 7.0])
    moving = blobs(make_grid(origin=np.array([-10.0, -12, -14]) + shift), shift)
    options = options_lib.Options(
        io_target="displacement", io_iterations=40, shape=NETWORK_GRID
    )
    seen = []

    result = pair_lib.register(
        moving, fixed, None, options,
        progress=lambda step, total, parts: seen.append((step, total)),
    )  # fmt: skip

    points = np.array([[[3.0, 2.0, 0.0], [7.0, -4.0, 5.0], [-2.0, 4.0, -6.0]]])
    np.testing.assert_allclose(
        result.transform.map_points(points), points + shift, atol=1.0
    )
    assert result.similarity_after < 0.5 * result.similarity_before
    assert seen
    assert seen[-1][0] == seen[-1][1]


def ball(grid, seed=0):
    """A textured ball about the origin, 25 mm in radius."""
    rng = np.random.default_rng(seed)
    centres, sizes = rng.uniform(-14, 14, (40, 3)), rng.uniform(2.5, 6, 40)
    heights = rng.uniform(30, 120, 40) * rng.choice([1, 1, -0.6], 40)
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    place = index @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]
    value = np.full(grid.shape, 200.0)
    for centre, size, height in zip(centres, sizes, heights, strict=True):
        distance = np.sum((place - centre) ** 2, axis=-1)
        value += height * np.exp(-distance / (2 * size**2))
    value /= 1 + np.exp(np.linalg.norm(place, axis=-1) - 24)
    return Volume(value.astype(np.float32), grid, "ball.nii.gz")


def cube_grid(n, spacing):
    affine = np.diag([spacing, spacing, spacing, 1.0])[:, [2, 1, 0, 3]]
    affine[:3, 3] = -spacing * (n - 1) / 2
    return Grid((n, n, n), affine)


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True], ids=["moving", "fixed"])
def test_displacement_of_one_thing_in_two_fields_of_view(turned):
    """Headers that agree are not left, whichever scan shows four times as much."""
    scans = ball(cube_grid(30, 2.0)), ball(cube_grid(48, 5.0))
    fixed, moving = scans[::-1] if turned else scans
    options = options_lib.Options(
        io_target="displacement", io_iterations=20, shape=(16, 16, 16), io_sim="ncc"
    )
    result = pair_lib.register(moving, fixed, None, options)
    assert result.started_from == "headers"
    points = np.concatenate([np.zeros((1, 3)), 8 * np.eye(3), -8 * np.eye(3)])[None]
    off = np.linalg.norm(result.transform.map_points(points) - points, axis=-1)
    assert off.mean() < 1.2  # 2.9 and 3.8 mm when extents were stretched
    assert "started from" in result_lib.summary(result)


@pytest.mark.parametrize(
    ("fixed", "moving", "possible"),
    [
        ("mri", "mri", ("lncc", "nmi")),
        ("mr", "t2", ("lncc", "nmi")),
        ("t1", "t1w", ("lncc",)),
        ("ct", "ct", ("lncc",)),
        ("ct", "mri", ("nmi",)),
        ("t1", "t2", ("nmi",)),
    ],
)
def test_similarity_follows_the_modalities(fixed, moving, possible):
    options = options_lib.Options(fixed_modality=fixed, moving_modality=moving)
    assert without_network._possible(options) == possible
    for chosen in ("lncc", "mind"):
        given = dataclasses.replace(options, io_sim=chosen)
        assert without_network._possible(given) == (chosen,)


def test_similarity_follows_the_images_where_modalities_do_not_say_it():
    options = options_lib.Options(fixed_modality="mri", moving_modality="mri")
    scan = ball(cube_grid(30, 2.0))
    tissue = scan.array > 100
    opposed = np.where(tissue, scan.array.max() + 100 - scan.array, scan.array)
    for moving, name in ((scan, "lncc"), (Volume(opposed, scan.grid), "nmi")):
        shown = without_network._as_shown(scans_of(scan, moving), options)
        level = affine_lib.judged(*shown)
        assert without_network._by_images(options, level, np.eye(4)) == name


def test_beyond_scans_that_end_apart_their_edges_go_on():
    scan = ball(cube_grid(30, 2.0))
    options = dataclasses.replace(
        OPTIONS, placement=network_grid.WITHOUT_WEIGHTS, io_sim="lncc"
    )
    pair = preparation.make_pair(scan, scan, options, options_lib.Regions())
    away = np.eye(4)
    for shift_mm, outside in ((6.0, "zeros"), (24.0, "edge")):
        away[0, 3] = shift_mm
        _, objective, _ = without_network._parts_that_meet(
            pair, options, scans_of(scan, scan), away
        )
        assert objective.outside == outside


def test_a_worse_result_gives_way_to_its_start():
    scan = ball(cube_grid(30, 2.0))
    scans = scans_of(scan, scan)
    level = affine_lib.judged(*without_network._as_shown(scans, OPTIONS))
    away = np.eye(4)
    away[:3, 3] = 0.2
    found = dataclasses.replace(displacement_lib.by_affine(away), start="headers")
    kept = without_network._not_worse(found, np.eye(4), scans, level, OPTIONS)
    (doubt,) = kept.doubts
    assert "less alike" in doubt and "so the headers stay" in doubt
    np.testing.assert_allclose(kept.forward.steps[0].matrix, np.eye(4), atol=1e-6)
    start = scans.grids[1].unit_to_mm @ away @ np.linalg.inv(scans.grids[0].unit_to_mm)
    home = displacement_lib.by_affine(np.eye(4))
    assert without_network._not_worse(home, start, scans, level, OPTIONS) is home


# --- other networks' views ------------------------------------------------------------


def test_weights_that_see_nifti_order_and_aligned_corners():
    """A shift by s along the network's first axis is along NIfTI's first, i."""
    scan = blobs(make_grid())
    stated = network_grid.ResamplingRule("aligned", "ijk").to_dict()
    model = loaded(Shifting((0.1, 0.0, 0.0)), **stated)
    result = pair_lib.register(scan, scan, model, OPTIONS)
    np.testing.assert_allclose(  # the corners of both grids coincide
        result.fixed_grid.affine_mm[:3, 3], scan.grid.affine_mm[:3, 3], atol=1e-9
    )
    moved = warping.displacement_mm(result.transform, scan.grid)
    # i is the last axis of our arrays; 0.1 of the way from its first to last centre.
    step = scan.grid.affine_mm[:3, 2]
    expected = 0.1 * (SHAPE[2] - 1) * step
    assert result.fixed_image.shape == NETWORK_GRID
    inner = moved[5:-5, 5:-5, 5:-5]
    np.testing.assert_allclose(inner - expected, 0.0, atol=1e-3)


@pytest.fixture(scope="module")
def prompted():
    """A small network with a bank, as trained on two named tasks."""
    config = PromptRegConfig(channels=2, tasks=2, temperature=0.1)
    model = PromptReg(config)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype("f4"),
        dict(model.init(jax.random.key(0), (16, 16, 16))),
    )
    bundle = bundle_lib.Bundle(
        variables, "promptreg", {}, {"tasks": ["brain", "hip"]}, "a test", "none"
    )
    return zoo.LoadedModel("small", model, variables, bundle)


WITH_PROMPTS = dataclasses.replace(OPTIONS, shape=(16, 24, 16), inverse=False)


def test_closest_domains_are_shares_of_the_bank(prompted):
    scans = blobs(make_grid()), blobs(make_grid(), (1.0, 0.0, 0.0))
    result = pair_lib.register(*scans, prompted, WITH_PROMPTS)
    assert set(result.domains) == {"brain", "hip"}
    assert sum(result.domains.values()) == pytest.approx(1.0, abs=1e-5)
    nearest = max(result.domains, key=result.domains.__getitem__)
    text = result_lib.summary(result)["closest domains"]
    assert text.startswith(f"{nearest} {100 * result.domains[nearest]:.0f} %")


def test_named_tasks_are_the_only_prompts(prompted):
    scan = blobs(make_grid())
    only = dataclasses.replace(WITH_PROMPTS, task="hip")
    result = pair_lib.register(scan, scan, prompted, only)
    assert result.domains == {"hip": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("liver", r"liver, which is not .*\(brain, hip\)"),
        ("0", "0, which is not"),
        ("hip,brain,hip", "names a domain twice"),
    ],
)
def test_unknown_tasks_are_refused(prompted, task, said):
    scan = blobs(make_grid())
    with pytest.raises(UserError, match=said):
        pair_lib.register(
            scan, scan, prompted, dataclasses.replace(WITH_PROMPTS, task=task)
        )


def test_tasks_are_for_banks():
    scan = blobs(make_grid())
    options = dataclasses.replace(OPTIONS, task="hip")
    with pytest.raises(UserError, match="known has neither a prompt bank nor heads"):
        pair_lib.register(scan, scan, loaded(Shifting()), options)


def test_a_grid_that_does_not_halve_three_times_is_refused(prompted):
    scan = blobs(make_grid())
    options = dataclasses.replace(WITH_PROMPTS, shape=(16, 20, 16))
    with pytest.raises(UserError, match="multiple of 8"):
        pair_lib.register(scan, scan, prompted, options)


# --- which Hounsfield units are compared ----------------------------------------------


def reading_units(**preprocessing) -> zoo.LoadedModel:
    """A fresh UniReg, whose field is near zero, as a checkpoint holds it."""
    config = UniRegConfig(features="none", head="flow")
    variables = UniReg(config).init(jax.random.key(0))
    bundle = bundle_lib.Bundle(
        jax.tree.map(np.asarray, variables), "unireg", {}, preprocessing, "", ""
    )
    return zoo.LoadedModel("units", UniReg(config), bundle.variables, bundle)


def scans_with_bone(seed=2):
    """The same soft tissue twice, with bright voxels in places of each scan's own."""
    rng = np.random.default_rng(seed)
    grid = Grid((16, 16, 16), np.eye(4))
    tissue = rng.uniform(-700, 100, grid.shape)
    found = []
    for row in (3, 11):
        hu = tissue.copy()
        hu[row, 4:12, 4:12] = rng.uniform(1000, 2500, (8, 8))
        found.append(Volume(hu.astype(np.float32), grid, f"scan {row}"))
    return found


def unlikeness(moving, fixed, window):
    """1 - NCC of what two scans on one grid are within a window."""
    cut = (
        np.clip(v.array, *window).astype(np.float64).ravel() for v in (moving, fixed)
    )
    return 1 - np.corrcoef(*cut)[0, 1]


BOTH_CT = options_lib.Options(
    fixed_modality="ct", moving_modality="ct", shape=(16, 16, 16), inverse=False,
    io_iterations=None, io_sim="ncc",
)  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "window"),
    [
        ({}, (-800.0, 400.0)),  # weights from before: what their network is shown
        ({"ct_window": list(HU_RANGE)}, (-800.0, 400.0)),
        ({"similarity_window": [-150, 250]}, (-150.0, 250.0)),
    ],
)
def test_scores_are_of_the_units_that_the_weights_compare(stated, window):
    moving, fixed = scans_with_bone()
    result = pair_lib.register(moving, fixed, reading_units(**stated), BOTH_CT)
    expected = unlikeness(moving, fixed, window)
    assert abs(expected - unlikeness(moving, fixed, HU_RANGE)) > 0.02
    for value in (result.similarity_before, result.similarity_after):
        np.testing.assert_allclose(value, expected, atol=1e-4)
    low, high = window
    shown = (np.clip(fixed.array, low, high) - low) / (high - low)
    np.testing.assert_allclose(result.fixed_image, shown, atol=1e-4)


@pytest.mark.parametrize("target", ["network", "map"])
def test_optimisation_minimises_what_is_scored(target):
    moving, fixed = scans_with_bone()
    options = dataclasses.replace(BOTH_CT, io_iterations=1, io_target=target)
    result = pair_lib.register(moving, fixed, reading_units(), options)
    expected = unlikeness(moving, fixed, (-800.0, 400.0))
    ways = 2 if target == "network" else 1  # forward and backward
    first = result.history["similarity"][0]
    np.testing.assert_allclose(first, ways * expected, atol=1e-3)


def test_prealignment_compares_the_same_units(monkeypatch):
    seen = []

    def find(way, moving, fixed, *, network=None):
        seen.extend(scan.rule.ct_window for scan in (moving, fixed))
        return pair_lib.select.Prealignment(np.eye(4))

    monkeypatch.setattr(pair_lib.select, "find", find)
    options = dataclasses.replace(BOTH_CT, prealign="affine")
    pair_lib.prealigned(*scans_with_bone(), reading_units(), options)
    pair_lib.prealigned(*scans_with_bone(), None, options)
    assert seen == [(-800.0, 400.0)] * 2 + [(-1000.0, 1000.0)] * 2


def test_a_sam_network_that_is_given_is_shown_the_units_that_it_knows():
    sizes = SamConfig((2, 2, 2, 2), 3)
    given = TrainedSam(
        sizes, dict(sam.init(sizes, jax.random.key(0))), ct_window=(-300.0, 500.0)
    )
    config = UniRegConfig(head="flow")
    bundle = bundle_lib.Bundle({}, "unireg", {}, {}, "", "")
    model = zoo.LoadedModel("bare", UniReg(config), {"params": {}}, bundle)
    found = preparation._with_sam(model, given)
    assert found.model == UniReg(dataclasses.replace(config, sam_window=(-300, 500)))
    assert set(found.variables) == {"params", "sam"}
    assert preparation._with_sam(found, None) is found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"io_target": "displacment"},
            "`io_target` is 'displacment', .* mean disp",
        ),
        ({"io_sim": "lnc"}, "`io_sim` is 'lnc', expected one of auto, lncc"),
        ({"prealign": "affin"}, "`prealign` is 'affin'"),
        ({"precision": "float16"}, "`precision` is 'float16'"),
        ({"fixed_modality": "t3"}, "`fixed_modality` is 't3', .* t1, "),
        ({"io_iterations": "10"}, "`io_iterations` is '10', expected a whole number"),
        ({"io_iterations": 1.5}, "`io_iterations` is 1.5, expected a whole number"),
        ({"seed": None}, "`seed` is None, expected a whole number"),
        ({"io_lr": "fast"}, "`io_lr` is 'fast', expected a number"),
        ({"seed": -1}, "`seed` is -1, expected 0 to 4294967295"),
        ({"level_iterations": 0}, "`level_iterations` is 0, expected a positive"),
        ({"ct_window": (1,)}, r"`ct_window` is \(1,\), expected 2 numbers"),
        ({"quantile_range": ("a", "b")}, "`quantile_range` is 'a', expected a number"),
    ],
)
def test_misspelt_values_of_options(change, words):
    with pytest.raises(UserError, match=words):
        options_lib.check_options(options_lib.Options(**change))


def test_shape_of_one_number_is_a_cube():
    assert options_lib.Options(shape=64).shape == (64, 64, 64)
    assert options_lib.Options(shape=[64, np.int64(32), 16]).shape == (64, 32, 16)
    for shape in (64.5, (64, 64), "64", (1.5, 2, 3)):
        with pytest.raises(UserError, match="one for a cube"):
            options_lib.Options(shape=shape)


def test_the_grid_is_that_of_the_weights_unless_another_is_given():
    fixed = blobs(make_grid())
    model = loaded(Shifting((0.1, 0.0, 0.0)), shape=[9, 10, 11])
    options = options_lib.Options(io_iterations=None)
    result = pair_lib.register(fixed, fixed, model, options)
    assert result.fixed_grid.shape == (9, 10, 11)
    result = pair_lib.register(fixed, fixed, model, OPTIONS)
    assert result.fixed_grid.shape == NETWORK_GRID
    # Without weights the fixed scan's, or a finer one of so small a scan.
    fast = dataclasses.replace(options, quality="fast")
    assert preparation.with_grid(fast, None, fixed).shape == tuple(
        8 * math.ceil(n / 8) for n in fixed.grid.shape
    )
    finer = preparation.with_grid(options, None, fixed).grid_shape
    assert min(finer) > max(fixed.grid.shape)


def test_paths_and_images_are_registered_as_volumes_are(tmp_path):
    """Of nibabel, SimpleITK and files: the transform that their volumes give."""
    import nibabel as nib
    import SimpleITK as sitk

    from jaxreg.io import volumes

    grid = make_grid(turn=0.3)
    scan, model = blobs(grid), loaded(Shifting((0.1, 0.05, 0.0)))
    path = tmp_path / "scan.nii.gz"
    volumes.write_volume(path, scan)
    expected = pair_lib.register(scan, scan, model, OPTIONS)
    points = np.array([[[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]]])
    kinds = (path, str(path), nib.load(path), sitk.ReadImage(str(path)))
    for given in kinds:
        found = pair_lib.register(given, scan, model, OPTIONS)
        back = pair_lib.register(scan, given, model, OPTIONS)
        for result in (found, back):
            np.testing.assert_allclose(
                result.transform.map_points(points),
                expected.transform.map_points(points), atol=1e-4,
            )  # fmt: skip


@pytest.mark.parametrize("scan", [np.zeros((9, 8, 7)), jnp.zeros((9, 8, 7)), None, 3])
def test_arrays_say_not_where_they_are(scan):
    with pytest.raises(UserError, match="moving scan is a .*does not say where"):
        pair_lib.register(scan, blobs(make_grid()), None, OPTIONS)


def test_what_is_wrong_with_an_image_in_memory_is_said_of_the_scan():
    """Not of the temporary file that it is read from, nor are its warnings."""
    import nibabel as nib

    scan = blobs(make_grid())
    with pytest.raises(UserError, match=r"^the moving scan is a 4D image of"):
        several = nib.Nifti1Image(np.zeros((9, 8, 7, 3), np.float32), np.eye(4))
        pair_lib.register(several, scan, None, OPTIONS)
    nowhere = nib.Nifti1Image(scan.array.T, None)
    with pytest.warns(UserWarning, match="^the fixed scan: neither qform nor sform"):
        pair_lib.register(scan, nowhere, loaded(Shifting()), OPTIONS)


def test_regions_may_be_what_scans_may_be(tmp_path):
    import nibabel as nib

    from jaxreg.io import volumes

    scan = blobs(make_grid())
    mask = Volume((scan.array > 300).astype(np.uint8), scan.grid)
    volumes.write_volume(tmp_path / "mask.nii.gz", mask)
    image = nib.load(tmp_path / "mask.nii.gz")
    found = options_lib.Regions(tmp_path / "mask.nii.gz", image, image)
    for region in vars(found).values():
        if region is not None:
            np.testing.assert_array_equal(region.array, mask.array)
    assert found.moving_segmentation is None
    with pytest.raises(UserError, match="the fixed mask is a numpy.ndarray"):
        options_lib.Regions(fixed_mask=mask.array)


def test_arguments_of_other_kinds_get_a_sentence():
    scan = blobs(make_grid())
    for arguments, sentence in (
        ((None, {"shape": 12}), r"the options are a dict, .*Options"),
        ((OPTIONS,), "the model is a Options, expected a name"),
    ):
        with pytest.raises(UserError, match=sentence):
            pair_lib.register(scan, scan, *arguments)
    with pytest.raises(UserError, match="the regions are a dict"):
        pair_lib.register(scan, scan, None, OPTIONS, regions={"fixed_mask": scan})
