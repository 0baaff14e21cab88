"""Pre-alignment of scans by name, and that a registration holds it exactly."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.data import network_grid
from jaxreg.data.network_grid import ResamplingRule
from jaxreg.data.preprocess import IntensityRule
from jaxreg.errors import UserError
from jaxreg.io import transforms
from jaxreg.matching import nearest
from jaxreg.matching import points as points_lib
from jaxreg.models import sam
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import preparation
from jaxreg.registration import result as result_lib
from jaxreg.registration.optimization import features
from jaxreg.registration.prealign import affine, from_matches, measure, select
from jaxreg.registration.prealign.select import Prealignment, Scan
from jaxreg.space import sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo


@pytest.fixture(autouse=True)
def few_points(request, monkeypatch):
    """Programs of tests are not optimised: slow tests alone have as many points."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(measure, "FEWEST", 2**9)
        monkeypatch.setattr(measure, "FEW", 2**10)
        monkeypatch.setattr(measure, "MANY", 2**12)
        monkeypatch.setattr(measure, "_LOCAL", 24)
        monkeypatch.setattr(measure, "LOCAL_DESCENT", 24)


NETWORK_GRID = (18, 20, 16)
_RNG = np.random.default_rng(0)
BLOBS_MM = _RNG.uniform(-18, 18, (9, 3))
HEIGHTS, SIZES_MM = _RNG.uniform(0.4, 1, 9), _RNG.uniform(5, 8, 9)


def brightness(points_mm):
    squares = ((points_mm[..., None, :] - BLOBS_MM) ** 2).sum(-1)
    return (1000 * HEIGHTS * np.exp(-squares / (2 * SIZES_MM**2))).sum(-1)


def grid(shape, spacing_mm, middle_mm):
    """Axes D H W along z y x."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag(spacing_mm)[::-1]
    matrix[:3, 3] = middle_mm - matrix[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, matrix)


FIXED = grid((28, 26, 30), (2.0, 2.2, 1.9), (0.0, 0.0, 0.0))
MOVING = grid((34, 24, 30), (1.8, 2.6, 2.1), (60.0, -40.0, 7.0))


def turned(degrees, shift_mm):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.eye(4)
    matrix[:3, :3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]]
    matrix[:3, 3] = shift_mm
    return matrix


TRUTH = turned(12, (61.0, -38.0, 9.0))
"""Fixed to moving mm."""


def apply(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def volume(grid, function, name="scan"):
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    places = apply(grid.affine_mm, voxels)
    return Volume(function(places).astype(np.float32), grid, name)


@pytest.fixture(scope="module")
def scans():
    """Moving and fixed: moving[TRUTH(x)] is fixed[x]."""
    back = np.linalg.inv(TRUTH)
    return (
        volume(MOVING, lambda p: brightness(apply(back, p)), "moving.nii.gz"),
        volume(FIXED, brightness, "fixed.nii.gz"),
    )


@dataclasses.dataclass(frozen=True)
class Known(RegistrationModel):
    """A model that answers with one field, and notes what it was shown."""

    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def apply(self, variables, moving, fixed, *, train=False, batching=None):
        n = len(moving) // 2
        shape = moving.shape[1:4]
        field = jnp.zeros((n, *shape, 3)) + jnp.asarray(self.shift)
        bump = jnp.sin(jnp.pi * sampling.identity(shape)).prod(-1, keepdims=True)
        field = jnp.concatenate([field * bump, -field * bump])
        return Prediction(Transform((Displacement(field),))), variables


def loaded(model, **preprocessing):
    preprocessing = {"orientation": "any", **preprocessing}
    bundle = bundle_lib.Bundle({}, "known", {}, preprocessing, "a test", "none")
    return zoo.LoadedModel("known", model, {}, bundle)


OPTIONS = options_lib.Options(shape=NETWORK_GRID, io_iterations=None, prealign="affine")
POINTS = _RNG.uniform(-14, 14, (1, 40, 3))


def given(monkeypatch, found):
    """Makes every search find this pre-alignment."""
    monkeypatch.setattr(select, "find", lambda *a, **k: found)


PLACEMENTS = [
    ResamplingRule(),
    ResamplingRule("aligned", "ijk"),
    ResamplingRule("pad_crop", "spl", 3.0),
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.resize)
def test_a_network_that_does_nothing_leaves_the_affine_map(
    scans, monkeypatch, placement
):
    given(monkeypatch, Prealignment(TRUTH))
    model = loaded(Known(), **placement.to_dict())
    result = pair_lib.register(*scans, model, OPTIONS)
    mapped = result.transform.map_points(POINTS)
    np.testing.assert_allclose(mapped, apply(TRUTH, POINTS), atol=1e-4)
    assert result.inverse is not None
    back = result.inverse.map_points(mapped)
    np.testing.assert_allclose(back, POINTS, atol=1e-3)
    assert result.inverse_residual_mm[1] < 1e-3
    assert result.folding_percent == 0
    # The network saw the moving scan where the fixed one is.
    np.testing.assert_allclose(result.warped_after, result.fixed_image, atol=0.08)
    assert result.similarity_after == pytest.approx(result.similarity_prealigned)
    assert result.similarity_after < 0.5 * result.similarity_before
    rows = result_lib.summary(result)
    assert {"lncc loss pre-aligned", "seconds to prealign"} <= set(rows)


def bumped(result, shift):
    """What `Known` answers, in mm of the fixed scan."""
    grid = result.fixed_grid
    unit = apply(np.linalg.inv(grid.unit_to_mm), POINTS)
    here = np.asarray(sampling.identity(grid.shape))
    bump = np.sin(np.pi * here).prod(-1, keepdims=True) * np.asarray(shift)
    moved = sampling.sample(jnp.asarray(bump, jnp.float32), jnp.asarray(unit, "f4"))
    return apply(grid.unit_to_mm, unit + np.asarray(moved))


SHIFT = (0.05, -0.03, 0.04)


def test_the_network_acts_before_the_affine_map(scans, monkeypatch, tmp_path):
    given(monkeypatch, Prealignment(TRUTH))
    result = pair_lib.register(*scans, loaded(Known(SHIFT)), OPTIONS)
    expected = apply(TRUTH, bumped(result, SHIFT))
    assert np.abs(expected - apply(TRUTH, POINTS)).max() > 1
    mapped = result.transform.map_points(POINTS)
    np.testing.assert_allclose(mapped, expected, atol=1e-3)
    back = result.inverse.map_points(mapped)
    np.testing.assert_allclose(back, POINTS, atol=0.05)
    assert result.inverse_residual_mm[0] < 0.02
    transforms.write_transform(tmp_path / "t.h5", result.transform, FIXED)
    written = transforms.read_transform(tmp_path / "t.h5")
    np.testing.assert_allclose(written.map_points(POINTS), expected, atol=1e-3)


def bend_of(size):
    """A smooth displacement on a coarse grid over the fixed scan."""
    over = FIXED.resized((6, 6, 7))
    here = np.asarray(sampling.identity(over.shape))
    return jnp.asarray(size * np.sin(2 * here[..., ::-1]), jnp.float32), over


@pytest.mark.parametrize("shift", [(0.0, 0.0, 0.0), SHIFT], ids=["still", "moving"])
def test_a_bend_lies_between_the_network_and_the_affine_map(scans, monkeypatch, shift):
    start = Prealignment(TRUTH, *bend_of(0.04))
    given(monkeypatch, start)
    result = pair_lib.register(*scans, loaded(Known(shift)), OPTIONS)
    moved = bumped(result, shift)
    expected = start.transform.map_points(moved)
    straight = apply(TRUTH, moved)
    assert np.abs(expected - straight).max() > 1
    mapped = result.transform.map_points(POINTS)
    # Both fields became one on the network grid.
    np.testing.assert_allclose(mapped, expected, atol=0.05)
    np.testing.assert_allclose(result.inverse.map_points(mapped), POINTS, atol=0.05)
    # Between the voxels of the network grid as well.
    assert result.inverse_residual_mm[0] < 0.03


@pytest.mark.parametrize("bent", [False, True], ids=["affine", "coarse"])
def test_a_pre_alignment_alone_is_exact(scans, monkeypatch, tmp_path, bent):
    start = Prealignment(TRUTH, *bend_of(0.04)) if bent else Prealignment(TRUTH)
    given(monkeypatch, start)
    result = pair_lib.register(*scans, None, OPTIONS)
    expected = start.transform.map_points(POINTS)
    np.testing.assert_allclose(result.transform.map_points(POINTS), expected, atol=1e-4)
    np.testing.assert_allclose(result.inverse.map_points(expected), POINTS, atol=0.05)
    assert result.similarity_after < 0.5 * result.similarity_before
    transforms.write_transform(tmp_path / "t.tfm", result.transform, FIXED)
    written = transforms.read_transform(tmp_path / "t.tfm")
    np.testing.assert_allclose(written.map_points(POINTS), expected, atol=1e-3)
    assert len(written.steps) == (3 if bent else 1)


def test_a_pre_alignment_that_was_found_is_not_looked_for(scans, monkeypatch):
    monkeypatch.setattr(select, "find", None)
    result = pair_lib.register(*scans, None, OPTIONS, start=Prealignment(TRUTH))
    np.testing.assert_allclose(
        result.transform.map_points(POINTS), apply(TRUTH, POINTS), atol=1e-4
    )


def test_features_are_sams_on_a_grid_like_its_own_alone():
    ct = dataclasses.replace(
        OPTIONS, fixed_modality="ct", moving_modality="ct", io_iterations=2,
        io_target="features", placement=ResamplingRule("pad_crop", "spl", 2.0),
    )  # fmt: skip
    assert pair_lib._extractor(NETWORK, ct) is not features.mind_features
    assert pair_lib._extractor(None, ct) is features.mind_features
    for placement in (None, ResamplingRule("pad_crop", "spl", 1.0), ResamplingRule()):
        with pytest.warns(UserWarning, match="takes MIND's descriptors in place"):
            other = dataclasses.replace(ct, placement=placement)
            assert pair_lib._extractor(NETWORK, other) is features.mind_features


def test_labels_and_masks_are_carried_along(scans, monkeypatch):
    given(monkeypatch, Prealignment(TRUTH))
    parts = {
        side: Volume((scan.array > 350).astype(np.int32), scan.grid, side)
        for side, scan in zip(("moving", "fixed"), scans, strict=True)
    }
    regions = options_lib.Regions(
        parts["fixed"], parts["moving"], parts["fixed"], parts["moving"]
    )
    options = dataclasses.replace(
        OPTIONS,
        fixed_modality="mri",
        moving_modality="mri",
        io_iterations=1,
        dice_loss_weight=1.0,
        loss_function_masking=True,
        input_masking=True,
        # Nearest voxels; other placements are up to half a voxel off.
        placement=ResamplingRule("pad_crop", "kji", 3.0),
    )
    over = options.placement.grid(FIXED, NETWORK_GRID)
    carried = network_grid.Resampled(over, Transform(()))
    start = dataclasses.replace(carried, transform=Prealignment(TRUTH).transform)
    pair = preparation.make_pair(*scans, options, regions, start)
    for a, b in (
        (pair.moving_onehot, pair.fixed_onehot),
        (pair.moving_mask, pair.fixed_mask),
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert 2 * (a * b).sum() / (a + b).sum() > 0.9
    # The image fades over a voxel where its mask ends.
    inside = np.asarray(pair.moving_mask)[0, ..., 0] > 0
    inside = ndimage.binary_dilation(inside, np.ones((3, 3, 3)))
    assert not np.any(np.asarray(pair.moving)[0, ..., 0][~inside])
    assert np.any(np.asarray(pair.moving))
    with pytest.raises(ValueError, match="not that of the grid"):
        carried.image(scans[0].array, scans[0].grid, (4, 4, 4))


# --- the searches ---------------------------------------------------------------------


MRI = IntensityRule("mri")


def error_mm(found, truth=TRUTH):
    mapped = found.transform.map_points(POINTS)
    return np.linalg.norm(mapped - apply(truth, POINTS), axis=-1).max()


@pytest.mark.slow
def test_searches_by_intensity(scans):
    moving, fixed = (Scan(scan, MRI) for scan in scans)
    assert error_mm(select.find("none", moving, fixed)) > 60
    assert error_mm(select.find("centre", moving, fixed)) < 8
    assert error_mm(select.find("affine", moving, fixed)) < 0.7


def test_masks_are_what_counts(scans):
    """Something bright beside the body, which the mask leaves out."""
    moving, fixed = scans
    spoilt = moving.array.copy()
    spoilt[:6] = 3000
    mask = Volume(np.ones_like(spoilt), moving.grid, "mask")
    mask.array[:6] = 0
    spoilt = Scan(dataclasses.replace(moving, array=spoilt), MRI)
    far = select.find("centre", spoilt, Scan(fixed, MRI))
    near = select.find(
        "centre", dataclasses.replace(spoilt, mask=mask), Scan(fixed, MRI)
    )
    assert error_mm(near) < 8 < error_mm(far)


@pytest.mark.parametrize("bent", [False, True], ids=["affine", "coarse"])
def test_headers_that_fit_better_are_kept(scans, monkeypatch, bent):
    """Matches 9 mm off, or a field that tears, for scans that lie on each other."""
    fixed = Scan(scans[1], MRI)
    found = Prealignment(turned(0, (9, 0, 0)), start="matches")
    if bent:
        found = Prealignment(np.eye(4), *bend_of(0.4), start="matches")
    monkeypatch.setattr(select, "_by_matches", lambda *a: found)
    said = "coarse field fits no better" if bent else "headers are kept"
    with pytest.warns(UserWarning, match=said):
        kept = select.find("sam", fixed, fixed)
    np.testing.assert_array_equal(kept.affine_mm, np.eye(4))
    assert kept.residual_field is None
    assert kept.start == ("matches" if bent else "headers")


def test_a_bend_of_headers_that_fits_better_is_kept(scans, monkeypatch):
    """Its affine part is that of the headers."""
    fixed = Scan(scans[1], MRI)
    found = Prealignment(np.eye(4), *bend_of(0.05), start="matches")
    there = found.transform.map_points
    warped = volume(
        FIXED,
        lambda p: brightness(2 * p - np.asarray(there(p.reshape(1, -1, 3).astype("f4")))
                             .reshape(p.shape)),
    )  # fmt: skip
    monkeypatch.setattr(select, "_by_matches", lambda *a: found)
    kept = select.find("sam", Scan(warped, MRI), fixed)
    assert kept.residual_field is found.residual_field
    assert kept.fits is not None
    before, after = kept.fits
    assert after.globally < before.globally


FIT = measure.Fit(0.9, 0.9)


def test_what_it_came_from_and_doubts_are_said(scans, monkeypatch):
    moving, fixed = scans
    found = affine.Found(
        TRUTH, "centres", {"headers": FIT}, ("headers",), False, measure.Fit(0.8, 0.7)
    )
    monkeypatch.setattr(affine, "search", lambda *a: found)
    monkeypatch.setattr(affine, "mirrored_fits", lambda *a: True)
    with pytest.warns(UserWarning) as caught:
        result = pair_lib.register(moving, fixed, None, OPTIONS)
    said = " ".join(str(warning.message) for warning in caught)
    assert (
        "places far apart fit nearly alike; the best place, found from centres" in said
    )
    assert "`fixed_mask`" in said and "mirrored, left for right" in said
    # They stay with the result, whose report shows them.
    assert len(result.doubts) == 2
    assert result.doubts == result.reported.doubts
    assert all(doubt in said for doubt in result.doubts)
    assert result.prealigned_from == "centres"
    rows = result_lib.summary(result)
    assert rows["pre-aligned from"] == "centres"
    assert rows["pre-alignment by grey levels"] == (
        "0.9000 by the headers, 0.8000 after it"
    )
    assert "0.7000 after it" in rows["pre-alignment by local correlation"]


@pytest.mark.parametrize(
    ("certain", "said"),
    [
        (True, "no map of moving.nii.gz and fixed.nii.gz fits better than their"),
        (False, "does not lead to the same place; their headers are kept as they are"),
    ],
)
def test_headers_that_stay_are_said(scans, monkeypatch, certain, said):
    found = affine.Found(np.eye(4), "headers", {"headers": FIT}, certain=certain)
    monkeypatch.setattr(affine, "search", lambda *a: found)
    monkeypatch.setattr(affine, "mirrored_fits", lambda *a: False)
    with pytest.warns(UserWarning, match=said):
        select.find("affine", *(Scan(scan, MRI) for scan in scans))


@pytest.mark.parametrize("better", [False, True], ids=["headers", "extents"])
def test_a_network_that_lays_extents_over_each_other_is_spoken_of(
    scans, monkeypatch, recwarn, better
):
    """Crops around an organ say where it is, which a map in mm gives up."""
    fits = {
        "headers": FIT,
        "stretched extents": measure.Fit(0.95 - better / 5, 0.8),
    }
    found = affine.Found(TRUTH, "centres", fits)
    monkeypatch.setattr(affine, "search", lambda *a: found)
    monkeypatch.setattr(affine, "mirrored_fits", lambda *a: False)
    pair_lib.prealigned(*scans, loaded(Known()), OPTIONS)
    assert any("with `prealign` none" in str(w.message) for w in recwarn) == better
    recwarn.clear()
    boxed = loaded(Known(), **ResamplingRule("pad_crop", "spl", 3.0).to_dict())
    pair_lib.prealigned(*scans, boxed, OPTIONS)
    assert not recwarn


# --- by matches that are made up ------------------------------------------------------


CT = IntensityRule("ct")
NETWORK = sam.TrainedSam(sam.SamConfig(channels=(1, 1, 1, 1), embedding=1), {})


@pytest.fixture
def matched(monkeypatch):
    """CT scans, and matches that a function of fixed mm makes."""

    def of(function, count=400):
        grids = {}

        def embed(network, image):
            return image

        def correspond(moving, fixed, shape, *, query_mask, key_mask):
            assert query_mask.shape == shape == moving.shape[1:4]
            there, here = grids["moving"], grids["fixed"]
            key = np.random.default_rng(0).integers(0, fixed.shape[1:4], (count, 3))
            place = function(apply(here.affine_mm, key))
            query = np.rint(apply(np.linalg.inv(there.affine_mm), place)).astype(int)
            return nearest.Matches(query, key, np.ones(count, np.float32))

        original = select._for_sam

        def for_sam(scan, network):
            image, grid, body = original(scan, network)
            grids[scan.volume.source] = grid
            assert body.any()
            return image, grid, body

        monkeypatch.setattr(points_lib, "embed", embed)
        monkeypatch.setattr(nearest, "correspond", correspond)
        monkeypatch.setattr(select, "_for_sam", for_sam)

    return of


@pytest.fixture(scope="module")
def ct():
    """Moving and fixed CT of about 64 mm, turned against each other in storage."""
    moving = volume(
        grid((34, 36, 40), (2.0, 2.0, 2.0), (60.0, -40.0, 7.0)),
        lambda p: brightness(p - (60, -40, 7)) - 1000,
        "moving",
    )
    flipped = np.diag([1.0, -1.0, 1.0, 1.0])
    flipped[1, 3] = 35
    moving = Volume(
        moving.array[:, ::-1], Grid(moving.grid.shape, moving.grid.affine_mm @ flipped),
        "moving",
    )  # fmt: skip
    over = grid((34, 36, 40), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    fixed = volume(over, lambda p: brightness(p) - 1000, "fixed")
    return Scan(moving, CT), Scan(fixed, CT)


def test_matches_to_an_affine_map_in_mm(ct, matched):
    matched(lambda p: apply(TRUTH, p))
    found = select.find("sam-affine", *ct, network=NETWORK)
    assert found.residual_field is None
    assert error_mm(found) < 0.7  # voxels of 2 mm were rounded to


def curved(points_mm):
    bend = 4 * np.sin(points_mm[..., ::-1] / 18)
    return apply(TRUTH, points_mm + bend)


def test_matches_to_a_coarse_field_in_mm(ct, matched, monkeypatch):
    matched(curved)
    # The scans are small.
    config = from_matches.CoarseConfig(stride=8)
    finer = functools.partial(from_matches.matched_field, config=config)
    monkeypatch.setattr(from_matches, "matched_field", finer)
    linear = select.find("sam-affine", *ct, network=NETWORK)
    for way in ("sam", "sam-coarse"):
        found = select.find(way, *ct, network=NETWORK)
        assert found.residual_field is not None and found.grid is not None
        wrong = [
            np.linalg.norm(f.transform.map_points(POINTS) - curved(POINTS), axis=-1)
            for f in (linear, found)
        ]
        assert wrong[1].mean() < 0.8 * wrong[0].mean()


def test_bend_and_affine_make_the_coarse_field(ct):
    """On the control points and between them."""
    rng = np.random.default_rng(3)
    field = jnp.asarray(0.05 * rng.normal(size=(1, 3, 4, 3, 3)), jnp.float32)
    matrix = np.eye(4)
    matrix[:3] += 0.1 * rng.normal(size=(3, 4))
    coarse = Transform((Displacement(field),))
    bend = select._residual_field(coarse, Transform((transform_lib.Affine(matrix),)))
    both = Transform((Displacement(bend), transform_lib.Affine(matrix)))
    points = rng.uniform(0, 1, (1, 50, 3)).astype(np.float32)
    np.testing.assert_allclose(
        both.map_points(points), coarse.map_points(jnp.asarray(points)), atol=1e-5
    )


def test_sam_sees_two_millimetres_towards_superior_posterior_left(ct):
    image, grid, body = select._for_sam(ct[0], NETWORK)
    assert image.shape == (1, *grid.shape, 1)
    assert not any(np.mod(grid.shape, (4, 16, 16)))
    np.testing.assert_allclose(grid.spacing_mm, 2)
    signs = np.sign(np.round(grid.affine_mm[:3, :3], 6))
    np.testing.assert_array_equal(signs, [[0, 0, -1], [0, -1, 0], [1, 0, 0]])
    low, high = sam.SAM_RANGE
    assert low <= float(image.min()) and float(image.max()) <= high
    middle = tuple(n // 2 for n in grid.shape)
    units = (float(image[(0, *middle, 0)]) - low) / (high - low) * 4095 - 1024
    expected = brightness(apply(grid.affine_mm, np.array(middle)) - (60, -40, 7)) - 1000
    assert units == pytest.approx(expected, abs=40)


def test_a_sam_of_mri_sees_its_own_spacing_and_scale(scans):
    network = dataclasses.replace(NETWORK, spacing_mm=1.5, quantile_range=(0.0, 1.0))
    image, grid, body = select._for_sam(Scan(scans[1], MRI), network)
    np.testing.assert_allclose(grid.spacing_mm, 1.5)
    low, high = sam.SAM_RANGE
    assert float(image.min()) == pytest.approx(low, abs=1)
    assert high - 40 < float(image.max()) <= high + 1e-3
    assert 0 < body.mean() < 1


def shown(image):
    """Hounsfield units of what SAM sees."""
    low, high = sam.SAM_RANGE
    return (np.asarray(image, np.float64) - low) / (high - low) * 4095 - 1024


def test_a_window_of_sam_keeps_its_hounsfield_units_everywhere(ct, monkeypatch):
    """The same scan, cut off alike, for pre-alignment, points and features."""
    network = dataclasses.replace(NETWORK, ct_window=(-800.0, -300.0))
    image, grid, body = select._for_sam(ct[0], network)
    whole, _, _ = select._for_sam(ct[0], NETWORK)
    expected = shown(whole).clip(-800, -300)
    np.testing.assert_allclose(shown(image), expected, atol=15)
    assert 0 < body.mean() < 1
    asked = []

    def embed(network, image):
        asked.append(image)
        raise UserError("asked")

    monkeypatch.setattr(points_lib, "embed", embed)
    rule = IntensityRule("ct", network.ct_window)
    with pytest.raises(UserError, match="asked"):
        points_lib.by_sam(ct[0].volume, rule, network)
    np.testing.assert_array_equal(asked[0], image)
    stored = jnp.asarray((shown(whole) + 1000) / 2000, jnp.float32).clip(0, 1)
    with pytest.raises(UserError, match="asked"):
        features.sam_features(network, stored, (-1000.0, 1000.0))
    np.testing.assert_allclose(shown(asked[1]), expected, atol=0.1)


def test_beyond_a_scan_sam_sees_its_edge_and_no_body(ct):
    scan = ct[0]
    bright = dataclasses.replace(scan.volume, array=scan.volume.array + 1000)
    image, grid, body = select._for_sam(
        dataclasses.replace(scan, volume=bright), NETWORK
    )
    assert grid.shape == (36, 48, 48)  # of 34 x 36 x 40
    assert body[:34, :36, :40].all()
    assert body.sum() == body[:34, :36, :40].sum()
    edge = np.repeat(image[0, :, 35:36], 12, axis=1)
    np.testing.assert_array_equal(image[0, :, 36:], edge)


@pytest.mark.parametrize(
    ("way", "function", "count", "said"),
    [
        ("sam", lambda p: p, 3, "sam: 3 matched points .* `prealign` affine"),
        ("sam-affine", lambda p: 0.1 * p + (60, -40, 7), 400, "by a factor of 0.001"),
    ],
)
def test_matches_that_are_not_to_be_trusted(ct, matched, way, function, count, said):
    matched(function, count)
    with pytest.raises(UserError, match=said):
        select.find(way, *ct, network=NETWORK)


def test_what_sam_needs_is_said(ct, scans):
    with pytest.raises(UserError, match="needs a SAM network; give `sam_weights`"):
        select.find("sam", *ct)
    with pytest.raises(UserError, match="knows CT alone, fixed.nii.gz is another"):
        select.find("sam", ct[0], Scan(scans[1], MRI), network=NETWORK)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prealign": "best"}, "'best', expected one of auto, none, centre"),
        ({"stored_orientation": True}, "leave one of the two"),
    ],
)
def test_options_that_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        options_lib.check_options(dataclasses.replace(OPTIONS, **change))
