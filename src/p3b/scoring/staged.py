"""A hierarchy's benefit stage by stage: an estimator for each, since each stage has a width and a grid of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from p3b.scoring.estimator import BenefitEstimator, Criterion


class Staged:
    """Estimators of one kind side by side, behind the `BenefitEstimator` protocol.

    Args:
        stages: an estimator for each stage.
        blocks: how many blocks each stage has.
    """

    def __init__(self, stages: Sequence[BenefitEstimator], blocks: Sequence[int]) -> None:
        self._stages, self._blocks = list(stages), list(blocks)
        self.every = self._stages[0].every

    def due(self) -> bool:
        return self._stages[0].due()

    def observe(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        first, found = 0, []
        for stage, blocks in zip(self._stages, self._blocks, strict=True):
            found.append(stage.observe(stream_SND[first : first + blocks + 1], criterion, targets))
            first += blocks + 1
        return torch.cat([benefits_2B for benefits_2B, _ in found], dim=1), torch.stack([loss for _, loss in found]).sum()

    def train(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        for stage in self._stages:
            stage.train(gradients_finite, scaler)

    def state_dict(self) -> dict[str, Any]:
        return {"stages": [stage.state_dict() for stage in self._stages]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for stage, own in zip(self._stages, state["stages"], strict=True):
            stage.load_state_dict(own)
