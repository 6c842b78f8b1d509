"""A run that has ended leaves a page and its predictions; report, doctor, runs and inspect read what is there."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from runs import flags, read, run

RUN = ("--epochs", "2", "--prune-start-epoch", "0", "--finetune-epochs", "1", "--report")


@pytest.fixture(scope="module")
def pruned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run, and a pruning run that is compared with it."""
    root = tmp_path_factory.mktemp("look")
    assert run("train", *flags(data, root / "dense", "--epochs", "2")) == 0
    assert run("prune", *flags(data, root / "pruned", *RUN, "--dense-run", str(root / "dense"))) == 0
    return root


def predictions(stage: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((stage / "predictions.csv").read_text().splitlines()))


def test_the_predictions_are_those_that_the_accuracy_is_over(pruned: Path) -> None:
    for folder, figures in (("dense/train", "model"), ("pruned/prune", "pruned")):
        stage = pruned / folder
        rows = predictions(stage)
        top1 = 100 * sum(row["target"] == row["predicted"] for row in rows) / len(rows)
        summary = read(stage / "summary.json")
        assert {row["part"] for row in rows} == {"test"} and len(rows) == summary["accuracy"]["test"]["images"]
        assert top1 == pytest.approx(summary[figures]["top1"])
        wrong = {int(row["index"]) for row in rows if row["target"] != row["predicted"]}
        assert {int(file.stem) for file in (stage / "examples").glob("*.png")} == wrong
    dense = [row["predicted"] for row in predictions(pruned / "dense/train")]
    assert [row["dense_predicted"] for row in predictions(pruned / "pruned/prune")] == dense


def test_examples_are_small_copies(pruned: Path) -> None:
    for file in (pruned / "pruned/prune/examples").glob("*.png"):
        with Image.open(file) as image:
            assert max(image.size) <= 96


def test_a_run_ends_with_its_page(pruned: Path) -> None:
    page = (pruned / "pruned" / "report.html").read_text()
    assert "pruned: prune" in page and "What each block does for the task" in page and "Accuracy by class" in page
    assert not (pruned / "dense" / "report.html").exists(), "--no-report"


def test_report_puts_runs_side_by_side(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pruned / "both.html"
    assert run("report", str(pruned / "dense"), str(pruned / "pruned"), "--out", str(out), "--follow") == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    assert "dense: train" in page and "pruned: prune" in page
    assert "http-equiv" not in page, "both have ended: nothing is to be loaded again"


def test_doctor_tells_what_it_finds(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", str(pruned / "pruned")) == 0
    said = capsys.readouterr().out
    assert "The run started from random weights." in said and "--model-pretrained" in said


def test_runs_lists_what_lies_below_a_folder(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("runs", str(pruned)) == 0
    said = capsys.readouterr().out
    assert "dense" in said and "block_benefit" in said and said.count("finished") == 2


def test_inspect_prints_the_architecture(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", str(pruned / "pruned" / "pruned")) == 0
    said = capsys.readouterr().out
    assert f"{read(pruned / 'pruned/prune/summary.json')['pruned']['params']:,} parameters" in said
    assert "blocks.1.mlp" in said and "classes: 3 (blue, green, red)" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("report",), "Name at least one run"),
        (("report", "nowhere"), "nowhere holds no run"),
        (("doctor", "nowhere"), "nowhere holds no run"),
        (("runs", "nowhere"), "nowhere is no folder"),
        (("inspect", "nowhere"), "nowhere"),
    ],
)
def test_what_is_not_there_is_said(command: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command) == 2
    assert message in capsys.readouterr().err
