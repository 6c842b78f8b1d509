"""Widths that are learned: masks from scores and shares, what the shares cost, and the budget that they end at.

Yu et al., "Width & Depth Pruning for Vision Transformers", AAAI 2022. G gates with n_g elements each, W kinds of weights.

    share_g  = sigmoid(threshold_g)                                what gate g keeps of its elements
    mask_g   = 1 for the top share_g of the scores, else 0         d/d score := d/d mask;  d/d share := sum(d/d mask * mask)
    R        = P(max(share_g, 1 / n_g)) / P(1)                     expected share of the parameters that remains
    penalty  = lambda_1 (R - target) + lambda_2 (R - target)^2     where R > target, else 0; lambdas climb its gradient
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FAR = 50.0
"""Beyond this a sigmoid is 0 or 1 to all digits that a count of elements can see."""


class TopShareMask(torch.autograd.Function):
    """Hard mask of the top share of the scores; equal scores keep their order, and the later ones stay.

    Forward: (n,) scores of any scale, a 0-dim share in [0, 1] and its count -> (n,) of 0 and 1, so many of them 1.
    Backward: the gradient goes straight through to the scores; the share gets sum(gradient * mask).
    """

    @staticmethod
    def forward(ctx: Any, scores_n: Tensor, share: Tensor, count: int) -> Tensor:
        mask_n = top_mask(scores_n, count)
        ctx.save_for_backward(mask_n, share)
        return mask_n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        mask_n, share = ctx.saved_tensors
        gradient_n = gradients[0]
        return gradient_n, (gradient_n * mask_n).sum().to(share.dtype), None


def top_share_masks(scores: Sequence[Tensor], shares_G: Tensor) -> list[Tensor]:
    """`TopShareMask` of every gate, with `kept_counts` of the shares.

    Args:
        scores: G tensors, each (n_g,).
        shares_G: (G,) in [0, 1].

    Returns:
        G tensors, each (n_g,). A device is waited for once.
    """
    counts = kept_counts(shares_G, torch.tensor([len(each) for each in scores])).tolist()
    return [TopShareMask.apply(*each) for each in zip(scores, shares_G.unbind(), counts, strict=True)]


def top_mask(scores_n: Tensor, count: int) -> Tensor:
    """1 for the `count` highest of (n,) scores, else 0, in their dtype; of equal ones those stay that come last."""
    mask_n = torch.zeros_like(scores_n)
    mask_n[torch.argsort(scores_n, stable=True)[len(scores_n) - count :]] = 1
    return mask_n


def kept_counts(shares_G: Tensor, sizes_G: Tensor, multiples_G: Tensor | None = None) -> Tensor:
    """Elements that gates keep of theirs: the nearest whole number, at least one.

    Args:
        shares_G: (G,) in [0, 1].
        sizes_G: (G,) elements of each gate.
        multiples_G: (G,) no larger than the sizes; then the nearest multiple, at least one of it. A gate may also keep all
            that it has.

    Returns:
        (G,) int64 on the CPU.
    """
    sizes_G = sizes_G.cpu()
    step_G = torch.ones_like(sizes_G) if multiples_G is None else multiples_G.cpu()
    wanted_G = shares_G.detach().cpu().double() * sizes_G
    below_G = torch.maximum((wanted_G / step_G).floor().long() * step_G, step_G)
    above_G = torch.minimum(below_G + step_G, sizes_G)
    return torch.where(above_G - wanted_G <= wanted_G - below_G, above_G, below_G)


@dataclass(frozen=True)
class WidthCost:
    """Parameters as a polynomial in what the gates keep: each weight has so many for each combination of its gates' elements.

    Attributes:
        coefficients: (W,) float64.
        members: (W, G) bool, the gates along each weight's axes, at most once each.
        sizes: (G,) int64, elements of each gate.
    """

    coefficients: Tensor
    members: Tensor
    sizes: Tensor

    def params(self, counts_G: Tensor) -> Tensor:
        """Parameters that remain with (..., G) kept elements, as (...,) float64; exact for whole numbers."""
        factors = torch.where(self.members, counts_G.double()[..., None, :], 1.0)
        return factors.prod(-1) @ self.coefficients

    def expected_params(self, shares_G: Tensor) -> Tensor:
        """0-dim float64: parameters that (G,) shares in [0, 1] let expect; a gate is expected to keep one element at least."""
        return self.params((shares_G.double() * self.sizes).clamp(min=1))

    def to(self, device: torch.device) -> WidthCost:
        """The same, on a device."""
        return WidthCost(self.coefficients.to(device), self.members.to(device), self.sizes.to(device))


def lagrangian(remaining: Tensor, target: float, lambda_1: Tensor, lambda_2: Tensor) -> Tensor:
    """lambda_1 (R - target) + lambda_2 (R - target)^2 where R > target, else 0; with gradients for R and both lambdas."""
    excess = (remaining - target).clamp(min=0)
    return lambda_1 * excess + lambda_2 * excess.square()


def counts_at_budget(
    cost: WidthCost, thresholds_G: Tensor, budget: float, multiples_G: Tensor | None = None
) -> tuple[Tensor, float]:
    """Whole numbers of elements at the learned shares, or as near to them as the budget lets them be.

    All thresholds move by one common offset, found by bisection, to where the budget is just not exceeded; then single gates
    gain or lose one element (or multiple), each time the one that brings the total nearest, until none brings it nearer. The
    order of the gates breaks ties.

    Args:
        cost: of the gates, on the CPU.
        thresholds_G: (G,) finite, any device.
        budget: parameters that may remain.
        multiples_G: as in `kept_counts`.

    Returns:
        (G,) int64 kept elements, and the offset.
    """
    thresholds_G = thresholds_G.detach().cpu().double()
    step_G = torch.ones_like(cost.sizes) if multiples_G is None else multiples_G

    def counts_at(offset: float) -> Tensor:
        return kept_counts(torch.sigmoid(thresholds_G + offset), cost.sizes, step_G)

    low, high = -_FAR - float(thresholds_G.max()), _FAR - float(thresholds_G.min())
    if float(cost.params(counts_at(high))) <= budget:
        low = high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if float(cost.params(counts_at(middle))) <= budget else (low, middle)
    counts_G = counts_at(low)

    one_G = torch.eye(len(step_G), dtype=torch.int64) * step_G
    missed = abs(float(cost.params(counts_G)) - budget)
    while True:
        # A gate that keeps all, though that is no multiple, comes down to the multiple below.
        down_G = torch.where(counts_G % step_G > 0, counts_G % step_G, step_G)
        moved = torch.cat([counts_G + one_G, counts_G - torch.diag(down_G)])
        moved = torch.minimum(moved, cost.sizes)
        off = (cost.params(moved) - budget).abs()
        off[(moved < step_G).any(-1)] = torch.inf
        best = int(off.argmin())
        if off[best] >= missed:
            return counts_G, low
        counts_G, missed = moved[best], float(off[best])
