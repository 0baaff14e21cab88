"""Transform files against ITK and against what the original wrote."""

import itertools
import re
import struct
import warnings

import h5py
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.errors import UserError
from jaxreg.io import (
    displacements,
    itk_fields,
    itk_linear,
    itk_transforms,
    transforms,
    volumes,
    workers,
)
from jaxreg.space import sampling
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import (
    Affine,
    Displacement,
    Transform,
    beyond_percent,
    in_world,
)
from jaxreg.space.warping import displacement_mm, jacobian_map, warp_volume

LPS = np.array([-1.0, -1.0, 1.0])
ITK_FORMATS = [".h5", ".hdf5", ".tfm", ".txt"]


def grid_of(size, origin, spacing, direction):
    """The grid of an ITK image; everything in x, y, z order and LPS."""
    affine = np.eye(4)
    affine[:3, :3] = (direction * spacing)[:, ::-1]
    affine[:3, 3] = origin
    affine[:2] *= -1
    return Grid(tuple(int(n) for n in size[::-1]), affine)


def golden_grid(g, role):
    return grid_of(
        *(g[f"{role}_{key}"] for key in ("size", "origin", "spacing", "direction"))
    )


def golden_transform(g):
    shape = g["phi"].shape[2:]
    field = np.moveaxis(g["phi"] - g["identity"], 1, -1)
    fixed, moving = (
        golden_grid(g, role).resized(shape) for role in ("fixed", "moving")
    )
    return in_world(Transform((Displacement(field),)), fixed, moving)


def rotation(a, b, c):
    def plane(angle, i, j):
        matrix = np.eye(3)
        matrix[[i, i, j, j], [i, j, i, j]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        return matrix

    return plane(a, 0, 1) @ plane(b, 1, 2) @ plane(c, 0, 2)


FIXED = grid_of((13, 11, 10), (10, -30, 5), (1.25, 1.0, 1.8), rotation(0.2, 3.0, 0.3))
MOVING = grid_of((12, 15, 9), (14, -28, 6), (0.9, 1.1, 2.2), rotation(0.25, 2.9, 0.2))
NETWORK = (8, 7, 9)


def smooth_image(shape, seed=0):
    coarse = np.random.default_rng(seed).uniform(0, 1, (1, 4, 4, 4, 1))
    return np.asarray(sampling.resize_half_pixel(jnp.asarray(coarse, "f4"), shape))[
        0, ..., 0
    ]


def smooth_field(shape=NETWORK, size=0.06, seed=1):
    coarse = np.random.default_rng(seed).normal(0, size, (1, 4, 4, 4, 3))
    return np.asarray(sampling.resize_half_pixel(jnp.asarray(coarse, "f4"), shape))


def example(*steps):
    """A transform between FIXED and MOVING with these unit steps."""
    steps = steps or (Displacement(smooth_field()),)
    return in_world(Transform(steps), FIXED.resized(NETWORK), MOVING.resized(NETWORK))


def prealign():
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(0.1, -0.05, 0.08)
    matrix[:3, 3] = (0.02, -0.03, 0.01)
    return Affine(matrix)


def points_in(grid, count=40, seed=2, margin=0.0):
    """Random RAS points inside a grid's extent."""
    unit = np.random.default_rng(seed).uniform(-margin, 1 + margin, (count, 3))
    return unit @ grid.unit_to_mm[:3, :3].T + grid.unit_to_mm[:3, 3]


def itk_image(itk, array, grid):
    image = itk.image_from_array(np.ascontiguousarray(array))
    affine = np.diag([*LPS, 1]) @ grid.affine_mm[:, [2, 1, 0, 3]]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(affine[:3, :3] / spacing))
    return image


def itk_read(itk, path):
    read = itk.transformread(str(path))
    assert len(read) == 1
    return read[0]


def itk_map(transform, points):
    return (
        np.array([transform.TransformPoint((p * LPS).tolist()) for p in points]) * LPS
    )


def itk_warp(itk, moving, transform):
    """ITK's own linear resampling of a volume onto FIXED."""
    image = itk_image(itk, moving.array.astype(np.float32), moving.grid)
    reference = itk_image(itk, np.zeros(FIXED.shape, np.float32), FIXED)
    return itk.array_from_image(
        itk.resample_image_filter(
            image,
            transform=transform,
            interpolator=itk.LinearInterpolateImageFunction.New(image),
            use_reference_image=True,
            reference_image=reference,
        )
    )


def itk_displacement(itk, vectors, spacing, origin, direction):
    """ITK's displacement field transform of vectors z y x 3 (LPS) in double."""
    image = itk.Image[itk.Vector[itk.D, 3], 3].New()
    image.SetRegions(list(vectors.shape[2::-1]))
    image.Allocate()
    itk.array_view_from_image(image)[:] = vectors
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(image)
    return transform


def itk_read_displacement(itk, path):
    image = itk.imread(str(path), itk.Vector[itk.F, 3])
    return itk_displacement(
        itk,
        itk.array_from_image(image),
        image.GetSpacing(),
        image.GetOrigin(),
        image.GetDirection(),
    )


# The fixture of the original.


@pytest.mark.golden
def test_golden_points(golden):
    g = golden("itk_transform")
    transform = golden_transform(g)
    for name in ("points", "points_outside"):
        # Where the field's box ends it jumps: a point there may fall on either side.
        got = transform.map_points(g[f"{name}_in"] * LPS) * LPS
        np.testing.assert_allclose(got, g[f"{name}_out"], atol=1e-4)


@pytest.mark.golden
def test_golden_warps(golden):
    g = golden("itk_transform")
    transform, fixed = golden_transform(g), golden_grid(g, "fixed")
    moving = Volume(g["moving"], golden_grid(g, "moving"))
    warped = warp_volume(moving, transform, fixed)
    assert warped.array.dtype == g["warped_linear"].dtype
    off = np.abs(warped.array - g["warped_linear"])
    assert (off > 1e-4 * np.ptp(g["moving"])).mean() <= 1e-4
    labels = Volume(g["moving_labels"], golden_grid(g, "moving"))
    nearest = warp_volume(labels, transform, fixed, order=0).array
    assert nearest.dtype == g["warped_labels_nearest"].dtype
    # A voxel half-way between two labels may take either.
    assert (nearest != g["warped_labels_nearest"]).mean() <= 1e-3


@pytest.mark.golden
def test_golden_integers_are_rounded_where_the_original_truncates(golden):
    g = golden("itk_transform")
    transform, fixed = golden_transform(g), golden_grid(g, "fixed")
    labels = Volume(g["moving_labels"], golden_grid(g, "moving"))
    real = Volume(g["moving_labels"].astype(np.float32), labels.grid)
    exact = warp_volume(real, transform, fixed).array
    # Float32 puts a 2 at 1.99999: such voxels say nothing about truncation.
    clear = np.abs(exact - np.rint(exact)) > 1e-4
    original = g["warped_labels_linear_int16"]
    np.testing.assert_array_equal(np.trunc(exact)[clear], original[clear])
    rounded = warp_volume(labels, transform, fixed).array
    assert rounded.dtype == original.dtype
    np.testing.assert_array_equal(rounded, np.rint(exact))
    assert (np.abs(rounded) >= np.abs(original)).all()
    assert (rounded != original).any()


@pytest.mark.golden
def test_golden_displacement_field(golden):
    g = golden("itk_transform")
    got = displacement_mm(golden_transform(g), golden_grid(g, "fixed"))
    np.testing.assert_allclose(got * LPS, g["displacement_field"], atol=1e-4)


@pytest.mark.golden
def test_golden_jacobian(golden):
    g = golden("itk_transform")
    fixed = golden_grid(g, "fixed")
    got = jacobian_map(golden_transform(g), fixed)
    inside = (slice(1, -1),) * 3
    np.testing.assert_allclose(
        got[inside], g["jacobian_direction_aware_interior"], rtol=1e-4, atol=1e-4
    )
    # The original divides by the spacing along each array axis and leaves the
    # direction out, and halves the difference at the border.
    field = g["displacement_field"].astype(np.float64)
    matrix = np.zeros((*field.shape, 3))
    for axis in range(3):
        padded = np.pad(
            field, [(1, 1) if i == axis else (0, 0) for i in range(4)], mode="edge"
        )
        n = field.shape[axis]
        matrix[..., 2 - axis] = (
            padded.take(range(2, n + 2), axis) - padded.take(range(n), axis)
        ) / (2 * g["fixed_spacing"][2 - axis])
    original = np.linalg.det(np.eye(3) + matrix)
    np.testing.assert_allclose(original, g["jacobian"], rtol=1e-3, atol=1e-3)
    positive = g["jacobian"] > 0
    np.testing.assert_allclose(
        np.log(g["jacobian"][positive]), g["log_jacobian"][positive], rtol=1e-4
    )
    # With the direction the same differences give what jaxreg gives.
    aware = np.linalg.det(np.eye(3) + matrix @ g["fixed_direction"].T)
    np.testing.assert_allclose(got[inside], aware[inside], rtol=1e-3, atol=1e-3)


@pytest.mark.golden
def test_golden_file_is_read(golden, golden_path):
    g = golden("itk_transform")
    transform = transforms.read_transform(golden_path / "itk_transform.hdf5")
    for name in ("points", "points_outside"):
        got = transform.map_points(g[f"{name}_in"] * LPS) * LPS
        np.testing.assert_allclose(got, g[f"{name}_out"], atol=1e-4)
    assert [type(step) for step in transform.steps] == [Affine, Displacement, Affine]
    assert transform.steps[1].outside == "half_voxel"


@pytest.mark.golden
def test_golden_file_equals_ours(golden, golden_path, tmp_path):
    itk_transforms.write(
        tmp_path / "ours.h5", golden_transform(golden("itk_transform"))
    )
    with (
        h5py.File(golden_path / "itk_transform.hdf5") as theirs,
        h5py.File(tmp_path / "ours.h5") as ours,
    ):
        assert set(ours) == set(theirs)
        assert set(ours["TransformGroup"]) == set(theirs["TransformGroup"])
        for number, group in theirs["TransformGroup"].items():
            mine = ours["TransformGroup"][number]
            assert set(mine) == set(group)
            kind = group["TransformType"][0]
            expected = {key: group[key][()] for key in set(group) - {"TransformType"}}
            if kind == b"CenteredAffineTransform_double_3_3":
                # The same map with the centre left to the fixed parameters.
                kind = b"AffineTransform_double_3_3"
                given = expected["TransformParameters"]
                np.testing.assert_array_equal(
                    given[9:12], expected["TransformFixedParameters"]
                )
                expected["TransformParameters"] = np.delete(given, slice(9, 12))
            assert mine["TransformType"][0] == kind
            for key, values in expected.items():
                assert mine[key].dtype == values.dtype
                np.testing.assert_allclose(mine[key][()], values, rtol=1e-6, atol=1e-6)


# ITK itself.


@pytest.mark.parametrize("suffix", ITK_FORMATS)
def test_itk_maps_points_as_we_do(tmp_path, suffix):
    itk = pytest.importorskip("itk")
    path = tmp_path / f"t{suffix}"
    transforms.write_transform(path, example(), FIXED)
    theirs = itk_read(itk, path)
    assert theirs.GetNameOfClass() == "CompositeTransform"
    points = points_in(FIXED, margin=0.3)
    np.testing.assert_allclose(
        example().map_points(points), itk_map(theirs, points), atol=1e-4
    )


@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
def test_itk_resamples_as_warp_does(tmp_path, suffix):
    itk = pytest.importorskip("itk")
    path = tmp_path / f"t{suffix}"
    transforms.write_transform(path, example(), FIXED)
    moving = Volume(smooth_image(MOVING.shape), MOVING)
    theirs = itk_warp(itk, moving, itk_read(itk, path))
    ours = warp_volume(moving, example(), FIXED).array
    assert (theirs > 0).mean() > 0.2  # the two volumes do overlap
    inside = (theirs > 0) & (ours > 0)
    assert (inside != (theirs > 0)).mean() < 1e-3
    limit = 1e-3 * np.ptp(moving.array)
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=limit)


def test_itk_applies_the_nifti_displacement(tmp_path):
    itk = pytest.importorskip("itk")
    path = tmp_path / "t.nii.gz"
    transforms.write_transform(path, example(), FIXED)
    image = itk.imread(str(path), itk.Vector[itk.F, 3])
    np.testing.assert_allclose(
        itk.array_from_image(image), displacement_mm(example(), FIXED) * LPS, atol=1e-5
    )
    theirs = itk_read_displacement(itk, path)
    points = points_in(FIXED)
    read = transforms.read_transform(path)
    np.testing.assert_allclose(
        read.map_points(points), itk_map(theirs, points), atol=1e-4
    )
    moving = Volume(smooth_image(MOVING.shape), MOVING)
    warped = itk_warp(itk, moving, theirs)
    ours = warp_volume(moving, example(), FIXED).array
    inside = (warped > 0) & (ours > 0)
    limit = 1e-3 * np.ptp(moving.array)
    np.testing.assert_allclose(ours[inside], warped[inside], atol=limit)


def test_itk_agrees_on_both_intents_of_a_nifti_field(tmp_path):
    itk = pytest.importorskip("itk")
    path = tmp_path / "t.nii.gz"
    displacements.write_nifti(path, example(), FIXED)
    image = nib.load(path)
    image.header.set_intent("displacement vector")
    nib.save(image, tmp_path / "ras.nii.gz")
    read = displacements.read_nifti(tmp_path / "ras.nii.gz")
    theirs = itk_read_displacement(itk, tmp_path / "ras.nii.gz")
    points = points_in(FIXED)
    np.testing.assert_allclose(
        read.map_points(points), itk_map(theirs, points), atol=1e-4
    )


def random_parameters(itk_transform, count, rng, scale=0.2):
    parameters = itk_transform.GetParameters()
    values = np.array([parameters[i] for i in range(count)])
    values += scale * rng.normal(size=count)
    for i, value in enumerate(values):
        parameters[i] = value
    itk_transform.SetParameters(parameters)


def itk_kind(itk, name):
    kind = getattr(itk, name)
    for arguments in ((itk.D, 3), (itk.D,), (itk.D, 3, 3)):
        try:
            return kind[arguments if len(arguments) > 1 else arguments[0]].New()
        except (KeyError, itk.TemplateTypeError):
            continue
    raise AssertionError(name)


@pytest.mark.parametrize("suffix", [".h5", ".txt"])
@pytest.mark.parametrize(
    ("name", "zyx"),
    [
        (name, zyx)
        for name in itk_linear.KINDS
        for zyx in ((False, True) if "Euler" in name else (False,))
    ],
)
def test_reads_itks_linear_kinds(tmp_path, name, suffix, zyx):
    itk = pytest.importorskip("itk")
    theirs = itk_kind(itk, name)
    rng = np.random.default_rng(len(name))
    fixed = theirs.GetFixedParameters()
    for i in range(len(fixed)):
        fixed[i] = rng.uniform(-20, 20)
    if "Euler" in name:
        fixed[len(fixed) - 1] = float(zyx)
    theirs.SetFixedParameters(fixed)
    count = itk_linear.KINDS[name][0]
    if name == "Rigid3DTransform":  # its nine are a rotation
        parameters = theirs.GetParameters()
        for i, value in enumerate(rotation(0.3, 0.5, -0.2).ravel()):
            parameters[i] = value
        theirs.SetParameters(parameters)
    elif "Quaternion" in name:
        random_parameters(theirs, count, rng, scale=1.0)
    else:
        random_parameters(theirs, count, rng)
    path = tmp_path / f"t{suffix}"
    itk.transformwrite(theirs, str(path))
    points = points_in(FIXED)
    np.testing.assert_allclose(
        itk_transforms.read(path).map_points(points),
        itk_map(theirs, points),
        atol=1e-9,
    )


def matlab(path, *matrices, order="<", letter="d"):
    """Writes MATLAB's level 4 by its specification."""
    with open(path, "wb") as file:
        for name, values in matrices:
            kind = (1000 if order == ">" else 0) + {"d": 0, "f": 10}[letter]
            sizes = (kind, len(values), 1, 0, len(name) + 1)
            file.write(struct.pack(f"{order}5i", *sizes) + name.encode() + b"\0")
            file.write(struct.pack(f"{order}{len(values)}{letter}", *values))


@pytest.mark.parametrize("precision", ["double", "float"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "name", ["AffineTransform", "MatrixOffsetTransformBase", "Euler3DTransform"]
)
def test_reads_the_mat_of_ants(tmp_path, name, order, precision):
    rng = np.random.default_rng(3)
    values = rng.normal(size=itk_linear.KINDS[name][0])
    fixed = rng.normal(size=3)
    if precision == "float":
        values, fixed = values.astype("f4"), fixed.astype("f4")
    path = tmp_path / "0GenericAffine.mat"
    matlab(
        path, (f"{name}_{precision}_3_3", values), ("fixed", fixed), order=order,
        letter=precision[0],
    )  # fmt: skip
    points = points_in(FIXED)
    got = transforms.read_transform(path).map_points(points)
    if name == "Euler3DTransform":
        theirs = sitk.Euler3DTransform(fixed.tolist(), *values.tolist()[:3])
        theirs.SetTranslation(values[3:].tolist())
    else:
        theirs = sitk.AffineTransform(3)
        theirs.SetFixedParameters(fixed.tolist())
        theirs.SetParameters(values.tolist())
    np.testing.assert_allclose(got, itk_map(theirs, points), atol=1e-9)


def test_reads_the_mat_that_simpleitk_writes(tmp_path):
    theirs = sitk.AffineTransform(3)
    theirs.SetFixedParameters([1.0, -2.0, 3.0])
    theirs.SetParameters(np.random.default_rng(4).normal(size=12).tolist())
    sitk.WriteTransform(theirs, str(tmp_path / "t.mat"))
    points = points_in(FIXED)
    got = transforms.read_transform(tmp_path / "t.mat").map_points(points)
    np.testing.assert_allclose(got, itk_map(theirs, points), atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
def test_reads_a_b_spline_as_its_field(tmp_path, suffix, order):
    image = sitk.Image([20, 18, 16], sitk.sitkFloat32)
    image.SetSpacing([2.0, 1.5, 3.0])
    image.SetOrigin([-10.0, 5.0, 7.0])
    image.SetDirection(rotation(0.3, -0.2, 0.1).ravel().tolist())
    theirs = sitk.BSplineTransformInitializer(image, [3, 4, 2], order=order)
    count = len(theirs.GetParameters())
    theirs.SetParameters(np.random.default_rng(5).normal(0, 2.0, count).tolist())
    sitk.WriteTransform(theirs, str(tmp_path / f"t{suffix}"))
    rng = np.random.default_rng(6)
    inside = rng.uniform(0.0, 1.0, (100, 3)) * (19, 17, 15)
    # More than half of what samples are apart at most, 4 mm, beyond the outer faces.
    beyond = np.where(inside < (10, 9, 8), (-1.6, -2.0, -1.3), (20.6, 19.0, 16.3))
    index = np.concatenate([inside, beyond])
    points = np.array([image.TransformContinuousIndexToPhysicalPoint(i) for i in index])
    expected = np.array([theirs.TransformPoint(p.tolist()) for p in points])
    assert (expected[100:] == points[100:]).all()  # beyond its domain: the identity
    assert np.abs(expected - points)[:100].max() > 1
    got = itk_transforms.read(tmp_path / f"t{suffix}").map_points(points * LPS) * LPS
    assert np.abs(got - expected).max() < itk_fields.TOLERANCE_MM


def random_itk(rng):
    """Returns a transform of any of SimpleITK's classes, and its error in mm."""
    linear = [
        sitk.AffineTransform, sitk.Euler3DTransform, sitk.VersorTransform,
        sitk.VersorRigid3DTransform, sitk.Similarity3DTransform,
        sitk.ScaleVersor3DTransform, sitk.ScaleSkewVersor3DTransform,
        sitk.ComposeScaleSkewVersor3DTransform, sitk.ScaleTransform,
        sitk.TranslationTransform,
    ]  # fmt: skip
    number = rng.integers(len(linear) + 3)
    domain = sitk.Image([11, 12, 9], sitk.sitkFloat32)
    domain.SetSpacing([16.0, 15.0, 20.0])  # around all that may be mapped
    domain.SetOrigin([-80.0] * 3)
    if number == len(linear):
        vectors = rng.normal(0, 2.0, (9, 12, 11, 3))
        image = sitk.GetImageFromArray(vectors, isVector=True)
        image.CopyInformation(domain)
        # Rounded in float32: places of 160 mm, and what they are turned into.
        return sitk.DisplacementFieldTransform(image), 1e-4
    if number > len(linear):
        order = int(rng.integers(1, 4))
        theirs = sitk.BSplineTransformInitializer(domain, [4, 5, 3], order)
        count = len(theirs.GetParameters())
        theirs.SetParameters(rng.normal(0, 0.5, count).tolist())
        return theirs, itk_fields.TOLERANCE_MM + 1e-4
    kind = linear[number]
    theirs = kind(3) if number in (0, 8, 9) else kind()
    values = np.array(theirs.GetParameters())
    values += rng.normal(0, 0.05, values.size)
    theirs.SetParameters(values.tolist())
    if number != 9:
        theirs.SetCenter(rng.uniform(-10, 10, 3).tolist())
    if kind is sitk.Euler3DTransform:
        theirs.SetComputeZYX(bool(rng.integers(2)))
    invertible = "ScaleVersor ScaleSkewVersor ComposeScale".split()
    if not theirs.GetName().startswith(tuple(invertible)) and rng.integers(2):
        theirs = theirs.GetInverse()
    return theirs, 0.0


@pytest.mark.parametrize("seed", range(12))
def test_reads_whatever_simpleitk_writes(tmp_path, seed):
    """Chains of any classes, composites within composites once they are flat."""
    rng = np.random.default_rng(seed)
    drawn = [random_itk(rng) for _ in range(rng.integers(1, 6))]
    parts, errors = zip(*drawn, strict=True)
    theirs = parts[0]
    if len(parts) > 1:
        half = len(parts) // 2
        nested = [
            sitk.CompositeTransform(list(p)) for p in (parts[:half], parts[half:])
        ]
        theirs = sitk.CompositeTransform(nested)
        theirs.FlattenTransform()
    suffixes = [".h5", ".tfm", ".mat"] if len(parts) == 1 else [".h5", ".tfm"]
    points = rng.uniform(-15, 15, (50, 3))
    expected = itk_map(theirs, points)
    # What one part is off, those after it stretch by less than a half.
    atol = 1e-9 + 1.5 ** (len(parts) - 1) * sum(errors)
    for suffix in suffixes:
        path = tmp_path / f"t{suffix}"
        sitk.WriteTransform(theirs, str(path))
        got = transforms.read_transform(path).map_points(points)
        np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


def test_affines_are_of_the_kind_that_every_reader_knows(tmp_path):
    """Only classes that nitransforms takes, which refuses CenteredAffineTransform."""
    steps = (prealign(), Displacement(smooth_field()))
    for suffix in (".h5", ".tfm"):
        path = tmp_path / f"t{suffix}"
        transforms.write_transform(path, example(*steps), FIXED)
        theirs = sitk.ReadTransform(str(path))
        parts = sitk.CompositeTransform(theirs)
        kinds = [
            parts.GetNthTransform(i).GetName()
            for i in range(parts.GetNumberOfTransforms())
        ]
        assert kinds == [
            "AffineTransform", "DisplacementFieldTransform", "AffineTransform"
        ]  # fmt: skip
        points = points_in(FIXED, margin=0.1)
        np.testing.assert_allclose(
            example(*steps).map_points(points), itk_map(theirs, points), atol=1e-4
        )


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr"])
def test_reads_grid_transforms_of_slicer(tmp_path, suffix):
    field, image = small_field()
    sitk.WriteImage(image, str(tmp_path / f"t{suffix}"))
    read = transforms.read_transform(tmp_path / f"t{suffix}")
    points = points_in(field, count=200, margin=0.3)
    theirs = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    np.testing.assert_allclose(
        read.map_points(points), itk_map(theirs, points), atol=1e-4
    )


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_field_in_micron_is_the_same_map(tmp_path, suffix):
    """All lengths of a header's unit, the grid's and the vectors', as one map has."""
    field, image = small_field()
    sitk.WriteImage(image, str(tmp_path / f"mm{suffix}"))
    large = sitk.Compose(
        [sitk.VectorIndexSelectionCast(image, i) * 1000 for i in range(3)]
    )
    large.SetSpacing((1000 * np.array(image.GetSpacing())).tolist())
    large.SetOrigin((1000 * np.array(image.GetOrigin())).tolist())
    large.SetDirection(image.GetDirection())
    path = tmp_path / f"um{suffix}"
    sitk.WriteImage(large, str(path))
    data = path.read_bytes()
    if suffix == ".nrrd":
        data = data.replace(b"kinds:", b'space units: "um" "um" "um"\nkinds:', 1)
    else:
        data = data.replace(b"ElementNum", b"DistanceUnits = um\nElementNum", 1)
    path.write_bytes(data)
    points = points_in(field, count=200)
    got, expected = (
        transforms.read_transform(tmp_path / f"{unit}{suffix}").map_points(points)
        for unit in ("um", "mm")
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(expected - points).max() > 1


def test_a_nifti_field_in_micron_is_taken_as_itk_takes_it(tmp_path):
    field, image = small_field()
    vectors = sitk.GetArrayFromImage(image).transpose(2, 1, 0, 3)[:, :, :, None]
    affine = np.diag([1000, 1000, 1000, 1]) @ field.affine_mm[:, [2, 1, 0, 3]]
    nifti = nib.Nifti1Image(vectors, affine)
    nifti.header.set_intent("vector")
    nifti.header.set_xyzt_units("micron")
    nib.save(nifti, tmp_path / "t.nii")
    with pytest.warns(UserWarning, match="lengths in micron .* its vectors in mm"):
        read = transforms.read_transform(tmp_path / "t.nii")
    theirs = sitk.ReadImage(str(tmp_path / "t.nii"), sitk.sitkVectorFloat64)
    points = points_in(field, count=200)
    np.testing.assert_allclose(
        read.map_points(points),
        itk_map(sitk.DisplacementFieldTransform(theirs), points),
        atol=1e-4,
    )


@pytest.mark.parametrize("claimed", ["1e300", "-1", "11", "99999999999", "three"])
def test_a_metaimage_of_impossible_axes_does_not_end_the_process(tmp_path, claimed):
    """MetaIO writes beyond its arrays of 10: SimpleITK crashes, also with scans."""
    _, image = small_field()
    sitk.WriteImage(image, str(tmp_path / "whole.mha"))
    data = (tmp_path / "whole.mha").read_bytes()
    path = tmp_path / "t.mha"
    path.write_bytes(data.replace(b"NDims = 3", b"NDims = " + claimed.encode()))
    for read in (transforms.read_transform, volumes.read_volume):
        with pytest.raises(UserError, match=f"claims {claimed} axes"):
            read(path)


def small_field():
    """A grid within FIXED, with vectors on it as an image of SimpleITK."""
    grid = grid_of((6, 5, 4), (8, -34, 4), (1.5, 1.0, 2.0), rotation(0.2, 3.0, 0.3))
    vectors = smooth_field((4, 5, 6), size=2.0)[0].astype(np.float32)
    image = sitk.GetImageFromArray(vectors, isVector=True)
    affine = np.diag([*LPS, 1]) @ grid.affine_mm[:, [2, 1, 0, 3]]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return grid, image


def test_a_nrrd_of_another_frame_is_taken_as_itk_takes_it(tmp_path):
    _, image = small_field()
    sitk.WriteImage(image, str(tmp_path / "lps.nrrd"))
    data = (tmp_path / "lps.nrrd").read_bytes()
    path = tmp_path / "ras.nrrd"
    path.write_bytes(data.replace(b"left-posterior-sup", b"right-anterior-sup"))
    with pytest.warns(UserWarning, match="another frame than LPS; its vectors are"):
        read = transforms.read_transform(path)
    theirs = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    middle = theirs.TransformContinuousIndexToPhysicalPoint([2.5, 2.0, 1.5])
    points = np.array([middle]) * LPS
    theirs = sitk.DisplacementFieldTransform(theirs)
    np.testing.assert_allclose(
        read.map_points(points), itk_map(theirs, points), atol=1e-4
    )


def test_a_field_smaller_than_the_scan_moves_nothing_beyond(tmp_path):
    """As in ITK: the identity outside of its domain, in every format."""
    _, image = small_field()
    theirs = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    sitk.WriteTransform(theirs, str(tmp_path / "t.h5"))
    index = np.stack(np.meshgrid(*map(np.arange, FIXED.shape), indexing="ij"), -1)
    points = index.reshape(-1, 3) @ FIXED.affine_mm[:3, :3].T + FIXED.affine_mm[:3, 3]
    theirs = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    sitk.WriteImage(image, str(tmp_path / "t.nrrd"))
    expected = itk_map(theirs, points).reshape(*FIXED.shape, 3)
    still = np.abs(expected.reshape(-1, 3) - points).max(-1) == 0
    assert 0.5 < still.mean() < 1
    for name in ("t.h5", "t.nrrd"):
        read = transforms.read_transform(tmp_path / name)
        got = displacement_mm(read, FIXED) + points.reshape(*FIXED.shape, 3)
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert beyond_percent(read, FIXED) == pytest.approx(100 * still.mean())
    assert beyond_percent(example(), FIXED) == 0
    assert beyond_percent(Transform((prealign(),)), FIXED) == 0


def test_a_vector_nifti_without_intent_is_taken_with_a_warning(tmp_path):
    grid, image = small_field()
    vectors = sitk.GetArrayFromImage(image).transpose(2, 1, 0, 3)[:, :, :, None]
    affine = grid.affine_mm[:, [2, 1, 0, 3]]
    maps = []
    for intent in ("none", "vector"):
        nifti = nib.Nifti1Image(vectors, affine)
        nifti.header.set_intent(intent)
        nib.save(nifti, tmp_path / f"{intent}.nii.gz")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read = transforms.read_transform(tmp_path / f"{intent}.nii.gz")
        said = any("does not say that it is a displace" in str(w.message) for w in told)
        assert said == (intent == "none")
        maps.append(read.map_points(points_in(grid)))
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize("suffix", [*ITK_FORMATS, ".nii.gz"])
def test_what_was_written_is_known_without_reading(tmp_path, suffix):
    """A scan warped by register is the one that warp gives, to the bit."""
    transform = example(prealign(), Displacement(smooth_field()))
    path = tmp_path / f"t{suffix}"
    transforms.write_transform(path, transform, FIXED)
    moving = Volume(smooth_image(MOVING.shape), MOVING)
    found = [
        warp_volume(moving, mapping, FIXED, fill=0.0).array
        for mapping in (
            transforms.as_written(path, transform),
            transforms.read_transform(path),
        )
    ]
    np.testing.assert_array_equal(*found)


def test_a_file_that_makes_the_hdf5_library_loop_is_given_up(tmp_path, monkeypatch):
    """Continuation blocks of the object headers refer to each other for ever."""
    from jaxreg.io import hdf5 as reader

    path = tmp_path / "endless.h5"
    hdf5(_0=("TranslationTransform_double_3_3", [1, 2, 3], []))(path)
    (tmp_path / "worker.py").write_text(ENDLESS)
    monkeypatch.setattr(reader, "_WORKER", workers.Worker(tmp_path / "worker.py"))
    with pytest.raises(UserError, match="does not come to an end"):
        transforms.read_transform(path)
    monkeypatch.undo()
    assert transforms.read_transform(path).steps


ENDLESS = """
import signal, sys
sys.stdin.buffer.readline()
signal.setitimer(signal.ITIMER_PROF, 0.1)
while True:
    pass
"""


@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
def test_reads_itks_composite_of_many(tmp_path, suffix):
    itk = pytest.importorskip("itk")
    rng = np.random.default_rng(0)
    theirs = itk.CompositeTransform[itk.D, 3].New()
    for _ in range(12):  # two digits: group names sort as numbers
        part = itk.AffineTransform[itk.D, 3].New()
        random_parameters(part, 12, rng, scale=0.1)
        theirs.AddTransform(part)
    path = tmp_path / f"t{suffix}"
    itk.transformwrite(theirs, str(path))
    points = points_in(FIXED)
    np.testing.assert_allclose(
        itk_transforms.read(path).map_points(points), itk_map(theirs, points), atol=1e-7
    )


def test_reads_itks_displacement_field_transform(tmp_path):
    itk = pytest.importorskip("itk")
    field = smooth_field((6, 7, 8), size=3.0)[0].astype(np.float64)
    grid = grid_of((8, 7, 6), (1, 2, 3), (1.5, 2.0, 2.5), rotation(0.4, 0.2, -0.3))
    affine = np.diag([*LPS, 1]) @ grid.affine_mm[:, [2, 1, 0, 3]]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    theirs = itk_displacement(
        itk,
        field,
        spacing.tolist(),
        affine[:3, 3].tolist(),
        itk.matrix_from_array(affine[:3, :3] / spacing),
    )
    itk.transformwrite(theirs, str(tmp_path / "t.h5"))
    read = itk_transforms.read(tmp_path / "t.h5")
    points = points_in(grid, count=100, margin=0.2)
    np.testing.assert_allclose(
        read.map_points(points), itk_map(theirs, points), atol=1e-4
    )


# Round trips and structure.


@pytest.mark.parametrize("suffix", ITK_FORMATS)
@pytest.mark.parametrize(
    "steps",
    [
        (Displacement(smooth_field()),),
        (prealign(), Displacement(smooth_field())),
        (Displacement(smooth_field()), prealign()),
        (Displacement(smooth_field()), Displacement(smooth_field((5, 6, 4), seed=3))),
        (prealign(),),
    ],
    ids=["field", "affine-field", "field-affine", "two-fields", "affine"],
)
def test_round_trip(tmp_path, suffix, steps):
    transform = example(*steps)
    path = tmp_path / f"t{suffix}"
    transforms.write_transform(path, transform, FIXED)
    again = transforms.read_transform(path)
    points = points_in(FIXED, margin=0.3)
    np.testing.assert_allclose(
        again.map_points(points), transform.map_points(points), atol=2e-5
    )
    fields = sum(isinstance(step, Displacement) for step in steps)
    assert len(again.steps) == 2 * fields + 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_inverse_roles_give_the_inverse(tmp_path):
    shift = np.zeros((1, *NETWORK, 3), np.float32) + np.float32([0.02, -0.03, 0.05])
    there = example(Displacement(shift))
    back = in_world(
        Transform((Displacement(-shift),)),
        MOVING.resized(NETWORK),
        FIXED.resized(NETWORK),
    )
    points = points_in(FIXED, margin=-0.2)
    np.testing.assert_allclose(
        back.map_points(there.map_points(points)), points, atol=1e-4
    )


def test_field_of_one_voxel_along_an_axis(tmp_path):
    field = np.zeros((1, 1, 4, 5, 3), np.float32) + np.float32([0.25, 0.1, -0.1])
    grid = FIXED.resized((1, 4, 5))
    transform = in_world(Transform((Displacement(field),)), grid, grid)
    itk_transforms.write(tmp_path / "t.h5", transform)
    points = points_in(FIXED, margin=-0.2)
    expected = points + grid.voxel_to_mm[:3, :3] @ [0.25, 0.1 * 3, -0.1 * 4]
    for t in (transform, itk_transforms.read(tmp_path / "t.h5")):
        np.testing.assert_allclose(t.map_points(points), expected, atol=1e-4)


def test_nifti_header_says_vector_in_mm(tmp_path):
    transforms.write_transform(tmp_path / "t.nii.gz", example(), FIXED)
    image = nib.load(tmp_path / "t.nii.gz")
    assert image.shape == (*FIXED.shape[::-1], 1, 3)
    assert image.get_data_dtype() == np.float32
    assert int(image.header["intent_code"]) == 1007
    assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
    np.testing.assert_allclose(
        np.asarray(image.dataobj)[4, 3, 2, 0] * LPS,
        displacement_mm(example(), FIXED)[2, 3, 4],
        rtol=1e-6,
    )


def test_nifti_field_outside_its_grid_is_the_identity(tmp_path):
    transforms.write_transform(tmp_path / "t.nii", example(), FIXED)
    read = transforms.read_transform(tmp_path / "t.nii")
    outside = FIXED.voxel_to_mm @ [-0.6, 3, 3, 1]
    np.testing.assert_allclose(read.map_points(outside[None, :3])[0], outside[:3])
    within = FIXED.voxel_to_mm @ [-0.4, 3, 3, 1]
    assert np.abs(read.map_points(within[None, :3])[0] - within[:3]).max() > 0.1


def test_old_misspelling_and_fixed_length_text(tmp_path):
    transform = example(prealign())
    path = tmp_path / "t.h5"
    itk_transforms.write(path, transform)
    with h5py.File(path, "a") as file:
        root = file["TransformGroup"]
        for group in root.values():
            name = group["TransformType"][0]
            del group["TransformType"]
            group["TransformType"] = np.array([name], "S60")
            for key in ("TransformParameters", "TransformFixedParameters"):
                if key in group:
                    group[key.replace("Transform", "Tranform")] = group[key][()]
                    del group[key]
        # A composite of one, without the composite.
        root.move("1", "single")
        del root["0"]
        root.move("single", "0")
    points = points_in(FIXED)
    np.testing.assert_allclose(
        itk_transforms.read(path).map_points(points),
        transform.map_points(points),
        atol=1e-9,
    )


def test_text_of_slicer(tmp_path):
    path = tmp_path / "t.tfm"
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\n"
        "Transform: AffineTransform_float_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 1 10 20 30\nFixedParameters: 0 0 0\n"
    )
    got = itk_transforms.read(path).map_points(np.array([[1.0, 2, 3]]))
    np.testing.assert_allclose(got, [[1 - 10, 2 - 20, 3 + 30]])


def test_text_is_exact(tmp_path):
    for suffix in (".tfm", ".h5"):
        itk_transforms.write(tmp_path / f"t{suffix}", example())
    read = [itk_transforms.read(tmp_path / f"t{s}") for s in (".tfm", ".h5")]
    for a, b in zip(*(t.steps for t in read), strict=True):
        for name in ("matrix", "field"):
            if hasattr(a, name):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_what_itk_cannot_say_is_refused(tmp_path):
    field = smooth_field()
    with pytest.raises(ValueError, match="use in_world first"):
        itk_transforms.write(tmp_path / "t.h5", Transform((Displacement(field),)))
    with pytest.raises(ValueError, match="batch 2"):
        itk_transforms.write(
            tmp_path / "t.h5", example(Displacement(np.concatenate([field, field])))
        )
    assert list(tmp_path.iterdir()) == []


# Bad input.


def text(*lines):
    return lambda path: path.write_text(
        "\n".join(("#Insight Transform File V1.0", *lines))
    )


def hdf5(**groups):
    def write(path):
        with h5py.File(path, "w") as file:
            for number, (name, parameters, fixed) in groups.items():
                group = file.create_group(f"TransformGroup/{number.strip('_')}")
                group["TransformType"] = [name]
                group["TransformParameters"] = np.asarray(parameters, float)
                group["TransformFixedParameters"] = np.asarray(fixed, float)

    return write


def nifti_field(*shape, value=0.0):
    def write(path):
        nib.save(nib.Nifti1Image(np.full(shape, value, np.float32), np.eye(4)), path)

    return write


FIELD = "DisplacementFieldTransform_double_3_3"
BOX = [2, 2, 2, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
BAD = {
    "missing.h5": (lambda path: None, "transform .* does not exist"),
    "t.mat": (lambda path: path.write_text("x"), "is no .mat of ITK or ANTs"),
    "fsl.mat": (
        lambda path: np.savetxt(path, np.eye(4)),
        "if it is a text matrix of FSL, convert it with c3d_affine_tool",
    ),
    "t.xfm": (lambda path: path.write_text("x"), "extension .xfm, expected one of .h5"),
    "text.h5": (lambda path: path.write_text("hello"), "no readable ITK transform"),
    "other.h5": (
        lambda path: h5py.File(path, "w").close(),
        "no readable ITK transform",
    ),
    "hello.txt": (lambda path: path.write_text("hello"), "its first line is not"),
    "binary.tfm": (lambda path: path.write_bytes(b"#\xff\xfe"), "not a text file"),
    "nothing.txt": (text(), "holds no transform"),
    "words.txt": (
        text("Transform: TranslationTransform_double_3_3", "Parameters: 1 two 3"),
        "something among its numbers is none",
    ),
    "plane.tfm": (
        text("Transform: AffineTransform_double_2_2", "Parameters: 1 0 0 1 0 0"),
        "expected a transform of 3D points",
    ),
    "velocity.txt": (
        text("Transform: GaussianExponentialDiffeomorphicTransform_double_3_3"),
        "holds a GaussianExp.*, expected one of AffineTransform, .*BSplineTransform",
    ),
    "bspline.txt": (
        text("Transform: BSplineTransform_double_3_3", "Parameters: 1"),
        "BSplineTransform: needs 18 finite fixed parameters, has 0",
    ),
    "quartic.txt": (
        text("Transform: BSplineTransform_double_3_3_4", "Parameters: 1"),
        "expected a transform of 3D points .* B-spline of order 1 to 3",
    ),
    "nested.txt": (
        text(
            "Transform: CompositeTransform_double_3_3",
            "Transform: CompositeTransform_double_3_3",
            "Transform: IdentityTransform_double_3_3",
        ),
        "holds a composite within another; flatten it first",
    ),
    "empty.txt": (
        text("Transform: CompositeTransform_double_3_3"),
        "holds no transform",
    ),
    "composite.mat": (
        lambda path: sitk.WriteTransform(
            sitk.CompositeTransform([sitk.TranslationTransform(3, (1, 2, 3))] * 2),
            str(path),
        ),
        "holds no transform",
    ),
    "versor.txt": (
        text(
            "Transform: VersorRigid3DTransform_double_3_3",
            "Parameters: 0 0.9 0.9 0 0 0",
        ),
        "has a versor of length 1.27279, expected at most 1",
    ),
    "short.txt": (
        text("Transform: AffineTransform_double_3_3", "Parameters: 1 2 3"),
        "AffineTransform: needs 12 finite parameters, has 3",
    ),
    "two.txt": (
        text(*["Transform: IdentityTransform_double_3_3"] * 2),
        "lists 2 transforms without a composite",
    ),
    "geometry.h5": (
        hdf5(_0=(FIELD, np.zeros(24), BOX[:17])),
        "fixed parameters, has 17",
    ),
    "size.h5": (hdf5(_0=(FIELD, np.zeros(21), BOX)), "21 parameters for 2 x 2 x 2"),
    "long.h5": (hdf5(_0=(FIELD, np.full(24, 1e300), BOX)), "vectors of more than 1e38"),
    "bent.h5": (
        hdf5(
            _0=(
                "BSplineTransform_double_3_3",
                1e200 * (np.arange(192) % 5),
                [4, 4, 4, *BOX[3:]],
            )
        ),
        "control points lie too far apart",
    ),
    "product.h5": (
        hdf5(
            _0=("CompositeTransform_double_3_3", [], []),
            _1=(FIELD, np.zeros(24), BOX),
            _2=("ScaleTransform_double_3_3", [1e300] * 3, []),
            _3=("ScaleTransform_double_3_3", [1e300] * 3, []),
        ),
        "its matrices multiply to infinity",
    ),
    "nan.h5": (hdf5(_0=(FIELD, np.full(24, np.nan), BOX)), "has 24 numbers that are"),
    "flat.h5": (
        hdf5(_0=(FIELD, np.zeros(24), [*BOX[:6], 0, *BOX[7:]])),
        "its grid is singular",
    ),
    "name.h5": (hdf5(x=(FIELD, np.zeros(24), BOX)), "no readable ITK transform"),
    "series.nii.gz": (nifti_field(4, 5, 6, 3), "has shape 4 x 5 x 6 x 3.*time series"),
    "image.nii": (nifti_field(4, 5, 6), "has shape 4 x 5 x 6"),
    "nan.nii": (nifti_field(4, 5, 6, 1, 3, value=np.nan), "has 360 numbers that are"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(tmp_path, name):
    write, expected = BAD[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError, match=expected) as caught:
        transforms.read_transform(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t.mat", "`transform_out` .*t.mat is a .mat file, .*use .h5"),
        ("t.nrrd", "`transform_out` .* has the extension .nrrd, expected one of"),
        ("t", r"extension \(none\)"),
        ("none/t.h5", "is in a folder that does not exist"),
    ],
)
def test_output_path_is_checked_before_any_work(tmp_path, name, expected):
    with pytest.raises(UserError, match=expected):
        transforms.check_transform_path(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(name)):
        transforms.write_transform(tmp_path / name, example(), FIXED)
    for suffix in transforms.EXTENSIONS:
        transforms.check_transform_path(tmp_path / f"t{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".h5", ".tfm", ".nii.gz"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_text("old")

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(itk_transforms, "_write_hdf5", fail)
    monkeypatch.setattr(itk_transforms, "_write_text", fail)
    monkeypatch.setattr(displacements.nifti1, "save", fail)
    with pytest.raises(RuntimeError):
        transforms.write_transform(path, example(), FIXED)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_volume_written_beside_the_transform_overlays(tmp_path):
    # Warped and fixed share their voxels, so file and memory agree.
    moving = Volume(smooth_image(MOVING.shape), MOVING)
    warped = warp_volume(moving, example(), FIXED)
    for suffix, dtype in itertools.product((".nii.gz", ".mha"), ("f4", "i2")):
        path = tmp_path / f"warped{suffix}"
        volumes.write_volume(path, Volume(warped.array.astype(dtype), warped.grid))
        assert volumes.read_grid(path).matches(FIXED, tolerance_mm=1e-4)
