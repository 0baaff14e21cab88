"""Affine pre-alignment: known maps between scans of different grids."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.space import affine, sampling
from jaxreg.space.grid import Grid
from jaxreg.space.transform import Affine, Displacement, Transform


def grid(shape, seed):
    """An oblique grid of unequal spacing."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix[:3, :3] = rotation * [2.5, 1.5, 0.8]
    matrix[:3, 3] = rng.uniform(-100, 100, 3)
    return Grid(shape, matrix)


FIXED, MOVING = grid((4, 6, 9), 0), grid((7, 5, 8), 1)


def some_affine(seed=2):
    matrix = np.eye(4)
    matrix[:3] += 0.2 * np.random.default_rng(seed).normal(size=(3, 4))
    return matrix


def mm_of(transform, points_mm):
    """Where fixed mm go, by way of the unit cubes."""
    unit = Affine(np.linalg.inv(FIXED.unit_to_mm))(points_mm)
    return Affine(MOVING.unit_to_mm)(transform.map_points(unit))


def test_maps_in_mm_and_back():
    matrix = some_affine()
    transform = affine.from_mm(matrix, FIXED, MOVING)
    points = np.random.default_rng(0).uniform(-50, 50, (5, 3))
    np.testing.assert_allclose(mm_of(transform, points), Affine(matrix)(points))
    np.testing.assert_allclose(affine.to_mm(transform, FIXED, MOVING), matrix)
    traced = affine.from_mm(jnp.asarray(matrix), FIXED, MOVING)
    np.testing.assert_allclose(mm_of(traced, points), Affine(matrix)(points), atol=1e-3)


def test_a_field_has_no_matrix():
    field = Transform((Displacement(np.zeros((1, 2, 2, 2, 3), np.float32)),))
    with pytest.raises(ValueError, match="a Displacement, not affine"):
        affine.to_mm(field, FIXED, MOVING)


def test_middles_meet():
    transform = affine.centres(FIXED, MOVING)
    middle = np.full((1, 3), 0.5)
    np.testing.assert_allclose(transform.map_points(middle), middle)
    # A shift in mm, whatever the spacing.
    shift = affine.to_mm(transform, FIXED, MOVING)
    np.testing.assert_allclose(shift[:3, :3], np.eye(3), atol=1e-12)


def test_centres_of_mass_meet():
    fixed, moving = np.full(FIXED.shape, -5.0), np.ones((1, *MOVING.shape, 1))
    fixed[1, 4, 3] = fixed[3, 4, 3] = 7
    moving[0, 5, 1, 6] = 3
    transform = affine.centres_of_mass(fixed, moving, FIXED, MOVING)
    start = FIXED.voxel_to_mm @ [2, 4, 3, 1]
    end = MOVING.voxel_to_mm @ [5, 1, 6, 1]
    np.testing.assert_allclose(mm_of(transform, start[None, :3])[0], end[:3], atol=1e-4)


def test_a_constant_image_has_its_mass_in_its_middle():
    found = affine.centres_of_mass(
        np.zeros(FIXED.shape), np.ones(MOVING.shape), FIXED, MOVING
    )
    expected = affine.centres(FIXED, MOVING).steps[0].matrix
    np.testing.assert_allclose(found.steps[0].matrix, expected, atol=1e-6)


def test_fit_finds_the_map_of_exact_points():
    points = np.random.default_rng(3).uniform(size=(9, 3)).astype(np.float32)
    matrix = some_affine()
    found = affine.fit(points, Affine(matrix.astype(np.float32))(points))
    np.testing.assert_allclose(found, matrix, atol=1e-5)


def test_fit_is_that_of_the_homogeneous_equations():
    rng = np.random.default_rng(4)
    start, end = rng.uniform(size=(2, 20, 3)).astype(np.float32)
    ones = np.ones((20, 1))
    rows = [np.concatenate([p, ones], 1).astype(np.float64) for p in (start, end)]
    solution = np.linalg.lstsq(*rows, rcond=None)[0].T
    np.testing.assert_allclose(affine.fit(start, end), solution, atol=1e-5)


def test_points_without_weight_do_not_count():
    rng = np.random.default_rng(5)
    start, end = rng.uniform(size=(2, 12, 3)).astype(np.float32)
    weight = np.array([1.0] * 8 + [0.0] * 4, np.float32)
    found = affine.fit(start, end, weight)
    np.testing.assert_allclose(found, affine.fit(start[:8], end[:8]), atol=1e-5)
    twice = affine.fit(start[:8], end[:8], np.full(8, 2.0, np.float32))
    np.testing.assert_allclose(found, twice, atol=1e-5)


def test_fitted_the_other_way_and_inverted():
    rng = np.random.default_rng(6)
    fixed = rng.uniform(size=(30, 3)).astype(np.float32)
    moving = fixed + 0.05 * rng.normal(size=fixed.shape).astype(np.float32)
    (step,) = affine.from_points(fixed, moving).steps
    backward = np.linalg.inv(np.asarray(affine.fit(moving, fixed), np.float64))
    np.testing.assert_allclose(step.matrix, backward, atol=1e-5)
    assert np.abs(step.matrix - affine.fit(fixed, moving)).max() > 1e-3


def test_displacement_of_a_matrix():
    matrix = some_affine()
    field = affine.displacement(matrix, (2, 3, 4))
    points = np.asarray(sampling.identity((2, 3, 4)), np.float64)
    np.testing.assert_allclose(points + field, Affine(matrix)(points), atol=1e-6)
