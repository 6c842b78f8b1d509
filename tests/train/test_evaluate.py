"""Accuracy over a set of images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from p3b.train.evaluate import Answers, evaluate
from p3b.train.optim import Precision

FP32 = Precision(torch.device("cpu"), None)


class Echo(nn.Module):
    """Answers with its input, and remembers the mode that it was in."""

    def forward(self, logits: Tensor) -> Tensor:
        self.was_training = self.training
        return logits


def identity(tensor: Tensor) -> Tensor:
    return tensor


def test_counts_are_by_hand() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [4, 9, 8, 7, 6, 5]])
    targets = torch.tensor([0, 4, 5, 1])  # first, fifth, sixth, first
    accuracy = evaluate(Echo(), [(logits[:3], targets[:3]), (logits[3:], targets[3:])], FP32, identity)
    assert (accuracy.top1, accuracy.top5, accuracy.images) == (50.0, 75.0, 4)
    assert accuracy.loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)))


def test_answers_are_those_that_are_counted_also_where_logits_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (400, 7), generator=generator).float()  # as coarse as bf16 makes them
    targets = torch.randint(7, (400,), generator=generator)
    answers = Answers()
    accuracy = evaluate(Echo(), [(logits[:300], targets[:300]), (logits[300:], targets[300:])], FP32, identity, answers)
    right = sum(said == so for said, so in zip(answers.predicted, answers.target, strict=True))
    assert 100 * right / 400 == pytest.approx(accuracy.top1) and answers.target == targets.tolist()
    highest = logits.softmax(dim=1).max(dim=1).values
    assert answers.probability == pytest.approx(highest.tolist()), "whichever of equal ones is taken, it is as likely"


def test_top5_of_fewer_than_five_classes_is_whole() -> None:
    accuracy = evaluate(Echo(), [(torch.randn(8, 3), torch.randint(3, (8,)))], FP32, identity)
    assert accuracy.top5 == 100 and accuracy.images == 8


def test_the_mode_is_evaluation_and_comes_back() -> None:
    for training in (True, False):
        model = Echo().train(training)
        evaluate(model, [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))], FP32, identity)
        assert not model.was_training and model.training is training


def test_shares_of_ranks_add_up_and_may_be_empty() -> None:
    logits, targets = torch.randn(7, 6), torch.randint(6, (7,))
    whole = evaluate(Echo(), [(logits, targets)], FP32, identity)
    shares: list[Tensor] = []

    def remember(sums: Tensor) -> Tensor:
        shares.append(sums)
        return sums

    for rank in range(3):
        evaluate(Echo(), [(logits[rank::3], targets[rank::3])], FP32, remember)
    evaluate(Echo(), [], FP32, remember)
    together = evaluate(Echo(), [], FP32, lambda _sums: torch.stack(shares).sum(0))
    assert (together.top1, together.top5, together.images) == (whole.top1, whole.top5, 7)
    assert together.loss == pytest.approx(whole.loss)
