"""Scans on disk against nibabel, SimpleITK and ITK."""

import gzip
import re
import time
import tracemalloc
import warnings
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxreg.errors import UserError
from jaxreg.io import files, volumes
from jaxreg.space.grid import Grid, Volume

FORMATS = [".nii", ".nii.gz", ".nrrd", ".mha"]


def rotation(angles):
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return z @ y @ x


def oblique(shape, *, angles=(0.3, -0.2, 0.5), spacing=(2.2, 1.6, 0.9), flip=1.0):
    """An anisotropic oblique grid; `flip` -1 makes it left-handed."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * np.array(spacing) * [flip, 1, 1]
    affine[:3, 3] = (-31.5, 12.25, 80.0)
    return Grid(shape, affine)


def volume(shape=(5, 6, 7), dtype=np.float32, **options):
    rng = np.random.default_rng(0)
    return Volume((rng.uniform(0, 100, shape)).astype(dtype), oblique(shape, **options))


def nifti(path, array, affine=None, **options):
    affine = np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(array, affine, **options), path)
    return path


def test_array_is_nifti_reversed(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    read = volumes.read_volume(nifti(tmp_path / "a.nii", array))
    assert read.array.shape == read.grid.shape == (4, 3, 2)
    assert read.array[3, 1, 0] == array[0, 1, 3]
    np.testing.assert_array_equal(read.grid.spacing_mm, [4, 3, 2])
    np.testing.assert_array_equal(read.grid.affine_mm @ [3, 1, 0, 1], [0, 3, 12, 1])
    assert read.source == str(tmp_path / "a.nii")
    assert read.array.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("flip", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_round_trip_on_oblique_grid(tmp_path, suffix, flip, dtype):
    before = volume(dtype=dtype, flip=flip)
    path = tmp_path / f"a{suffix}"
    volumes.write_volume(path, before)
    after = volumes.read_volume(path, kind="stored")
    assert after.array.dtype == dtype
    np.testing.assert_array_equal(after.array, before.array)
    np.testing.assert_allclose(after.grid.affine_mm, before.grid.affine_mm, atol=2e-5)
    assert volumes.read_grid(path).matches(before.grid, tolerance_mm=1e-4)
    assert volumes.read_volume(path).array.dtype == np.float32
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 6)] * 3),
    flip=st.sampled_from([1.0, -1.0]),
    suffix=st.sampled_from(FORMATS),
)
def test_any_orientation_survives(tmp_path, angles, spacing, flip, suffix):
    before = volume((3, 2, 4), angles=angles, spacing=spacing, flip=flip)
    path = tmp_path / f"a{suffix}"
    volumes.write_volume(path, before)
    after = volumes.read_volume(path)
    np.testing.assert_array_equal(after.array, before.array)
    assert after.grid.matches(before.grid, tolerance_mm=1e-4)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64, np.uint16])
def test_wide_types_survive(tmp_path, dtype):
    before = volume(dtype=dtype)
    volumes.write_volume(tmp_path / "a.nii.gz", before)
    after = volumes.read_volume(tmp_path / "a.nii.gz", kind="stored")
    assert after.array.dtype == dtype
    np.testing.assert_array_equal(after.array, before.array)


def test_bool_and_half_are_stored_as_what_files_know(tmp_path):
    path = tmp_path / "a.nii"
    for dtype, stored in ((bool, np.uint8), (np.float16, np.float32)):
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)
        volumes.write_volume(path, Volume(array, oblique((2, 3, 4))))
        read = volumes.read_volume(path, kind="stored").array
        assert read.dtype == stored
        np.testing.assert_array_equal(read, array)


def test_labels_are_written_without_scaling_and_with_both_forms(tmp_path):
    path = tmp_path / "labels.nii.gz"
    volumes.write_volume(path, volume(dtype=np.int16))
    image = nib.load(path)
    assert image.get_data_dtype() == np.int16
    assert (image.dataobj.slope, image.dataobj.inter) == (1.0, 0.0)
    assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-5)
    assert image.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_itk_sees_the_same_place(tmp_path, suffix, flip):
    before = volume(flip=flip)
    path = tmp_path / f"a{suffix}"
    volumes.write_volume(path, before)
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), before.array)
    lps = image.TransformIndexToPhysicalPoint((3, 2, 1))  # x, y, z
    ras = before.grid.affine_mm @ [1, 2, 3, 1]
    np.testing.assert_allclose(np.array(lps) * [-1, -1, 1], ras[:3], atol=1e-4)


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_headers_with_separate_data_are_read_and_not_written(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    image = sitk.GetImageFromArray(np.arange(24.0, dtype=np.float32).reshape(2, 3, 4))
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(path))
    read = volumes.read_volume(path)
    np.testing.assert_array_equal(read.array, sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(read.grid.spacing_mm, [3, 2, 1])
    with pytest.raises(UserError, match=f"extension {suffix}, expected one of .nii"):
        volumes.write_volume(path, read)


def test_scaling_is_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -1000)
    nib.save(image, tmp_path / "a.nii")
    stored = nib.load(tmp_path / "a.nii")
    expected = np.asarray(stored.dataobj).T
    for kind in ("image", "stored"):
        read = volumes.read_volume(tmp_path / "a.nii", kind=kind)
        assert read.array.dtype == np.float32
        np.testing.assert_allclose(read.array, expected, rtol=1e-6)


def test_big_endian_becomes_native(tmp_path):
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(array, np.eye(4), header), tmp_path / "a.nii")
    read = volumes.read_volume(tmp_path / "a.nii", kind="stored")
    assert read.array.dtype == np.dtype("=i2")
    np.testing.assert_array_equal(read.array, array.T)


def test_sform_wins_and_a_difference_is_told(tmp_path):
    image = nib.Nifti1Image(np.arange(24.0).reshape(2, 3, 4), None)
    image.set_sform(np.diag([2.0, 2, 2, 1]), code=1)
    image.set_qform(np.diag([1.0, 1, 1, 1]), code=1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="qform and sform differ; the sform is used"):
        read = volumes.read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(read.grid.spacing_mm, [2, 2, 2])
    image.set_sform(np.diag([2.0, 2, 2, 1]), code=0)
    nib.save(image, tmp_path / "q.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = volumes.read_volume(tmp_path / "q.nii")
    np.testing.assert_array_equal(read.grid.spacing_mm, [1, 1, 1])


def test_no_orientation_is_told(tmp_path):
    image = nib.Nifti1Image(np.arange(24.0).reshape(2, 3, 4), None)
    image.header.set_zooms((1, 2, 3))
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="neither qform nor sform"):
        read = volumes.read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(read.grid.spacing_mm, [3, 2, 1])


def test_trailing_axes_of_one_are_dropped(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    read = volumes.read_volume(nifti(tmp_path / "a.nii", array[..., None, None]))
    np.testing.assert_array_equal(read.array, array.T)
    image = sitk.JoinSeries([sitk.GetImageFromArray(array)])
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    read = volumes.read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(read.array, array)


def test_shear_fits_nifti_only(tmp_path):
    grid = oblique((2, 3, 4))
    sheared = grid.affine_mm @ np.array(
        [[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    before = Volume(np.arange(24.0).reshape(2, 3, 4), Grid(grid.shape, sheared))
    volumes.write_volume(tmp_path / "a.nii", before)
    assert int(nib.load(tmp_path / "a.nii").header["qform_code"]) == 0
    assert volumes.read_volume(tmp_path / "a.nii").grid.matches(before.grid)
    with pytest.raises(UserError, match=r"a.nrrd cannot hold a sheared voxel grid"):
        volumes.write_volume(tmp_path / "a.nrrd", before)


def test_kinds(tmp_path):
    values = np.zeros((2, 3, 4), np.float32)
    values[0, 0] = [0.2, 0.5, 0.7, 1.0]
    fractions = nifti(tmp_path / "fractions.nii", values)
    mask = volumes.read_volume(fractions, kind="mask")
    assert mask.array.dtype == np.uint8
    np.testing.assert_array_equal(mask.array[:, 0, 0], [0, 0, 1, 1])
    with pytest.raises(UserError, match="fractional values .*nearest neighbour"):
        volumes.read_volume(fractions, kind="labels")
    whole = nifti(tmp_path / "whole.nii", np.rint(values) * 3)
    for kind in ("labels", "mask"):
        read = volumes.read_volume(whole, kind=kind)
        assert read.array.dtype == np.int32
        np.testing.assert_array_equal(np.unique(read.array), [0, 3])
    stored = nifti(tmp_path / "stored.nii", (np.rint(values) * 3).astype(np.int16))
    for kind in ("labels", "mask", "stored"):
        assert volumes.read_volume(stored, kind=kind).array.dtype == np.int16
    zeros = nifti(tmp_path / "zeros.nii", np.zeros((2, 3, 4), np.uint8))
    for kind in ("labels", "stored"):
        assert not volumes.read_volume(zeros, kind=kind).array.any()
    with pytest.raises(UserError, match="mask .*zeros.nii is empty"):
        volumes.read_volume(zeros, kind="mask")
    with pytest.raises(UserError, match="zeros.nii is constant"):
        volumes.read_volume(zeros)
    for name, values in (("wrapped", np.int8([-56])), ("unlabelled", np.float32([-1]))):
        below = np.resize(values, (2, 3, 4)) * np.eye(3, 4, dtype=values.dtype)
        path = nifti(tmp_path / f"{name}.nii", below)
        said = rf"{name}.nii has negative labels \(down to {values[0]:.0f}\)"
        with pytest.raises(UserError, match=said):
            volumes.read_volume(path, kind="labels")
        assert volumes.read_volume(path, kind="stored").array.min() == values[0]
    huge = nifti(tmp_path / "huge.nii", np.full((2, 3, 4), 3e9))
    with pytest.raises(UserError, match="beyond 32-bit"):
        volumes.read_volume(huge, kind="labels")


def _truncated(path):
    array = np.random.default_rng(0).normal(size=(9, 9, 9))
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _rgb(path):
    dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    nifti(path, np.zeros((2, 3, 4), dtype))


def _vectors(path):
    image = nib.Nifti1Image(np.zeros((2, 3, 4, 1, 3), np.float32), np.eye(4))
    image.header.set_intent("vector")
    nib.save(image, path)


def _huge_header(path):
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    path.write_bytes(header.binaryblock + b"\0" * 4)


def _singular(path):
    image = nib.Nifti1Image(np.arange(24.0).reshape(2, 3, 4), None)
    image.set_sform(np.diag([2.0, 3, 0, 1]), code=1)
    nib.save(image, path)


def _flat_axes(path):
    affine = np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.arange(24.0).reshape(2, 3, 4), None)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def _with(value):
    def write(path):
        array = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
        array[0, 1, 1:3] = value
        if path.suffix == ".nii":
            nifti(path, array)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(array), str(path))

    return write


def _of_shape(*shape):
    return lambda path: nifti(
        path, np.arange(np.prod(shape), dtype=float).reshape(shape)
    )


def _sitk(image):
    return lambda path: sitk.WriteImage(image, str(path))


BAD = {
    "missing.nii": (lambda path: None, "image .* does not exist"),
    "folder.nii": (lambda path: path.mkdir(), "is a folder, expected a file"),
    "empty.nii.gz": (lambda path: path.write_bytes(b""), "is empty"),
    "a.jpg": (lambda path: path.write_bytes(b"x"), "extension .jpg, expected one of"),
    "none": (lambda path: path.write_bytes(b"x"), r"extension \(none\), expected"),
    "text.nii.gz": (lambda path: path.write_text("hello"), "cannot be read"),
    "text.nii": (lambda path: path.write_text("hello" * 99), "cannot be read"),
    "zip.nii.gz": (
        lambda path: path.write_bytes(gzip.compress(b"hello")),
        "cannot be read",
    ),
    "truncated.nii.gz": (_truncated, "cannot be read, it may be truncated"),
    "truncated.nii": (_truncated, "cannot be read, it may be truncated"),
    "text.nrrd": (lambda path: path.write_text("hello"), "cannot be read"),
    "text.mha": (lambda path: path.write_text("hello"), "cannot be read"),
    "flat.nii": (_of_shape(4, 5), "is a 2D image of 4 x 5"),
    "slice.nii.gz": (_of_shape(4, 5, 1), "is a 2D image of 4 x 5 x 1"),
    "flat.mha": (
        _sitk(sitk.GetImageFromArray(np.eye(4, dtype=np.float32))),
        "is a 2D image of 4 x 4",
    ),
    "series.nii": (_of_shape(2, 3, 4, 5), "is a 4D image of 2 x 3 x 4 x 5"),
    "series.nrrd": (
        _sitk(sitk.JoinSeries([sitk.Image(2, 3, 4, sitk.sitkFloat32)] * 2)),
        "is a 4D image of 2 x 3 x 4 x 2",
    ),
    "rgb.nii": (_rgb, "is an RGB or vector image"),
    "vectors.nii.gz": (_vectors, "is an RGB or vector image"),
    "vectors.mha": (
        _sitk(sitk.Image([2, 3, 4], sitk.sitkVectorFloat32, 3)),
        "is an RGB or vector image",
    ),
    "complex.nii": (
        lambda path: nifti(path, np.ones((2, 3, 4), np.complex64)),
        "holds complex numbers",
    ),
    "nan.nii": (_with(np.nan), "has 2 voxels that are NaN or infinite"),
    "inf.nrrd": (_with(-np.inf), "has 2 voxels that are NaN or infinite"),
    "nan.mha": (_with(np.nan), "has 2 voxels that are NaN or infinite"),
    "overflow.nii": (
        lambda path: nifti(path, np.linspace(0, 1e300, 24).reshape(2, 3, 4)),
        "has 23 voxels that are NaN or infinite",
    ),
    "huge.nii": (_huge_header, "claims 30000 x 30000 x 30000 voxels"),
    "singular.nii": (_singular, r"voxel spacing .2, 3, 0. mm"),
    "plane.nii": (_flat_axes, "singular affine"),
    "constant.nii": (
        lambda path: nifti(path, np.full((2, 3, 4), 7.0)),
        "is constant .7 everywhere.",
    ),
}


@pytest.mark.filterwarnings("ignore:.*qform")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(tmp_path, name):
    write, expected = BAD[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError, match=expected) as caught:
        volumes.read_volume(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not re.search(r"\.\s*$", message)


def test_integers_are_never_not_finite(tmp_path):
    path = nifti(tmp_path / "a.nii", np.arange(24, dtype=np.int32).reshape(2, 3, 4))
    assert volumes.read_volume(path).array.dtype == np.float32


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    volumes.write_volume(path, volume())
    before = path.read_bytes()

    def fail(image, target):
        target.write_bytes(b"half")
        raise RuntimeError

    monkeypatch.setattr(volumes.nib, "save", fail)
    with pytest.raises(RuntimeError):
        volumes.write_volume(path, volume((2, 2, 2)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", "--warped-moving-out .*a.png has the extension .png"),
        ("none/a.nii", "--warped-moving-out .* is in a folder that does not exist"),
    ],
)
def test_check_volume_path(tmp_path, name, expected):
    with pytest.raises(UserError, match=expected):
        volumes.check_volume_path(tmp_path / name, "--warped-moving-out")


@pytest.mark.parametrize(("unit", "mm"), [("micron", 1e-3), ("meter", 1e3)])
@pytest.mark.parametrize("form", ["s", "q"])
def test_units_of_length_are_those_that_itk_sees(tmp_path, unit, mm, form):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    affine = np.diag([2 / mm, 3 / mm, 4 / mm, 1])
    affine[:3, 3] = np.array([-19, -17, 15]) / mm
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=int(form == "s"))
    image.set_qform(affine, code=int(form == "q"))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    grid = volumes.read_grid(tmp_path / "a.nii")
    itk = sitk.ReadImage(str(tmp_path / "a.nii"))
    np.testing.assert_allclose(grid.spacing_mm[::-1], itk.GetSpacing(), rtol=1e-6)
    lps = np.array([-1, -1, 1]) * itk.GetOrigin()
    np.testing.assert_allclose(grid.affine_mm[:3, 3], lps, rtol=1e-6)


def _headed(path, **fields):
    """Writes a NIfTI file and sets fields of its header behind nibabel's back."""
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    image = nib.Nifti1Image(np.arange(24, dtype=np.float32).reshape(2, 3, 4), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    block = path.read_bytes()
    header = nib.Nifti1Header(block[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + block[348:])
    return path


def test_a_quaternion_a_rounding_too_long_is_a_rotation(tmp_path):
    path = _headed(
        tmp_path / "a.nii", sform_code=0, quatern_b=0.70711, quatern_c=0.70711
    )
    itk = sitk.ReadImage(str(path))
    direction = np.reshape(itk.GetDirection(), (3, 3))
    grid = volumes.read_grid(path)
    ours = grid.affine_mm[:3, [2, 1, 0]] / grid.spacing_mm[::-1]
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ ours, direction, atol=1e-6)
    path = _headed(tmp_path / "b.nii", sform_code=0, quatern_b=3.0)
    with pytest.raises(UserError, match="qform that is no rotation"):
        volumes.read_volume(path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"srow_x": (1e20, 0, 0, 0)}, r"voxel spacing \[1e\+20, 3, 4\] mm, expected"),
        ({"srow_y": (0, 1e-12, 0, 0)}, r"voxel spacing \[2, 1e-12, 4\] mm, expected"),
        (
            {"srow_z": (0, 0, 4, 1e20)},
            "first voxel 1e.20 mm from the origin of",
        ),
        ({"srow_z": (0, 0, 4, np.nan)}, "first voxel at .* nan. mm, expected finite"),
    ],
)
def test_a_place_that_no_scan_has_is_refused(tmp_path, fields, expected):
    path = _headed(tmp_path / "a.nii", qform_code=0, **fields)
    for read in (volumes.read_grid, volumes.read_volume):
        with pytest.raises(UserError, match=expected):
            read(path)


def test_numbers_beyond_any_are_refused_without_a_warning_of_numpy(tmp_path):
    image = nib.Nifti2Image(np.arange(24.0).reshape(2, 3, 4), np.diag([2.0, 3, 4, 1]))
    nib.save(image, tmp_path / "a.nii")
    block = (tmp_path / "a.nii").read_bytes()
    for fields in (
        {"pixdim": (1, 1e308, 1e308, 1e308, 1, 1, 1, 1), "quatern_b": 0.5},
        {"scl_slope": 1e308, "scl_inter": 1e308},
    ):
        header = nib.Nifti2Header(block[:540], check=False)
        header["sform_code"], header["qform_code"] = 0, 1
        for name, value in fields.items():
            header[name] = value
        (tmp_path / "a.nii").write_bytes(header.binaryblock + block[540:])
        for kind in ("image", "labels", "mask", "stored"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(UserError, match="spacing|NaN or infinite"):
                    volumes.read_volume(tmp_path / "a.nii", kind=kind)


def test_an_sform_that_is_no_place_gives_way_to_the_qform(tmp_path):
    zeros = {f"srow_{axis}": 0.0 for axis in "xyz"}
    path = _headed(tmp_path / "a.nii", **zeros)
    with pytest.warns(UserWarning, match="sform is no place in space; its qform"):
        grid = volumes.read_grid(path)
    np.testing.assert_allclose(grid.spacing_mm, [4, 3, 2])
    path = _headed(tmp_path / "b.nii", quatern_b=3.0, **zeros)
    with pytest.raises(UserError, match="neither is a place in space"):
        volumes.read_grid(path)


def test_labels_behind_a_slope_are_whole_numbers_again(tmp_path):
    labels = np.arange(24.0).reshape(2, 3, 4) % 8
    for name, values in (("whole", labels), ("half", labels / 2)):
        image = nib.Nifti1Image(values, np.eye(4))
        image.set_data_dtype(np.int16)
        nib.save(image, tmp_path / f"{name}.nii")
    stored = np.asarray(nib.load(tmp_path / "whole.nii").dataobj)
    assert (stored != np.rint(stored)).any()  # what a reader has to undo
    for kind in ("labels", "stored"):
        read = volumes.read_volume(tmp_path / "whole.nii", kind=kind)
        np.testing.assert_array_equal(read.array, labels.T)
    with pytest.raises(UserError, match="voxels with fractional values"):
        volumes.read_volume(tmp_path / "half.nii", kind="labels")


def _flipped(packed, raw):
    """Flips a bit of stored (not deflated) data, where only a checksum tells."""
    damaged = bytearray(packed)
    damaged[damaged.index(raw[4000:4016]) + 2] ^= 0x40
    return bytes(damaged)


def _meta(payload):
    return (
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\n"
        b"BinaryDataByteOrderMSB = False\nCompressedData = True\n"
        b"ElementSpacing = 1 1 1\nDimSize = 9 10 20\nElementType = MET_FLOAT\n"
        b"ElementDataFile = LOCAL\n" + payload
    )


def test_checksums_and_ends_of_compressed_data_count(tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 10, 9)).astype(np.float32)
    raw = array.tobytes()
    nib.save(nib.Nifti1Image(array.T, np.eye(4)), tmp_path / "a.nii")
    whole = (tmp_path / "a.nii").read_bytes()
    packed, deflated = gzip.compress(whole, 0), zlib.compress(raw, 0)
    good = {"a.nii.gz": packed, "a.mha": _meta(deflated)}
    bad = {
        "bit.nii.gz": _flipped(packed, raw),
        "end.nii.gz": packed[:-4],
        "bit.mha": _meta(_flipped(deflated, raw)),
        "end.mha": _meta(zlib.compress(raw)[:-2000]),
    }
    for name, content in (good | bad).items():
        (tmp_path / name).write_bytes(content)
    for name in good:
        np.testing.assert_array_equal(volumes.read_volume(tmp_path / name).array, array)
    for name in bad:
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            volumes.read_volume(tmp_path / name)
    (tmp_path / "a.nii.gz").write_bytes(packed + b"more")
    with pytest.warns(UserWarning, match="follows the end of its compressed data"):
        volumes.read_volume(tmp_path / "a.nii.gz")


def test_a_name_of_249_bytes_is_written(tmp_path):
    path = tmp_path / ("a" * 242 + ".nii.gz")
    volumes.write_volume(path, volume())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UserError, match="name of 307 bytes, at most 255"):
        volumes.write_volume(tmp_path / ("a" * 300 + ".nii.gz"), volume())


def test_names_and_paths_that_are_too_long_are_refused(tmp_path):
    deep = tmp_path.joinpath(*["b" * 200] * 30, "a.nii")
    for path in (tmp_path / ("a" * 300 + ".nii"), tmp_path / ("a" * 300), deep):
        for read in (volumes.read_grid, volumes.read_volume):
            with pytest.raises(UserError, match="image .* does not exist"):
                read(path)
    with pytest.raises(UserError, match="is in a folder that does not exist"):
        volumes.write_volume(deep, volume())
    for name in ("a.mha", "z.mha"):
        head = _meta(b"").replace(b"LOCAL", b"v" * 300)
        if name == "a.mha":
            head = head.replace(b"CompressedData = True", b"CompressedData = False")
        (tmp_path / name).write_bytes(head)
        with pytest.raises(UserError, match=f"{name} (cannot be read|names the comp)"):
            volumes.read_volume(tmp_path / name)


def _bombs():
    """Files of 1 MB that say 2,500 bytes of voxels and unpack into 1 GiB of zeros."""
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    whole = _image_bytes(np.zeros((20, 10, 9), np.float32))
    nrrd = (
        b"NRRD0004\ntype: float\ndimension: 3\nsizes: 9 10 20\nencoding: gzip\n"
        b"spacings: 1 1 1\n\n"
    )
    endless = gzip.compress(bytes(2**24)) * 64
    return {
        "members.nii.gz": gzip.compress(whole) + endless,
        "blocks.nii.gz": gzip.compress(b"")[:10] + block * 64,
        "a.nrrd": nrrd + endless,
        "a.mha": _meta(zlib.compress(b"")[:2] + block * 64),
    }


def _image_bytes(array):
    return nib.Nifti1Image(array.T, np.eye(4)).to_bytes()


def test_a_small_file_that_unpacks_into_gigabytes_is_refused(tmp_path):
    for name, content in _bombs().items():
        (tmp_path / name).write_bytes(content)
        start = time.process_time()
        tracemalloc.start()
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            volumes.read_volume(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**26
        assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "raw.mha"])
def test_what_memory_does_not_hold_is_refused(tmp_path, monkeypatch, name):
    """Linux would promise the memory and end the process when it is used."""
    assert files.available_bytes() > 2**20
    path = tmp_path / name
    if name == "raw.mha":
        image = sitk.GetImageFromArray(volume((20, 30, 40)).array)
        sitk.WriteImage(image, str(path))
    else:
        volumes.write_volume(path, volume((20, 30, 40)))
    monkeypatch.setattr(files, "available_bytes", lambda: 80_000)
    with pytest.raises(UserError, match=f"{name} needs 0.0 GiB of memory, more than"):
        volumes.read_volume(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
def test_a_file_that_goes_after_its_header_was_read_is_named(tmp_path, name):
    path = tmp_path / name
    volumes.write_volume(path, volume((2, 3, 4)))
    values, _ = volumes._open(path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} does not exist any more"):
        values("image")
