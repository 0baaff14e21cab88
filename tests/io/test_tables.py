"""Point files: CSV and 3D Slicer's own, each with its frame."""

import json

import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.io import tables

LPS = np.array([-1.0, -1.0, 1.0])
PLACES = np.array([[1.0, 2.0, 3.0], [-4.5, 5.25, 6.0]])  # RAS+ mm


def fcsv(system, places):
    rows = [
        f"vtkMRMLMarkupsFiducialNode_{n},{x},{y},{z},0,0,0,1,1,1,0,F-{n},a note,"
        for n, (x, y, z) in enumerate(places.tolist())
    ]
    head = [
        "# Markups fiducial file version = 4.11",
        *([f"# CoordinateSystem = {system}"] if system else []),
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID",
    ]
    return "\n".join([*head, *rows]) + "\n"


def mrk(system, places, units="mm"):
    points = [
        {"id": str(n), "label": f"F-{n}", "description": "", "position": place,
         "orientation": [-1.0, -0.0, -0.0, 0.0, 1.0], "locked": True,
         "positionStatus": "defined"}
        for n, place in enumerate(places.tolist())
    ]  # fmt: skip
    one = {"type": "Fiducial", "controlPoints": points, "display": {"color": [1, 0, 0]}}
    if system:
        one["coordinateSystem"] = system
    if units:
        one["coordinateUnits"] = units
    return json.dumps({"@schema": "x", "markups": [one]})


@pytest.mark.parametrize(
    ("system", "sign"),
    [("LPS", LPS), ("RAS", 1), ("1", LPS), ("0", 1), ("lps", LPS), (None, 1)],
)
@pytest.mark.parametrize("frame", ["lps", "ras"])
def test_fcsv_says_its_frame(tmp_path, system, sign, frame):
    (tmp_path / "p.fcsv").write_text(fcsv(system, PLACES * sign))
    table = tables.read(tmp_path / "p.fcsv", "points")
    np.testing.assert_array_equal(tables.points_mm(table, frame), PLACES)
    assert table.column("label") == ["F-0", "F-1"]


@pytest.mark.parametrize(
    ("system", "sign"), [("LPS", LPS), ("RAS", 1), (None, LPS), ("1", LPS), ("0", 1)]
)
@pytest.mark.parametrize(
    ("units", "factor"), [("mm", 1.0), (["um", "UCUM", "micron"], 1e3), (None, 1.0)]
)
def test_mrk_json_says_its_frame_and_unit(tmp_path, system, sign, units, factor):
    path = tmp_path / "p.mrk.json"
    path.write_text(mrk(system, PLACES * sign * factor, units))
    table = tables.read(path, "points")
    np.testing.assert_allclose(tables.points_mm(table, "ras"), PLACES, rtol=1e-12)


@pytest.mark.parametrize("suffix", [".fcsv", ".mrk.json"])
@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_a_file_of_slicer_keeps_all_but_the_places(tmp_path, suffix, system):
    text = (fcsv if suffix == ".fcsv" else mrk)(system, PLACES)
    source, target = tmp_path / f"p{suffix}", tmp_path / f"q{suffix}"
    source.write_text(text)
    table = tables.read(source, "points")
    given = tables.points_mm(table, "lps")
    tables.write(target, table, given, frame="lps")
    if suffix == ".fcsv":
        lines = [line.split(",") for line in text.splitlines()]
        for line in lines[3:]:
            line[1:4] = [f"{float(cell):.6f}" for cell in line[1:4]]
        assert [line.split(",") for line in target.read_text().splitlines()] == lines
    else:
        assert json.loads(target.read_text()) == json.loads(text)
    tables.write(target, table, given + [1.0, 2.0, 3.0], frame="lps")
    moved = tables.points_mm(tables.read(target, "points"), "ras")
    np.testing.assert_allclose(moved, given + [1.0, 2.0, 3.0], atol=1e-6)


@pytest.mark.parametrize("frame", ["lps", "ras"])
@pytest.mark.parametrize("target", tables.EXTENSIONS)
@pytest.mark.parametrize("source", tables.EXTENSIONS)
def test_from_any_format_to_any(tmp_path, source, target, frame):
    texts = {
        ".csv": "label,x,y,z\nF-0,1,2,3\nF-1,-4.5,5.25,6\n",
        ".fcsv": fcsv("LPS", PLACES),
        ".mrk.json": mrk("RAS", PLACES),
    }
    (tmp_path / f"p{source}").write_text(texts[source])
    table = tables.read(tmp_path / f"p{source}", "points")
    given = tables.points_mm(table, frame)
    path = tmp_path / f"q{target}"
    more = {"similarity": ["0.5", "0.25"]}
    tables.write(path, table, given, more, frame=frame)
    got = tables.read(path, "points")
    np.testing.assert_allclose(tables.points_mm(got, frame), given, atol=1e-6)
    assert got.column("label") == ["F-0", "F-1"]
    assert "0.25" in path.read_text()


def test_slicer_reads_the_columns_in_any_order(tmp_path):
    text = "# columns = label,x,y,z,sel,vis\n# CoordinateSystem = LPS\ntip,-1,-2,3,1,1"
    (tmp_path / "p.fcsv").write_text(text)
    table = tables.read(tmp_path / "p.fcsv", "points")
    np.testing.assert_array_equal(tables.points_mm(table, "ras"), PLACES[:1])


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.fcsv", fcsv("IJK", PLACES), "CoordinateSystem is ijk, expected LPS or RAS"),
        ("p.fcsv", "# CoordinateSystem = LPS\n", "holds no points"),
        ("p.fcsv", "# columns = a,b\n1,2\n", "has the columns a, b, expected x, y"),
        ("p.mrk.json", "[", "is no .mrk.json text"),
        ("p.mrk.json", "[1]", "no markups of 3D Slicer"),
        ("p.mrk.json", mrk("LPS", PLACES, "mm").replace('"mm"', "[]"), "no markups"),
        ("p.mrk.json", '{"markups": []}', "holds no points"),
        ("p.mrk.json", mrk("IJK", PLACES), "coordinateSystem is ijk, expected"),
        ("p.mrk.json", mrk("LPS", PLACES, "inch"), "coordinateUnits are inch"),
        (
            "p.mrk.json",
            mrk("LPS", PLACES).replace('"defined"', '"undefined"'),
            'point "F-0" has not been placed',
        ),
        ("p.mrk.json", mrk("LPS", PLACES[:, :2]), "no three finite coordinates"),
        (
            "p.mrk.json",
            mrk("LPS", PLACES).replace("5.25", "NaN"),
            "no three finite coordinates",
        ),
        ("p.mrk.json", "[" * 100000, "is no .mrk.json text"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        tables.read(tmp_path / name, "points")
