"""Pre-alignment from matched points: against arrays of the released code."""

import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.matching import nearest
from jaxreg.registration.prealign import from_matches
from jaxreg.space import sampling

NAME = "sam_match_small"
# Unit coordinates along D H W to (x, y, z) from -1 to 1.
TO_XYZ = np.array([[0, 0, 2, -1], [0, 2, 0, -1], [2, 0, 0, -1], [0, 0, 0, 1.0]])


def distance(value, reference):
    """The largest error relative to the largest value."""
    return np.abs(value - reference).max() / np.abs(reference).max()


def matches_of(query, key):
    return nearest.Matches(query, key, np.ones(len(query), np.float32))


@pytest.fixture(scope="module")
def kept(golden):
    """The stored matches, with the shapes of moving and fixed image."""
    g = golden(NAME)
    matches = matches_of(g["kept_query_zyx"], g["kept_key_zyx"])
    return matches, g["source_mask"].shape, g["target_mask"].shape


@pytest.mark.golden
def test_affine_from_matches(golden, kept):
    g = golden(NAME)
    (step,) = from_matches.matched_affine(*kept).steps
    unit = np.asarray(step.matrix, np.float64)
    matrix = TO_XYZ @ unit @ np.linalg.inv(TO_XYZ)
    assert distance(matrix[:3], g["affine_inv"]) < 1e-4
    assert distance(np.linalg.inv(matrix)[:3], g["affine"]) < 1e-4


@pytest.mark.golden
def test_coarse_field_from_matches(golden, kept):
    g = golden(NAME)
    config = from_matches.CoarseConfig(stride=int(g["coarse_control_stride"]))
    (step,) = from_matches.matched_field(*kept, config).steps
    shape = step.field.shape[1:4]
    phi = 2 * np.asarray(sampling.identity(shape) + step.field) - 1
    assert distance(np.moveaxis(phi, -1, 1), g["coarse_phi"]) < 1e-4


def test_coarse_field_leads_nearer_to_the_matches_than_the_affine_map():
    # Sizes of the test above, so that no second program is compiled.
    shape, config = (32, 48, 48), from_matches.CoarseConfig(stride=8)
    fixed = np.random.default_rng(0).integers(8, np.array(shape) - 8, (200, 3))
    bent = fixed + np.rint(3 * np.sin(fixed[:, ::-1] / 10)).astype(int)
    matches = matches_of(bent, fixed)
    last = np.array(shape) - 1

    def error(transform):
        found = transform.map_points((fixed / last)[None].astype(np.float32))
        return np.linalg.norm(found[0] * last - bent, axis=1).mean()

    linear = error(from_matches.matched_affine(matches, shape, shape))
    assert (
        error(from_matches.matched_field(matches, shape, shape, config)) < 0.7 * linear
    )


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
        from_matches.matched_affine(
            matches_of(query, query), (32, 32, 32), (32, 32, 32)
        )


def test_matches_in_a_plane_of_either_image_are_refused():
    points = np.random.default_rng(0).integers(0, 32, (20, 3))
    flat = points * [1, 0, 1]
    for query, key in ((points, flat), (flat, points)):
        with pytest.raises(UserError, match="20 matched points along 2 directions"):
            from_matches.matched_affine(
                matches_of(query, key), (32, 32, 32), (32, 32, 32)
            )


def test_small_images_have_no_coarse_field():
    points = np.random.default_rng(0).integers(0, 30, (9, 3))
    with pytest.raises(UserError, match="two control points 16 voxels apart"):
        from_matches.matched_field(
            matches_of(points, points), (64, 64, 64), (64, 31, 64)
        )
