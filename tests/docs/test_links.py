"""Links of the documentation lead somewhere, pages can be found, and both readers of Markdown see the same."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import PAGES, ROOT, anchors, links, prose

DOCS = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
ABOVE = "outside of docs/, so the site has it not: name it in backticks"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    lost = []
    for address in links(page):
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            lost.append(f"{address}: no such file")
        elif page in DOCS and not target.is_relative_to(ROOT / "docs"):
            lost.append(f"{address}: {ABOVE}")
        elif parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target):
            lost.append(f"{address}: no such heading; there are {', '.join(sorted(anchors(target)))}")
    assert not lost


def test_every_page_is_in_the_navigation_and_nothing_else() -> None:
    named = re.findall(r'= "([\w/]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_and_tables_begin_after_an_empty_line(page: Path) -> None:
    """Python-Markdown, which makes the site, takes them for text otherwise."""
    lines = prose(page).splitlines()
    for before, line in pairwise(lines):
        if re.match(r"(?:[-*]|\d+\.) |\|", line) and before.strip() and not before.startswith("#"):
            assert re.match(r"\s*(?:[-*]|\d+\.) |\||\s", before), f"no empty line before {line!r}"


def test_what_the_code_names_of_the_documentation_is_there() -> None:
    """Messages and comments name pages as docs/NAME.md, some with a heading."""
    sources = [*(ROOT / "src").rglob("*.py"), ROOT / "Makefile"]  # a benchmark may make a page that nobody has recorded yet
    named = {
        found for file in sources for found in re.findall(r"docs/[\w/]+\.md(?:#[\w-]+)?", file.read_text(encoding="utf-8"))
    }
    assert named
    for name in named:
        file, _, heading = name.partition("#")
        assert (ROOT / file).is_file(), f"{name} is named and not there"
        assert not heading or heading in anchors(ROOT / file), f"{name}: no such heading"


def test_the_readme_fits_and_begins_with_the_answer() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 90
    first = "\n".join(lines[:30])
    assert "p3b prune photos" in first and "![" in first, "the answer and a picture come first"


def test_a_lost_link_is_found_in_a_built_site(tmp_path: Path) -> None:
    from check_site import complaints

    (tmp_path / "index.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="#gone"></a><a href="gone.html"></a><a href="https://elsewhere.org"></a>'
        '<script src="https://elsewhere.org/x.js"></script><img src="index.html">'
    )
    assert list(complaints(tmp_path)) == [
        "index.html: loads https://elsewhere.org/x.js from another host",
        "index.html: #gone: no such anchor",
        "index.html: gone.html leads nowhere",
    ]
