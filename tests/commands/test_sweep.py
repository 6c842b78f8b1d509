"""`p3b sweep`: a bisection that keeps its word, budgets from one warm-up, and an answer that says how sure it is."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import p3b.run.records
from p3b.commands.command_line import STOPPED, USER_ERROR
from p3b.errors import ConfigError
from p3b.run.bisection import candidates, grid, judge, largest, middle
from processes import SparePython, on_ranks
from refusals import Refusals
from runs import colour_folders, everything_in, flags, lines, read, run, same_tensors, weights

QUICK = ("--epochs", "2", "--prune-start-epoch", "4steps", "--finetune-epochs", "1", "--prune-method", "uniform")
"""Pruning starts within the second epoch of three steps."""
TWO = (*QUICK, "--prune-ratios", "0.3", "0.6")
NAMES = ["dense-seed0", "uniform-0.3-seed0", "uniform-0.6-seed0"]
SEARCH = (*QUICK, "--lowest", "0.2", "--highest", "0.6", "--ratio-step", "0.2")

RANGES = st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 50)).map(
    lambda drawn: (min(drawn[:2]) / 100, (max(drawn[:2]) + 1) / 101, drawn[2] / 1000)
)
GRIDS = RANGES.filter(lambda each: each[0] < each[1] and each[2] <= each[1] - each[0]).map(lambda each: grid(*each))


# --- the bisection ----------------------------------------------------------------------------------------------------


def bisect(ratios: list[float], holds: dict[float, bool], known: dict[float, bool]) -> tuple[float | None, int]:
    """The answer, and the tries that it took."""
    tries = 0
    while left := candidates(ratios, known):
        known = {**known, middle(left): holds[middle(left)]}
        tries += 1
    return largest(known), tries


@given(GRIDS, st.floats(0, 1))
def test_the_answer_is_the_largest_that_holds_where_accuracy_falls(ratios: list[float], edge: float) -> None:
    holds = {ratio: ratio <= edge for ratio in ratios}
    answer, tries = bisect(ratios, holds, {})
    assert answer == max((ratio for ratio in ratios if ratio <= edge), default=None)
    assert tries <= math.ceil(math.log2(len(ratios) + 1))


@given(st.data(), GRIDS)
def test_the_answer_holds_whatever_the_accuracies_do(data: st.DataObject, ratios: list[float]) -> None:
    """What was known before counts too, and no try is made twice or below what holds."""
    holds = {ratio: data.draw(st.booleans()) for ratio in ratios[:40]}
    ratios = ratios[:40]
    known = {ratio: holds[ratio] for ratio in data.draw(st.sets(st.sampled_from(ratios)))}
    answer, tries = bisect(ratios, holds, known)
    assert tries <= math.ceil(math.log2(len(candidates(ratios, known)) + 1))
    if answer is None:
        assert not any(known.values())
    else:
        assert holds[answer] and answer >= (largest(known) or 0)


@given(RANGES.filter(lambda each: each[0] < each[1] and each[2] <= each[1] - each[0]))
def test_a_grid_goes_from_end_to_end_in_steps(asked: tuple[float, float, float]) -> None:
    lowest, highest, step = asked
    ratios = grid(lowest, highest, step)
    assert ratios[0] == lowest and ratios[-1] == highest
    gaps = [after - before for before, after in pairwise(ratios)]
    assert all(0 < gap <= step + 1e-9 for gap in gaps)
    assert all(math.isclose(gap, step, rel_tol=1e-6) for gap in gaps[:-1])


@pytest.mark.parametrize(
    "wrong", [(0.5, 0.5, 0.1), (-0.1, 0.5, 0.1), (0.1, 1.0, 0.1), (0.1, 0.5, 0.0), (0.1, 0.5, 0.6), (0.1, 0.9, 1e-9)]
)
def test_a_grid_that_is_none_is_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="--lowest"):
        grid(*wrong)


def test_what_differs_by_rounding_alone_decides_nothing() -> None:
    dense, pruned = ({"top1": 100 * right / 300, "images": 300} for right in (194, 191))
    assert dense["top1"] - pruned["top1"] > 1.0
    budget = judge(dense, pruned, 0.5, 1.0)
    assert budget.holds and budget.loss == 1.0
    errors = [100 * math.sqrt(right / 300 * (1 - right / 300) / 300) for right in (194, 191)]
    assert budget.standard_error == pytest.approx(math.hypot(*errors))
    assert not judge(dense, pruned, 0.5, 0.99).holds


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two budgets, never changed by a test."""
    out = tmp_path_factory.mktemp("swept")
    assert run("sweep", *flags(data, out, *TWO), figures=True) == 0
    return out


def of_kind(out: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines(out / "sweep.jsonl") if line["kind"] == kind]


def names(out: Path) -> list[str]:
    return [line["name"] for line in of_kind(out, "run")]


def told(out: Path) -> list[str]:
    """The runs' lines without what a clock measures and without the folder."""
    untimed = [{**line, "train_seconds": None, "processor_seconds": None} for line in of_kind(out, "run")]
    return [json.dumps(line).replace(str(out), "OUT") for line in untimed]


def test_every_budget_is_what_prune_alone_makes_of_it(swept: Path, tmp_path: Path) -> None:
    assert names(swept) == NAMES
    for line in of_kind(swept, "run")[1:]:
        program, command, *said = shlex.split(line["command"])
        assert (program, command) == ("p3b", "prune")
        said[said.index("--output-dir") + 1] = str(tmp_path / line["name"])
        assert run(command, *said) == 0
        ours, alone = swept / "runs" / line["name"], tmp_path / line["name"]
        assert same_tensors(weights(ours / "pruned"), weights(alone / "pruned"))
        assert read(ours / "prune" / "summary.json")["accuracy"] == read(alone / "prune" / "summary.json")["accuracy"]
        assert len(lines(ours / "prune" / "metrics.jsonl")) == len(lines(alone / "prune" / "metrics.jsonl"))
    assert [path.name for path in (swept / "warm-ups").iterdir()] == ["plain-seed0"]
    assert lines(swept / "warm-ups" / "plain-seed0" / "warm-up" / "metrics.jsonl")[-1]["epoch"] == 1, "it stops in the second"


def test_the_tables_say_what_the_lines_say(swept: Path) -> None:
    text = (swept / "sweep.md").read_text()
    for line in of_kind(swept, "run"):
        assert f"{line['top1']:.2f} ± " in text and f"{line['params']:,}" in text and line["part"] == "test"
    assert text.startswith("# Sweep over budgets") and "`sweep.jsonl`" in text
    assert (swept / "sweep.png").stat().st_size and "<h1>Sweep over budgets</h1>" in (swept / "sweep.html").read_text()


def test_interrupted_and_continued_is_as_never_interrupted(
    data: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once in the warm-up, once in the middle of a budget."""
    whole, stops = p3b.run.records.Records.log_epoch, ["warm-ups", "uniform-0.6"]

    def stopping(self: Any, *more: Any) -> Any:
        if stops and stops[0] in str(self.folder.root):
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *more)

    monkeypatch.setattr(p3b.run.records.Records, "log_epoch", stopping)
    asked = flags(data, tmp_path, *TWO)
    for done in (1, 2):
        assert run("sweep", *asked) == STOPPED
        assert "run the same command again" in capsys.readouterr().err
        assert names(tmp_path) == NAMES[:done]
    assert run("sweep", *asked) == 0
    assert told(tmp_path) == told(swept)
    for name in NAMES:
        kind = "dense" if name == NAMES[0] else "pruned"
        assert same_tensors(weights(tmp_path / "runs" / name / kind), weights(swept / "runs" / name / kind))
    before = everything_in(tmp_path)
    assert run("sweep", *asked) == 0
    assert everything_in(tmp_path) == before, "nothing is run twice"


def test_the_largest_budget_that_loses_little(
    data: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any loss is allowed at first, so the search goes up; then none of less than nothing, over the same runs."""
    dense = swept / "runs" / NAMES[0]
    asked = flags(data, tmp_path, *SEARCH, "--dense-run", str(dense))
    assert run("sweep", *asked, "--max-loss", "99") == 0
    assert names(tmp_path) == ["dense-given", "uniform-0.4-seed0", "uniform-0.6-seed0"], "the middle first"
    answer = of_kind(tmp_path, "answer")[-1]
    assert answer["ratio"] == 0.6 and [budget["ratio"] for budget in answer["budgets"]] == [0.4, 0.6]
    of_dense, found = (
        read(folder / "summary.json")["accuracy"] for folder in (dense / "train", tmp_path / "runs" / answer["name"] / "prune")
    )
    assert answer["test"] == {"dense": of_dense["test"], "answer": found["test"]}
    assert answer["budgets"][-1]["loss"] == pytest.approx(of_dense["val"]["top1"] - found["val"]["top1"])
    text, said = (tmp_path / "sweep.md").read_text(), " ".join(capsys.readouterr().out.split())
    for shown in (text, said):
        assert "loses at most 99 points of top-1: 0.6" in shown and "which had no part in the choice" in shown
        assert "Below the noise" not in shown, "two standard errors are less than 99 points"
    assert "Accuracy on 9 val images" in text

    assert run("sweep", *asked, "--max-loss", "0") == 0
    again = of_kind(tmp_path, "answer")[-1]
    best = max((budget["ratio"] for budget in again["budgets"] if budget["loss"] <= 0), default=None)
    assert again["ratio"] == best
    assert names(tmp_path)[:3] == ["dense-given", "uniform-0.4-seed0", "uniform-0.6-seed0"]
    assert "Below the noise: 0 points" in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((), "Give either --prune-ratios"),
        (("--prune-ratios", "0.5", "--max-loss", "1"), "got both"),
        (("--prune-ratios", "0.5", "1.5"), "--prune-ratios must lie in [0, 1), got 1.5"),
        (("--prune-ratios", "0.5", "0.5"), "--prune-ratios is 0.5 0.5; expected at least one, each once"),
        (("--prune-ratios", "0.5", "0.97"), "cannot be met"),
        (("--prune-ratios", "0.5", "--lowest", "0.2"), "--lowest belongs to --max-loss"),
        (("--max-loss", "-1"), "--max-loss is in points of top-1 and must lie in [0, 100), got -1"),
        (("--max-loss", "nan"), "got nan"),
        (("--max-loss", "1", "--lowest", "0.9", "--highest", "0.1"), "--lowest 0.9 and --highest 0.1 are no range"),
        (("--max-loss", "1", "--ratio-step", "0"), "--ratio-step 0.0 does not fit"),
        (("--max-loss", "1"), "--highest: A prune ratio of 0.9 cannot be met"),
        (
            ("--prune-method", "wdpruning", "--prune-ratios", "0.2", "0.746"),
            "--prune-ratios: A prune ratio of 0.746 cannot be met: wdpruning keeps one element of every gate",
        ),
        (
            ("--prune-method", "wdpruning", "--wd-classifiers", "1", "--wd-classifier-choose", "1", "--max-loss", "1"),
            "--lowest: A prune ratio of 0.1 cannot be met: cutting the network after block 1",
        ),
        (("--prune-ratios", "0.5", "--dense-run", "nowhere"), "nowhere holds no finished `p3b train`"),
        (("--prune-ratios", "0.5", "--prune-alpha", "0.7"), "--prune-alpha 0.7 means nothing"),
        (("--prune-ratios", "0.5", "--prune-method", "unifrom"), "Did you mean 'uniform'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    data: Path, refused: Refusals, asked: tuple[str, ...], message: str
) -> None:
    refused("sweep", *flags(data, refused.out, *QUICK, *asked), telling=(message,))


def test_a_method_that_reaches_further_may_search_further(data: Path, tmp_path: Path) -> None:
    """SAViT takes channels of the stream, and so parameters outside the blocks, which others leave."""
    asked = flags(data, tmp_path, *QUICK, "--prune-method", "savit", "--prune-ratios", "0.9", "--savit-every", "1")
    assert run("sweep", *asked) == 0
    (line,) = (line for line in of_kind(tmp_path, "run") if line["row"] == "savit")
    assert line["status"] == "done" and line["params"] < 0.105 * 19347


def test_a_search_without_validation_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = colour_folders(tmp_path / "data", {"train": 2, "test": 1})
    assert run("sweep", *flags(data, tmp_path / "out", *SEARCH, "--max-loss", "1", "--val-share", "0")) == USER_ERROR
    assert "there are none: give --val-path or a --val-share" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_all_ranks_sweep_from_one_warm_up(python: SparePython, data: Path, tmp_path: Path) -> None:
    done = on_ranks(python, 2, "sweep", *flags(data, tmp_path, *TWO, "--batch-size", "2", "--layout", "index"))
    assert done.status == 0, done.errors[-3000:]
    assert [(line["name"], line["processes"]) for line in of_kind(tmp_path, "run")] == [(name, 2) for name in NAMES]
    for name in NAMES[1:]:
        log = (tmp_path / "runs" / name / "prune" / "log.txt").read_text()
        assert log.count("the warm-up of 4 steps is taken from") == 1


def test_a_dense_run_of_other_epochs_is_told_beside_the_table(data: Path, swept: Path, tmp_path: Path) -> None:
    dense = ("--dense-run", str(swept / "runs" / NAMES[0]))
    asked = flags(data, tmp_path, *QUICK, "--prune-ratios", "0.3", *dense, "--finetune-epochs", "2")
    assert run("sweep", *asked) == 0
    assert "was trained for 3 epochs, the pruned ones for 4" in (tmp_path / "sweep.md").read_text()


def test_a_dense_run_on_other_images_is_refused(
    data: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = swept / "runs" / NAMES[0]
    asked = flags(data, tmp_path / "out", *TWO, "--dense-run", str(dense), "--val-path", str(data / "train"))
    assert run("sweep", *asked) == USER_ERROR
    assert "was measured on 9 val images, the pruned models will be on 12" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
