"""Points of one scan in another: frames, grids, subvoxel places, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.data import network_grid
from jaxreg.data.preprocess import IntensityRule
from jaxreg.errors import UserError
from jaxreg.matching import points
from jaxreg.models import sam
from jaxreg.space.grid import Grid, Volume

RULE = IntensityRule("mri", quantile_range=(0.0, 1.0))
SPACING = (1.5, 1.2, 1.0)
SHAPE = (20, 26, 34)
CONFIG = sam.SamConfig(channels=(3, 3, 4, 4), embedding=6, form="native")


def scan(shift_mm=(0.0, 0.0, 0.0), seed=0):
    """A smooth random scan whose array axes are z, y, x of RAS+."""
    noise = np.random.default_rng(seed).normal(size=SHAPE)
    array = ndimage.gaussian_filter(noise, 1.5).astype(np.float32)
    matrix = np.eye(4)
    matrix[:3, :3] = np.fliplr(np.diag(SPACING[::-1]))
    matrix[:3, 3] = np.array([-20.0, 5.0, 40.0]) + shift_mm
    return Volume(array, Grid(SHAPE, matrix), "scan.nii.gz")


def stored_otherwise(volume):
    """The same scan with its array axes permuted and flipped."""
    return network_grid.oriented(volume, np.array([[0, -1], [2, 1], [1, -1]]))


def inner_points(volume, count=12, margin=5):
    rng = np.random.default_rng(1)
    at = rng.uniform(margin, np.array(volume.grid.shape) - 1 - margin, (count, 3))
    return at @ volume.grid.affine_mm[:3, :3].T + volume.grid.affine_mm[:3, 3]


def assert_near(found, expected):
    """Within what MIND between voxels of 1 mm allows."""
    error = np.linalg.norm(found.points_mm - expected, axis=-1)
    assert np.median(error) < 0.6 and error.max() < 1.5, error


def by_mind(volume):
    return points.by_mind(volume, RULE, spacing_mm=1.0)


def test_the_same_scan_gives_the_same_places():
    volume = scan()
    here, described = inner_points(volume), by_mind(volume)
    found = points.find(here, described, described)
    assert_near(found, here)
    assert (found.similarity > 0.9).all() and (found.similarity <= 1 + 1e-5).all()
    cycle = points.cycle_mm(here, found, described, described)
    assert cycle.shape == (12,) and (cycle < 2).all()


def test_neither_storage_nor_place_in_the_world_matters():
    shift = np.array([30.0, -12.5, 7.25])
    volume, other = scan(), stored_otherwise(scan(shift))
    assert other.grid.shape != volume.grid.shape
    here = inner_points(volume)
    found = points.find(here, by_mind(volume), by_mind(other))
    assert_near(found, here + shift)


def test_a_voxel_of_another_pattern_is_found_again():
    """What is moved within the scan is found where it went."""
    volume = scan()
    moved = Volume(np.roll(volume.array, (0, 3, -4), (0, 1, 2)), volume.grid, "moved")
    here = inner_points(volume, margin=8)
    found = points.find(here, by_mind(volume), by_mind(moved))
    expected = here + volume.grid.affine_mm[:3, :3] @ [0, 3, -4]
    assert_near(found, expected)


@pytest.fixture(scope="module")
def network():
    variables = sam.init(CONFIG, jax.random.key(3))
    return sam.TrainedSam(CONFIG, variables, 1.5, quantile_range=(0.0, 1.0))


def test_sam_describes_the_fine_grid_in_the_scans_world(network):
    volume = scan()
    found = points.by_sam(volume, RULE, network)
    # 30 x 31.2 x 34 mm: 20 x 21 x 23 voxels, padded to 20 x 32 x 32.
    assert found.vectors.shape == (10, 16, 16, 12)
    assert found.inside.shape == (10, 16, 16)
    assert found.inside[:, :11, :12].all()
    assert not found.inside[:, 11:].any() and not found.inside[:, :, 12:].any()
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.grid.spacing_mm, 3.0)
    # Superior, posterior, left.
    directions = found.grid.affine_mm[:3, :3] / 3.0
    np.testing.assert_allclose(directions, [[0, 0, -1], [0, -1, 0], [1, 0, 0]])
    here = inner_points(volume)
    there = points.find(here, found, found)
    assert np.median(np.linalg.norm(there.points_mm - here, axis=-1)) < 1.5


def test_nothing_is_found_beyond_the_scan(network):
    volume = scan()
    query = points.by_sam(volume, RULE, network)
    key = points.by_sam(scan(seed=4), RULE, network)
    found = points.find(inner_points(volume, 60, 0), query, key)
    inverse = np.linalg.inv(key.scan.affine_mm)
    at = found.points_mm @ inverse[:3, :3].T + inverse[:3, 3]
    # The last fine voxel may begin half a voxel of 1.5 mm before the edge.
    assert (at > -2.5).all() and (at < np.array(SHAPE) + 1.5).all()


def test_the_top_of_a_parabola_is_found():
    angles = (np.arange(8) - 3.3) / 8
    vectors = np.zeros((1, 1, 8, 2), np.float32)
    vectors[0, 0, :, 0], vectors[0, 0, :, 1] = np.cos(angles), np.sin(angles)
    grid = Grid((1, 1, 8), np.diag([1.0, 1.0, 1.0, 1.0]))
    made = points.DescribedScan(
        jnp.asarray(vectors), grid, np.ones((1, 1, 8), bool), grid, "row"
    )
    query = Grid((1, 1, 1), np.eye(4))
    one = points.DescribedScan(
        jnp.array([[[[1.0, 0.0]]]]), query, np.ones((1, 1, 1), bool), query,
        "one",
    )  # fmt: skip
    found = points.find(np.zeros((1, 3)), one, made)
    np.testing.assert_allclose(found.points_mm[0], [0, 0, 3.3], atol=0.01)


def test_a_point_outside_is_refused():
    volume = scan()
    described = by_mind(volume)
    with pytest.raises(UserError, match=r"point 2 .* lies outside scan.nii.gz"):
        points.find(
            np.array([inner_points(volume)[0], [500.0, 0, 0]]), described, described
        )


def test_no_points_are_no_matches():
    described = by_mind(scan())
    found = points.find(np.zeros((0, 3)), described, described)
    assert found.points_mm.shape == (0, 3) and found.similarity.shape == (0,)


def test_intensities_are_those_of_sam():
    ct = IntensityRule("ct", sam.HU_RANGE)
    scaled = np.array([0.0, 0.25, 1.0], np.float32)
    np.testing.assert_allclose(points.in_sam_range(scaled, ct), [-50, 13.75, 205])
    np.testing.assert_allclose(points.in_sam_range(scaled, RULE), [-50, 13.75, 205])
    narrow = IntensityRule("ct", (-1024.0, 1023.5))
    np.testing.assert_allclose(
        points.in_sam_range(scaled, narrow), [-50, -18.125, 77.5], atol=1e-4
    )
    assert isinstance(points.in_sam_range(scaled, ct), np.ndarray)


def test_a_network_of_ct_is_shown_nothing_else():
    network = sam.TrainedSam(CONFIG, {})
    with pytest.raises(UserError, match="knows CT alone, scan.nii.gz is another"):
        points.by_sam(scan(), RULE, network)
