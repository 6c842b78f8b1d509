"""Throughput."""

from __future__ import annotations

import torch

from p3b.deploy.speed import images_per_second
from tiny import tiny_vit


def test_every_model_has_a_speed_of_its_own() -> None:
    small, large = tiny_vit(depth=1), tiny_vit(depth=8).train()
    speeds = images_per_second(
        [small, large], (3, 32, 32), batch_size=2, device=torch.device("cpu"), rounds=3, seconds_per_round=0.02
    )
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)
    assert speeds[0] > speeds[1], "eight times the work"
    assert not large.training
