"""Measuring for one shot: what a method decides by, from some hundred images and a trained model, no weight of which moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from p3b.errors import TrainingError
from p3b.methods.base import Criterion, Method
from p3b.vit.observing import evaluating

Batches = Iterable[tuple[Tensor, Any]]
"""Images and targets, on the model's device."""


def measure(
    model: nn.Module, method: Method, batches: Batches, criterion: Criterion, gradients_finite: Callable[[], Tensor]
) -> int:
    """Run the batches through the model, forward and backward, and let the method take in what they say.

    The model is in evaluation mode meanwhile. Gradients that were there before are gone afterwards.

    Args:
        model: trained; its gates hold ones.
        method: that decides.
        batches: a squared score is taken of each batch's mean gradient, so the smaller a batch the more a score tells of
            single images (see `p3b.Pruner.calibrate`).
        criterion: the task loss, from outputs and targets to a scalar.
        gradients_finite: whether all gradients are, one answer for all ranks.

    Returns:
        How many images there were.

    Raises:
        TrainingError: there were none, or no gradient was finite.
    """
    images, counted = 0, 0
    with evaluating(model), torch.enable_grad():
        if method.probes:
            _let_probes_learn(model, method, batches, criterion)
        for batch, targets in batches:
            model.zero_grad(set_to_none=True)
            loss = criterion(model(batch), targets) + method.loss(criterion, targets)
            loss.backward()
            finite = gradients_finite()
            method.collect(finite)
            method.train_own(finite, None)
            images, counted = images + len(batch), counted + int(finite)
    model.zero_grad(set_to_none=True)
    if images == 0:
        raise TrainingError("There are no images to calibrate on: the batches are empty, or an iterator that is used up.")
    if counted == 0:
        raise TrainingError(
            "No gradient of the calibration was finite, so nothing says what to prune. Check that images and weights are "
            "finite, and calibrate in float32 or bfloat16."
        )
    return images


def _let_probes_learn(model: nn.Module, method: Method, batches: Batches, criterion: Criterion) -> None:
    """Go through the images once before they are measured: what probes say before they have learnt counts for nothing."""
    finite = torch.ones((), dtype=torch.bool, device=next(model.parameters()).device)
    for batch, targets in batches:
        model(batch)
        method.loss(criterion, targets)
        method.discard()
        method.train_own(finite, None)
