"""Every generated page says what the lines of its record say, and every line has a birth certificate."""

from __future__ import annotations

import json

import pytest

import ablations
import animals
import bench
import clock
import equal_page
import estimators
import layouts
import narrow
import recipes
import scaling
import table
import timm_models
from faults import campaign
from harness.command import Bench
from harness.pages import END, Part
from harness.records import ROOT, read_lines
from transfers import TRANSFERS

BENCHES = (bench.BENCH, scaling.BENCH, clock.BENCH, layouts.BENCH, narrow.BENCH, estimators.BENCH, recipes.BENCH)
STUDIES = (table.STUDY, ablations.STUDY)
EQUAL_TIME = tuple(equal_page.part(transfer.record, transfer) for transfer in TRANSFERS.values())
OTHERS = (animals.PART, campaign.PAGE, timm_models.PART, *EQUAL_TIME)
PARTS = (*(each.part for each in BENCHES), *(study.part(study.record) for study in STUDIES), *OTHERS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.script)
def test_the_page_says_what_the_lines_say(part: Part) -> None:
    text = part.page.read_text()
    assert part.text() == text, f"{part.page} and {part.lines} differ: run `python benchmarks/{part.script} table`"
    assert text.count(part.begin) == 1 and text.count(END) >= 1
    assert "<details>" in text, "commands and circumstances are folded"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.script)
def test_every_line_has_a_certificate_and_names_no_place(part: Part) -> None:
    lines = read_lines(part.lines)
    assert lines and str(ROOT) not in json.dumps(lines)
    for line in lines:
        line = line.get("certificate", line)
        assert "part" in line or {"command", "commit", "hardware"} <= line.keys()


@pytest.mark.parametrize("tool", BENCHES, ids=lambda tool: tool.part.script)
def test_what_is_recorded_is_known_and_stands_once(tool: Bench) -> None:
    lines = read_lines(tool.part.lines)
    assert len({tool.key(line) for line in lines}) == len(lines)
    assert {line["name"] for line in lines if "name" in line} <= {*tool.names, *clock.SETTLED}
    assert all("versions" in line for line in lines)
