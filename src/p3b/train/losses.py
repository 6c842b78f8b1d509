"""The task loss of the recipe, and knowledge distillation around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.errors import ConfigError, unknown_name

DISTILLATIONS = ("none", "soft", "hard")


def task_loss(soft_targets: bool, smoothing: float) -> nn.Module:
    """Cross-entropy: with soft targets where mixup makes them (smoothing is in them already), else with label smoothing."""
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


def check_distillation(kind: str, alpha: float, temperature: float) -> None:
    """Refuse what no loss can be made of; for the arguments see `TrainingLoss`.

    Raises:
        ConfigError: unknown kind, or a weight or temperature outside its range.
    """
    if kind not in DISTILLATIONS:
        raise ConfigError(unknown_name("distillation type", kind, DISTILLATIONS))
    if not 0 <= alpha <= 1 or not 0 < temperature < math.inf:
        raise ConfigError(f"Distillation needs alpha in [0, 1] and a temperature > 0, got {alpha} and {temperature}.")


class TrainingLoss:
    """Loss of a batch: the task loss, and where there is a teacher (1 - alpha) of it and alpha of the distance to the teacher.

    A distilled DeiT in training answers with two logits; its class head learns the task, its distillation head the teacher.

    Args:
        task: from logits and targets to a scalar.
        teacher: from images to logits, such as a frozen model; or None.
        kind: "none", "soft" (Hinton et al. 2015: KL divergence at a temperature) or "hard" (Touvron et al. 2021: the
            teacher's label).
        alpha: weight of the teacher, in [0, 1].
        temperature: of the soft distance, > 0.

    Raises:
        ConfigError: unknown kind, a kind without a teacher, or a weight or temperature outside its range.
    """

    def __init__(
        self,
        task: nn.Module,
        teacher: Callable[[Tensor], Tensor] | None = None,
        kind: str = "none",
        alpha: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        check_distillation(kind, alpha, temperature)
        if (teacher is None) != (kind == "none"):
            raise ConfigError(
                "Distillation needs both a teacher (--teacher-model) and a kind (--distillation-type soft or hard)."
            )
        self.task, self._teacher, self._kind = task, teacher, kind
        self._alpha, self._temperature = alpha, temperature

    def __call__(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        logits, towards_teacher = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        task_loss = self.task(logits.float(), targets)
        if self._teacher is None:
            return task_loss
        with torch.no_grad():
            teacher_logits = self._teacher(images).float()
        distance = self._distance(towards_teacher.float(), teacher_logits)
        return (1 - self._alpha) * task_loss + self._alpha * distance

    def _distance(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self._kind == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(1))
        t = self._temperature
        student, teacher = F.log_softmax(logits / t, 1), F.log_softmax(teacher_logits / t, 1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * t * t
