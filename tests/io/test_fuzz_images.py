"""Damaged scans and label maps: each is read or refused in one sentence, and soon.

JAXREG_FUZZ_SEED and JAXREG_FUZZ_COUNT (files in all) give other and more ones.
"""

import bz2
import gzip
import itertools
import locale
import os
import pathlib
import struct
import sys
import warnings
import zlib

import mutation
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.errors import UserError
from jaxreg.io import dicom as dicom_files
from jaxreg.io import volumes

COUNT = int(os.environ.get("JAXREG_FUZZ_COUNT", "1200"))

SHAPE = (5, 6, 7)  # D H W
KINDS = ("image", "labels", "mask", "stored")


def values(dtype, *more):
    rng = np.random.default_rng(0)
    return rng.integers(0, 90, (*more, *SHAPE)).astype(dtype)


def oblique():
    affine = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.3, -0.2, 0.5) * [0.9, 1.6, 2.2], [-31, 12, 80]
    )
    return affine


def nifti(path, *, dtype=np.float32, kind=nib.Nifti1Image, codes=(1, 1), **options):
    """Writes a NIfTI file; `codes` are those of qform and sform."""
    header = kind.header_class(endianness=options.get("endianness", "<"))
    array = values(dtype, *options.get("more", ()))
    image = kind(array.T, oblique(), header, dtype=dtype)
    image.set_qform(oblique(), code=codes[0])
    image.set_sform(oblique(), code=codes[1])
    image.header.set_xyzt_units(options.get("units", "mm"))
    if "intent" in options:
        image.header.set_intent(options["intent"])
    if "comment" in options:
        image.header.extensions.append(
            nib.nifti1.Nifti1Extension("comment", options["comment"])
        )
    nib.save(image, path)
    if "slope" in options:  # behind nibabel's back, which would scale the numbers
        data = bytearray(path.read_bytes())
        header = nib.Nifti1Header(bytes(data[:348]))
        header["scl_slope"], header["scl_inter"] = options["slope"]
        data[:348] = header.binaryblock
        path.write_bytes(data)


def nii(**options):
    return lambda path: nifti(path, **options)


def coloured(path):
    colours = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    array = np.zeros(SHAPE[::-1], colours)
    array["G"] = values(np.uint8).T
    nib.save(nib.Nifti1Image(array, oblique()), path)


def pair(path):
    """Writes the header of a pair, which is refused, with its voxels beside it."""
    image = nib.Nifti1Pair(values(np.int16).T, oblique())
    nib.save(image, path.with_name("pair.hdr"))
    path.with_name("pair.hdr").rename(path)


def itk(path, *, dtype=np.int16, compressed=False):
    image = sitk.GetImageFromArray(values(dtype))
    image.SetSpacing((0.9, 1.6, 2.2))
    image.SetOrigin((31.0, -12.0, 80.0))
    image.SetDirection(nib.eulerangles.euler2mat(0.3, -0.2, 0.5).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=compressed)


def itk_file(**options):
    return lambda path: itk(path, **options)


NRRD = """NRRD0005
# a comment
type: {kind}
dimension: 3
space: {space}
sizes: 7 6 5
space directions: (0.9,0,0) (0,1.6,0.1) (0,-0.1,2.2)
kinds: domain domain domain
endian: {endian}
encoding: {encoding}
space origin: (31,-12,80)
space units: "mm" "mm" "mm"
{more}"""

META = """ObjectType = Image
NDims = 3
BinaryData = {binary}
BinaryDataByteOrderMSB = {big}
CompressedData = {compressed}
TransformMatrix = 1 0 0 0 0.8 0.6 0 -0.6 0.8
Offset = 31 -12 80
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 0.9 1.6 2.2
DimSize = 7 6 5
ElementNumberOfChannels = 1
{more}ElementType = {kind}
ElementDataFile = {file}
"""


def text(array):
    return " ".join(map(str, array.ravel().tolist())).encode() + b"\n"


def nrrd(path, *, kind="short", dtype="<i2", encoding="raw", **options):
    """Writes an NRRD file, its voxels in it or in those that `files` names."""
    array = values(dtype)
    stored = array.tobytes()
    stored = {
        "raw": lambda: stored,
        "gzip": lambda: gzip.compress(stored, mtime=0),
        "ascii": lambda: text(array),
        "hex": lambda: stored.hex().encode(),
        "bzip2": lambda: bz2.compress(stored),
    }[encoding]()
    files = options.get("files", ())
    more = options.get("more", "")
    if len(files) == 1:
        more += f"data file: {files[0]}\n"
        path.with_name(files[0]).write_bytes(stored)
    elif files:
        more += "\n".join(("data file: LIST", *files, ""))
        for name, part in zip(files, array, strict=True):
            path.with_name(name).write_bytes(part.tobytes())
    head = NRRD.format(
        kind=kind,
        encoding=encoding,
        endian="big" if dtype[0] == ">" else "little",
        space=options.get("space", "left-posterior-superior"),
        more=more,
    )
    path.write_bytes(head.encode() + (b"" if files else b"\n" + stored))


def nrrd_file(**options):
    return lambda path: nrrd(path, **options)


def meta(path, *, kind="MET_SHORT", dtype="<i2", **options):
    """Writes a MetaImage, its voxels in it or in those that `files` names."""
    array = values(dtype)
    stored = array.tobytes()
    if options.get("binary") == "False":
        stored = text(array)
    more = options.get("more", "")
    if options.get("compressed"):
        stored = zlib.compress(stored)
        more = f"CompressedDataSize = {len(stored)}\n" + more
    files = options.get("files", ())
    if len(files) == 1:
        path.with_name(files[0]).write_bytes(stored)
    elif files:
        for name, part in zip(files, array, strict=True):
            path.with_name(name).write_bytes(part.tobytes())
    head = META.format(
        binary=options.get("binary", "True"),
        big=dtype[0] == ">",
        compressed=bool(options.get("compressed")),
        kind=kind,
        more=more,
        file="LOCAL" if not files else "LIST" if len(files) > 1 else files[0],
    )
    if len(files) > 1:
        head += "\n".join(files) + "\n"
    path.write_bytes(head.encode() + (b"" if files else stored))


def meta_file(**options):
    return lambda path: meta(path, **options)


def dicom(path):
    """Writes the slices of a series into the folder of one of them."""
    array = values(np.int16)
    before = locale.setlocale(locale.LC_ALL)
    for k in range(len(array)):
        image = sitk.GetImageFromArray(array[k])
        image.SetSpacing((1.5, 2.0))
        tags = {
            "0020|000e": "1.2.3.4", "0020|000d": "1.2.3", "0008|0060": "CT",
            "0020|0032": f"-10\\5\\{20 + 3 * k}", "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(k), "0008|0018": f"1.2.3.4.{k + 1}",
            "0028|1052": "-1024", "0028|1053": "1", "0008|103e": "thorax",
        }  # fmt: skip
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(path.with_name(f"{k}.dcm")))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)


PARTS = tuple(f"part{k}.raw" for k in range(SHAPE[0]))

MADE = {
    "float.nii": nii(),
    "float.nii.gz": nii(),
    "slope.nii": nii(dtype=np.int16, slope=(0.5, -10)),
    "big.nii": nii(dtype=np.float64, endianness=">"),
    "qform.nii": nii(dtype=np.uint8, codes=(1, 0)),
    "sform.nii": nii(dtype=np.int32, codes=(0, 2), units="micron"),
    "nowhere.nii.gz": nii(dtype=np.uint16, codes=(0, 0)),
    "comment.nii": nii(dtype=np.int8, comment=b"said beside the voxels" * 3),
    "series.nii": nii(dtype=np.int16, more=(1,)),
    "two.nii": nii(dtype=np.int64, kind=nib.Nifti2Image),
    "two.nii.gz": nii(dtype=np.uint32, kind=nib.Nifti2Image, endianness=">"),
    "colours.nii": coloured,
    "pair.nii": pair,
    "complex.nii": nii(dtype=np.complex64),
    "vectors.nii": nii(more=(3, 1), intent="vector"),
    "raw.nrrd": nrrd_file(),
    "gzip.nrrd": nrrd_file(encoding="gzip", dtype=">f4", kind="float"),
    "ascii.nrrd": nrrd_file(encoding="ascii", space="RAS"),
    "hex.nrrd": nrrd_file(encoding="hex"),
    "bzip2.nrrd": nrrd_file(encoding="bzip2"),
    "one.nhdr": nrrd_file(files=("voxels.raw",), dtype=">i2"),
    "gzip.nhdr": nrrd_file(files=("voxels.raw.gz",), encoding="gzip"),
    "list.nhdr": nrrd_file(files=PARTS, kind="double", dtype="<f8"),
    "raw.mha": meta_file(),
    "zlib.mha": meta_file(compressed=True, kind="MET_FLOAT", dtype="<f4"),
    "ascii.mha": meta_file(binary="False"),
    "one.mhd": meta_file(files=("voxels.raw",), kind="MET_DOUBLE", dtype=">f8"),
    "zlib.mhd": meta_file(files=("voxels.zraw",), compressed=True),
    "list.mhd": meta_file(files=PARTS, kind="MET_UCHAR", dtype="|u1"),
    "written.nrrd": itk_file(compressed=True),
    "written.mha": itk_file(dtype=np.float64, compressed=True),
    "2.dcm": dicom,
}
EACH = max(1, COUNT // len(MADE))

NIFTI_VALUES = (
    *(0, 1, -1, 2, 3, 5, 7, 8, 16, 64, 128, 255, 256, 348, 352, 512, 1024, 2304),
    *(2**15 - 1, 2**31 - 1, 2**63 - 1, -(2**15), -(2**31), 0.5, 1e-30, 1e30, -1e30),
    *(float("nan"), float("inf"), float("-inf"), 3e38, 1e308, 1007, 9, 18, 32),
)


def nifti_field(data, rng):
    """Sets a named field of a NIfTI header, or one element of it."""
    kind = nib.Nifti2Header if data[4:7] == b"n+2" else nib.Nifti1Header
    dtype = kind.template_dtype
    if len(data) < dtype.itemsize:
        return
    if data[:4] in (struct.pack(">i", 348), struct.pack(">i", 540)):
        dtype = dtype.newbyteorder(">")
    fields = np.frombuffer(data, dtype, 1)
    name = rng.choice(dtype.names)
    if fields[name].dtype.kind == "S":
        fields[name] = rng.choice((b"", b"n+1", b"n+2", b"ni1", b"ni2", b"\xff" * 4))
        return
    flat = fields[name].reshape(-1)
    value = rng.choice(NIFTI_VALUES)
    if flat.dtype.kind in "iu":
        limits = np.iinfo(flat.dtype)
        value = int(np.nan_to_num(value, nan=-7.0, posinf=2.0**70, neginf=-(2.0**70)))
        value = min(max(value, limits.min), limits.max)
    if flat.dtype.kind == "f" and abs(value) > float(np.finfo(flat.dtype).max):
        value = float("inf")
    flat[rng.randrange(flat.size)] = value


NRRD_LINES = (
    rb"""
data file: LIST
data file: .
data file: x%d.raw 1 9 1
foo:=bar
byte skip: -1
byte skip: 999999999999
line skip: 9999
encoding
line skip: -1
sizes: 99999 99999 99999
sizes: 7 6 5 1 1 1 1 1
sizes: 4294967296 4294967296 4294967296
dimension: 4
type: block
kinds: vector domain domain
space dimension: 3
space: scanner-xyz
space directions: none (1,0,0) (0,1,0)
space origin: none
space directions: (nan,0,0) (0,inf,0) (0,0,1)
space units: "um" "m"
spacings: 1 0 nan
space: LPS
measurement frame: (1,0) (0,1)
encoding: gzip
encoding: hex
encoding: bzip2
block size: -1
axis mins: 0 nan 0
centers: cell none ???
endian: middle
data file: x%s.raw 1 9 1
data file: %9999d 1 9 1
""".splitlines()[1:]
    + [b"kinds: " + b"k" * 2000, b"k" * 3000 + b": 1"]
)

META_LINES = (
    rb"""
NDims = 0
NDims = 10
NDims = 4
DimSize = 7 6 -5
Junk
DimSize = 99999 99999 99999
HeaderSize = -1
HeaderSize = 99999999
DimSize = 4294967296 4294967296 4294967296
BinaryData = maybe
ElementNumberOfChannels = 3
ElementNumberOfChannels = 99999999
ElementNumberOfChannels = 0
ElementNumberOfChannels = -1
ElementSpacing = 1 -1 1
ElementSpacing = nan inf 0
ObjectType =
ElementSize = 0 0 0
TransformMatrix = 0 0 0 0 0 0 0 0 0
TransformMatrix = nan 0 0 0 1 0 0 0 1
Offset = nan 1e300 inf
CompressedDataSize = -1
CompressedDataSize = 99999999999
CompressedData = True
CompressedData = False
DistanceUnits = um
ElementType = MET_STRING
ElementType = MET_UCHAR_ARRAY
ElementDataFile = LIST
ElementDataFile = LIST 2
ElementDataFile = .
ElementDataFile = x%d.raw 1 9 1
ElementMin = nan
Modality = MET_MOD_CT
ObjectType = Tube
ElementDataFile = x%s%n.raw 1 9 1
ElementDataFile = x%d.raw 1 9 0
""".splitlines()[1:]
    + [b"Name = " + b"n" * 300, b"Comment = " + b"c" * 3000]
)


def line_of(fields):
    """Returns a fault that adds a line to a text header, or takes one's place."""

    def edit(data, rng):
        head, tail = bytes(data[: mutation.HEADER]), bytes(data[mutation.HEADER :])
        lines = head.split(b"\n")
        at = rng.randrange(min(len(lines), 18))
        lines[at : at + rng.randrange(2)] = [rng.choice(fields)]
        data[:] = b"\n".join(lines) + tail

    return edit


def edits_of(name):
    kind = name.partition(".")[2]
    if kind in ("nii", "nii.gz"):
        return (nifti_field,)
    if kind in ("nrrd", "nhdr"):
        return (line_of(NRRD_LINES),)
    return () if kind == "dcm" else (line_of(META_LINES),)


def read(path, kind):
    """Reads a scan, and looks at what of it a registration relies on."""
    grid = volumes.read_grid(path)
    volume = volumes.read_volume(path, kind=kind)
    assert volume.array.shape == volume.grid.shape == grid.shape
    assert min(grid.shape) > 1
    np.testing.assert_array_equal(volume.grid.affine_mm, grid.affine_mm)
    assert np.isfinite(grid.affine_mm).all()
    assert np.linalg.matrix_rank(grid.affine_mm[:3, :3] / grid.spacing_mm) == 3
    assert (grid.spacing_mm > 1e-8).all()
    assert np.abs(grid.affine_mm).max() < 1e15
    assert np.isfinite(volume.array).all()
    assert volume.array.dtype.kind in "iuf"
    assert volume.array.dtype.isnative
    if kind == "image":
        assert volume.array.min() < volume.array.max()
    if kind == "labels":
        assert volume.array.dtype.kind in "iu"


def outcomes_of(folder, name):
    """Reads damaged copies of a file; returns how many were read and refused."""
    path = folder / name / name
    path.parent.mkdir()
    MADE[name](path)
    others = [path.read_bytes()]
    for other in MADE:
        if other != name and other.partition(".")[2] == name.partition(".")[2]:
            MADE[other](path.with_name(other))
            others.append(path.with_name(other).read_bytes())
    copies = mutation.mutations(
        path.read_bytes(), mutation.SEED, edits=edits_of(name), others=others
    )
    scan = path.parent if path.suffix == ".dcm" else path

    def one(number):
        read(scan, KINDS[number % len(KINDS)])

    found = mutation.outcomes(one, path, itertools.islice(copies, EACH))
    dicom_files._WORKER.close()  # the memory of a process is known when it has ended
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return mutation.run(__file__, tmp_path_factory.mktemp("damaged"))


def test_the_process_comes_to_its_end(found):
    assert "process" not in found, found["process"]["trouble"]


@pytest.mark.parametrize("name", MADE)
def test_damaged_files_are_read_or_refused(found, name):
    mutation.check(found[name], EACH)


REFUSED = ("colours.nii", "pair.nii", "complex.nii", "vectors.nii", "bzip2.nrrd")


@pytest.mark.parametrize("name", MADE)
def test_files_that_are_whole_are_read(tmp_path, name):
    """What the damaged copies are copies of: else they would all be refused for it."""
    path = tmp_path / name
    MADE[name](path)
    scan = tmp_path if path.suffix == ".dcm" else path
    if name in REFUSED:
        with pytest.raises(UserError):
            read(scan, "stored")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = volumes.read_volume(scan, kind="stored")
    expected = values(found.array.dtype)
    if name == "slope.nii":
        expected = expected * 0.5 - 10
    np.testing.assert_array_equal(found.array, expected)


if __name__ == "__main__":
    mutation.main(outcomes_of, MADE, pathlib.Path(sys.argv[1]))
