"""The task loss of many sets of logits at once, whatever the task loss is.

A criterion is the user's: as a rule a mean over a batch, and so one large batch of all sets would get one number where one for
each set is needed. `torch.vmap` calls it once, and every operation in it works on all sets side by side: the answers are those
of one call for each set, up to rounding. What it cannot carry over it refuses (a random criterion, one that reads a value out,
one that calls foreign code); such a criterion is called for each set.

K sets of logits, S samples, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]


class TaskLosses:
    """Losses of K sets of logits, by one call of the criterion where that is shown to be the same.

    It is tried on the first two sets, values and gradients, once for each criterion and kind of targets.
    """

    def __init__(self) -> None:
        self._tried: tuple[object, ...] | None = None
        self._at_once = False

    def __call__(self, logits_KSC: Tensor, criterion: Criterion, targets: Tensor) -> Tensor:
        """(K,) losses, part of the graph of the logits."""
        question = (criterion, targets.dtype, targets.ndim, logits_KSC.dtype, logits_KSC.device)
        if question != self._tried:
            self._tried, self._at_once = question, _agrees(logits_KSC[:2].detach(), criterion, targets)
        return _at_once(logits_KSC, criterion, targets) if self._at_once else _one_by_one(logits_KSC, criterion, targets)


def _at_once(logits_KSC: Tensor, criterion: Criterion, targets: Tensor) -> Tensor:
    losses_K: Tensor = torch.vmap(criterion, in_dims=(0, None))(logits_KSC, targets)
    return losses_K


def _one_by_one(logits_KSC: Tensor, criterion: Criterion, targets: Tensor) -> Tensor:
    return torch.stack([criterion(logits_SC, targets) for logits_SC in logits_KSC])


def _agrees(logits_KSC: Tensor, criterion: Criterion, targets: Tensor) -> bool:
    """Whether one call gives the losses, and by the logits the gradients, of one call for each set."""
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where it would go through the sets one by one
            together, apart = (
                _with_gradient(losses_of, logits_KSC, criterion, targets) for losses_of in (_at_once, _one_by_one)
            )
    except Exception:  # vmap passes on whatever its parts raise; what is wrong with the criterion itself, its next call tells
        return False
    return all(_close(mine, its) for mine, its in zip(together, apart, strict=True))


def _close(mine: Tensor, its: Tensor) -> bool:
    return mine.shape == its.shape and torch.allclose(mine, its, rtol=1e-5, atol=1e-7, equal_nan=True)


def _with_gradient(
    losses_of: Callable[[Tensor, Criterion, Tensor], Tensor], logits_KSC: Tensor, criterion: Criterion, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logits_KSC = logits_KSC.requires_grad_()
    losses_K = losses_of(logits_KSC, criterion, targets)
    (gradient_KSC,) = torch.autograd.grad(losses_K.sum(), logits_KSC)
    return losses_K.detach(), gradient_KSC
