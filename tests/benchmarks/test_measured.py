"""The measured table and the ablations: runs are recorded once, on budget, and the pages say what the lines say."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ablations
import measured
import table
from harness.records import read_lines
from measured import P3B, Study, difference, main, plain_command, require_budget, settings
from p3b.errors import BudgetError
from p3b.run.method_options import require_taken
from p3b.run.option_checks import check
from p3b.run.options import PruneConfig
from p3b.run.series_plan import DENSE, SMALLER, Run, config_of, is_pruned, shared_warm_ups
from runs import CALM, MACHINE, MODEL, PHASES, brief, colour_folders

STUDIES = (table.STUDY, ablations.STUDY)
FLAGS = shlex.join(
    ["--data-path", "SHARED/colours", *MODEL, *MACHINE, *CALM, *PHASES, "--epochs", "2", "--finetune-epochs", "1"]
)


def line(name: str = P3B, ratio: float | None = 0.9, seed: int = 0, top1: float = 60.0, **changed: Any) -> dict[str, Any]:
    """What a run might have left."""
    params = 1_000_000 if ratio is None else round((1 - ratio) * 1_000_000)
    made_by = {
        "commit": "0" * 40,
        "date": "2026-01-01",
        "hardware": {"machine": "x", "cores": 2, "threads": 1, "accelerator": None},
    }
    run = Run(name, ratio, seed, tuple(changed.get("changed", {}).items()))
    return {
        "kind": "run", "status": "done", "name": run.name, "row": name, "ratio": ratio, "seed": seed, "command": "again",
        "p3b": "p3b prune", "part": "test", "images": 6000, "top1": top1, "top5": 90.0, "params": params, "macs": params,
        "dense_params": 1_000_000, "dense_macs": 1_000_000, "train_seconds": 60.0, "seconds": 61.0, "epochs": 5, "processes": 1,
        "data": "d", "precision": "bfloat16", "versions": {"torch": "2"},
        "keep_ratios": {"blocks.0.attn": 0.25, "blocks.0.mlp": 0.5},
        "speed": {size: {"images_per_second": 30.0, "dense": 20.0, "layout": "index"} for size in ("1", "32")},
        "returned": {"elements": 5, "updates": 10, "chances": 1000}, **made_by, **changed,
    }  # fmt: skip


# --- what is recorded


def test_the_figure_of_the_table_is_there() -> None:
    assert table.STUDY.record.with_suffix(".png").exists()


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_what_is_recorded_is_known_once_on_budget_and_by_the_recipe_of_now(study: Study) -> None:
    lines = read_lines(study.record)
    seeds = sorted({line["seed"] for line in lines}) or [0]
    known = {run.name: run for run in study.runs(settings(Path("SHARED"), Path("WORK"), seeds))}
    names = [line["name"] for line in lines]
    assert len(set(names)) == len(names) and set(names) <= set(known)
    for each in lines:
        require_budget(each)
        assert each["p3b"] == plain_command(known[each["name"]])
        assert each["command"] == measured.again(study, known[each["name"]])


# --- the plan


def test_the_table_runs_seed_by_seed_and_the_smallest_budget_first() -> None:
    names = [run.name for run in table.runs(settings(Path("SHARED"), Path("WORK")))]
    rows = (
        SMALLER,
        P3B,
        "random",
        "uniform",
        "magnitude",
        "taylor",
        "wdpruning",
        "savit-start_epoch_0.8-finalize_epoch_1-savit_every_2",
    )
    expected = [
        name
        for seed in (0, 1)
        for name in (f"dense-seed{seed}", *(f"{row}-{ratio}-seed{seed}" for ratio in (0.9, 0.75, 0.5) for row in rows))
    ]
    assert names == expected


def test_the_ablations_change_one_thing_at_a_time() -> None:
    config = settings(Path("SHARED"), Path("WORK"))
    runs = ablations.runs(config)
    assert len({run.name for run in runs}) == len(runs) == 8 * 2 * 2
    base = config_of(config, runs[0])
    assert isinstance(base, PruneConfig) and base.prune.prune_method == P3B
    for variant in ablations.variants():
        ours = config_of(config, variant.run(0.9, 0))
        assert isinstance(ours, PruneConfig)
        check(ours)
        assert (
            replace(ours.prune, **{key: getattr(base.prune, key) for key, _ in variant.changed}, prune_method=P3B) == base.prune
        )
        assert all(getattr(ours.prune, key) != getattr(base.prune, key) for key, _ in variant.changed)
    table_names = {run.name for run in table.runs(config)}
    assert sum(run.name in table_names for run in runs) == 8, "P3B and uniform shares are runs of the table"


def test_every_setting_of_the_recipe_means_something_and_warm_ups_are_shared() -> None:
    config = settings(Path("SHARED"), Path("WORK"))
    require_taken(config.prune, [run.row for run in table.runs(config) if is_pruned(run.row)])
    assert {name.rsplit("-", 1)[0] for name in shared_warm_ups(config, table.runs(config))} == {"plain", f"{P3B}-low_rank"}


# --- what the lines say


def test_a_line_that_misses_the_budget_is_refused() -> None:
    require_budget(line("uniform", 0.9, params=100_999))
    require_budget(line(DENSE, None))
    require_budget(line(SMALLER, 0.9, params=101_900))
    for name, params in (("uniform", 101_100), ("uniform", 98_900), (SMALLER, 102_100)):
        with pytest.raises(BudgetError, match=r"expected 10\.0% within"):
            require_budget(line(name, 0.9, params=params))


def test_a_difference_counts_common_seeds_and_both_errors() -> None:
    ours = [line("uniform", seed=seed, top1=top1) for seed, top1 in ((0, 58.0), (1, 60.0), (5, 0.0))]
    theirs = [line(seed=seed, top1=top1) for seed, top1 in ((0, 60.0), (1, 61.0))]
    found = difference(ours, theirs)
    assert found is not None and (found.mean, found.seeds) == (-1.5, 2)
    assert found.of_seeds == pytest.approx(0.5), "differences -2 and -1: deviation 0.7071 over sqrt(2)"
    assert found.of_test == pytest.approx(100 * math.sqrt((0.59 * 0.41 + 0.605 * 0.395) / 6000))
    assert found.error == pytest.approx(math.hypot(found.of_test, 0.5))
    alone = difference(ours[:1], theirs)
    assert alone is not None and alone.of_seeds is None and alone.error == alone.of_test
    assert difference(ours, []) is None


def test_the_table_tells_apart_what_is_more_than_two_errors_away() -> None:
    lines = [line(seed=seed, top1=60.0 + seed) for seed in (0, 1)]
    lines += [line("random", seed=seed, top1=50.0 + seed) for seed in (0, 1)] + [
        line("taylor", top1=59.5),
        line(DENSE, None, keep_ratios={}),
    ]
    text = "\n".join(table.tables(lines))
    assert "| random | 0, 1 | 50.50 ± 0.71 | -10.00 ± 0.90 * | 100,000 | 10.00% | 0.1 | 10.0% | 30 (x 1.50) |" in text
    assert "| taylor | 0 | 59.50 | -0.50 ± 0.90 | " in text
    assert "| P3B (block_benefit) | 0, 1 | 60.50 ± 0.71 |  | " in text
    assert "| random | 25 | 50 |" in text and "![Accuracy against parameters](table.png)" in text
    assert text.index("| dense |") < text.index("| P3B")
    assert "| random | 50.50 ± 0.71 |  |  |" in text, "one size of three was measured"


def test_the_ablations_page_answers_what_has_been_run() -> None:
    hard = line(top1=55.0, changed={"prune_masks": "hard"}, returned={"elements": 0, "updates": 10, "chances": 900})
    text = "\n".join(ablations.tables([line(), hard]))
    assert "| hard from the first update on | 90% | 0 | 55.00 | -5.00 ± 0.90 * |" in text
    assert "| by benefit (P3B) | 90% | 0 | 10 | 5 | 0.50% |" in text
    assert "| hard from the first update on | 90% | 0 | 10 | 0 | 0.00% |" in text
    assert "the same share" not in text


# --- the tool


@pytest.fixture
def shared_folder(tmp_path: Path) -> Path:
    colour_folders(tmp_path / "shared" / "data" / "colours", {"train": 4, "val": 1, "test": 1})
    return tmp_path / "shared"


def small(study: Study, runs: Sequence[Run]) -> Study:
    return replace(study, runs=lambda config: [run for run in runs if run.seed in config.compare.seeds])


def test_runs_are_made_recorded_once_and_drawn(
    shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "images_per_second", lambda models, _shape, **_: [float(len(models))] * len(models))
    monkeypatch.setattr(measured, "TOLERANCE", 0.02)  # one channel of a network of 19,347 parameters is more than 0.1 %
    changed = (("prune_masks", "hard"),)
    late = (("prune_start_epoch", "1.5"),)
    runs = [Run(DENSE, None, 0), *(Run(P3B, 0.5, 0, each) for each in ((), changed, late)), Run(P3B, 0.5, 1)]
    study, record = small(table.STUDY, runs), tmp_path / "out" / "table.jsonl"
    given = ["run", "--shared", str(shared_folder), "--work", str(tmp_path / "work"), "--record", str(record), "--seeds", "0"]
    with brief():
        assert main(study, [*given, "--only", "block_benefit-0.5"], flags=FLAGS) == 0
        assert [each["name"] for each in read_lines(record)] == ["block_benefit-0.5-seed0"]
        assert main(study, given, flags=FLAGS) == 0
        found = {each["name"]: each for each in read_lines(record)}
        before = record.read_bytes()
        assert main(study, given, flags=FLAGS) == 0
    assert record.read_bytes() == before and "done before" not in capsys.readouterr().out
    hard, started_late = "block_benefit-masks_hard-0.5-seed0", "block_benefit-start_epoch_1.5-0.5-seed0"
    assert list(found) == ["block_benefit-0.5-seed0", "dense-seed0", hard, started_late]
    assert str(tmp_path) not in record.read_text()
    assert found[hard]["changed"] == {"prune_masks": "hard"}
    assert found[hard]["p3b"] == plain_command(runs[2], FLAGS) and "--prune-masks hard" in found[hard]["p3b"]
    assert found[hard]["command"].startswith(f"python benchmarks/table.py run --only {hard} --seeds 0 ")
    assert found["dense-seed0"]["keep_ratios"] == {} and found["dense-seed0"]["params"] == found[hard]["dense_params"]
    assert set(found[hard]["speed"]) == {"1", "32"} and len(found[hard]["keep_ratios"]) == 4
    assert found[hard]["returned"]["updates"] > 0
    logs = {name: (tmp_path / "work" / "runs" / name / "prune" / "log.txt").read_text() for name in list(found)[2:]}
    assert "is taken from" in logs[hard] and "is taken from" not in logs[started_late]
    assert record.with_suffix(".md").read_text() == study.part(record).text()
    assert record.with_suffix(".png").exists()


def test_a_run_off_budget_is_not_recorded_and_an_unknown_name_is_refused(
    shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "TOLERANCE", 1e-9)
    study, record = small(ablations.STUDY, [Run("uniform", 0.47, 0)]), tmp_path / "lines.jsonl"
    given = ["run", "--shared", str(shared_folder), "--work", str(tmp_path / "work"), "--record", str(record)]
    with brief():
        assert main(study, given, flags=FLAGS) == 2
    assert not record.exists() and "uniform-0.47-seed0 keeps" in capsys.readouterr().err
    assert main(study, [*given, "--only", "unifrom"], flags=FLAGS) == 2
    assert "the first are uniform-0.47-seed0" in capsys.readouterr().err


def test_the_ablations_take_over_what_the_table_has(tmp_path: Path) -> None:
    table_record = tmp_path / "table.jsonl"
    table_record.write_text(json.dumps(line()) + "\n")

    class Here(Study):
        record = tmp_path / "ablations.jsonl"  # type: ignore[assignment]

    study = Here("ablations", "", lambda _config: [Run(P3B, 0.9, 0)], ablations.tables, borrows=table_record)
    assert main(study, ["run", "--work", str(tmp_path / "work"), "--record", str(study.record)], flags=FLAGS) == 0
    (found,) = read_lines(study.record)
    assert found["top1"] == 60.0 and found["command"].startswith("python benchmarks/ablations.py run --only block_benefit-0.9")
    assert not (tmp_path / "work").exists()
