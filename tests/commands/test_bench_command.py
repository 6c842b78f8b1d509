"""`p3b bench`: tables for each batch size, and the same figures as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exported import save_small
from p3b.commands.bench import sides
from p3b.commands.command_line import main
from p3b.deploy.bench import Side
from p3b.run.deploy_options import BenchConfig

BRIEF = ["--rounds", "3", "--seconds", "1", "--layout", "index", "--no-memory", "--device", "cpu"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("saved") / "pruned")


def test_a_pruned_model_is_measured_beside_a_dense_one_of_its_shape(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", str(saved), "--batch-sizes", "1", "3", "--json", str(file), *BRIEF]) == 0
    said = capsys.readouterr().out
    assert "batches of 1" in said and "batches of 3" in said and "thread(s)" in said
    dense, pruned = json.loads(file.read_text())["sides"]
    assert dense["name"].startswith("dense of") and dense["bytes"] is None and pruned["bytes"] > 0
    assert [timing["batch_size"] for timing in pruned["timings"]] == [1, 3]
    for first, second in zip(dense["timings"], pruned["timings"], strict=True):
        assert first["ratio"] is None and second["ratio"]["low"] <= second["ratio"]["median"] <= second["ratio"]["high"]
        assert second["p50_ms"] <= second["p90_ms"] and second["rounds"] == 3


def test_compiled_sides_stand_beside_eager_ones(saved: Path, tmp_path: Path) -> None:
    exported = tmp_path / "small.onnx"
    exported.touch()
    chosen = sides(BenchConfig((saved, exported), compile=True))
    assert chosen == [
        Side(saved, dense=True),
        Side(saved, compiled=True, dense=True),
        Side(saved),
        Side(saved, compiled=True),
        Side(exported),
    ]
    assert [side.name.rpartition(", ")[2] for side in chosen] == ["eager", "compiled", "eager", "compiled", "ONNX Runtime"]
