"""The page that lists many registrations: a thumbnail a pair, sorted by any number.

It lies in one folder with the pages of the pairs, and links to them and to their
thumbnails by their names alone.
"""

import dataclasses
import html
import math
import pathlib
import urllib.parse
from collections.abc import Sequence

from jaxreg.io import files
from jaxreg.registration.report import page as page_lib

INDEX = "index.html"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One pair of a list.

    Attributes:
      name: what to call it.
      page: its report; it may be missing.
      similarity: the loss that the next two are values of.
      before: with the scans where their headers place them.
      after: with the moving scan warped.
      folding_percent: voxels that fold, 0 to 100.
      seconds: to register.
      remark: why there is no report.
    """

    name: str
    page: pathlib.Path
    similarity: str = ""
    before: float = math.nan
    after: float = math.nan
    folding_percent: float = math.nan
    seconds: float = math.nan
    remark: str = ""


def thumbnail_of(page: pathlib.Path) -> pathlib.Path:
    """Returns where a page's thumbnail lies."""
    return page.with_suffix(".png")


def write_overview(path: files.PathLike, entries: Sequence[Entry]) -> None:
    """Writes the page of a list, whole or not at all.

    Args:
      path: the page, in the folder of the reports.
      entries: in the list's order.

    Raises:
      UserError: the file cannot be written.
    """
    page_lib.write_html(path, overview(entries))


_COLUMNS = (
    "pair", "loss before", "loss after", "gain", "folded, %", "seconds",
)  # fmt: skip


def overview(entries: Sequence[Entry]) -> str:
    """Returns the page of a list; its links lead to files in its own folder."""
    losses = sorted({entry.similarity for entry in entries if entry.similarity})
    there = sum(entry.page.is_file() for entry in entries)
    head = "".join(
        f'<th scope="col"><button type="button" data-column="{number}">{name}</button>'
        "</th>"
        for number, name in enumerate(_COLUMNS)
    )
    lines = "\n".join(map(_line, entries))
    body = (
        "<header><h1>Registrations</h1>\n"
        f'<p class="names">{there} of {len(entries)} pairs have a report; loss: '
        f"{html.escape(', '.join(losses) or 'not measured')}, smaller is better; gain "
        "is how much smaller it became. The heads of the columns sort.</p></header>\n"
        f'<main><div class="wide"><table id="pairs"><thead><tr><th scope="col">'
        f"before (axial), and after, on fixed</th>{head}</tr></thead><tbody>\n{lines}\n"
        "</tbody></table></div></main>"
    )
    return page_lib.document(
        "Registrations", body, "overview.js", images="'self' file:"
    )


def _line(entry: Entry) -> str:
    gain = entry.before - entry.after
    name = html.escape(entry.name)
    picture = ""
    if entry.page.is_file():
        link = html.escape(urllib.parse.quote(entry.page.name))
        name = f'<a href="./{link}">{name}</a>'
        if thumbnail_of(entry.page).is_file():
            source = html.escape(urllib.parse.quote(thumbnail_of(entry.page).name))
            picture = (
                f'<a href="./{link}"><img class="small" loading="lazy" '
                f'src="./{source}" alt="overlays of {html.escape(entry.name)}"></a>'
            )
    elif entry.remark:
        name += f"<br><small>{html.escape(entry.remark)}</small>"
    cells = "".join(
        f'<td data-value="{"" if math.isnan(value) else repr(float(value))}">'
        f"{'–' if math.isnan(value) else format(value, form)}</td>"
        for value, form in (
            (entry.before, ".4f"), (entry.after, ".4f"), (gain, ".4f"),
            (entry.folding_percent, ".3g"), (entry.seconds, ".1f"),
        )
    )  # fmt: skip
    return f"<tr><td>{picture}</td><td>{name}</td>{cells}</tr>"
