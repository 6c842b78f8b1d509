"""Accuracy over a set of images, each counted exactly once whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from p3b.train.optim import Precision

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent, mean cross-entropy, and the number of images they are over."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass
class Answers:
    """What a model said of each image, in the order in which the images were seen: class indices, and the probability of the
    predicted class, in [0, 1]."""

    target: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, predicted: Tensor, targets: Tensor) -> None:
        """Take in a batch: logits (S, classes) float32, predicted and targets (S,) class indices."""
        probability = logits.softmax(dim=1).gather(1, predicted[:, None])[:, 0]
        self.target += targets.tolist()
        self.predicted += predicted.tolist()
        self.probability += probability.tolist()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    precision: Precision,
    reduce_sum: Callable[[Tensor], Tensor],
    answers: Answers | None = None,
) -> Accuracy:
    """Evaluate in evaluation mode; the model's mode is restored afterwards.

    Args:
        model: images (S, C, H, W) -> logits (S, classes).
        batches: this rank's share of (images, targets).
        precision: autocast of the forward pass.
        reduce_sum: sum of a tensor over all ranks that share the images; the identity where each rank sees all of them.
        answers: takes in what the model says of this rank's images, where wanted.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=precision.device)
    for images, targets in batches:
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        if answers is not None:
            answers.add(logits, ranked[:, 0], targets)  # logits of bf16 are often equal: the answer is the one that is counted
        best = ranked == targets[:, None]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([best[:, 0].sum(), best.sum(), loss, torch.tensor(len(targets), device=loss.device)]).double()
    model.train(was_training)
    top1, top5, loss_sum, images_seen = reduce_sum(sums).tolist()
    seen = max(images_seen, 1)
    return Accuracy(100 * top1 / seen, 100 * top5 / seen, loss_sum / seen, int(images_seen))
