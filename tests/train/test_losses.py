"""The task loss and distillation against their formulas."""

from __future__ import annotations

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from p3b.errors import ConfigError
from p3b.train.losses import TrainingLoss, class_weights, task_loss

IMAGES = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
LOGITS, DIST_LOGITS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 4, 2])


def a_teacher() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Linear(4, 5).requires_grad_(False)


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(1, keepdim=True)


@pytest.mark.parametrize(("balance", "power"), [("sqrt", 0.5), ("inverse", 0.0)])
def test_class_weights_bring_rare_classes_up_and_leave_the_mean_loss(balance: str, power: float) -> None:
    images = [100, 25, 4]
    weights = class_weights(images, balance)
    assert weights is not None
    share = weights * torch.tensor(images)
    assert share.sum().item() == pytest.approx(sum(images)), "1 in the mean over the images"
    assert share / share[-1] == pytest.approx(torch.tensor([count / 4 for count in images]) ** power)
    assert class_weights(images, "none") is None
    assert class_weights([3, 0], balance)[1] == 0  # type: ignore[index]
    with pytest.raises(ConfigError, match="class balance"):
        class_weights(images, "square")


def test_weights_act_on_labels_and_on_what_mixup_makes_of_them() -> None:
    weights = torch.linspace(0.5, 1.5, LOGITS.shape[1])
    one_hot = torch.nn.functional.one_hot(LABELS, LOGITS.shape[1]).float()
    per_image = nn.CrossEntropyLoss(reduction="none")(LOGITS, LABELS) * weights[LABELS]
    assert task_loss(True, 0.1, weights)(LOGITS, one_hot) == pytest.approx(per_image.mean())
    assert task_loss(False, 0.0, weights)(LOGITS, LABELS) == pytest.approx(per_image.sum() / weights[LABELS].sum())


def test_the_task_loss_fits_its_targets() -> None:
    assert isinstance(task_loss(soft_targets=True, smoothing=0.1), SoftTargetCrossEntropy)
    smoothed = task_loss(soft_targets=False, smoothing=0.1)
    assert isinstance(smoothed, LabelSmoothingCrossEntropy)
    assert isinstance(task_loss(soft_targets=False, smoothing=0.0), nn.CrossEntropyLoss)
    targets = torch.full((3, 5), 0.1 / 5)
    targets[range(3), LABELS] += 0.9
    assert smoothed(LOGITS, LABELS) == pytest.approx(-(targets * softmax(LOGITS).log()).sum(1).mean())
    assert task_loss(True, 0.1)(LOGITS, targets) == pytest.approx(smoothed(LOGITS, LABELS))


def test_without_a_teacher_it_is_the_task_loss() -> None:
    loss = TrainingLoss(nn.CrossEntropyLoss())(IMAGES, LOGITS, LABELS)
    assert loss == pytest.approx(-softmax(LOGITS)[range(3), LABELS].log().mean())


def test_soft_distillation_is_kl_at_a_temperature() -> None:
    teacher, alpha, t = a_teacher(), 0.3, 2.0
    loss = TrainingLoss(nn.CrossEntropyLoss(), teacher, "soft", alpha, t)(IMAGES, LOGITS, LABELS)
    p, q = softmax(teacher(IMAGES) / t), softmax(LOGITS / t)
    divergence = (p * (p.log() - q.log())).sum(1).mean() * t * t
    assert loss == pytest.approx((1 - alpha) * nn.functional.cross_entropy(LOGITS, LABELS) + alpha * divergence)


def test_hard_distillation_takes_the_teachers_label() -> None:
    teacher, alpha = a_teacher(), 0.5
    loss = TrainingLoss(nn.CrossEntropyLoss(), teacher, "hard", alpha)(IMAGES, LOGITS, LABELS)
    labels = teacher(IMAGES).argmax(1)
    assert not torch.equal(labels, LABELS)
    expected = (1 - alpha) * nn.functional.cross_entropy(LOGITS, LABELS) + alpha * nn.functional.cross_entropy(LOGITS, labels)
    assert loss == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_of_two_logits_one_learns_the_task_and_one_the_teacher(kind: str) -> None:
    heads = [LOGITS.clone().requires_grad_(), DIST_LOGITS.clone().requires_grad_()]
    for alpha, task_learns, teacher_learns in ((0.0, True, False), (1.0, False, True), (0.5, True, True)):
        loss = TrainingLoss(nn.CrossEntropyLoss(), a_teacher(), kind, alpha)(IMAGES, tuple(heads), LABELS)
        gradients = torch.autograd.grad(loss, heads)
        assert [bool(gradient.any()) for gradient in gradients] == [task_learns, teacher_learns]


def test_losses_are_taken_in_float32() -> None:
    loss = TrainingLoss(nn.CrossEntropyLoss(), a_teacher(), "soft")(IMAGES, LOGITS.half(), LABELS)
    assert loss.dtype is torch.float32


@pytest.mark.parametrize(
    ("teacher", "kind", "alpha", "temperature", "said"),
    [
        (True, "sofd", 0.5, 1.0, "Unknown distillation type 'sofd'. Did you mean 'soft'"),
        (False, "soft", 0.5, 1.0, "needs both a teacher"),
        (True, "none", 0.5, 1.0, "needs both a teacher"),
        (True, "soft", 1.5, 1.0, r"alpha in \[0, 1\]"),
        (True, "soft", 0.5, 0.0, "temperature > 0"),
    ],
)
def test_settings_that_cannot_be(teacher: bool, kind: str, alpha: float, temperature: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainingLoss(nn.CrossEntropyLoss(), a_teacher() if teacher else None, kind, alpha, temperature)
