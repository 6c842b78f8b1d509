"""Element criteria: one function each, from a block and its weights to one score per element and gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from p3b.vit.anatomy.weights import Axis, dims_of, split_axis
from p3b.vit.layout import BlockLayout, ModelLayout, StreamLayout

ElementCriterion = Callable[[BlockLayout, Mapping[str, Tensor]], Mapping[str, Tensor]]


@torch.no_grad()
def taylor(block: BlockLayout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared first-order Taylor score of each element, (m_e * dLoss/dm_e)^2, from the gradients that the weights hold.

    A gate multiplies rows or columns of weights, W_eff = m * W, so by the chain rule both W * dLoss/dW and m * dLoss/dm are
    sums of W_eff * dLoss/dW_eff: the score needs no gradient of the gate, only the weights' own, summed along the element.

    Args:
        block: layout of the block.
        weights: parameters by key; one without a gradient counts as zero, which is right where the loss does not depend on it
            (`p3b.scoring.first_order` sees to frozen ones).

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
        for axis, dim in weight.gated:
            assert contribution is not None
            if dim in first_order:  # the stream's gate is no gate of the block
                first_order[dim] += sum_by_element(contribution, weight.factors(axis, dim), axis, dim, block.sizes)
    return {block.gate(dim): score.square() for dim, score in first_order.items()}


@torch.no_grad()
def taylor_of_stream(stream: StreamLayout, weights: Mapping[str, Tensor]) -> Tensor:
    """`taylor` for the channels of the residual stream: from everything that writes to them, (D,) float32, >= 0."""
    first_order = torch.zeros(stream.size, device=weights[stream.weights[0].key].device)
    for weight in stream.weights:
        parameter = weights[weight.key]
        for axis, dim in weight.gated:
            if parameter.grad is not None:
                values = (parameter.detach() * parameter.grad).float()
                first_order += sum_by_element(values, weight.factors(axis, dim), axis, dim, {dim: stream.size})
    return first_order.square()


@torch.no_grad()
def magnitude(block: BlockLayout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """L2 norm of the weights that each element carries: its rows and columns of the block's matrices.

    Biases, the norm's affine part and LayerScale are left out: they are no connections, and the scale of the norm's would drown
    the matrices'. What a gate multiplies is not looked at: the weights themselves are measured, as they are behind their masks.

    Args:
        block: layout of the block.
        weights: parameters by key.

    Returns:
        By gate name: (size of the dimension,) float32, >= 0.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, with the L2 norm instead of the L1 norm.
    """
    squares = {dim: torch.zeros(size, device=weights[block.weights[0].key].device) for dim, size in block.dims.items()}
    for weight in block.weights:
        if len(weight.axes) != 2:
            continue
        square = weights[weight.key].detach().float().square()
        for axis, factors in enumerate(weight.axes):
            for dim in dims_of(factors):
                if dim in squares:
                    squares[dim] += sum_by_element(square, factors, axis, dim, block.sizes)
    return {block.gate(dim): square.sqrt() for dim, square in squares.items()}


def of_all(criterion: ElementCriterion, layout: ModelLayout, weights: Mapping[str, Tensor]) -> Tensor:
    """(N,) scores of all elements by one of these criteria, on the weights' device."""
    return torch.cat([score for block in layout.blocks for score in criterion(block, weights).values()])


def by_gate(layout: ModelLayout, values_N: Tensor) -> dict[str, Tensor]:
    """Values of all elements, block after block and gate after gate, then the stream's: a vector for each gate, by its name."""
    sizes = layout.gates
    return dict(zip(sizes, values_N.split(list(sizes.values())), strict=True))


def sum_by_element(values: Tensor, factors: Axis, axis: int, dim: str, sizes: Mapping[str, int]) -> Tensor:
    """Sum a tensor of a weight's shape over everything but the elements of one dimension along one axis.

    Args:
        values: of the weight's shape.
        factors: of that axis; `dim` is one of them.
        axis: index of the axis.
        dim: whose elements are summed by.
        sizes: of the dimensions among the factors.

    Returns:
        (size of the dimension,).
    """
    split = split_axis(values, axis, factors, sizes)
    position = axis + factors.index(dim)
    others = [i for i in range(split.ndim) if i != position]
    return split.sum(others) if others else split
