"""A teacher stays as it is, costs what it says, and with no weight changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import p3b.train.teacher
from p3b.train.losses import TrainingLoss
from p3b.train.optim import Precision
from p3b.train.teacher import MEASURED_PASSES, Teacher
from runs import same_tensors
from tiny import images, labels, tiny_vit

FP32, BF16 = (Precision(torch.device("cpu"), dtype) for dtype in (None, torch.bfloat16))


def test_no_gradient_reaches_it_and_it_stays_as_it_is() -> None:
    model, student = tiny_vit(seed=1), tiny_vit().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = TrainingLoss(nn.CrossEntropyLoss(), Teacher(model.train(), FP32), "soft", 0.5, 2.0)
    optimizer = torch.optim.SGD([*student.parameters(), *model.parameters()], lr=0.1)
    loss(images(), student(images()), labels()).backward()
    optimizer.step()
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert same_tensors(model.state_dict(), before)
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_it_answers_in_its_own_precision_whatever_the_student_computes_in() -> None:
    model = tiny_vit()
    with torch.no_grad(), BF16.autocast():
        rounded = model(images()).float()
    assert torch.equal(Teacher(model, BF16)(images()), rounded)
    assert torch.equal(Teacher(model, FP32)(images()), model(images()))
    with BF16.autocast():
        assert Teacher(model, FP32)(images()).dtype is torch.float32
    assert not torch.equal(rounded, model(images()))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_with_no_weight_the_loss_is_that_of_the_task_bit_for_bit(kind: str) -> None:
    def gradients(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        student = tiny_vit(seed=3)
        value = loss(images(4), student(images(4)), labels(4))
        return (value, *torch.autograd.grad(value, list(student.parameters())))

    task = gradients(TrainingLoss(nn.CrossEntropyLoss()))
    taught = gradients(TrainingLoss(nn.CrossEntropyLoss(), Teacher(tiny_vit(seed=1), BF16), kind, 0.0, 2.0))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(task, taught, strict=True))


def test_its_cost_is_the_median_share_of_the_time_from_one_pass_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes 2 seconds of 10; once there is an evaluation of an hour in between."""
    now = iter([10 * number + (3600 if number > 5 else 0) + part for number in range(99) for part in (0, 2)])
    monkeypatch.setattr(p3b.train.teacher.time, "perf_counter", lambda: float(next(now)))
    teacher = Teacher(nn.Identity(), FP32)
    for _ in range(MEASURED_PASSES):
        teacher(torch.zeros(1))
        assert teacher.share is None
    teacher(torch.zeros(1))
    assert teacher.share == pytest.approx(0.2)
    teacher(torch.zeros(1))
    assert next(now) % 10 == 0 and teacher.share == pytest.approx(0.2), "nothing is measured any more"
    teacher.measure()
    assert teacher.share is None
