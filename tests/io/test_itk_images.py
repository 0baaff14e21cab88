"""NRRD and MetaImage headers, word by word, against their formats' documents and ITK.

The place of a voxel is worked out here from the words of the header; SimpleITK reads
the same file by itself.
"""

import gzip
import warnings
import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes

ARRAY = np.random.default_rng(0).integers(-900, 900, (5, 6, 7)).astype("<i2")
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # of LPS

NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "7 6 5",
    "space directions": "(0.9,0,0) (0,1.28,0.96) (0,-1.32,1.76)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(31,-12,80)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 0.8 0.6 0 -0.6 0.8",
    "Offset": "31 -12 80",
    "ElementSpacing": "0.9 1.6 2.2",
    "DimSize": "7 6 5",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}
AFFINE = np.array(  # LPS mm; the columns are the steps along x, y and z
    [[0.9, 0, 0, 31], [0, 1.28, -1.32, -12], [0, 0.96, 1.76, 80], [0, 0, 0, 1]]
)


def nrrd(path, data, end="\n", **changes):
    """Writes a header and data behind it; a field of None is left out."""
    fields = NRRD | {name.replace("_", " "): value for name, value in changes.items()}
    last = {"data file": fields.pop("data file", None)}
    lines = ["NRRD0005", *(f"{k}: {v}" for k, v in (fields | last).items() if v)]
    path.write_bytes((end.join(lines) + 2 * end).encode() + data)
    return path


def meta(path, data, end="\n", **changes):
    """Writes a header and data behind it; a field of None is left out."""
    fields = META | changes
    fields["ElementDataFile"] = fields.pop("ElementDataFile")
    text = end.join(f"{k} = {v}" for k, v in fields.items() if v)
    path.write_bytes((text + end).encode() + data)
    return path


def check(path, affine=AFFINE, array=ARRAY, *, same_as_itk=True):
    """Compares what is read with what the header says, and with SimpleITK."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = volumes.read_volume(path, kind="stored")
    np.testing.assert_array_equal(read.array, array)
    assert read.array.dtype == array.dtype.newbyteorder("=")
    ras = (RAS @ affine)[:, [2, 1, 0, 3]]
    np.testing.assert_allclose(read.grid.affine_mm, ras, atol=1e-6)
    if same_as_itk:
        itk = sitk.ReadImage(str(path))
        np.testing.assert_array_equal(np.squeeze(sitk.GetArrayFromImage(itk)), array)
        place = itk.TransformIndexToPhysicalPoint
        rest = (0,) * (itk.GetDimension() - 3)
        for index in ((0, 0, 0), (6, 0, 0), (0, 5, 0), (0, 0, 4), (3, 2, 1)):
            np.testing.assert_allclose(
                place((*index, *rest))[:3], (affine @ [*index, 1])[:3], atol=1e-5
            )


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (1, 1, 1)),
        ("LPS", (1, 1, 1)),
        ("right-anterior-superior", (-1, -1, 1)),
        ("RAS", (-1, -1, 1)),
        ("left-anterior-superior", (1, -1, 1)),
        ("LAS", (1, -1, 1)),
    ],
)
def test_nrrd_spaces(tmp_path, space, signs):
    path = nrrd(tmp_path / "a.nrrd", ARRAY.tobytes(), space=space)
    check(path, np.diag([*signs, 1]) @ AFFINE)


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("raw", ARRAY.tobytes()),
        ("gzip", gzip.compress(ARRAY.tobytes())),
        ("gz", gzip.compress(ARRAY.tobytes())),
        ("ascii", " ".join(map(str, ARRAY.ravel())).encode()),
        ("text", "\n".join(map(str, ARRAY.ravel())).encode()),
        ("hex", ARRAY.tobytes().hex().encode()),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_nrrd_encodings(tmp_path, encoding, data, end):
    check(nrrd(tmp_path / "a.nrrd", data, end=end, encoding=encoding))


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("signed char", "|i1"), ("uchar", "|u1"), ("short", ">i2"), ("uint16", ">u2"),
        ("int", ">i4"), ("unsigned int", "<u4"), ("int64", ">i8"),
        ("unsigned long long", "<u8"), ("float", ">f4"), ("double", ">f8"),
    ],
)  # fmt: skip
def test_nrrd_types_and_byte_orders(tmp_path, encoding, kind, dtype):
    array = np.abs(ARRAY // 9).astype(dtype)
    data = array.tobytes() if encoding == "raw" else gzip.compress(array.tobytes())
    endian = "big" if dtype[0] == ">" else "little"
    path = nrrd(tmp_path / "a.nrrd", data, type=kind, endian=endian, encoding=encoding)
    check(path, array=array)


def test_nrrd_voxels_beside_the_header(tmp_path):
    raw, folder = ARRAY.tobytes(), tmp_path / "below"
    folder.mkdir()
    (folder / "a.raw").write_bytes(raw)
    (tmp_path / "a.raw.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "b.raw").write_bytes(b"two\nlines\n12345" + raw)
    for k in range(5):
        (tmp_path / f"slice{k + 1}.raw").write_bytes(ARRAY[k].tobytes())
        (tmp_path / f"slice{k + 1}.gz").write_bytes(gzip.compress(ARRAY[k].tobytes()))
    check(nrrd(tmp_path / "a.nhdr", b"", data_file="below/a.raw"))
    check(nrrd(tmp_path / "b.nhdr", b"", data_file="a.raw.gz", encoding="gzip"))
    skips = {"line_skip": "2", "byte_skip": "5"}
    check(nrrd(tmp_path / "c.nhdr", b"", data_file="b.raw", **skips))
    check(nrrd(tmp_path / "d.nhdr", b"", data_file="b.raw", byte_skip="-1"))
    listed = "".join(f"slice{k + 1}.raw\n" for k in range(5))
    path = nrrd(tmp_path / "e.nhdr", b"", data_file="LIST")
    path.write_bytes(path.read_bytes().rstrip() + b"\n" + listed.encode())
    check(path)
    check(nrrd(tmp_path / "f.nhdr", b"", data_file="slice%d.raw 1 5 1"))
    check(nrrd(tmp_path / "g.nhdr", b"", data_file="slice%d.gz 1 5 1", encoding="gzip"))


@pytest.mark.parametrize(
    ("unit", "mm"), [("mm", 1.0), ("um", 1e-3), ("µm", 1e-3), ("μm", 1e-3), ("cm", 10)]
)
def test_nrrd_units(tmp_path, unit, mm):
    units = f'"{unit}" "{unit}" "{unit}"'
    path = nrrd(tmp_path / "a.nrrd", ARRAY.tobytes(), space_units=units)
    check(path, np.diag([mm, mm, mm, 1]) @ AFFINE, same_as_itk=mm == 1)


def test_nrrd_units_of_axes_count_where_there_is_no_space(tmp_path):
    words = {"space": None, "space_directions": None, "space_origin": None}
    path = nrrd(
        tmp_path / "a.nrrd", ARRAY.tobytes(), spacings="900 1600 2200",
        units='"um" "um" "um"', **words,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="which way its axes run .taken as LPS."):
        grid = volumes.read_grid(path)
    np.testing.assert_allclose(grid.spacing_mm, [2.2, 1.6, 0.9])


def test_nrrd_axes_of_one_number_are_dropped(tmp_path):
    steps = NRRD["space directions"]
    first = {
        "dimension": "4", "sizes": "1 7 6 5", "kinds": "list domain domain domain",
        "space_directions": f"none {steps}",
    }  # fmt: skip
    last = {
        "dimension": "4", "sizes": "7 6 5 1", "kinds": "domain domain domain list",
        "space_directions": f"{steps} none",
    }  # fmt: skip
    for number, words in enumerate((first, last)):
        for encoding in ("raw", "gzip"):
            data = ARRAY.tobytes()
            data = data if encoding == "raw" else gzip.compress(data)
            path = tmp_path / f"{number}{encoding}.nrrd"
            check(nrrd(path, data, encoding=encoding, **words))


@pytest.mark.parametrize("kind", ["vector", "list", "RGB-color", "3-vector"])
@pytest.mark.parametrize("first", [True, False])
def test_nrrd_of_several_numbers_per_voxel_are_refused(tmp_path, kind, first):
    steps = NRRD["space directions"]
    domain = "domain domain domain"
    path = nrrd(
        tmp_path / "a.nrrd",
        ARRAY.tobytes() * 3,
        dimension="4",
        sizes="3 7 6 5" if first else "7 6 5 3",
        kinds=f"{kind} {domain}" if first else f"{domain} {kind}",
        space_directions=f"none {steps}" if first else f"{steps} none",
    )
    with pytest.raises(UserError, match=r"is an RGB or vector image \(3 numbers"):
        volumes.read_volume(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"space": "scanner-xyz"}, "run .taken as LPS; its space is scanner-xyz."),
        ({"space": "3D-right-handed"}, "not say which way its axes run .taken as LPS;"),
        ({"space_directions": None}, "not say the size of its voxels .taken as 1 mm."),
        ({"space_origin": None}, "not say where its first voxel is .taken as 0, 0, 0."),
        (
            {"space_directions": None, "space_origin": None},
            "the size of its voxels .* nor where its first voxel is",
        ),
    ],
)
def test_what_an_nrrd_does_not_say_is_told(tmp_path, words, expected):
    path = nrrd(tmp_path / "a.nrrd", ARRAY.tobytes(), **words)
    with pytest.warns(UserWarning, match=expected):
        assert volumes.read_grid(path).shape == (5, 6, 7)


@pytest.mark.parametrize(
    "words",
    [
        {"space_directions": "(nan,0,0) (0,1.6,0) (0,0,2.2)"},
        {"space_directions": "(0.9,0,0) (0,1.6,0) (0,0,inf)"},
        {"space_directions": "(0.9,0,0) (0,1.6,0) (0,0,0)"},
        {"space_directions": "(0.9,0,0) (0,1.6,0) (0,1.6,0)"},
        {"space_origin": "(nan,0,0)"},
    ],
)
def test_an_nrrd_that_is_nowhere_is_refused(tmp_path, words):
    path = nrrd(tmp_path / "a.nrrd", ARRAY.tobytes(), **words)
    with pytest.raises(UserError):
        volumes.read_volume(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["Offset", "Position", "Origin"])
@pytest.mark.parametrize("turn", ["TransformMatrix", "Rotation", "Orientation"])
def test_metaimage_places(tmp_path, end, name, turn):
    words = {"Offset": None, "TransformMatrix": None}
    words |= {turn: META["TransformMatrix"], name: META["Offset"]}
    check(meta(tmp_path / "a.mha", ARRAY.tobytes(), end=end, **words))


def test_metaimage_sizes_of_elements(tmp_path):
    words = {"ElementSpacing": None, "ElementSize": META["ElementSpacing"]}
    check(meta(tmp_path / "a.mha", ARRAY.tobytes(), **words))
    check(meta(tmp_path / "b.mha", ARRAY.tobytes(), ElementSize="9 9 9"))


def test_metaimage_negative_spacing_turns_an_axis(tmp_path):
    path = meta(tmp_path / "a.mha", ARRAY.tobytes(), ElementSpacing="0.9 -1.6 2.2")
    check(path, AFFINE @ np.diag([1, -1, 1, 1]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("MET_CHAR", "|i1"), ("MET_UCHAR", "|u1"), ("MET_SHORT", ">i2"),
        ("MET_USHORT", "<u2"), ("MET_INT", ">i4"), ("MET_UINT", "<u4"),
        ("MET_LONG", "<i4"), ("MET_ULONG", ">u4"), ("MET_LONG_LONG", ">i8"),
        ("MET_ULONG_LONG", "<u8"), ("MET_FLOAT", ">f4"), ("MET_DOUBLE", ">f8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("word", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_metaimage_types_and_byte_orders(tmp_path, kind, dtype, packed, word):
    array = np.abs(ARRAY // 9).astype(dtype)
    words = {"BinaryDataByteOrderMSB": None, word: str(dtype[0] == ">")}
    data = array.tobytes()
    if packed:
        data = zlib.compress(data)
        words |= {"CompressedData": "True", "CompressedDataSize": str(len(data))}
    path = meta(tmp_path / "a.mha", data, ElementType=kind, **words)
    check(path, array=array)


def test_metaimage_voxels_beside_the_header(tmp_path):
    raw = ARRAY.tobytes()
    (tmp_path / "a.raw").write_bytes(raw)
    (tmp_path / "b.raw").write_bytes(b"12345" + raw)
    (tmp_path / "c.zraw").write_bytes(zlib.compress(raw))
    for k in range(5):
        (tmp_path / f"slice{k + 1}.raw").write_bytes(ARRAY[k].tobytes())
    check(meta(tmp_path / "a.mhd", b"", ElementDataFile="a.raw"))
    for size in ("5", "-1"):
        words = {"ElementDataFile": "b.raw", "HeaderSize": size}
        check(meta(tmp_path / "b.mhd", b"", **words))
    words = {"ElementDataFile": "c.zraw", "CompressedData": "True"}
    check(meta(tmp_path / "c.mhd", b"", **words))
    names = "".join(f"slice{k + 1}.raw\n" for k in range(5))
    check(meta(tmp_path / "d.mhd", names.encode(), ElementDataFile="LIST"))
    pattern = "slice%d.raw 1 5 1"
    check(meta(tmp_path / "e.mhd", b"", ElementDataFile=pattern))


@pytest.mark.parametrize("kind", ["MET_STRING", "MET_OTHER", "MET_NONE", "MET_X"])
@pytest.mark.parametrize("binary", ["True", "False"])
def test_metaimage_elements_that_are_no_numbers_are_refused(tmp_path, kind, binary):
    """ITK has memory for a byte each, and MetaIO writes 512 of a MET_STRING there."""
    path = meta(
        tmp_path / "a.mha", ARRAY.tobytes(), ElementType=kind, BinaryData=binary
    )
    for read in (volumes.read_grid, volumes.read_volume):
        with pytest.raises(UserError, match=f"its ElementType is {kind}"):
            read(path)


def test_metaimage_numbers_as_text(tmp_path):
    data = " ".join(map(str, ARRAY.ravel())).encode() + b"\n"
    check(meta(tmp_path / "a.mha", data, BinaryData="False"))


def test_metaimage_units(tmp_path):
    for unit, mm in (("mm", 1.0), ("um", 1e-3), ("cm", 10.0)):
        path = meta(tmp_path / "a.mha", ARRAY.tobytes(), DistanceUnits=unit)
        check(path, np.diag([mm, mm, mm, 1]) @ AFFINE, same_as_itk=mm == 1)


def test_metaimage_channels(tmp_path):
    check(meta(tmp_path / "a.mha", ARRAY.tobytes(), ElementNumberOfChannels="1"))
    path = meta(tmp_path / "b.mha", ARRAY.tobytes() * 3, ElementNumberOfChannels="3")
    with pytest.raises(UserError, match=r"is an RGB or vector image \(3 numbers"):
        volumes.read_volume(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"ElementSpacing": None}, "not say the size of its voxels .taken as 1 mm."),
        ({"Offset": None}, "does not say where its first voxel is"),
        (
            {"TransformMatrix": None},
            "does not say which way its axes run .taken as LPS",
        ),
    ],
)
def test_what_a_metaimage_does_not_say_is_told(tmp_path, words, expected):
    path = meta(tmp_path / "a.mha", ARRAY.tobytes(), **words)
    with pytest.warns(UserWarning, match=expected):
        assert volumes.read_grid(path).shape == (5, 6, 7)


@pytest.mark.parametrize(
    "words",
    [
        {"ElementSpacing": "0.9 0 2.2"},
        {"ElementSpacing": "0.9 nan 2.2"},
        {"ElementSpacing": "0.9 1.6"},
        {"ElementSpacing": None, "ElementSize": "0.9 1,6 2.2"},
        {"Offset": "nan 0 0"},
        {"Offset": "31 -12"},
        {"Offset": None, "Position": "31 x 80"},
        {"TransformMatrix": "1 0 0 0 1 0"},
        {"TransformMatrix": "1 0 0 1 0 0 0 0 1"},
        {"TransformMatrix": "0 0 0 0 0 0 0 0 0"},
        {"TransformMatrix": "1 0 0 0 nan 0 0 0 1"},
    ],
)
def test_a_metaimage_that_is_nowhere_is_refused(tmp_path, words):
    path = meta(tmp_path / "a.mha", ARRAY.tobytes(), **words)
    with pytest.raises(UserError):
        volumes.read_volume(path)


@pytest.mark.parametrize("cut", [1, 20, 210])
def test_voxels_that_end_early_are_refused(tmp_path, cut):
    raw, short = ARRAY.tobytes(), ARRAY.tobytes()[:-cut]
    text = " ".join(map(str, ARRAY.ravel())).encode()[:-5]
    (tmp_path / "a.raw").write_bytes(short)
    made = [
        nrrd(tmp_path / "a.nrrd", short),
        nrrd(tmp_path / "b.nrrd", gzip.compress(raw)[:-cut], encoding="gzip"),
        nrrd(tmp_path / "c.nrrd", gzip.compress(short), encoding="gzip"),
        nrrd(tmp_path / "d.nrrd", short.hex().encode(), encoding="hex"),
        nrrd(tmp_path / "e.nrrd", text, encoding="ascii"),
        nrrd(tmp_path / "a.nhdr", b"", data_file="a.raw"),
        meta(tmp_path / "a.mha", short),
        meta(tmp_path / "b.mha", zlib.compress(short), CompressedData="True"),
        meta(tmp_path / "c.mha", zlib.compress(raw)[:-cut], CompressedData="True"),
        meta(tmp_path / "d.mha", text, BinaryData="False"),
        meta(tmp_path / "a.mhd", b"", ElementDataFile="a.raw"),
    ]
    for path in made:
        with pytest.raises(UserError):
            volumes.read_volume(path)


HARMFUL = {
    "%s.mhd": {"ElementDataFile": "%s%s%s 1 5 1"},
    "%n.mhd": {"ElementDataFile": "%n%n%n 1 5 1"},
    "percent.mhd": {"ElementDataFile": "50%.raw"},
    "still.mhd": {"ElementDataFile": "slice%d.raw 1 5 0"},
    "name.mhd": {"Name": "n" * 300},
    "orientation.mhd": {"AnatomicalOrientation": "R" * 300},
    "wide.nhdr": {"data_file": "%9999d 1 5 1"},
    "four.nhdr": {"data_file": "x%d%d%d%d.raw 1 5 1"},
    "long.nhdr": {"data_file": "a" * 5000},
    "sizes.nrrd": {"sizes": "7 6 5 " + "1 " * 600},
    "kinds.nrrd": {"kinds": "k" * 2000},
    "unknown.nrrd": {"n" * 1100: "1"},
}


@pytest.mark.parametrize("name", HARMFUL)
def test_headers_that_would_end_the_process_are_refused(tmp_path, name):
    """A format of C with numbers that are not there; texts beyond their memory."""
    write = meta if name.endswith(".mhd") else nrrd
    path = write(tmp_path / name, ARRAY.tobytes(), **HARMFUL[name])
    for read in (volumes.read_grid, volumes.read_volume, transforms.read_transform):
        with pytest.raises(UserError, match="cannot be read.*(no pattern|characters)"):
            read(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr"])
def test_text_that_is_no_numbers_is_refused(tmp_path, name):
    """NrrdIO repeats the word that it refuses in memory of a fixed size."""
    text = b"1 2 3 " + b"k" * 5000 + b" 4" * 300
    words = {"encoding": "ascii"}
    if name == "a.nhdr":
        (tmp_path / "a.txt").write_bytes(text)
        words["data_file"] = "a.txt"
    path = nrrd(tmp_path / name, b"" if name == "a.nhdr" else text, **words)
    for read in (volumes.read_volume, transforms.read_transform):
        with pytest.raises(UserError, match="its text holds more than numbers"):
            read(path)


def test_long_texts_that_do_no_harm_are_left(tmp_path):
    words = {"content": "c" * 3000}
    path = nrrd(tmp_path / "a.nrrd", ARRAY.tobytes(), **words)
    pair = b"Segment0_Extent:=" + b"9" * 3000 + b"\n# " + b"c" * 3000 + b"\nkinds:"
    path.write_bytes(path.read_bytes().replace(b"kinds:", pair))
    check(path)
    words = {"0008|103e": "t" * 3000}
    check(meta(tmp_path / "a.mha", ARRAY.tobytes(), **words))


def test_a_metaimage_that_says_two_things_is_refused(tmp_path):
    path = meta(tmp_path / "a.mha", ARRAY.tobytes())
    double = b"Offset = 0 0 0\nElementSpacing"
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing", double))
    with pytest.raises(UserError, match="its header gives Offset twice"):
        volumes.read_volume(path)
