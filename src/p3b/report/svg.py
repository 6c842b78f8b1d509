"""Matplotlib figures inside a page: inline SVG that follows the page's colours, with a text alternative and its data.

Ink, soft ink and background of `STYLE` are written as CSS variables, so that one figure serves light and dark mode and print.
"""

from __future__ import annotations

import csv
import io
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from p3b.report.figures import SOFT_INK, STYLE

PIXELS_PER_INCH = 100
WIDEST_BESIDE = 560
SMALLEST = 0.66
"""Of its size, on a phone: letters of 9 pixels. A figure that is wider than the window then can be moved within its frame."""
_VARIABLES = {
    "#222222": "var(--ink)",
    SOFT_INK: "var(--soft)",
    "#ffffff": "var(--paper)",
    "#f1f1ee": "var(--shade)",
    "#e4e4e4": "var(--rule)",
}
_PLACE = "\N{SECTION SIGN}"
"""Stands before every id of a figure until it is known in which section of the page it is."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        name: unique in the page; the name of the CSV file.
        title: heading.
        says: one or two sentences: what it shows. The text alternative.
        svg: markup.
        csv: its data as text.
        width: in CSS pixels, where there is room for it.
    """

    name: str
    title: str
    says: str
    svg: str
    csv: str
    width: int

    @property
    def is_wide(self) -> bool:
        """Whether it has no room beside another one."""
        return self.width > WIDEST_BESIDE

    def svg_in(self, section: str) -> str:
        """The markup with ids that no other section of the page has."""
        return self.svg.replace(_PLACE, f"{section}-")

    @property
    def csv_link(self) -> str:
        """The data as a link that needs no other file."""
        return "data:text/csv;base64," + b64encode(self.csv.encode()).decode()


def picture(figure: Figure, name: str, title: str, says: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Picture:
    """A figure with its title, text alternative and data.

    Args:
        figure: drawn with the colours of `STYLE`.
        name: unique in the page, of letters, digits and hyphens.
        title, says: see `Picture`.
        head, rows: the data that it shows.
    """
    width = round(PIXELS_PER_INCH * figure.get_figwidth())
    return Picture(name, title, says, _inline(figure, name, says, width), _csv(head, rows), width)


def _inline(figure: Figure, name: str, says: str, width: int) -> str:
    text = io.StringIO()
    # Every figure of the page has names of its own for its clip paths and glyphs.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, system-ui, sans-serif")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{_PLACE}{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', lambda found: f"{found[1]}{_PLACE}{name}-{found[2]}", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    limits = f"max-width: {width}px; min-width: {round(SMALLEST * width)}px"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(says, quote=True)}" style="{limits}" ', 1)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
