"""Point lists of 3D Slicer: .fcsv and .mrk.json, which state their frame.

References:
  3D Slicer, Modules/Loadable/Markups: vtkMRMLMarkupsFiducialStorageNode and the schema
  markups-schema-v1.0.3.json.
"""

import copy
import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

FCSV_COLUMNS = (
    *("id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock"),
    *("label", "desc", "associatedNodeID"),
)
_SYSTEMS = {"ras": "ras", "lps": "lps", "0": "ras", "1": "lps"}
_MM = {"mm": 1.0, "millimeter": 1.0, "um": 1e-3, "cm": 10.0, "m": 1000.0}
_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/"
    "Resources/Schema/markups-schema-v1.0.3.json#"
)
_BROKEN = (TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def read_fcsv(text: str) -> tuple[list[str], list[list[str]], str, list[str]]:
    """Returns (names of the columns, rows, "lps" or "ras", lines of comment).

    Raises:
      ValueError: its coordinate system is another, or unknown.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    comments = [line for line in lines if line.startswith("#")]
    said = {}
    for line in comments:
        name, _, value = line.lstrip("# ").partition("=")
        said[name.strip().lower()] = value.strip()
    # Files from before the field are in Slicer's own frame.
    system = said.get("coordinatesystem", "ras").lower()
    if system not in _SYSTEMS:
        raise ValueError(f"its CoordinateSystem is {system}, expected LPS or RAS")
    names = said.get("columns", ",".join(FCSV_COLUMNS)).split(",")
    rows = list(csv.reader(line for line in lines if not line.startswith("#")))
    return [name.strip() for name in names], rows, _SYSTEMS[system], comments


def fcsv_text(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    frame: str,
    comments: Sequence[str] | None,
) -> str:
    """Returns the text of a .fcsv; comments of a file that was read are kept."""
    if comments is None:
        comments = [
            "# Markups fiducial file version = 5.6",
            f"# CoordinateSystem = {frame.upper()}",
            f"# columns = {','.join(header)}",
        ]
    text = io.StringIO()
    text.writelines(line + "\n" for line in comments)
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_json(text: str) -> tuple[Any, list[tuple[str, str, list[float]]]]:
    """Returns (the document, label, description and place in LPS mm of each point).

    Raises:
      ValueError: it is no such document, or a point has no place.
    """
    document = json.loads(text)
    found = []
    try:
        for point, factors in _points(document):
            label = str(point.get("label", ""))
            if point.get("positionStatus", "defined") in ("undefined", "missing"):
                raise ValueError(f'point "{label}" has not been placed')
            given = [float(x) for x in point["position"]]
            if len(given) != 3 or not all(map(math.isfinite, given)):
                raise ValueError(f'point "{label}" has no three finite coordinates')
            place = [x * f for x, f in zip(given, factors, strict=True)]
            found.append((label, str(point.get("description", "")), place))
    except _BROKEN as error:
        raise ValueError(f"no markups of 3D Slicer ({error!r})") from error
    return document, found


def _points(document: Any):
    """Yields (control point, factors from its coordinates to LPS mm)."""
    for markup in document["markups"]:
        system = str(markup.get("coordinateSystem", "LPS")).lower()
        units = markup.get("coordinateUnits", "mm")
        unit = str(units[0] if isinstance(units, list) else units)
        if system not in _SYSTEMS:
            raise ValueError(f"its coordinateSystem is {system}, expected LPS or RAS")
        if unit not in _MM:
            raise ValueError(f"its coordinateUnits are {unit}, expected mm")
        sign = -1.0 if _SYSTEMS[system] == "ras" else 1.0
        for point in markup.get("controlPoints", []):
            yield point, [sign * _MM[unit], sign * _MM[unit], _MM[unit]]


def json_text(
    document: Any,
    places: Sequence[Sequence[float]],
    labels: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Returns the text of a .mrk.json.

    Args:
      document: of the file that was read, to be kept but for the places; or None.
      places: LPS mm of each point.
      labels: of each point.
      notes: of each point; "" keeps its description.
    """
    if document is None:
        points = [{"id": str(n), "label": s} for n, s in enumerate(labels, start=1)]
        document = {
            "@schema": _SCHEMA,
            "markups": [
                {
                    "type": "Fiducial",
                    "coordinateSystem": "LPS",
                    "coordinateUnits": "mm",
                    "controlPoints": points,
                }
            ],
        }
    document = copy.deepcopy(document)
    for (point, factors), place, note in zip(
        _points(document), places, notes, strict=True
    ):
        point["position"] = [float(x) / f for x, f in zip(place, factors, strict=True)]
        point["positionStatus"] = "defined"
        if note:
            point["description"] = note
    return json.dumps(document, indent=2) + "\n"
