"""Pictures of a registration, and self-contained HTML pages with a viewer."""

from jaxreg.registration.report.figures import (
    before_after_figure,
    draw_before_after,
    history_figure,
    thumbnail,
)
from jaxreg.registration.report.likeness import Likeness, likeness_of
from jaxreg.registration.report.overview import (
    INDEX,
    Entry,
    thumbnail_of,
    write_overview,
)
from jaxreg.registration.report.page import Page, inline_image
from jaxreg.registration.report.provenance import provenance
from jaxreg.registration.report.writing import (
    Known,
    Picture,
    page_of,
    registration_figure,
    write_report,
)

__all__ = [
    "INDEX",
    "Entry",
    "Known",
    "Likeness",
    "Page",
    "Picture",
    "before_after_figure",
    "draw_before_after",
    "history_figure",
    "inline_image",
    "likeness_of",
    "page_of",
    "provenance",
    "registration_figure",
    "thumbnail",
    "thumbnail_of",
    "write_overview",
    "write_report",
]
