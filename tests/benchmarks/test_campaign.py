"""The campaign records each case, replaces a part only when it is complete, and its page says what the lines say."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import faults.campaign
from faults.campaign import PAGE, PARTS, Part, main, tables
from harness.pages import END
from harness.records import read_lines
from laws import LAWS

PART = """
import json
import subprocess
import sys
from pathlib import Path

def cases(count, seed, work):
    for number in range(count):
        (work / f"{number}.txt").write_text(str(seed))
        yield {"part": "tiny", "case": f"case {number % 2}", "ok": number != FAILS, "kills": number, "miss": 0.25 * number,
               "detail": f"wrote {work / 'file'}"}
        if number == STOPS:
            raise KeyboardInterrupt
"""


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the campaign with one part of its own, whose cases fail or stop where asked; record and page lie in tmp_path."""
    monkeypatch.syspath_prepend(tmp_path)
    page = replace(PAGE, page=tmp_path / "page.md", lines=tmp_path / "faults.jsonl")
    page.page.write_text(f"Before.\n\n{page.begin}\nold\n{END}\n\nAfter.\n")
    made: list[str] = []

    def run(*arguments: str, fails: int = -1, stops: int = -1) -> int:
        made.append(f"tiny_part_{tmp_path.name.replace('-', '_')}_{len(made)}")
        (tmp_path / f"{made[-1]}.py").write_text(f"FAILS, STOPS = {fails}, {stops}\n{PART}")
        parts = {"tiny": Part(made[-1], full=3, small=1, title="Tiny things"), "other": Part("absent", 1, 1, "Others")}
        return main([*arguments, "--work", str(tmp_path / "work")], parts=parts, page=page)

    run.page, run.lines, run.work = page.page, page.lines, tmp_path / "work"  # type: ignore[attr-defined]
    return run


def test_what_is_recorded_is_complete_and_has_not_failed() -> None:
    lines = read_lines(PAGE.lines)
    recorded = {line["part"] for line in lines}
    assert "laws" in recorded
    for name in recorded:
        *cases, last = [line for line in lines if line["part"] == name]
        certificate = last["certificate"]
        assert {"command", "commit", "seed", "hardware", "versions", "seconds", "date"} <= certificate.keys()
        assert certificate["command"].endswith(f"run --part {name}")
        assert all(line["ok"] for line in cases), name
        assert sum(line.get("cases", 1) for line in cases) >= PARTS[name].full


def test_each_case_and_a_certificate_are_recorded_and_the_page_is_made(campaign: Any) -> None:
    other = {"part": "other", "case": "kept", "ok": True, "detail": ""}
    campaign.lines.write_text(json.dumps({"part": "tiny", "case": "old", "ok": False, "detail": ""}) + "\n" + json.dumps(other))
    assert campaign("run", "--part", "tiny", "--seed", "7") == 0
    assert [line.get("case") for line in read_lines(campaign.lines)] == ["kept", "case 0", "case 1", "case 0", None]
    certificate = read_lines(campaign.lines)[-1]["certificate"]
    assert certificate["seed"] == 7
    assert certificate["command"] == "python benchmarks/faults/campaign.py run --part tiny"
    assert len(certificate["commit"]) == 40
    assert certificate["versions"].keys() >= {"python", "torch"}
    assert read_lines(campaign.lines)[1]["detail"] == "wrote WORK/file"
    text = campaign.page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    assert "| Tiny things | kills: 3 in all, at most 2 a case; miss: at most 0.5 | 3 cases | 0 |" in text
    assert "| case 0 | 2 | 0 |" in text
    assert "| Others | no run is recorded |  |  |" in text


def test_a_failing_case_is_printed_recorded_and_gives_another_exit_status(
    campaign: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign("run", "--part", "tiny", fails=1) == 1
    assert "FAILED tiny: case 1: wrote WORK/file" in capsys.readouterr().err
    assert [line["ok"] for line in read_lines(campaign.lines)[:3]] == [True, False, True]
    text = campaign.page.read_text()
    assert "| 3 cases | 1 |" in text
    assert "- Tiny things: case 1: wrote WORK/file" in text
    assert campaign("run", "--part", "tiny") == 0
    assert "What failed" not in campaign.page.read_text()


def test_an_interrupted_part_leaves_the_old_lines_and_what_it_has_seen(campaign: Any) -> None:
    assert campaign("run", "--part", "tiny") == 0
    lines, page = campaign.lines.read_bytes(), campaign.page.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        campaign("run", "--part", "tiny", stops=1)
    assert campaign.lines.read_bytes() == lines
    assert campaign.page.read_bytes() == page
    assert len(read_lines(campaign.work / "tiny.jsonl")) == 2
    assert campaign("run", "--part", "tiny") == 0  # begins again, in an empty folder
    assert len(read_lines(campaign.lines)) == 4
    assert not (campaign.work / "tiny.jsonl").exists()


def test_the_small_version_changes_neither_record_nor_page(campaign: Any) -> None:
    page = campaign.page.read_bytes()
    assert campaign("run", "--part", "tiny", "--small") == 0
    assert not campaign.lines.exists()
    assert campaign.page.read_bytes() == page
    cases = [line for line in read_lines(campaign.work / "faults.jsonl") if "case" in line]
    assert len(cases) == 1


def test_figures_are_summed_up_by_their_type_and_cells_stay_cells() -> None:
    shared = {"part": "kills", "ok": True, "detail": ""}
    lines = [
        {**shared, "case": "a|b", "alone": True, "steps": [1, 2], "often": "every step", "left": None},
        {**shared, "case": "a|b", "alone": False, "steps": [5], "often": "every epoch", "left": None},
        {"part": "kills", "certificate": {**read_lines(PAGE.lines)[-1]["certificate"], "changed_since": True}},
    ]
    text = "\n".join(tables(lines))
    assert "alone: 1 of 2; steps: 3 in all; often: every step (1), every epoch (1) |" in text
    assert "| a\\|b | 2 | 0 |" in text
    assert "with changes that were not committed" in text
    assert "left" not in text


def test_it_runs_as_a_script_with_the_real_laws(tmp_path: Path) -> None:
    def script() -> None:
        os.chdir(tmp_path)
        sys.argv = [faults.campaign.__file__, "run", "--part", "laws", "--small", "--work", str(tmp_path)]
        runpy.run_path(faults.campaign.__file__, run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=script)  # torch is loaded already
    process.start()
    process.join(300)
    assert process.exitcode == 0
    *laws, last = read_lines(tmp_path / "faults.jsonl")
    assert len(laws) == len(LAWS)
    assert all(line["ok"] and line["cases"] > 0 for line in laws)
    assert last["certificate"]["command"] == "python benchmarks/faults/campaign.py run --part laws --small"
