"""A frozen model that a student learns from, and what it costs to ask it."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch
from torch import Tensor, nn

from p3b.train.optim import Precision

MEASURED_PASSES = 20
"""Micro-batches that the cost is measured on."""


class Teacher:
    """Answers each batch once, in evaluation and inference mode; no gradient reaches it.

    Args:
        model: on the device of the images; is frozen.
        precision: that it computes in, whatever the student computes in.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self._model, self._precision = model.requires_grad_(False).eval(), precision
        self._device = precision.device
        self.measure()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (S, classes) in float32 for images (S, C, H, W)."""
        measured = len(self._began) <= MEASURED_PASSES
        if measured:
            self._began.append(self._now())
        with torch.inference_mode(), self._precision.autocast():
            logits = self._model(images)
        if measured:
            self._seconds.append(self._now() - self._began[-1])
        return logits.to(torch.float32, copy=True)  # autograd refuses to keep a tensor of inference mode

    def measure(self) -> None:
        """Measure the cost anew, on the passes to come."""
        self._began: list[float] = []
        self._seconds: list[float] = []

    @property
    def share(self) -> float | None:
        """Share of a micro-batch's time, from one pass to the next, that a pass takes; None until enough were measured.

        Medians of both: an evaluation or a checkpoint in between does not count.
        """
        if len(self._began) <= MEASURED_PASSES:
            return None
        between = [after - before for before, after in pairwise(self._began)]
        return statistics.median(self._seconds) / statistics.median(between)

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
