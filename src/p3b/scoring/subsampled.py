"""Any estimator on a part of the batch, at some of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from p3b.scoring.estimator import BenefitEstimator, Criterion


class Subsampled:
    """Observes the first samples of a batch at every k-th optimizer step; its probes learn from no more than that.

    Batches are drawn at random, so their first samples are a random part; every rank gives the same share of its own.

    Args:
        inner: what observes; its `every` is 1.
        every: k >= 1.
        share: of each batch, in (0, 1]; at least one sample.
    """

    def __init__(self, inner: BenefitEstimator, every: int = 4, share: float = 0.5) -> None:
        assert inner.every == 1 and every >= 1 and 0 < share <= 1
        self.inner, self.every, self._share = inner, every, share
        self._steps_done = 0

    def due(self) -> bool:
        return self._steps_done % self.every == 0

    def observe(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        samples = max(1, round(self._share * len(targets)))
        return self.inner.observe([x_SND[:samples] for x_SND in stream_SND], criterion, targets[:samples])

    def train(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        if self.due():
            self.inner.train(gradients_finite, scaler)
        self._steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "estimator_steps": self._steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)
        self._steps_done = int(state["estimator_steps"])
