"""Estimators are judged by runs that are recorded once, and the page says what the lines say."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import estimators
from estimators import BENCH, JUDGED, Panel, agreement, spearman
from harness.command import main
from harness.records import read_lines
from p3b.scoring.estimators import ESTIMATORS, ProbeSettings
from p3b.vit.layout import read_layout
from tiny import labels, tiny_vit

CE = torch.nn.functional.cross_entropy


def test_every_estimator_is_judged() -> None:
    assert set(JUDGED) == set(ESTIMATORS)


def test_rank_correlation_goes_by_order_alone() -> None:
    a = torch.tensor([0.1, 0.5, -2.0, 3.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([0.5, 0.1, -2.0, 3.0])) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_agreement_is_that_of_the_means_within_each_interval() -> None:
    up, down = [[1.0, 2.0, 3.0]] * 2, [[3.0, 2.0, 1.0]] * 2
    steps = [{"step": step, **dict.fromkeys(JUDGED, up)} for step in range(8)]
    for step in (4, 5):
        steps[step]["linear"] = [up[0], down[0]]
    for step in (4, 5, 6, 7):
        del steps[step]["subsampled"]
    found = agreement(steps, edges=[4, 6, 8])  # an interval of two steps: the first is 2..3
    assert found["linear"] == {"cls": pytest.approx([1, 1, 1]), "patch": pytest.approx([1, -1, 1])}
    assert found["subsampled"] == {"cls": pytest.approx([1]), "patch": pytest.approx([1])}
    assert found.keys() == set(JUDGED) - {"paper"}


def test_who_watches_changes_nothing_and_a_panel_goes_on_where_it_stopped(tmp_path: Path) -> None:
    layout = read_layout(tiny_vit())
    generator = torch.Generator().manual_seed(0)
    batches = [([torch.randn(8, 17, 24, generator=generator) for _ in range(5)], labels(8, seed=s)) for s in range(6)]
    settings = ProbeSettings(layout, lambda tensor: tensor, torch.device("cpu"), torch.float32)

    def panel() -> Panel:
        return Panel({name: ESTIMATORS[name](settings) for name in JUDGED}, tmp_path / "record.jsonl")

    def learn(estimator: Any, some: list[Any]) -> list[torch.Tensor]:
        found = []
        for stream, targets in some:
            benefits, loss = estimator.observe(stream, CE, targets)
            loss.backward()
            estimator.train(torch.tensor(True), None)
            found.append(benefits)
        return found

    alone = learn(ESTIMATORS["paper"](settings), batches)
    first = panel()
    watched = learn(first, batches[:3])
    state = deepcopy(first.state_dict())
    learn(first, batches[:2])  # lines that the resumed one must not find
    second = panel()
    second.load_state_dict(state)
    watched += learn(second, batches[3:])
    assert all(map(torch.equal, alone, watched))
    lines = read_lines(tmp_path / "record.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert [("subsampled" in line, "ridge" in line) for line in lines] == [(step % 4 == 0, True) for step in range(6)]


def test_a_run_is_recorded_once_and_its_row_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for piece, value in (("_top1", {"top1": 91.0, "params": 5}), ("_speed", {"sides": {n: {"ratio": 2.0} for n in JUDGED}})):
        monkeypatch.setattr(estimators, piece, lambda given, value=value: asked.append(given) or value)
    lines, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    page.touch()
    tool = replace(BENCH, part=replace(BENCH.part, lines=lines, page=page))
    for only in ("digits-speed", "digits-50-ridge-", "digits-50-ridge-"):
        assert main(tool, ["run", "--only", only, "--work", str(tmp_path)]) == 0
    assert [line["name"] for line in read_lines(lines)] == ["digits-speed", "digits-50-ridge-0", "digits-50-ridge-1"]
    _, first, second = asked
    assert (first.prune.prune_benefit, first.prune.prune_ratio, first.run.resume) == ("ridge", 0.5, True)
    assert (first.run.seed, second.run.seed) == (0, 1)
    assert "| ridge |  |  | 91.00 (91.00, 91.00) |  | 2.00 |" in page.read_text()
