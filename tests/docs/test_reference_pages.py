"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
from pages import ROOT

from p3b.report.diagnosis import CHECKS, Finding
from p3b.report.record import StageRecord
from reference_pages import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_current(name: str) -> None:
    made = PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == made, "run `python scripts/site/reference_pages.py`"


def test_every_check_of_the_doctor_is_explained() -> None:
    """docs/diagnosis.md has a section for each check, in the order in which they are told, that names the flags to try."""
    sections = re.split(r"^## ", (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    told = {section.partition("\n")[0].lower(): section for section in sections}
    sources = {_name(check): inspect.getsource(check) for check in CHECKS}
    assert [heading for heading in told if heading in sources] == list(sources)
    for name, source in sources.items():
        advice = set(re.findall(r"--[a-z][a-z-]+", source.rpartition("Finding(")[2]))
        missing = {flag for flag in advice if f"`{flag}" not in told[name]}
        assert not missing, f"the section '{name}' does not name {missing}"


def _name(check: Callable[[StageRecord], Finding | None]) -> str:
    found = re.search(r'Finding\(\s*"([^"]+)"', inspect.getsource(check))
    assert found is not None
    return found[1]
