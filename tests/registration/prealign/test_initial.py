"""A given transform in the place of a pre-alignment, with networks that answer 0."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.io import transforms
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair
from jaxreg.registration.prealign import initial
from jaxreg.space import sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo

SHAPE = (16, 15, 17)
NETWORK_GRID = (16, 15, 17)  # the scans' own: nothing is read between voxels
OPTIONS = options_lib.Options(shape=NETWORK_GRID, io_iterations=None)


@dataclasses.dataclass(frozen=True)
class Shifting(RegistrationModel):
    """Answers with one shift, in unit coordinates."""

    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def init(self, key, shape):
        return {}

    def apply(self, variables, moving, fixed, *, train=False, batching=None):
        field = jnp.zeros((*fixed.shape[:4], 3)) + jnp.asarray(self.shift)
        return Prediction(Transform((Displacement(field),))), variables


def network(*shift: float) -> zoo.LoadedModel:
    bundle = bundle_lib.Bundle(
        {}, "known", {}, {"orientation": "any"}, "a test", "none"
    )
    return zoo.LoadedModel("known", Shifting(shift or (0.0, 0.0, 0.0)), {}, bundle)


def grid_at(origin=(-10.0, -12.0, -14.0)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * (1.5, 1.0, 1.2)
    affine[:3, 3] = origin
    return Grid(SHAPE, affine)


def blobs(grid: Grid, shift=0.0, seen_through: np.ndarray | None = None) -> Volume:
    """Blobs at fixed places, moved by a shift, as a map of fixed to moving mm says."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    place = index @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3] - shift
    if seen_through is not None:
        back = np.linalg.inv(seen_through)
        place = place @ back[:3, :3].T + back[:3, 3]
    array = np.zeros(grid.shape)
    for centre, width, height in (
        ((-1.0, -3.0, -2.0), 4.0, 1.0), ((3.0, -7.0, 3.0), 2.0, 0.7),
    ):  # fmt: skip
        distance = np.sum((place - centre) ** 2, axis=-1)
        array += height * np.exp(-distance / (2 * width**2))
    return Volume((1000 * array).astype(np.float32), grid, "blobs.nii.gz")


def turned() -> np.ndarray:
    """40 degrees, stretched, and 300 mm away."""
    c, s = np.cos(np.radians(40)), np.sin(np.radians(40))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.1]])
    matrix[:3, 3] = 300.0, -20.0, 4.0
    return matrix


def bend(grid: Grid) -> Transform:
    """A smooth displacement of up to 2 mm on the fixed grid, then `turned`."""
    points = np.asarray(sampling.identity(grid.shape))
    field = 0.1 * np.sin(np.pi * points[..., ::-1]) * points[..., [1, 2, 0]]
    unit = Transform((Displacement(field.astype(np.float32)),))
    return transform_lib.in_world(unit, grid, grid).then(Transform((Affine(turned()),)))


def places(grid: Grid) -> np.ndarray:
    """Voxel centres and points between them, 1 P 3 in mm."""
    index = np.random.default_rng(0).integers(0, np.asarray(grid.shape), (30, 3))
    return Affine(grid.affine_mm)(index.astype(np.float64))[None]


def moved_scan() -> Volume:
    """The blobs where `turned` puts them."""
    middle = grid_at().affine_mm @ [*(np.asarray(SHAPE) - 1) / 2, 1.0]
    origin = (turned() @ middle)[:3] - (middle[:3] - grid_at().affine_mm[:3, 3])
    return blobs(grid_at(origin), seen_through=turned())


@pytest.mark.parametrize("kind", ["matrix", "field"])
def test_where_the_network_adds_nothing_the_result_is_what_was_given(kind, tmp_path):
    fixed, moving = blobs(grid_at()), moved_scan()
    given = Transform((Affine(turned()),)) if kind == "matrix" else bend(fixed.grid)
    path = tmp_path / "initial.h5"
    transforms.write_transform(path, given)
    result = pair.register(moving, fixed, network(), OPTIONS, initial=path)
    at = places(fixed.grid)
    expected = given.map_points(at)
    np.testing.assert_allclose(result.transform.map_points(at), expected, atol=1e-3)
    assert result.prealigned_from == "the given transform"
    assert result.inverse is not None
    back = result.inverse.map_points(expected)
    inside = np.abs(back - at).max(-1) < 1.0  # of points that lie in the moving scan
    assert inside.mean() > 0.4
    # A bent inverse is read linearly between its voxels of up to 1.5 mm.
    tolerance = 5e-3 if kind == "matrix" else 0.15
    np.testing.assert_allclose(back[inside], at[inside], atol=tolerance)


def test_what_the_network_adds_comes_before_what_was_given():
    """The network sees the moving scan over the fixed one's grid, as pre-aligned."""
    fixed, moving = blobs(grid_at()), moved_scan()
    given = Transform((Affine(turned()),))
    shift = (0.1, -0.05, 0.02)
    options = dataclasses.replace(OPTIONS, inverse=False)
    result = pair.register(moving, fixed, network(*shift), options, initial=given)
    at = places(fixed.grid)
    added = result.fixed_grid.unit_to_mm[:3, :3] @ shift
    np.testing.assert_allclose(
        result.transform.map_points(at), given.map_points(at + added), atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("bent", [False, True])
def test_a_displacement_without_weights_starts_from_it(bent):
    """300 mm apart and turned by 40 degrees, with 2 mm left to find."""
    fixed, moving = blobs(grid_at()), moved_scan()
    near = turned()
    near[:3, 3] += 1.5, -1.0, 0.0
    options = options_lib.Options(
        shape=(8, 8, 8), io_target="displacement", io_iterations=15, inverse=False
    )
    given = Transform((Affine(near),))
    if bent:
        back = Affine(np.linalg.inv(turned()))
        given = bend(fixed.grid).then(Transform((back,))).then(given)
    result = pair.register(moving, fixed, None, options, initial=given)
    at = np.array([[[-1.0, -3.0, -2.0], [3.0, -7.0, 3.0]]])
    before, after = (
        np.linalg.norm(t.map_points(at) - Affine(turned())(at), axis=-1).max()
        for t in (given, result.transform)
    )
    assert after < 0.6 * before
    assert result.similarity_prealigned is not None
    assert result.similarity_after < result.similarity_prealigned


@pytest.mark.parametrize(
    ("change", "given", "words"),
    [
        ({"prealign": "affine"}, np.eye(4), "leave one of the two away"),
        ({"stored_orientation": True}, np.eye(4), "leave one of the two away"),
        ({}, np.linalg.inv(turned()), "fixed to moving points.*its inverse"),
        ({}, np.diag([1.0, 1, 0, 1]), "singular"),
    ],
)
def test_mistakes_are_sentences(change, given, words):
    fixed, moving = blobs(grid_at()), moved_scan()
    if "singular" in words:
        moving = fixed
    options = dataclasses.replace(OPTIONS, **change)
    with pytest.raises(UserError, match=words):
        pair.register(
            moving, fixed, network(), options, initial=Transform((Affine(given),))
        )


def test_a_field_that_does_not_cover_the_scan_is_told():
    fixed = blobs(grid_at())
    small = Grid((8, 8, 8), fixed.grid.affine_mm)
    given = bend(small)
    with pytest.warns(UserWarning, match="beyond the displacement field"):
        found = initial.prealignment(given, fixed, moved_scan())
    at = places(small)
    np.testing.assert_allclose(
        found.transform.map_points(at), given.map_points(at), atol=1e-3
    )
