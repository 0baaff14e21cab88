"""The viewer in a browser: Chromium, headless, reads its own pixels and says them."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from jaxreg.registration import report, scan_pair
from jaxreg.registration.options import Regions
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Transform

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: apt-get install chromium"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--virtual-time-budget=20000"),
    *("--window-size=900,1200", "--force-device-scale-factor=1", "--dump-dom"),
)
SHAPE = (8, 10, 12)  # superior, anterior, right
SPACING = (3.0, 2.0, 1.0)
MARK = (6, 8, 10)  # voxel near the patient's top, front and right

# A browser that only prints a page's elements draws no frames.
WITHOUT_FRAMES = "window.requestAnimationFrame = (f) => setTimeout(f, 0);"
# Runs in a copy of the page whose policy allows it.
PROBE = """
const tell = (what) => {
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(what);
  document.body.append(out);
};
(async () => {
  const tools = document.getElementById("viewer");
  while (tools.dataset.ready !== "yes") await new Promise((r) => setTimeout(r, 20));
  const drawn = () => new Promise((r) => setTimeout(r, 30));
  const key = (k, on = document) => on.dispatchEvent(
    new KeyboardEvent("keydown", { key: k, bubbles: true, cancelable: true }));
  const canvas = (name) => document.getElementById(`canvas-${name}`);
  // Mean colour of a box of 5 x 5 pixels at a part of the canvas.
  const colour = (name, x, y) => {
    const one = canvas(name);
    const box = one.getContext("2d").getImageData(
      Math.round(x * one.width) - 2, Math.round(y * one.height) - 2, 5, 5).data;
    return [0, 1, 2].map((k) => {
      let sum = 0;
      for (let i = k; i < box.length; i += 4) sum += box[i];
      return Math.round(sum / 25);
    });
  };
  const said = {};
  await drawn();
  key("x");
  for (const [name, keys] of %(states)s) {
    for (const k of keys) key(k);
    await drawn();
    said[name] = %(places)s.map(([plane, x, y]) => colour(plane, x, y));
    said[`pressed ${name}`] = [...document.querySelectorAll("[aria-pressed=true]")]
      .map((b) => b.dataset.set);
  }
  const where = () => document.getElementById("where-axial").textContent;
  said.slices = [where()];
  const axial = canvas("axial");
  for (const k of ["ArrowUp", "Home", "End", "PageDown"]) {
    key(k, axial);
    await drawn();
    said.slices.push(where());
  }
  const box = axial.getBoundingClientRect();
  axial.setPointerCapture = () => {};
  axial.dispatchEvent(new PointerEvent("pointerdown", { pointerId: 1, bubbles: true,
    button: 0, clientX: box.left + box.width * %(tap)s[0],
    clientY: box.top + box.height * %(tap)s[1] }));
  await drawn();
  said.readout = document.getElementById("readout").textContent;
  said.wide = document.documentElement.scrollWidth - window.innerWidth;
  tell(said);
})().catch((error) => tell({ error: String(error) }));
"""


def marked(value_at_mark: float, grid: Grid, name: str) -> Volume:
    array = np.zeros(SHAPE, np.float32)
    array[:, :, :6] = 50.0  # the left half, in grey
    d, h, w = MARK
    array[d - 1 : d + 2, h - 1 : h + 2, w - 1 : w + 2] = value_at_mark
    return Volume(array, grid, name)


# Of 255: scans are shown up to the 0.995 quantile of every third voxel.
GREY = (
    255
    * 50
    / np.quantile(marked(100.0, Grid(SHAPE, np.eye(4)), "").array[::3, ::3, ::3], 0.995)
)


def on_canvas(plane: str, voxel) -> tuple[str, float, float]:
    """Where a voxel lies on its plane's canvas, as parts of it, by hand."""
    extent = {axis: n * s for axis, n, s in zip("zyx", SHAPE, SPACING, strict=True)}
    at = {axis: (i + 0.5) * s for axis, i, s in zip("zyx", voxel, SPACING, strict=True)}
    across, up = {"axial": "xy", "coronal": "xz", "sagittal": "yz"}[plane]
    wide, high = 20.0, 24.0  # of the box: the longest of any plane, y and z
    x = 0.5 + (extent[across] / 2 - at[across]) / wide
    y = 0.5 + (extent[up] / 2 - at[up]) / high
    return plane, x, y


STATES = [
    ("fixed", ["1"]), ("before", ["2"]), ("after", ["3"]), ("blend", ["4"]),
    ("colours", ["5"]), ("difference", ["7"]), ("with before", ["b"]),
    ("jacobian", ["1", "j"]), ("displacement", ["d"]), ("neither", ["d", "g", "l"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the probe found: the mark's colour in all planes, and a place without it."""
    folder = tmp_path_factory.mktemp("browser")
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * SPACING
    place = Grid(SHAPE, affine)
    fixed = marked(100.0, place, "fixed")
    moving = marked(0.0, place, "moving")
    labels = [Volume((v.array > 20).astype(np.uint8), place) for v in (fixed, moving)]
    regions = Regions(fixed_segmentation=labels[0], moving_segmentation=labels[1])
    scans = scan_pair.ScanPair(fixed, moving, regions, moving, "mri")
    # Twice the size along x about the mark: the determinant is 2.
    matrix = np.diag([2.0, 1.0, 1.0, 1.0])
    matrix[0, 3] = -(MARK[2] * SPACING[2])
    text = without_policy(report.page_of(scans, Transform((Affine(matrix),))).text)
    places = [on_canvas(plane, MARK) for plane in ("axial", "coronal", "sagittal")]
    places.append(on_canvas("axial", (6, 2, 2)))
    probe = PROBE % {
        "states": json.dumps(STATES),
        "places": json.dumps(places),
        "tap": json.dumps(places[0][1:]),
    }
    start = json.dumps([MARK[2], MARK[1], MARK[0]]).replace(" ", "")
    text = re.sub(r'"start":\[\d+,\d+,\d+\]', f'"start":{start}', text)
    text = text.replace("<main>", f"<script>{WITHOUT_FRAMES}</script><main>")
    return probed(folder, text, probe)


def probed(folder, text: str, probe: str):
    """Opens a page with a program added to it, and returns what that says."""
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"<script>{probe}</script></body>"))
    dom = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert "error" not in result, result
    return result


def without_policy(text: str) -> str:
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1
    return text


def near(colour, expected, *, within=6) -> bool:
    return bool(np.abs(np.subtract(colour, expected)).max() <= within)


def test_the_mark_is_where_the_letters_say_in_all_planes(said):
    """White in the fixed scan, black in the moving one, at its place by hand."""
    for state, grey in (("fixed", 255), ("before", 0)):
        for colour in said[state][:3]:
            assert near(colour, [grey] * 3), (state, said[state])
    assert near(said["fixed"][3], [GREY] * 3)
    assert near(said["before"][3], [255] * 3)


def test_ways_to_compare(said):
    """White and black: half blended; magenta; darker in the difference."""
    assert near(said["blend"][0], [128] * 3)
    assert near(said["colours"][0], [255, 0, 255])
    assert near(said["difference"][0], [0] * 3)
    # The map leads the grey half out of the moving scan; before, 255 lies on it.
    assert near(said["difference"][3], [127.5 - GREY / 2] * 3)
    assert near(said["with before"][3], [127.5 + (255 - GREY) / 2] * 3)
    assert "moving=before" in said["pressed with before"]


def test_overlays(said):
    """A determinant of 2 is half way to the reddest of 4; 8 mm of displacement."""
    white, red = np.array([255.0] * 3), np.array([214, 47, 39])
    expected = white + 1.6 * (64 / 127) * (red - white)
    assert near(said["jacobian"][0], expected)
    assert not near(said["displacement"][3], said["fixed"][3], within=30)
    pressed = set(said["pressed neither"])
    assert pressed == {"view=fixed", "grid=toggle", "moving=before"}


def test_keys_change_slices_and_a_tap_moves_the_cross(said):
    assert said["slices"] == ["7 / 8", "8 / 8", "1 / 8", "8 / 8", "1 / 8"]
    assert said["readout"].startswith("x 10.0, y 16.0, z 0.0 mm (RAS) · Jacobian 2.0")
    assert said["readout"].endswith("displacement 0.0 mm")


def test_nothing_is_wider_than_the_window(said):
    assert said["wide"] <= 0


SORT = """
const order = () => [...document.querySelectorAll("tbody tr")]
  .map((row) => row.cells[1].textContent);
const found = [order()];
for (const column of [4, 4, 2, 0]) {
  document.querySelector(`[data-column="${column}"]`).click();
  found.push(order());
}
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(found);
document.body.append(out);
"""


def test_the_list_sorts_by_folds_and_similarity(tmp_path):
    """Folds falling, then rising, loss after falling, names; unknown ones last."""
    unknown = float("nan")
    entries = [
        report.Entry(name, tmp_path / f"{name}.html", "lncc", 0.5, after, folds, 1.0)
        for name, after, folds in (
            ("b", 0.2, 0.5), ("c", unknown, unknown), ("a", 0.3, 0.0), ("d", 0.1, 12.0),
        )
    ]  # fmt: skip
    report.write_overview(tmp_path / "index.html", entries)
    text = without_policy((tmp_path / "index.html").read_text())
    found = probed(tmp_path, text, SORT)
    assert ["".join(names) for names in found] == [
        *("bcad", "dbac", "abdc", "abdc", "abcd"),
    ]  # fmt: skip
