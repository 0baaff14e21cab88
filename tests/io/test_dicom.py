"""Folders of DICOM slices against SimpleITK, and those that are refused."""

import locale
import pathlib
import warnings

import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.errors import UserError
from jaxreg.io import dicom, volumes

ARRAY = np.random.default_rng(0).integers(-900, 900, (5, 6, 7)).astype(np.int16)
TILTED = "0.8\\0.6\\0\\0\\0\\-1"  # the directions of a row and of a column


@pytest.fixture(autouse=True)
def _own_locale():
    """Puts the process's locale back, which SimpleITK's writer of DICOM sets to "C"."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def write_slice(path, array, **tags):
    """Writes one file; a tag of no value is left out."""
    image = sitk.GetImageFromArray(array, isVector=array.ndim > 2)
    image.SetSpacing((1.5, 2.0))
    known = {
        "series": "0020|000e", "study": "0020|000d", "modality": "0008|0060",
        "position": "0020|0032", "axes": "0020|0037", "number": "0020|0013",
        "instance": "0008|0018", "intercept": "0028|1052", "slope": "0028|1053",
        "name": "0008|103e",
    }  # fmt: skip
    given = {
        "series": "1.2.3.4", "study": "1.2.3", "modality": "CT",
        "axes": "1\\0\\0\\0\\1\\0", "intercept": "-1024", "slope": "1",
    }  # fmt: skip
    for name, value in (given | tags).items():
        if value is not None:
            image.SetMetaData(known[name], value)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_series(folder, *, series="1.2.3.4", step=(0.0, 0.0, 3.0), **tags):
    """Writes the slices of `ARRAY` in files whose names are not in their order."""
    folder.mkdir(exist_ok=True)
    for k, array in enumerate(ARRAY):
        place = np.array([-10.0, 5.0, 20.0]) + k * np.array(step)
        write_slice(
            folder / f"{series}.{4 - k}.dcm",
            array,
            series=series,
            instance=f"{series}.{k + 1}",
            position="\\".join(f"{number:g}" for number in place),
            **tags,
        )
    return folder


def itk_image(folder):
    return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))


@pytest.mark.parametrize(
    ("axes", "step"),
    [
        ("1\\0\\0\\0\\1\\0", (0, 0, 3)),
        ("1\\0\\0\\0\\1\\0", (0, 0, -3)),
        (TILTED, (1.2, -1.6, 0)),
    ],
    ids=["up", "down", "oblique"],
)
def test_a_series_lies_where_itk_has_it(tmp_path, axes, step):
    folder = write_series(tmp_path / "s", axes=axes, step=step)
    (folder / "README.txt").write_text("no slice")
    before = locale.setlocale(locale.LC_ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = volumes.read_volume(folder, kind="stored")
    assert locale.setlocale(locale.LC_ALL) == before
    itk = itk_image(folder)
    np.testing.assert_array_equal(read.array, sitk.GetArrayFromImage(itk))
    for corner in ((0, 0, 0), (6, 0, 0), (0, 5, 0), (0, 0, 4), (3, 2, 1)):
        lps = np.array(itk.TransformIndexToPhysicalPoint(corner))
        ras = read.grid.affine_mm @ [*corner[::-1], 1]
        np.testing.assert_allclose(ras[:3] * [-1, -1, 1], lps, atol=1e-5)
    assert volumes.read_grid(folder).matches(read.grid)


def test_files_without_an_extension_are_slices_too(tmp_path):
    folder = write_series(tmp_path / "s")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"IM{number:04d}")
    read = volumes.read_volume(folder, kind="stored")
    np.testing.assert_array_equal(read.array, ARRAY)
    with pytest.raises(UserError, match="IM0001 is one DICOM file, expected a folder"):
        volumes.read_volume(folder / "IM0001")


def _two_series(folder):
    write_series(folder, name="thorax")
    write_series(folder, series="1.2.3.5", name="abdomen")


def _no_series(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("none")


def _frames(folder):
    folder.mkdir()
    image = sitk.GetImageFromArray(ARRAY.astype(np.uint16))
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "frames.dcm"))
    writer.Execute(image)


def _missing(folder):
    write_series(folder)
    (folder / "1.2.3.4.2.dcm").unlink()


def _uneven(folder):
    write_series(folder)
    write_slice(
        folder / "1.2.3.4.0.dcm", ARRAY[4], instance="1.2.3.4.9", position="-10\\5\\33"
    )


def _repeated(folder):
    write_series(folder)
    write_slice(
        folder / "again.dcm", ARRAY[2], instance="1.2.3.4.9", position="-10\\5\\26"
    )


def _sizes(folder):
    write_series(folder)
    other = ARRAY[0, :4]
    write_slice(folder / "a.dcm", other, instance="1.2.3.4.9", position="-10\\5\\35")


def _turned(folder):
    write_series(folder)
    write_slice(
        folder / "a.dcm",
        ARRAY[0],
        instance="1.2.3.4.9",
        position="-10\\5\\35",
        axes=TILTED,
    )


def _slopes(folder):
    write_series(folder)
    write_slice(
        folder / "a.dcm",
        ARRAY[0],
        instance="1.2.3.4.9",
        position="-10\\5\\35",
        intercept="-1000",
    )


def _nowhere(folder):
    folder.mkdir()
    for k in range(2):
        name = folder / f"{k}.dcm"
        write_slice(name, ARRAY[k], instance=f"1.2.3.4.{k + 1}", axes=None)
        # The writer always gives a place: it becomes a tag that has no meaning.
        data = name.read_bytes()
        name.write_bytes(data.replace(b"\x20\0\x32\0", b"\x20\0\x33\0"))


def _colour(folder):
    folder.mkdir()
    colours = np.zeros((6, 7, 3), np.uint8)
    for k in range(2):
        write_slice(
            folder / f"{k}.dcm",
            colours,
            instance=f"1.2.3.4.{k + 1}",
            position=f"0\\0\\{k}",
            intercept=None,
            slope=None,
        )


def _single(folder):
    folder.mkdir()
    write_slice(folder / "a.dcm", ARRAY[0], position="0\\0\\0")


REFUSED = {
    "two series": (
        _two_series,
        r"holds 2 DICOM series \(thorax: 5 files, abdomen: 5 files\), expected one",
    ),
    "no series": (_no_series, "is a folder, .* it holds no DICOM image that can be"),
    "frames": (_frames, "frames.dcm is a DICOM file of 5 frames, expected slices"),
    "missing slice": (_missing, "from 3 to 6 mm apart, .*is one missing"),
    "uneven slices": (_uneven, "from 3 to 4 mm apart"),
    "repeated slice": (_repeated, "several images of one place"),
    "other sizes": (_sizes, "slices of different sizes or directions .*a.dcm"),
    "other directions": (_turned, "slices of different sizes or directions .*a.dcm"),
    "other slopes": (_slopes, "slices of different rescale slopes or intercepts"),
    "no place": (_nowhere, "does not say where its slice lies"),
    "colours": (_colour, "is a colour image, expected one number per voxel"),
    "one slice": (_single, "holds one DICOM slice, expected a 3D series"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_evenly_spaced_series_is_refused(tmp_path, name):
    write, expected = REFUSED[name]
    write(tmp_path / "s")
    for read in (volumes.read_grid, volumes.read_volume):
        with pytest.raises(UserError, match=expected) as caught:
            read(tmp_path / "s")
        assert str(tmp_path / "s") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_slices_that_cannot_be_read_are_named(tmp_path):
    """Without the last one the rest is evenly spaced: the scan would be shorter."""
    folder = write_series(tmp_path / "s")
    last = folder / "1.2.3.4.0.dcm"
    last.write_bytes(last.read_bytes()[:400])
    with pytest.warns(UserWarning, match=r"1\.2\.3\.4\.0\.dcm cannot be read as DICOM"):
        read = volumes.read_volume(folder, kind="stored")
    np.testing.assert_array_equal(read.array, ARRAY[:4])


@pytest.mark.parametrize("cut", [1, 20, 84])
def test_a_slice_without_all_of_its_voxels_is_not_read(tmp_path, cut):
    folder = write_series(tmp_path / "s")
    inner = folder / "1.2.3.4.2.dcm"
    inner.write_bytes(inner.read_bytes()[:-cut])
    with pytest.raises(UserError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volumes.read_volume(folder)


def test_a_length_that_no_file_has_takes_no_memory(tmp_path):
    folder = write_series(tmp_path / "s")
    last = folder / "1.2.3.4.0.dcm"
    data = last.read_bytes()
    at = data.index(b"UI\x1a\x001.2.840")  # GDCM then takes other bytes for lengths
    last.write_bytes(data[: at + 2] + b"\2\0\2\0\2\0" + data[at + 8 :])
    dicom._WORKER.close()
    with pytest.warns(UserWarning, match="cannot be read as DICOM images"):
        volumes.read_grid(folder)
    status = pathlib.Path(f"/proc/{dicom._WORKER._process.pid}/status")
    if not status.exists():
        pytest.skip("only Linux counts the memory")
    peak = int(status.read_text("ascii").split("VmHWM:")[1].split()[0])
    assert peak < 600 * 1024  # KiB; 870 without a limit
    with pytest.warns(UserWarning, match="cannot be read as DICOM images"):
        assert volumes.read_volume(folder).array.shape == (4, 6, 7)
