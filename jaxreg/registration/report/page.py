"""The HTML page of a registration: one file that asks for no other.

A page's policy (Content-Security-Policy) lets it run its own program alone and load
nothing, whatever the names of scans and options hold.
"""

import base64
import dataclasses
import functools
import hashlib
import html
import importlib.resources
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreg.io import files
from jaxreg.registration.report.planes import PLANES

MOST_BYTES = 6_000_000
"""Of a page, whatever the size of the scans."""
_IN_NOTEBOOK = 900  # pixels that a page is high there


@dataclasses.dataclass(frozen=True)
class Page:
    """An HTML page, which a notebook shows in a frame of its own.

    Attributes:
      text: the page.
      numbers: its table, name to value with its unit.
      cautions: its warnings, a sentence each.
    """

    text: str
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cautions: Sequence[str] = ()

    def save(self, path: files.PathLike) -> None:
        """Writes the page to a file, which appears whole or not at all.

        Raises:
          UserError: the file cannot be written.
        """
        write_html(path, self.text)

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="registration" width="100%" height="{_IN_NOTEBOOK}" '
            f'style="border:0" sandbox="allow-scripts" '
            f'srcdoc="{html.escape(self.text)}"></iframe>'
        )


@dataclasses.dataclass(frozen=True)
class Content:
    """What a page says; all text is escaped.

    Attributes:
      title: its heading.
      subtitle: a line below.
      cautions: sentences that come first; None where nothing was checked.
      cards: the few numbers that matter, name to value with its unit.
      pictures: PNG data by caption.
      tables: rows name to value, by heading.
      label_table: rows of cells, the first one its head; empty for none.
      command: the command line that made it.
      notes: sentences below the numbers.
    """

    title: str
    subtitle: str = ""
    cautions: Sequence[str] | None = None
    cards: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    label_table: Sequence[Sequence[str]] = ()
    command: str | None = None
    notes: Sequence[str] = ()


def html_page(
    content: Content, viewer: Callable[[int], Mapping[str, Any]] | None = None
) -> str:
    """Returns a page without outside references.

    Args:
      content: what it says.
      viewer: gives the data of `packing.packed` in so many bytes; None for a page
        without a viewer.
    """
    if viewer is None:
        return _assembled(content, None)
    spent = len(_assembled(content, {"volumes": {}, "field": {}}).encode())
    return _assembled(content, viewer(MOST_BYTES - spent - _META_BYTES))


_META_BYTES = 20_000  # more than the viewer's data need besides their volumes


def _assembled(content: Content, data: Mapping[str, Any] | None) -> str:
    say = html.escape
    parts = [f"<header><h1>{say(content.title)}</h1>"]
    if content.subtitle:
        parts.append(f'<p class="names">{say(content.subtitle)}</p>')
    parts.append("</header>\n<main>")
    parts.append(_cautions(content.cautions))
    parts.append(_cards(content.cards))
    if data is not None:
        parts.append(_viewer(data))
    parts += [
        f"<section><h2>{say(caption)}</h2>\n"
        f'<figure class="picture">{inline_image(picture, caption)}</figure></section>'
        for caption, picture in content.pictures.items()
    ]
    parts += [_table(name, rows) for name, rows in content.tables.items() if rows]
    parts += [f"<p>{say(note)}</p>" for note in content.notes]
    parts.append(_label_table(content.label_table))
    if content.command:
        parts.append(
            f"<section><h2>Command</h2>\n<pre>{say(content.command)}</pre></section>"
        )
    parts.append("</main>")
    if data is not None:
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        parts.append(
            f'<script type="application/json" id="viewer-data">{text}</script>'
        )
    title = ": ".join(filter(None, (content.title, content.subtitle)))
    body = "\n".join(part for part in parts if part)
    return document(title, body, None if data is None else "viewer.js")


def document(
    title: str, body: str, program: str | None, *, images: str = "data:"
) -> str:
    """Returns a whole page, which runs and loads nothing but what is said here.

    Args:
      title: of the window, as text.
      body: what it shows, as HTML.
      program: the file of this package that it runs at its end; None for none.
      images: the sources of pictures, in the words of a Content-Security-Policy.
    """
    style = _resource("page.css")
    code = "" if program is None else _resource(program)
    script = f"<script>{code}</script>\n" if code else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{_policy(style, code, images)}\n<title>{html.escape(title)}</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n{body}\n{script}</body>\n</html>\n"
    )


@functools.cache
def _resource(name: str) -> str:
    return (importlib.resources.files(__package__ or "") / name).read_text("utf-8")


def _policy(style: str, program: str, images: str) -> str:
    """Returns the rule by which the page runs and loads nothing but what it holds."""

    def allowed(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'" if text else "'none'"

    rule = (
        f"default-src 'none'; img-src {images}; style-src {allowed(style)}; "
        f"script-src {allowed(program)}; base-uri 'none'; form-action 'none'"
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{rule}">'


def inline_image(data: bytes, caption: str) -> str:
    """Returns an HTML image that holds its PNG."""
    return (
        f'<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


def write_html(path: str | os.PathLike, page: str) -> None:
    """Writes a page to a file, which appears whole or not at all."""
    with files.atomic_path(path) as unfinished:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(page)


# --- parts ----------------------------------------------------------------------------


def _cautions(sentences: Sequence[str] | None) -> str:
    if sentences is None:
        return ""
    if not sentences:
        return (
            '<p class="fine">No warnings: no folds, no gain of the start over the end, '
            "and the scans overlap. Look at the pictures all the same.</p>"
        )
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return (
        '<section class="cautions" aria-labelledby="cautions"><h2 id="cautions">'
        f"{len(sentences)} warning{'s' * (len(sentences) > 1)}</h2>"
        f"<ul>{items}</ul></section>"
    )


def _cards(cards: Mapping[str, str]) -> str:
    if not cards:
        return ""
    items = "".join(
        f"<li><span>{html.escape(name)}</span><b>{html.escape(value)}</b></li>"
        for name, value in cards.items()
    )
    return f'<ul class="cards" aria-label="Main numbers">{items}</ul>'


def _table(name: str, rows: Mapping[str, str]) -> str:
    lines = "\n".join(
        f'<tr><th scope="row">{html.escape(row)}</th><td>{html.escape(value)}</td></tr>'
        for row, value in rows.items()
    )
    return (
        f"<section><h2>{html.escape(name)}</h2>\n"
        f'<div class="wide"><table>\n{lines}\n</table></div></section>'
    )


def _label_table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    lines = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows[1:]
    )
    return (
        "<section><h2>Overlap of labels</h2>\n<details><summary>Dice of each label"
        f"</summary>\n<table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n"
        "</tbody></table></details></section>"
    )


# --- the viewer -----------------------------------------------------------------------

_VIEWS = {
    "fixed": "Fixed",
    "before": "Moving before",
    "after": "Moving after",
    "blend": "Blend",
    "colour": "Colours",
    "checker": "Checkerboard",
    "difference": "Difference",
}
_OVERLAYS = {"jacobian": ("Jacobian", "J"), "displacement": ("Displacement", "D")}
_SWITCHES = {"grid": ("Deformed grid", "G"), "cross": ("Cross", "X")}
_KEYS = (
    ("1 to 7", "fixed, moving before, moving after, blend, colours, checkerboard, "
     "difference"),
    ("F", "flicker between fixed and moving after"),
    ("B", "compare with the moving scan before or after"),
    ("J, D, 0", "Jacobian determinant, displacement, neither"),
    ("G, L, X", "deformed grid, outlines of labels, cross"),
    ("arrows, Page Up and Down, Home, End",
     "slices of the plane that has the focus; so does the mouse wheel"),
    ("click, tap or drag", "moves the cross, and with it the other planes"),
)  # fmt: skip


def _button(setting: str, text: str, key: str = "") -> str:
    shown = f"<kbd>{key}</kbd>" if key else ""
    short = f' aria-keyshortcuts="{key}"' if key else ""
    return (
        f'<button type="button" data-set="{setting}" aria-pressed="false"{short}>'
        f"{text}{shown}</button>"
    )


def _group(name: str, buttons: Sequence[str], attributes: str = "") -> str:
    return (
        f'<div class="group" role="group" aria-label="{name}"{attributes}>'
        f"<span>{name}</span>{''.join(buttons)}</div>"
    )


def _viewer(data: Mapping[str, Any]) -> str:
    switches = dict(_SWITCHES)
    if "labels_fixed" in data["volumes"]:
        switches["labels"] = ("Labels", "L")
    views = _group(
        "View",
        [
            _button(f"view={value}", name, str(number))
            for number, (value, name) in enumerate(_VIEWS.items(), start=1)
        ],
    )
    compared = (
        _group(
            "Compared with moving",
            [_button("moving=before", "before"), _button("moving=after", "after")],
            ' id="moving-choice" hidden',
        )
        + _slide("share", "Blend", 'min="0" max="100" value="50"')
        + _slide("square", "Squares", 'step="any"')
    )
    overlays = _group(
        "Overlay",
        [_button(f"overlay={k}", name, key) for k, (name, key) in _OVERLAYS.items()],
    ) + _group(
        "Show",
        [_button(f"{k}=toggle", name, key) for k, (name, key) in switches.items()],
    )
    keys = "\n".join(
        f'<tr><th scope="row">{key}</th><td>{what}</td></tr>' for key, what in _KEYS
    )
    return f"""<section id="viewer" aria-label="Viewer"><h2>Viewer</h2>
<noscript><p>The viewer needs JavaScript; the picture below shows the same registration
without it.</p></noscript>
<p id="viewer-note" hidden></p>
<div id="viewer-tools" hidden>
<div class="tools">{views}</div>
<div class="tools">{overlays}</div>
<div class="tools compared">{compared}</div>
<div class="planes">{"".join(_plane(plane) for plane in PLANES)}</div>
<div class="legend" id="legend" aria-live="polite"></div>
<output class="readout" id="readout"></output>
<p class="names">{html.escape(_resolution(data))}</p>
<details class="keys"><summary>Keys and touch</summary><table>
{keys}
</table></details>
</div></section>"""


def _slide(name: str, text: str, attributes: str) -> str:
    return (
        f'<label class="slide" id="{name}-choice" hidden>{text} '
        f'<input type="range" id="{name}" {attributes}> '
        f'<span id="{name}-value"></span></label>'
    )


def _plane(name: str) -> str:
    return (
        f"<figure><figcaption><span>{name.capitalize()}</span>"
        f'<span id="where-{name}"></span></figcaption>'
        f'<canvas id="canvas-{name}" tabindex="0" role="img" '
        f'aria-label="{name} slice; arrow keys change it"></canvas>'
        f'<input type="range" id="slice-{name}" min="0" step="1" '
        f'aria-label="{name} slice"></figure>'
    )


def _resolution(data: Mapping[str, Any]) -> str:
    """Returns what the viewer shows of the fixed scan's voxels, in a sentence."""
    factors = data.get("factors", [1, 1, 1])
    spacing = data.get("spacing", [1.0, 1.0, 1.0])
    voxel = " x ".join(f"{f * s:.3g}" for f, s in zip(factors, spacing, strict=True))
    if max(factors) == 1:
        return f"On the fixed scan's grid, voxels of {voxel} mm, 8 bits."
    merged = " x ".join(map(str, factors))
    return (
        f"On the fixed scan's grid, {merged} voxels merged to one of {voxel} mm, 8 "
        "bits, so that the page stays small; the picture below has the scan's own "
        "voxels."
    )
