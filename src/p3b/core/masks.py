"""From keep ratio to mask: section 6 of the method.

A block has gates; a gate has elements. G gates, n elements over all gates of one block, t elements to go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GATE_FACTORS: Mapping[str, float] = {"in": 1.0, "head": 1.0, "hidden": 0.75, "out": 1.5}
"""Factor on the ranks of a gate's elements, by kind: output channels are given up later, hidden channels earlier."""

_BELOW_HALF = 0.5 - 2.0**-25
"""The largest float32 below 0.5."""


def soft_mask(scores: Tensor, num_pruned: float, tau: float) -> Tensor:
    """Mask that gives up the lowest scores but lets a gradient through, so that they can return.

        m_e = sigmoid( ln(9) * (position_e - t) / (n * tau + 1e-8) ),   positions 1..n in ascending order of the scores

    A distance of n * tau positions from t means 0.1 or 0.9. Equal scores keep their order.

    Args:
        scores: (n,) any scale; only their order counts.
        num_pruned: t, the elements to go, in [0, n]. With a whole number the t-th element gets exactly 0.5 and counts as kept;
            t + 0.5 puts the edge between two elements, so that exactly t fall below 0.5 (that is what the methods use).
        tau: softness >= 0; at 0 the mask is hard.

    Returns:
        (n,) in [0, 1], float32. An element counts as kept where its mask is >= 0.5.

    Source: arXiv 2506.23675, with the slope of its published run.
    """
    distance = _positions(scores) - num_pruned
    mask = torch.sigmoid(math.log(9) * distance / (len(scores) * tau + 1e-8)).float()
    # With a very large tau the sigmoid rounds to 0.5; what was given up must still count as given up.
    return torch.where(distance < 0, mask.clamp(max=_BELOW_HALF), mask)


def rank_scores(scores: Tensor) -> Tensor:
    """Ranks 1/n .. n/n of (n,) scores in ascending order, float64; equal scores keep their order."""
    return _positions(scores) / len(scores)


@dataclass(frozen=True)
class BlockOrder:
    """In which order a block gives up its elements, over all its gates.

    Attributes:
        merit: (n,) what the order goes by: rank within the gate times the gate's factor; gates one after the other.
        sizes: elements of each gate, summing to n.
        kept: (n + 1, G) elements that each gate still has after the t lowest of the block are gone, t = 0..n.
    """

    merit: Tensor
    sizes: tuple[int, ...]
    kept: Tensor


def order_elements(gate_scores: Sequence[Tensor], factors: Sequence[float]) -> BlockOrder:
    """Sort the elements of all gates of a block together.

    Args:
        gate_scores: G tensors, each (size of the gate,), finite.
        factors: G factors on the ranks (see `GATE_FACTORS`).
    """
    sizes = tuple(len(scores) for scores in gate_scores)
    merit = torch.cat([factor * rank_scores(scores) for scores, factor in zip(gate_scores, factors, strict=True)])
    gate_of_element = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(merit.device)
    gate_in_order = gate_of_element[torch.argsort(merit, stable=True)]
    gone = torch.nn.functional.one_hot(gate_in_order, len(sizes)).cumsum(0)
    total = torch.tensor(sizes, device=merit.device)
    return BlockOrder(merit, sizes, torch.cat([total[None], total - gone]))


def count_to_prune(remaining: Tensor, share: float, surplus: float = 0.0) -> int:
    """How many of the lowest elements go so that a block meets its share, found exactly.

    Args:
        remaining: (n + 1,) parameters left after t elements are gone; it never rises with t.
        share: parameters that the block may keep, >= 0.
        surplus: parameters by which the blocks before this one together miss (below 0) or exceed (above 0) their shares.

    Returns:
        t in 0..n. One of the two counts next to the share, so never more than one element away from it: the one that
        brings the total of all blocks nearer to the budget.
    """
    below = int((remaining > share).sum())  # the first t that meets the share from below
    if below == 0 or remaining[below] == share:
        return below
    missed = abs(float(remaining[below]) - share + surplus)
    exceeded = abs(float(remaining[below - 1]) - share + surplus)
    return below if missed <= exceeded else below - 1


def shares_to_counts(
    orders: Sequence[BlockOrder], costs: Sequence[Callable[[Tensor], Tensor]], shares: Sequence[float]
) -> list[int]:
    """Elements to give up in every block.

    Each block ends within one element of its share, and all together within about one element of the sum of shares.

    Args:
        orders: B orders.
        costs: B functions from (n + 1, G) kept elements to (n + 1,) parameters that remain.
        shares: B numbers of parameters that may stay.
    """
    counts, surplus = [], 0.0
    for order, cost, share in zip(orders, costs, shares, strict=True):
        remaining = cost(order.kept).double()
        count = count_to_prune(remaining, share, surplus)
        surplus += float(remaining[count]) - share
        counts.append(count)
    return counts


def block_masks(order: BlockOrder, num_pruned: int, tau: float) -> list[Tensor]:
    """Soft (tau > 0) or hard (tau = 0) masks of a block's gates: G tensors, exactly `num_pruned` elements below 0.5."""
    return list(torch.split(soft_mask(order.merit, num_pruned + 0.5, tau), list(order.sizes)))


def hard_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same masks with 1 where an element counts as kept (>= 0.5) and 0 elsewhere."""
    return {name: (mask >= 0.5).to(mask.dtype) for name, mask in masks.items()}


def _positions(scores: Tensor) -> Tensor:
    positions = torch.empty(len(scores), dtype=torch.float64, device=scores.device)
    positions[torch.argsort(scores, stable=True)] = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    return positions
