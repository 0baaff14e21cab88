import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance

from jaxreg import metrics
from jaxreg.space import sampling
from jaxreg.space.grid import unit_scale

SHAPE = (12, 10, 14)
SPACING_MM = (2.5, 1.0, 0.7)


def blobs(seed):
    """Three ellipsoids, labels 1 to 3, some touching the edge of the array."""
    rng = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    labels = np.zeros(SHAPE, np.uint8)
    for label in (1, 2, 3):
        centre = rng.uniform(0.2, 0.8, 3) * SHAPE
        radius = rng.uniform(2.0, 4.0, 3)
        labels[np.sum(((index - centre) / radius) ** 2, -1) < 1] = label
    return labels


def to_itk(array):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING_MM[::-1])
    return image


def undecided(determinant):
    """How many cells rounding of the determinant may put on either side of 0."""
    return int(np.sum(np.abs(determinant) < 1e-5))


@pytest.mark.golden
@pytest.mark.parametrize("suffix", ["", "_2d"])
def test_folding_matches_reference(golden, suffix):
    g = golden("gradicon_losses")
    points = np.moveaxis(g[f"flip_phi{suffix}"], 1, -1)
    determinant = metrics.cell_determinant(points)
    count = (determinant < 0).sum() / len(determinant)
    either = undecided(determinant)
    assert abs(count - g[f"flips_count{suffix}"]) <= either / len(points)
    share = 100 * either / determinant.size
    np.testing.assert_allclose(
        metrics.folding_percent(determinant),
        g[f"flips_percent{suffix}"],
        rtol=1e-5,
        atol=share,
    )


@pytest.mark.golden
def test_determinant_matches_reference(golden):
    g = golden("gradicon_losses")
    determinant = metrics.cell_determinant(np.moveaxis(g["flip_phi"], 1, -1))
    np.testing.assert_allclose(
        determinant, g["jacobian_det"][:, 0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dimension", [2, 3])
def test_determinant_of_a_linear_map(dimension):
    matrix = np.eye(dimension) + 0.2 * np.arange(dimension**2).reshape(dimension, -1)
    axes = [np.linspace(0, 1, n) for n in SHAPE[:dimension]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)[None]
    determinant = metrics.cell_determinant(grid @ matrix.T)
    assert determinant.shape == (1, *(n - 1 for n in SHAPE[:dimension]))
    np.testing.assert_allclose(determinant, np.linalg.det(matrix), rtol=1e-4)
    mirrored = metrics.cell_determinant(grid * np.r_[-1, np.ones(dimension - 1)])
    assert metrics.folding_percent(mirrored) == 100.0
    assert metrics.folding_percent(metrics.cell_determinant(grid)) == 0.0


def test_determinant_checks_the_shape():
    with pytest.raises(ValueError, match="N H W 2"):
        metrics.cell_determinant(np.zeros((1, 4, 4, 3)))


def test_folding_of_a_grid_without_cells_is_zero():
    determinant = metrics.cell_determinant(np.asarray(sampling.identity((1, 4, 5))))
    assert metrics.folding_percent(determinant) == 0
    assert metrics.sdlogj(determinant) == 0


def test_sdlogj_of_a_stretched_axis():
    # Along one axis x -> exp(x): log |J| is x plus a constant, a plain ramp.
    points = np.array(sampling.identity((401, 3, 3)), np.float64)
    points[..., 0] = np.exp(points[..., 0])
    determinant = metrics.cell_determinant(points)
    np.testing.assert_allclose(metrics.sdlogj(determinant), 12**-0.5, rtol=1e-3)


def test_sdlogj_of_an_affine_map_and_of_folds():
    assert metrics.sdlogj(np.full((4, 4), 1.7)) == pytest.approx(0, abs=1e-7)
    expected = np.std(np.log([1.0, 2.0, 1e-9, 1e-9]))
    assert metrics.sdlogj(np.array([1.0, 2.0, -3.0, 0.0])) == pytest.approx(expected)


def test_dice_matches_simpleitk():
    sitk = pytest.importorskip("SimpleITK")
    a, b = blobs(0), blobs(1)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(to_itk(a), to_itk(b))
    scores = metrics.dice(a, b)
    assert list(scores) == [1, 2, 3]
    for label, score in scores.items():
        assert score == pytest.approx(overlap.GetDiceCoefficient(label))
    assert metrics.mean_score(scores) == pytest.approx(np.mean(list(scores.values())))


def test_dice_of_absent_labels():
    a, b = np.array([0, 1, 1, 2]), np.array([0, 1, 0, 0])
    scores = metrics.dice(a, b, labels=(1, 2, 5))
    assert scores[1] == pytest.approx(2 / 3)
    assert scores[2] == 0
    assert np.isnan(scores[5])
    assert metrics.mean_score(scores) == pytest.approx(1 / 3)
    assert np.isnan(metrics.mean_score({5: float("nan")}))


def test_label_metrics_check_the_shapes():
    with pytest.raises(ValueError, match="one grid"):
        metrics.dice(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="one grid"):
        metrics.hd95_mm(np.zeros((2, 3)), np.zeros((3, 2)), spacing_mm=(1, 1))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_dice_is_symmetric_and_between_zero_and_one(seed):
    a, b = blobs(seed), blobs(seed + 1)
    scores = metrics.dice(a, b)
    assert scores == metrics.dice(b, a)
    assert all(0 <= score <= 1 for score in scores.values())
    assert set(metrics.dice(a, a).values()) == {1.0}


def surface_points_mm(mask):
    """Voxels with a neighbour outside, by definition rather than by erosion."""
    padded = np.pad(mask, 1)
    neighbours = [
        np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        for axis in range(3)
        for step in (1, -1)
    ]
    return np.argwhere(mask & ~np.all(neighbours, 0)) * SPACING_MM


def test_hd95_matches_all_pairs_of_surface_voxels():
    a, b = blobs(2), blobs(3)
    distances = metrics.hd95_mm(a, b, spacing_mm=SPACING_MM)
    assert list(distances) == [1, 2, 3]
    for label, value in distances.items():
        pairs = distance.cdist(
            surface_points_mm(a == label), surface_points_mm(b == label)
        )
        expected = max(np.percentile(pairs.min(i), 95) for i in (0, 1))
        assert value == pytest.approx(expected)


def test_hausdorff_matches_simpleitk():
    sitk = pytest.importorskip("SimpleITK")
    a, b = blobs(4), blobs(5)
    maxima = metrics.hd95_mm(a, b, spacing_mm=SPACING_MM, percentile=100)
    for label, value in maxima.items():
        hausdorff = sitk.HausdorffDistanceImageFilter()
        hausdorff.Execute(to_itk(a) == label, to_itk(b) == label)
        assert value == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)


def test_hd95_of_shifted_and_of_absent_labels():
    a = np.zeros(SHAPE, int)
    a[2:5, 3:6, 4:8] = 1
    shifted = np.roll(a, 2, axis=0)
    a[0, 0, 0] = 2
    distances = metrics.hd95_mm(a, shifted, spacing_mm=SPACING_MM, labels=(1, 2))
    assert distances[1] == pytest.approx(2 * SPACING_MM[0])
    assert np.isnan(distances[2])
    assert metrics.hd95_mm(a, a, spacing_mm=SPACING_MM) == {1: 0.0, 2: 0.0}


def test_tre_matches_scipy():
    rng = np.random.default_rng(6)
    mapped, target = rng.uniform(-50, 50, (2, 9, 3))
    expected = np.diag(distance.cdist(mapped, target))
    np.testing.assert_allclose(metrics.tre_mm(mapped, target), expected, rtol=1e-12)


def test_tre_checks_the_shapes():
    with pytest.raises(ValueError, match="P 3"):
        metrics.tre_mm(np.zeros((4, 3)), np.zeros((5, 3)))


# --- UniReg's measures ----------------------------------------------------------------


@pytest.mark.golden
def test_folds_and_sdlogj_match_unireg(golden):
    g = golden("unireg_rpn_small")
    flow = np.moveaxis(g["flow"], 1, -1)
    shape = flow.shape[1:4]
    points = np.asarray(sampling.identity(shape)) + flow / unit_scale(shape)
    forward = metrics.cell_determinant(points[:1], differences="forward")
    assert abs((forward < 0).sum() - g["metric/fold_neg"]) <= undecided(forward)
    assert forward.size == g["metric/fold_total"]
    central = metrics.cell_determinant(points, differences="central")
    expected = g["metric/sdlogj_voxel_units"]
    np.testing.assert_allclose(
        metrics.sdlogj(central, mode="exclude"), expected, rtol=1e-5
    )
    # The stored share is a float32 mean: half a step of it, and what rounding of the
    # determinant may move across 0.
    stored = g["metric/nonpos_ratio_voxel_units"]
    step = np.spacing(np.float32(stored))
    off = abs(np.mean(central <= 0) - stored)
    assert off <= step + undecided(central) / central.size


@pytest.mark.parametrize(
    ("name", "first", "second"), [("backward", 2, 3), ("forward", 1, 2)]
)
def test_differences_lie_where_they_say(name, first, second):
    points = np.array(sampling.identity((5, 6, 7)))
    points[0, 2, 3, 4, 0] += 0.1  # along the first axis alone
    changed = metrics.cell_determinant(points, differences=name)[0] - 1
    corner = 1 if name == "backward" else 0  # the cell's place in the volume
    found = np.argwhere(np.abs(changed) > 1e-3) + corner
    np.testing.assert_array_equal(found, [[first, 3, 4], [second, 3, 4]])
    central = metrics.cell_determinant(points, differences="central")[0] - 1
    found = np.argwhere(np.abs(central) > 1e-3) + 1
    np.testing.assert_array_equal(found, [[1, 3, 4], [3, 3, 4]])
    np.testing.assert_allclose(central[0, 2, 3], 0.2, rtol=1e-4)


def test_sdlogj_by_another_rule():
    values = np.array([1.0, 2.0, -3.5, 0.0])
    expected = np.std(np.log([1.0, 2.0]), ddof=1)
    assert metrics.sdlogj(values, mode="exclude") == pytest.approx(expected)
    expected = np.std(np.log([4.0, 5.0, 1e-9, 3.0]))
    assert metrics.sdlogj(values, mode="l2r") == pytest.approx(expected)
    assert np.isnan(metrics.sdlogj(np.array([-1.0, 2.0]), mode="exclude"))
