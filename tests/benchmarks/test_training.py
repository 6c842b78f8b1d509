"""What a training step takes, plain and pruning: every measurement gives its figures, and the page shows them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

import bench
from p3b.deploy.speed import images_per_second
from tiny import VIT, tiny_vit
from training import Entry, Shape

TINY = Shape("tiny", VIT, 2, 1, {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3})
GIVEN = Namespace(device="cpu", threads=1, rounds=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_measurement_becomes_a_row(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measures = {"gates": bench.measure_gates, "masks": bench.measure_masks, "benefit": bench.measure_benefit}
    entries = {name: Entry(name, "tiny", precision, measure) for name, measure in measures.items()}
    monkeypatch.setattr(bench, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(bench, "ENTRIES", entries)
    made_by = {"command": "c", "commit": "0" * 40, "hardware": {"machine": "m", "cores": 2, "accelerator": None}}
    lines: dict[str, Any] = {name: {"name": name, **bench.measure(name, GIVEN), **made_by} for name in entries}
    gates, masks, benefit = (line["result"] for line in lines.values())
    assert gates["rounds"] == 1 and gates["batch"] == 2 and gates["sides"]["pruning"]["ratio"] > 0
    assert masks["share_of_training"] == pytest.approx(3 * masks["sides"]["update"]["ratio"] / 100)
    assert list(benefit["sides"]) == ["plain", *bench.MEASURED]
    assert all(side["ratio"] > 0 for side in benefit["sides"].values())
    text = "\n".join(bench.tables(list(lines.values())))
    assert f"| tiny | {precision} | 1 core, batch 2 |" in text
    assert all(f"| {name} | " in text for name in bench.MEASURED)
    assert "- `c`: 1 round" in text


def test_every_model_has_a_speed_of_its_own() -> None:
    small, large = tiny_vit(depth=1), tiny_vit(depth=8).train()
    speeds = images_per_second(
        [small, large], (3, 32, 32), batch_size=2, device=torch.device("cpu"), rounds=3, seconds_per_round=0.01
    )
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)
    assert speeds[0] > speeds[1], "eight times the work"
    assert not large.training
