"""The task loss of the recipe, and knowledge distillation around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.errors import ConfigError, unknown_name

DISTILLATIONS = ("none", "soft", "hard")
CLASS_BALANCES = ("none", "sqrt", "inverse")


def task_loss(soft_targets: bool, smoothing: float, class_weights: Tensor | None = None) -> nn.Module:
    """Cross-entropy: with soft targets where mixup makes them (smoothing is in them already), else with label smoothing.

    Args:
        soft_targets: whether targets are probabilities.
        smoothing: of labels, in [0, 1).
        class_weights: (C,) weight of each class, on the device; None: all alike.
    """
    if class_weights is not None:
        return nn.CrossEntropyLoss(class_weights, label_smoothing=0.0 if soft_targets else smoothing)
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


def class_weights(images: Sequence[int], balance: str) -> Tensor | None:
    """Weights that bring rare classes up, 1 in the mean over the images; None where all are alike.

    Args:
        images: (C,) of each class; one that has none gets no weight.
        balance: "none"; "sqrt": as 1 / sqrt(images); "inverse": as 1 / images, so that classes count alike.

    Raises:
        ConfigError: unknown balance.
    """
    if balance not in CLASS_BALANCES:
        raise ConfigError(unknown_name("class balance", balance, CLASS_BALANCES))
    if balance == "none":
        return None
    counts_C = torch.tensor(images, dtype=torch.float32)
    weights_C = torch.where(counts_C > 0, counts_C.clamp(min=1) ** (-0.5 if balance == "sqrt" else -1.0), 0.0)
    return weights_C * counts_C.sum() / (weights_C * counts_C).sum()


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
