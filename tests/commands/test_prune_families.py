"""`p3b prune` from end to end on a tiny model of each family, and what the exporters make of it."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path

import pytest
import torch

import p3b
from p3b.storage.models import build_model
from runs import SHAPE, finished, run

VIT = dict(pair.split("=") for pair in SHAPE)
FAMILIES: dict[str, dict[str, str]] = {
    "vit_small_patch16_dinov3": {**VIT, "embed_dim": "32", "num_heads": "2"},
    "beit_base_patch16_224": VIT,
    "vit_relpos_base_patch16_224": VIT,
    "qwen3_vit_88m": {**VIT, "pos_embed_grid_size": "2"},
    "naflexvit_base_patch16_gap": {**VIT, "pos_embed_grid_size": "(2,2)"},
    "samvit_base_patch16_224": {**VIT, "window_size": "2", "global_attn_indexes": "(1,)", "neck_chans": "8"},
    "vitamin_small_224": {"img_size": "32", "depth": "1"},
    "swin_tiny_patch4_window7_224": {
        "img_size": "16",
        "patch_size": "2",
        "embed_dim": "12",
        "window_size": "4",
        "depths": "(1,1)",
        "num_heads": "(2,3)",
    },
    "swinv2_tiny_window8_256": {
        "img_size": "16",
        "patch_size": "2",
        "embed_dim": "40",
        "window_size": "4",
        "depths": "(1,1)",
        "num_heads": "(2,4)",
    },
    "hiera_tiny_224": {
        "img_size": "16",
        "embed_dim": "16",
        "num_heads": "2",
        "stages": "(1,1)",
        "q_pool": "1",
        "mask_unit_size": "(2,2)",
    },
}
PHASES = ("--epochs", "2", "--prune-start-epoch", "1", "--prune-ratio", "0.3", "--prune-benefit", "linear")


def _pruned(name: str, data: Path, out: Path) -> Path:
    arguments = [f"{key}={value}" for key, value in FAMILIES[name].items()]
    return finished("prune", data, out, *PHASES, "--model", name, "--model-kwargs", *arguments) / "pruned"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if n % 2 else ()) for n, name in enumerate(FAMILIES)]
)
def test_the_command_prunes_it_and_leaves_a_small_model_that_answers(name: str, data: Path, tmp_path: Path) -> None:
    small = p3b.load(_pruned(name, data, tmp_path))
    dense, _ = build_model(
        name, num_classes=3, model_kwargs={key: literal_eval(value) for key, value in FAMILIES[name].items()}
    )
    kept = p3b.count_parameters(small) / p3b.count_parameters(dense)
    assert abs(kept - 0.7) < 0.02
    side = int(FAMILIES[name]["img_size"])
    with torch.no_grad():
        assert small(torch.zeros(2, 3, side, side)).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_small_model_is_exported_and_agrees_with_itself(name: str, data: Path, tmp_path: Path) -> None:
    small = _pruned(name, data, tmp_path / "run")
    for ending in ("onnx", "pt2"):
        file = tmp_path / f"small.{ending}"
        assert run("export", str(small), "--output", str(file)) == 0  # refused where its answers differ
        assert file.stat().st_size > 0


def test_inspect_tells_a_hierarchy_stage_by_stage(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: it asked for a depth, which a model of stages does not have."""
    small = _pruned("hiera_tiny_224", data, tmp_path)
    assert run("inspect", str(small)) == 0
    said = capsys.readouterr().out
    assert "width 16, depth 2" in said and "blocks.1.mlp" in said
