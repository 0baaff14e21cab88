"""Scans that users of Python hand over: the rules of files, and one sentence."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.errors import UserError
from jaxreg.io import given
from jaxreg.space.grid import Grid, Volume

ARRAY = np.random.default_rng(0).normal(size=(7, 8, 9)).astype(np.float32)
SCAN = Volume(ARRAY, Grid(ARRAY.shape, np.diag([2.0, 3.0, 4.0, 1.0])))


def lazy(folder, damage):
    """An image of nibabel whose voxels are still in a file, which is then damaged."""
    path = folder / "a.nii.gz"
    nib.save(nib.Nifti1Image(ARRAY.T, np.eye(4)), path)
    image = nib.load(path)
    damage(path)
    return image


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_value(value):
    array = ARRAY.copy()
    array[0, 1, 2] = value
    return dataclasses.replace(SCAN, array=array)


def on(affine):
    return Volume(ARRAY, Grid(ARRAY.shape, np.asarray(affine, float)))


def itk_labels():
    return sitk.Cast(sitk.GetImageFromArray((ARRAY > 0) * 1), sitk.sitkLabelUInt8)


BAD = {
    "a file cut short": (lambda p: lazy(p, halved), "cannot be read or written"),
    "a file gone": (lambda p: lazy(p, lambda f: f.unlink()), "cannot be read or writ"),
    "ITK's label map": (lambda p: itk_labels(), "cannot be read or written"),
    "an empty image": (lambda p: sitk.Image(), "cannot be read or written"),
    "a plane": (lambda p: nib.Nifti1Image(ARRAY[0], np.eye(4)), "is a 2D image of 8 x"),
    "vectors": (lambda p: sitk.GetImageFromArray(ARRAY, True), "RGB or vector image"),
    "NaN": (lambda p: with_value(np.nan), "has 1 voxels that are NaN or infinite"),
    "inf": (lambda p: with_value(np.inf), "has 1 voxels that are NaN or infinite"),
    "complex": (lambda p: dataclasses.replace(SCAN, array=ARRAY * 1j), "of complex64"),
    "nowhere": (lambda p: on(np.full((4, 4), np.nan)), "first voxel at .* mm, expec"),
    "flat": (lambda p: on(np.diag([1, 0, 1, 1])), "voxel spacing"),
    "in a line": (
        lambda p: on([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
        "singular affine",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_scan_is_refused_in_one_sentence(tmp_path, name):
    make, expected = BAD[name]
    with pytest.raises(UserError, match=expected) as caught:
        given.volume(make(tmp_path), "fixed scan")
    sentence = str(caught.value)
    assert sentence.startswith(("the fixed scan ", "volume "))
    assert "\n" not in sentence


def test_a_scan_that_is_a_volume_stays_it():
    assert given.volume(SCAN) is SCAN


def test_warnings_name_the_scan_and_not_a_temporary_file():
    image = nib.Nifti1Image(ARRAY.T, None)
    image.header.set_zooms((1, 2, 3))
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    with pytest.warns(UserWarning, match="^the fixed scan: neither qform nor sform"):
        read = given.volume(image, "fixed scan")
    np.testing.assert_array_equal(read.array, ARRAY)
    assert read.source == "the fixed scan"
