"""Figures of a run as SVG files for the documentation: dark on white, readable in light and dark surroundings.

python scripts/site/figures_of_run.py demo-run/pruned        # writes docs/images/demo-<name>.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from p3b.report.charts import draw_all
from p3b.report.record import read_run
from p3b.report.svg import Picture

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SHOWN = ("learning-curves", "benefit", "keep-ratios", "network")
COLOURS = {"ink": "#222222", "soft": "#707070", "paper": "#ffffff", "shade": "#f1f1ee", "rule": "#e4e4e4"}
"""Of a report in light mode: those that its figures take from the page."""


def file_of(picture: Picture) -> str:
    """The markup as a file of its own, on white, with a size that a reader of Markdown can see."""
    svg = re.sub(r"var\(--(\w+)\)", lambda variable: COLOURS[variable[1]], picture.svg_in("f"))
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    svg = re.sub(r'style="max-width: \d+px"', f'width="{width:.0f}" height="{height:.0f}"', svg, count=1)
    return re.sub(r"(<svg\b[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)


if __name__ == "__main__":
    stage = next(stage for stage in read_run(Path(sys.argv[1])) if stage.name == "prune")
    for picture in draw_all(stage):
        if picture.name in SHOWN:
            (IMAGES / f"demo-{picture.name}.svg").write_text(file_of(picture), encoding="utf-8")
            print(picture.name, picture.says)
