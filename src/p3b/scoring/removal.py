"""Benefit without probes: what the loss would change by, to first order, if a block were removed.

    benefit_b = sqrt(mean over the interval of (dLoss/ds_b)^2),    x_b = x_{b-1} + s_b f_b(x_{b-1})    at s_b = 1

s_b multiplies all that a block adds to the residual stream; at 0 the block is gone. This is to a block what the Taylor score
(`criteria.taylor`) is to an element. By the chain rule dLoss/ds_b is the sum of W * dLoss/dW over the weights that write the
block's output, which have their gradients anyway: nothing is computed forward, nothing learns, and the loss may be any. The
block's share in what it passes through is not part of it, and where only active elements are computed (`p3b.vit.active`), the
others count as zero.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, on whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from p3b.errors import TrainingError
from p3b.scoring.estimator import at_least_float32
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.gates import Gates
from p3b.vit.layout import BlockLayout, ModelLayout

REMOVAL = "removal"
"""Its name among the estimators of block benefit."""


@torch.no_grad()
def by_weights(layout: ModelLayout, weights: Mapping[str, Tensor]) -> Tensor:
    """(B,) float32 dLoss/ds_b of every block, from the gradients that the weights hold; one without a gradient counts as zero.

    Args:
        layout: of the model.
        weights: its parameters by key.
    """
    device = next(iter(weights.values())).device
    found = torch.zeros(len(layout.blocks), device=device)
    for b, block in enumerate(layout.blocks):
        for key in _writers(block):
            parameter = weights[key]
            if parameter.grad is not None:
                ours, theirs = (at_least_float32(each).flatten() for each in (parameter.detach(), parameter.grad))
                found[b] += torch.dot(ours, theirs)
    return found


def by_gates(layout: ModelLayout, gates: Gates, gradients: Mapping[str, Tensor]) -> Tensor:
    """The same from the gradients of the gates of what blocks write, where weights are frozen.

    Raises:
        TrainingError: blocks have no such gates, since the whole stream is narrowed by one.
    """
    if layout.stream is not None:
        raise TrainingError(
            "The removal of blocks is measured by the gradients of the layers that write to the residual stream, and some of "
            "them are frozen. With a narrower stream they have to be trained: unfreeze them, keep the stream (--prune-stream "
            "0), or choose another estimator (--prune-benefit linear)."
        )
    written = [block.gate("out") for block in layout.blocks]
    return torch.stack([(gates.masks[gate] * gradients[gate]).sum(dtype=torch.float32) for gate in written])


def _writers(block: BlockLayout) -> list[str]:
    """Keys of the weights that write a block's output: those that its gate, or the stream's, multiplies."""
    return [weight.key for weight in block.weights if any(dim in ("out", STREAM) for _, dim in weight.gated)]
