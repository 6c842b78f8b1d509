"""One call of any criterion for many sets of logits gives what one call for each gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.scoring.task_losses import TaskLosses

SETS, SAMPLES, CLASSES = 6, 8, 5
HARD = torch.arange(SAMPLES) % CLASSES
SOFT = torch.softmax(torch.linspace(-2, 2, SAMPLES * CLASSES).view(SAMPLES, CLASSES), 1)
PADDED = HARD.index_fill(0, torch.tensor([0, 3]), -100)


def _logits(seed: int = 0) -> Tensor:
    return torch.randn(SETS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _focal(logits_SC: Tensor, targets: Tensor) -> Tensor:
    """Samples weighted by each other: no mean over samples of anything."""
    losses_S = F.cross_entropy(logits_SC, targets, reduction="none")
    return (losses_S * losses_S.detach().softmax(0)).sum()


def _largest(logits_SC: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_SC, targets, reduction="none").topk(3).values.mean()


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (F.cross_entropy, HARD),
        (F.cross_entropy, SOFT),
        (F.cross_entropy, PADDED),
        (nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, CLASSES), label_smoothing=0.1), HARD),
        (LabelSmoothingCrossEntropy(0.1), HARD),
        (SoftTargetCrossEntropy(), SOFT),
        (BinaryCrossEntropy(), SOFT),
        (BinaryCrossEntropy(target_threshold=0.2), SOFT),
        (_focal, HARD),
        (_largest, HARD),
        (lambda logits, targets: F.cross_entropy(logits, targets) * (2.0 if logits.sum().item() > 0 else 1.0), HARD),
        (lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"), HARD),
    ],
)
def test_losses_and_gradients_are_those_of_one_call_each(criterion: Callable[..., Tensor], targets: Tensor) -> None:
    losses_of = TaskLosses()
    for seed in range(2):
        logits, apart = _logits(seed), _logits(seed)
        found = losses_of(logits, criterion, targets)
        expected = torch.stack([criterion(each, targets) for each in apart])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(logits.grad, apart.grad, rtol=1e-5, atol=1e-6)


class _Counted:
    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        self.criterion, self.calls = criterion, 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return self.criterion(logits, targets)


def test_a_criterion_is_tried_once_and_then_called_once_a_step() -> None:
    losses_of, criterion = TaskLosses(), _Counted(SoftTargetCrossEntropy())
    losses_of(_logits(), criterion, SOFT)
    assert criterion.calls == 1 + 2 + 1
    for _ in range(3):
        losses_of(_logits(), criterion, SOFT)
    assert criterion.calls == 4 + 3


@pytest.mark.parametrize(
    "criterion",
    [
        lambda logits, targets: F.cross_entropy(F.dropout(logits, 0.5), targets),
        lambda logits, targets: F.cross_entropy(logits, targets) + 0 * logits.sum().item(),
        lambda logits, targets: torch.tensor(logits.detach().numpy().mean()) + F.cross_entropy(logits, targets),
    ],
    ids=["random", "reads a value", "foreign"],
)
def test_a_criterion_that_cannot_be_called_for_all_is_called_for_each(criterion: Callable[..., Tensor]) -> None:
    counted, losses_of = _Counted(criterion), TaskLosses()
    losses_of(_logits(), counted, HARD)
    tried = counted.calls
    torch.manual_seed(0)
    found = losses_of(_logits(1), counted, HARD)
    assert counted.calls == tried + SETS
    torch.manual_seed(0)
    assert torch.equal(found, torch.stack([criterion(each, HARD) for each in _logits(1)]))


def test_logits_that_are_not_finite_decide_nothing() -> None:
    """A resumed run tries on other logits than a run that never stopped: both come to the same."""
    losses_of, criterion = TaskLosses(), _Counted(F.cross_entropy)
    losses_of(_logits() * torch.nan, criterion, HARD)
    before = criterion.calls
    losses_of(_logits(), criterion, HARD)
    assert criterion.calls == before + 1


def test_a_mistake_of_the_criterion_is_told_by_itself() -> None:
    with pytest.raises(AssertionError):
        TaskLosses()(_logits(), JsdCrossEntropy(), HARD[:7])
