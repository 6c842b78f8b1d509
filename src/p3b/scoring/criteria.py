"""Element criteria: one function each, from a block and its weights to one score per element and gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from p3b.vit.layout import BlockLayout, split_axis


@torch.no_grad()
def taylor(block: BlockLayout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared first-order Taylor score of each element, (m_e * dLoss/dm_e)^2, from the gradients that the weights hold.

    A gate multiplies rows or columns of weights, W_eff = m * W, so by the chain rule both W * dLoss/dW and m * dLoss/dm are
    sums of W_eff * dLoss/dW_eff: the score needs no gradient of the gate, only the weights' own, summed along the element.

    Args:
        block: layout of the block.
        weights: parameters by key; one without a gradient (frozen) counts as zero.

    Returns:
        By gate name: (size of the dimension,) float32, >= 0.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8.
    """
    first_order = {dim: torch.zeros(size, device=weights[block.weights[0].key].device) for dim, size in block.dims.items()}
    for weight in block.weights:
        parameter = weights[weight.key]
        if parameter.grad is None:
            continue
        contribution = (parameter.detach() * parameter.grad).float() if weight.gated else None
        for axis in weight.gated:
            assert contribution is not None
            factors = split_axis(contribution, axis, weight.axes[axis], block.dims)
            position, dim = next((axis + i, name) for i, name in enumerate(weight.axes[axis]) if isinstance(name, str))
            others = [i for i in range(factors.ndim) if i != position]
            first_order[dim] += factors.sum(others) if others else factors
    return {block.gate(dim): score.square() for dim, score in first_order.items()}
