"""Pre-alignment: against arrays of the released code, and known maps of an image."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg import matching, prealign
from jaxreg.errors import UserError
from jaxreg.space import affine, sampling
from jaxreg.space.grid import Grid

NAME = "sam_match_small"
# Unit coordinates along D H W to (x, y, z) from -1 to 1.
TO_XYZ = np.array([[0, 0, 2, -1], [0, 2, 0, -1], [2, 0, 0, -1], [0, 0, 0, 1.0]])


def distance(value, reference):
    """The largest error relative to the largest value."""
    return np.abs(value - reference).max() / np.abs(reference).max()


def matches_of(query, key):
    return matching.Matches(query, key, np.ones(len(query), np.float32))


@pytest.fixture(scope="module")
def kept(golden):
    """The stored matches, with the shapes of moving and fixed image."""
    g = golden(NAME)
    matches = matches_of(g["kept_query_zyx"], g["kept_key_zyx"])
    return matches, g["source_mask"].shape, g["target_mask"].shape


@pytest.mark.golden
def test_affine_from_matches(golden, kept):
    g = golden(NAME)
    (step,) = prealign.matched_affine(*kept).steps
    unit = np.asarray(step.matrix, np.float64)
    matrix = TO_XYZ @ unit @ np.linalg.inv(TO_XYZ)
    assert distance(matrix[:3], g["affine_inv"]) < 1e-4
    assert distance(np.linalg.inv(matrix)[:3], g["affine"]) < 1e-4


@pytest.mark.golden
def test_coarse_field_from_matches(golden, kept):
    g = golden(NAME)
    config = prealign.CoarseConfig(stride=int(g["coarse_control_stride"]))
    (step,) = prealign.matched_field(*kept, config).steps
    shape = step.field.shape[1:4]
    phi = 2 * np.asarray(sampling.identity(shape) + step.field) - 1
    assert distance(np.moveaxis(phi, -1, 1), g["coarse_phi"]) < 1e-4


def test_coarse_field_leads_nearer_to_the_matches_than_the_affine_map():
    # Sizes of the test above, so that no second program is compiled.
    shape, config = (32, 48, 48), prealign.CoarseConfig(stride=8)
    fixed = np.random.default_rng(0).integers(8, np.array(shape) - 8, (200, 3))
    bent = fixed + np.rint(3 * np.sin(fixed[:, ::-1] / 10)).astype(int)
    matches = matches_of(bent, fixed)
    last = np.array(shape) - 1

    def error(transform):
        found = transform.map_points((fixed / last)[None].astype(np.float32))
        return np.linalg.norm(found[0] * last - bent, axis=1).mean()

    linear = error(prealign.matched_affine(matches, shape, shape))
    assert error(prealign.matched_field(matches, shape, shape, config)) < 0.7 * linear


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (np.zeros((0, 3), int), "0 matched points along 0 directions"),
        (np.eye(3, dtype=int), "3 matched points along 2 directions"),
        (np.arange(30).reshape(10, 3) * [1, 1, 0], "10 matched points along 1"),
    ],
)
def test_too_few_matches_are_refused(query, said):
    with pytest.raises(UserError, match=said):
        prealign.matched_affine(matches_of(query, query), (32, 32, 32), (32, 32, 32))


def test_matches_in_a_plane_of_either_image_are_refused():
    points = np.random.default_rng(0).integers(0, 32, (20, 3))
    flat = points * [1, 0, 1]
    for query, key in ((points, flat), (flat, points)):
        with pytest.raises(UserError, match="20 matched points along 2 directions"):
            prealign.matched_affine(matches_of(query, key), (32, 32, 32), (32, 32, 32))


def test_small_images_have_no_coarse_field():
    points = np.random.default_rng(0).integers(0, 30, (9, 3))
    with pytest.raises(UserError, match="two control points 16 voxels apart"):
        prealign.matched_field(matches_of(points, points), (64, 64, 64), (64, 31, 64))


# --- from intensities, with an image that is known everywhere ------------------------


_RNG = np.random.default_rng(0)
BLOBS_MM = _RNG.uniform(-22, 22, (12, 3))
HEIGHTS, SIZES_MM = _RNG.uniform(0.3, 1, 12), _RNG.uniform(5, 9, 12)


def intensity(points_mm):
    """A smooth image in mm about its middle: ... 3 to ... ."""
    squares = ((points_mm[..., None, :] - BLOBS_MM) ** 2).sum(-1)
    return (HEIGHTS * np.exp(-squares / (2 * SIZES_MM**2))).sum(-1)


def grid(shape, spacing_mm, middle_mm):
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag(spacing_mm)[::-1]
    matrix[:3, 3] = middle_mm - matrix[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, matrix)


FIXED = grid((24, 28, 32), (2.5, 2.2, 1.8), (0.0, 0.0, 0.0))
MOVING = grid((26, 24, 30), (2.2, 2.5, 2.0), (100.0, -40.0, 7.0))


def rotation(axis, degrees):
    i, j = ((1, 2), (0, 2), (0, 1))[axis]
    matrix, angle = np.eye(3), np.deg2rad(degrees)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[j, i], matrix[i, j] = np.sin(angle), -np.sin(angle)
    return matrix


def mapping(linear, shift_mm):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, shift_mm
    return matrix


TURNED = mapping(rotation(0, 8) @ rotation(2, -10), (104.0, -37.0, 4.0))
SHEARED = mapping(
    [[1.1, 0.08, 0.0], [0.0, 0.92, -0.06], [0.05, 0.0, 1.05]], (98.0, -42.0, 8.0)
)


def voxels_mm(grid):
    axes = [np.arange(n) for n in grid.shape]
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    return voxels @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]


def images_of(truth):
    """Fixed and moving image, so that moving[truth(x)] is fixed[x]."""
    back = np.linalg.inv(truth)
    fixed = intensity(voxels_mm(FIXED))
    moving = intensity(voxels_mm(MOVING) @ back[:3, :3].T + back[:3, 3])
    return [jnp.asarray(a, jnp.float32)[None, ..., None] for a in (fixed, moving)]


def error_mm(transform, truth):
    """The largest error at the fixed image's corners."""
    wrong = affine.to_mm(transform, FIXED, MOVING) - truth
    corners = voxels_mm(FIXED)[:: FIXED.shape[0] - 1, :: FIXED.shape[1] - 1]
    corners = corners[:, :, :: FIXED.shape[2] - 1].reshape(-1, 3)
    return np.linalg.norm(corners @ wrong[:3, :3].T + wrong[:3, 3], axis=1).max()


@pytest.mark.parametrize("truth", [TURNED, SHEARED], ids=["turned", "sheared"])
def test_known_affine_is_recovered(truth):
    assert error_mm(affine.centres(FIXED, MOVING), truth) > 7
    found = prealign.intensity_affine(*images_of(truth), FIXED, MOVING)
    assert error_mm(found, truth) < 0.2  # a tenth of a voxel


def test_known_affine_is_recovered_across_modalities():
    fixed, moving = images_of(SHEARED)
    config = prealign.IntensityConfig(loss="mind", levels=1, iterations=80)
    found = prealign.intensity_affine(fixed, 1.5 - moving, FIXED, MOVING, config=config)
    assert error_mm(found, SHEARED) < 0.4


def test_a_good_start_stays_and_the_mask_counts():
    fixed, moving = images_of(TURNED)
    config = prealign.IntensityConfig(levels=1, iterations=20, step=0.05)
    start = affine.from_mm(TURNED, FIXED, MOVING)
    half = jnp.zeros_like(fixed).at[:, 12:].set(1.0)
    spoilt = jnp.where(half > 0, fixed, jnp.flip(fixed, (2, 3)))
    found = prealign.intensity_affine(
        spoilt, moving, FIXED, MOVING, start=start, fixed_mask=half, config=config
    )
    whole = prealign.intensity_affine(
        spoilt, moving, FIXED, MOVING, start=start, config=config
    )
    assert error_mm(found, TURNED) < 0.3 < error_mm(whole, TURNED)


def test_what_makes_things_worse_is_not_kept():
    fixed = jnp.asarray(np.random.default_rng(2).normal(size=(1, *FIXED.shape, 1)))
    config = prealign.IntensityConfig(levels=1, iterations=1, step=50.0)
    found = prealign.intensity_affine(fixed, fixed, FIXED, FIXED, config=config)
    np.testing.assert_allclose(affine.to_mm(found, FIXED, FIXED), np.eye(4), atol=1e-6)


@pytest.mark.parametrize("loss", ["mind", "ncc"])
def test_images_thrown_out_of_each_other_are_not_alike(loss):
    """Of no voxels, or of a few, the losses are small."""
    rng = np.random.default_rng(2)
    fixed, moving = (jnp.asarray(rng.normal(size=(1, 8, 8, 8, 1)), "f4") for _ in "ab")
    over = grid((8, 8, 8), (1, 1, 1), (0, 0, 0))
    away = np.zeros((3, 4))
    for shift, far in (((0, 0, 7.0), False), ((0, 0, 50.0), True)):
        away[:, 3] = shift
        same, inverse = np.eye(4), np.linalg.inv(over.unit_to_mm)
        level = (fixed, moving, jnp.ones_like(fixed), over.unit_to_mm, inverse, 1.0)
        value, share = prealign._unlikeness(level, 1.0, loss, jnp.asarray(away))
        assert float(share) == (0 if far else 1 / 8)
        assert np.isinf(prealign.unlikeness(value, share)) == far
    config = prealign.IntensityConfig(loss=loss, levels=1, iterations=1, step=200.0)
    found = prealign.intensity_affine(fixed, moving, over, over, config=config)
    np.testing.assert_allclose(affine.to_mm(found, over, over), same, atol=1e-6)


def test_levels_halve_the_finer_axes_first():
    config = prealign.IntensityConfig(levels=3, most_voxels=64 * 64 * 16)
    levels = prealign._levels(grid((16, 128, 128), (5.0, 1.0, 1.0), (0, 0, 0)), config)
    shapes = [level.shape for level in levels]
    assert shapes == [(8, 16, 16), (16, 32, 32), (16, 64, 64)]
    np.testing.assert_allclose(levels[0].spacing_mm, [10, 8, 8])


def test_pyramid_averages_pairs_of_voxels():
    image = jnp.arange(32.0).reshape(1, 2, 2, 8, 1)
    coarse, fine = prealign._pyramid(image, ((2, 1, 2), (2, 2, 4)))
    np.testing.assert_allclose(fine[0, 0, 0, :, 0], [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(coarse[0, :, 0, :, 0], [[5.5, 9.5], [21.5, 25.5]])


def test_images_off_their_grids_are_refused():
    image = jnp.zeros((1, 4, 4, 4, 1))
    with pytest.raises(UserError, match="the fixed image has shape"):
        prealign.intensity_affine(image, image, FIXED, MOVING)


@pytest.mark.parametrize("change", [{"loss": "mse"}, {"levels": 0}, {"step": 0.0}])
def test_settings_that_are_refused(change):
    with pytest.raises(UserError, match="a loss of ncc, mind and positive"):
        prealign.IntensityConfig(**change)
