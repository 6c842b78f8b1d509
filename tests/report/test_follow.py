"""`p3b report --follow`: the page of a run that trains, written again until the run has ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import p3b.commands.report
from made_runs import EPOCHS, SUMMARY, epoch, make_run, update
from p3b.commands.report import report
from p3b.run.look_options import ReportConfig


def test_the_page_follows_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is read at a moment when half a line is written."""
    run = make_run(tmp_path / "run", finished=False)
    stage, page = run / "prune", run / "report.html"
    later = json.dumps(epoch(len(EPOCHS) + 1, "fine-tune", 91.25)) + "\n"
    blocks = json.dumps(update(3.5, 40)) + "\n"
    seen: list[str] = []

    def train(_seconds: float) -> None:
        seen.append(page.read_text())
        for name, line in (("metrics.jsonl", later), ("blocks.jsonl", blocks)):
            with (stage / name).open("a") as file:
                file.write(line[:50] if len(seen) == 1 else line[50:])
        if len(seen) == 2:
            (stage / "summary.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr(p3b.commands.report.time, "sleep", train)
    assert report(ReportConfig(runs=(run,), follow=True, seconds=7)) == page
    assert len(seen) == 2
    for text in seen:
        assert 'http-equiv="refresh" content="7"' in text and "after 6 epochs: 68.00 % top-1" in text
    last = page.read_text()
    assert "refresh" not in last and "91.25" in last and "50% smaller (500 parameters)" in last
