"""The pages in a real browser: nothing is complained of or asked for, every figure is there, and nothing sticks out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, browser, find
from made_runs import compare_lines, make_run
from p3b.report.comparison_page import write_report
from p3b.report.run_report import write_run_report

SIZES = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no Chromium on this machine")
    with browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "photos")
    written = write_report(folder, lines=compare_lines())
    return {
        "run": write_run_report([run], folder / "report.html"),
        "compare": next(file for file in written if file.suffix == ".html"),
    }


@pytest.mark.parametrize("name", ["run", "compare"])
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_page_in_a_browser(opened: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    shown = opened.show(pages[name], width, scheme)
    look = shown.look
    assert not shown.complaints and not shown.requests
    assert look["width"] <= width, "the page is not wider than the window"
    assert look["right"] <= width and not look["hidden"], "no column of a table hides behind a scrollbar"
    assert len(look["pictures"]) == {"run": 8, "compare": 2}[name]
    for drawn in look["pictures"]:
        assert drawn["width"] > 300 and drawn["height"] > 60 and drawn["marks"] > 8 and drawn["label"], drawn
        assert drawn["ink"] == look["ink"] or (drawn["ink"] in ("", "rgb(0, 0, 0)") and scheme == "light"), drawn
    assert all(look["images"])
    dark = sum(map(int, look["paper"].removeprefix("rgb(").rstrip(")").split(", ")[:3])) < 200
    assert dark == (scheme == "dark") and look["paper"] != look["ink"]
