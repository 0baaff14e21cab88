"""The page of a registration: packed volumes, numbers, warnings, no links."""

import base64
import dataclasses
import gzip
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.registration import report, scan_pair
from jaxreg.registration.optimization import displacement
from jaxreg.registration.options import Regions
from jaxreg.registration.report import cautions, figures, packing, page, registered
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Transform

SHAPE = (9, 11, 13)
EVIL = "</script><script>alert(1)</script>\"'&<img src=x>.nii.gz"


def grid(shape=SHAPE, spacing=(2.0, 1.5, 1.0)) -> Grid:
    """array[d, h, w] with w towards right, h anterior, d superior."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * np.asarray(spacing)
    return Grid(shape, affine)


def shift(x_mm: float, y_mm: float = 0.0, z_mm: float = 0.0) -> Transform:
    matrix = np.eye(4)
    matrix[:3, 3] = x_mm, y_mm, z_mm
    return Transform((Affine(matrix),))


def scans(shape=SHAPE, *, labels=True, name="moving.nii.gz") -> scan_pair.ScanPair:
    place = grid(shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    away = ((index / np.asarray(shape) - 0.45) ** 2).sum(-1)
    array = (1000 * np.exp(-8 * away)).astype(np.float32)
    moving = np.roll(array, 2, axis=2)  # towards right by 2 mm
    regions = Regions()
    if labels:
        maps = (Volume((a > 500).astype(np.uint8), place) for a in (array, moving))
        regions = Regions(
            **dict(
                zip(("fixed_segmentation", "moving_segmentation"), maps, strict=True)
            )
        )
    moved = Volume(moving, place, name)
    return scan_pair.ScanPair(
        Volume(array, place, "fixed.nii.gz"), moved, regions, moved, "mri"
    )


def unpacked(text: str, shape) -> np.ndarray:
    """What the viewer makes of a volume: x y z, as its program sums differences up."""
    rows = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)
    summed = np.cumsum(rows.reshape(shape[::-1]), axis=-1, dtype=np.uint8)
    return summed.transpose(2, 1, 0)


# --- packing --------------------------------------------------------------------------


def test_volumes_are_packed_without_loss_where_there_is_room():
    found = registered.on_fixed_grid(scans(), shift(2.0))
    data = packing.packed(found, 10**6)
    assert data["shape"] == [13, 11, 9] == data["scanShape"]
    assert data["factors"] == [1, 1, 1]
    fixed = found.fixed.array.transpose(2, 1, 0)
    low, high = np.quantile(found.fixed.array[::3, ::3, ::3], [0.005, 0.995])
    expected = np.rint(255 * np.clip((fixed - low) / (high - low), 0, 1))
    np.testing.assert_array_equal(
        unpacked(data["volumes"]["fixed"], data["shape"]), expected
    )
    np.testing.assert_array_equal(
        unpacked(data["volumes"]["labels_fixed"], data["shape"]), fixed > 500
    )
    assert set(data["volumes"]) == {
        *("fixed", "before", "after", "jacobian"),
        *("labels_fixed", "labels_before", "labels_after"),
    }
    jacobian = unpacked(data["volumes"]["jacobian"], data["shape"])
    assert (jacobian == 128).all()


def test_the_field_runs_along_the_upright_axes_of_any_grid():
    turn = np.diag([-1.0, 1.0, 1.0, 1.0])  # stored towards the left
    one = scans(labels=False)
    flipped = Grid(SHAPE, turn @ one.fixed.grid.affine_mm)
    fixed = dataclasses.replace(one.fixed, grid=flipped)
    found = registered.on_fixed_grid(
        dataclasses.replace(one, fixed=fixed), shift(3.0, -1.0, 0.5)
    )
    field = packing.packed(found, 10**6)["field"]
    numbers = np.frombuffer(gzip.decompress(base64.b64decode(field["data"])), "<i2")
    vectors = field["unit"] * numbers.reshape(3, -1)
    np.testing.assert_allclose(
        vectors, np.repeat([[3.0], [-1.0], [0.5]], vectors.shape[1], 1), atol=1e-3
    )
    assert field["most"] == pytest.approx(np.sqrt(10.25), rel=1e-4)


@settings(max_examples=6, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    room=st.integers(2_000, 20_000),
    seed=st.integers(0, 99),
)
def test_what_is_packed_has_the_room_that_there_is(shape, room, seed):
    """Of noise, which does not compress; the folded voxel is still to be seen."""
    noise = np.random.default_rng(seed)
    place = grid(shape)
    volumes = [Volume(noise.random(shape, np.float32), place) for _ in range(3)]
    determinant = 0.5 + noise.random(shape, np.float32)
    determinant.flat[noise.integers(determinant.size)] = -0.1
    moved = np.zeros((*shape, 3), np.float32)
    found = registered.Registered(*volumes, place, moved, determinant, 0.0)
    data = packing.packed(found, room)
    merged = np.ceil(np.array(shape[::-1]) / data["factors"])
    assert data["shape"] == merged.tolist()
    size = sum(map(len, data["volumes"].values())) + len(data["field"]["data"])
    assert size <= room
    assert (unpacked(data["volumes"]["jacobian"], data["shape"]) == 0).sum() == 1


def test_the_finest_axis_is_merged_first():
    spacing = np.array([1.0, 1.0, 4.0])
    assert packing._factors((40, 40, 10), spacing, [1, 1, 1], 4000) == [2, 2, 1]


def test_the_determinant_as_bytes():
    values = np.array([-1.0, 0.0, 1e-9, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0])
    expected = [0, 0, 1, 1, 64, 128, 192, 255, 255]
    np.testing.assert_array_equal(
        packing.jacobian_bytes(values[None, None])[0, 0], expected
    )


# --- numbers and warnings -------------------------------------------------------------


@pytest.mark.parametrize("columns", [2, 6])
def test_numbers_of_a_shift(columns):
    """So many of 13 columns leave the moving scan; those of the foreground count."""
    found = registered.on_fixed_grid(scans(), shift(float(columns)))
    measures = registered.measure(found)
    assert measures.displacement_mm == pytest.approx((columns,) * 3, abs=1e-4)
    assert measures.volume_change == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)
    assert measures.folded_percent == 0
    assert measures.dice is not None
    assert measures.dice[0] < 0.9
    assert (measures.dice[1] == 1.0) == (columns == 2)
    array = found.fixed.array
    bright = array > array.mean(dtype=np.float64)
    assert measures.without_partner_percent == pytest.approx(
        100 * bright[..., -columns:].sum() / bright.sum()
    )


MEASURES = registered.Measures(
    0.0, 0.1, (0.8, 1.0, 1.2), (1.0, 2.0, 3.0), 0.0, 0.0, False, (0.5, 0.6), {}
)


@pytest.mark.parametrize(
    ("changes", "before", "words"),
    [
        ({}, 0.5, ()),
        ({"folded_percent": 0.3}, 0.5, ("folds in 0.3 %",)),
        ({"volume_change": (-0.1, 1.0, 6.0)}, 0.5, ("grow to more than 6",)),
        ({"folded_percent": 99.0}, 0.5, ("mirrors",)),
        ({"volume_change": (0.1, 1.0, 2.0)}, 0.5, ("shrink to less than 0.1",)),
        ({"without_partner_percent": 7.0}, 0.5, ("Edge of the field of view: 7.0 %",)),
        ({"without_partner_percent": 80.0}, 0.5, ("Poor overlap: 80 %",)),
        ({"beyond_percent": 85.0}, 0.5, ("85 % of the fixed scan lies beyond",)),
        ({"blank": True}, 0.5, ("shows nothing",)),
        ({"dice": (0.6, 0.5)}, 0.5, ("labels overlap less",)),
        ({}, 0.3, ("start is better than the end",)),
        ({"blank": True, "beyond_percent": 1.0}, 0.3, ("start", "beyond", "nothing")),
    ],
)
def test_warnings(changes, before, words):
    likeness = report.Likeness("lncc loss", before, 0.4)
    said = cautions.cautions(dataclasses.replace(MEASURES, **changes), likeness)
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))


def test_a_mirrored_map_is_found_out():
    flip = Transform((Affine(np.diag([-1.0, 1.0, 1.0, 1.0])),))
    measures = registered.measure(registered.on_fixed_grid(scans(labels=False), flip))
    assert "mirrors" in cautions.cautions(measures)[0]


def test_levels_of_chained_histories():
    first = {"loss": np.ones(3), "ncc": np.ones(3)}
    inner = displacement.chained(
        [{"loss": np.ones(2)}, {"loss": np.ones(4), "x": np.ones(4)}]
    )
    history = displacement.chained([first, inner])
    assert history["level"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert figures.level_starts(history) == [3, 5]
    assert history["x"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert figures.level_starts({"loss": np.ones(3)}) == []


# --- the page -------------------------------------------------------------------------


class Read(html.parser.HTMLParser):
    """Tags with their attributes, the text of scripts, and all other text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.styles, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        kind = self.tags[-1][0] if self.tags else ""
        if kind in ("script", "style"):
            (self.scripts if kind == "script" else self.styles).append(data)
            self.tags.append(("end", {}))
        else:
            self.text += data


@pytest.fixture(scope="module")
def text() -> str:
    return report.page_of(
        scans(name=EVIL),
        shift(2.0),
        report.Known(
            numbers={"a & b": EVIL},
            likeness=report.Likeness("lncc loss", 0.5, 0.4),
            history={"loss": np.arange(4.0), "level": np.array([0, 0, 1, 1])},
            provenance={"weights": EVIL},
            doubts=["the sides & ends are not certain"],
            notes=["1 < 2"],
        ),
        command=f"jaxreg register --moving '{EVIL}'",
    ).text


def test_a_page_has_all_sections_and_no_links(text):
    read = Read(text)
    for words in (
        "Viewer", "Before and after", "Objective by step", "the next level begins",
        "Numbers", "Where it came from", "Overlap of labels", "Command", "1 < 2",
        "0.5000 → 0.4000", "the sides & ends are not certain", "folded voxels", "mm",
        "needs JavaScript", "Keys and touch",
    ):  # fmt: skip
        assert words in read.text, words
    for tag, attributes in read.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                assert attributes[name].startswith("data:image/png;base64,"), tag
    outside = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(", outside)
    images = [a for tag, a in read.tags if tag == "img"]
    assert len(images) == 2
    assert all(image["alt"] for image in images)
    assert text.index("<noscript>") < text.index("<img")


def test_names_are_escaped_and_only_the_own_program_runs(text):
    read = Read(text)
    assert read.text.count(EVIL) >= 3
    assert not [a for tag, a in read.tags if tag == "img" and a["src"] == "x"]
    assert len([1 for tag, _ in read.tags if tag == "script"]) == 2
    data, program = read.scripts
    assert json.loads(data)["scanShape"] == [13, 11, 9]
    (policy,) = (a["content"] for _, a in read.tags if "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for name, content in (("script-src", program), ("style-src", read.styles[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"


def test_controls_are_named_for_those_who_do_not_see_them(text):
    read = Read(text)
    for tag, attributes in read.tags:
        if tag == "canvas":
            assert attributes["aria-label"]
            assert attributes["tabindex"] == "0"
        if tag == "input" and attributes["id"].startswith("slice"):
            assert attributes["aria-label"]
        if tag == "button":
            assert attributes["type"] == "button"
    wanted = set(re.findall(r'byId\(["`]([\w-]+)["`]\)', "".join(read.scripts)))
    assert wanted <= {a["id"] for _, a in read.tags if "id" in a}


def test_a_page_is_small_whatever_the_scans_are(monkeypatch):
    monkeypatch.setattr(page, "MOST_BYTES", 400_000)
    noise = np.random.default_rng(0).random((40, 40, 40), np.float32)
    volume = Volume(noise, grid((40, 40, 40)))
    both = scan_pair.ScanPair(volume, volume, Regions(), volume, "mri")
    text = report.page_of(both, shift(1.0)).text
    assert 200_000 < len(text.encode()) <= 400_000
    assert "voxels merged to one" in text


def test_pages_of_equal_registrations_are_equal():
    one, other = (report.page_of(scans(), shift(2.0)).text for _ in range(2))
    assert one == other


def test_a_notebook_shows_the_page_in_a_frame(text):
    (frame,) = Read(report.Page(text)._repr_html_()).tags
    assert frame[0] == "iframe"
    assert frame[1]["srcdoc"] == text
    assert frame[1]["sandbox"] == "allow-scripts"
