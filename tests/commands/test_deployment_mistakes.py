"""`p3b export`, `predict` and `bench` tell a mistake before work starts, and write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from exported import save_small
from p3b.commands.command_line import main

MISTAKES = [
    ("bench", ["nowhere.onnx"], "nowhere.onnx"),
    ("bench", ["--batch-sizes", "0"], "--batch-sizes"),
    ("bench", ["--seconds", "0"], "--seconds"),
    ("bench", ["--layout", "indx"], "index"),
    ("predict", [], "No image is given"),
    ("predict", ["nowhere.png"], "nowhere.png"),
    ("predict", ["-", "--files-from", "-"], "Standard input"),
    ("predict", ["-", "-"], "once"),
    ("predict", ["--top", "0"], "--top"),
    ("predict", ["--layout", "foldd"], "folded"),
    ("export", ["--output", "model.tflite"], ".tflite"),
    ("export", ["--int8", "static", "--output", "a.pt2"], "--int8"),
    ("export", ["--int8", "static", "--half"], "contradict"),
    ("export", ["--int8", "static"], "--calibration"),
    ("export", ["--check-images", "0"], "--check-images"),
    ("export", ["--max-loss", "-1"], "--max-loss"),
    ("export", ["--layout", "indx"], "index"),
    ("export", ["--images", "nowhere"], "nowhere"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("saved") / "pruned")


@pytest.mark.parametrize(("command", "flags", "word"), MISTAKES)
def test_a_mistake_is_told_before_work_starts(
    saved: Path, command: str, flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "export":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    before = set(saved.parent.iterdir())
    assert main([command, str(saved), *flags]) == 2
    assert word in capsys.readouterr().err and set(saved.parent.iterdir()) == before
