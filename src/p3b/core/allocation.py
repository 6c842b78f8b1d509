"""From block benefit to keep ratios: section 4 of the method (Glandorf and Rosenhahn, arXiv 2506.23675, section 3).

B: blocks (attention and MLP in turn). Parameters are counted in elements. All results are float64 on the device of their input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from p3b.errors import BudgetError


def block_importance(benefit: Tensor, kept_params: Tensor, benefit_scale: float = 10.0) -> Tensor:
    """Benefit per parameter that a block now spends, squashed and scaled to mean 1; before smoothing.

        u' = T u / max(u),   s = softplus(1.4 u') - softplus(1.4 u' - T),   r = s / (kept_params + 1e-6),   r / mean(r)

    The difference of softplus maps to (0, T): a block with a negative benefit does not collapse, the best one gets no monopoly.

    Args:
        benefit: (B,) mean benefit over an interval, in units of the loss; any sign, finite.
        kept_params: (B,) parameters that each block now keeps, >= 0.
        benefit_scale: T in [0.01, 1000]; beyond, the difference of softplus drowns in rounding or overflows.

    Returns:
        (B,) >= 0 with mean 1; all ones where no block helps (max(u) <= 0), since then nothing tells the blocks apart.

    Raises:
        ValueError: a benefit is not finite, the shapes differ, or benefit_scale is outside its range.

    Source: arXiv 2506.23675. Departure: with max(u) <= 0 the published division would turn every sign.
    """
    _require_finite(benefit, "benefit")
    if benefit.shape != kept_params.shape or benefit.ndim != 1:
        raise ValueError(f"benefit {tuple(benefit.shape)} and kept_params {tuple(kept_params.shape)} must both be (B,)")
    if not 0.01 <= benefit_scale <= 1000:
        raise ValueError(f"benefit_scale must lie in [0.01, 1000], got {benefit_scale}")
    benefit = benefit.double()
    if not _any_block_helps(benefit):
        return torch.ones_like(benefit)
    scaled = benefit_scale * (benefit / benefit.max())
    squashed = softplus(1.4 * scaled) - softplus(1.4 * scaled - benefit_scale)
    per_param = squashed / (kept_params.double() + 1e-6)
    return per_param / per_param.mean()


def update_importance(
    previous: Tensor | None, benefit: Tensor, kept_params: Tensor, gamma: float = 0.2, benefit_scale: float = 10.0
) -> Tensor:
    """Importance smoothed over intervals: r_t = gamma * r + (1 - gamma) * r_{t-1}; the first interval is taken as it is.

    Args:
        previous: (B,) smoothed importance of the interval before; None at the first one.
        benefit, kept_params, benefit_scale: as in `block_importance`.
        gamma: weight of the new interval, in (0, 1].

    Returns:
        (B,) >= 0. Where no block helps (max(u) <= 0) the previous importance stands, or a uniform one if there is none.
    """
    _require_finite(benefit, "benefit")
    fresh = block_importance(benefit, kept_params, benefit_scale)
    if previous is None:
        return fresh
    return gamma * fresh + (1 - gamma) * previous if _any_block_helps(benefit) else previous


def mix_importance(importance_cls: Tensor, importance_patch: Tensor, alpha: float = 0.5) -> Tensor:
    """alpha * r^c + (1 - alpha) * r^p: both (B,), alpha in [0, 1] is the weight of the class token."""
    return alpha * importance_cls + (1 - alpha) * importance_patch


def keep_ratios(importance: Tensor, params: Tensor, other_params: float, prune_ratio: float) -> Tensor:
    """Share one parameter budget among blocks by water-filling: k_b = min(1, c * importance_b).

    Args:
        importance: (B,) benefit per parameter, >= 0, any scale.
        params: (B,) parameters of each block, norm and biases included.
        other_params: parameters outside all blocks; they stay.
        prune_ratio: share of all parameters that goes, in [0, 1).

    Returns:
        (B,) in [0, 1]; (result * params).sum() == (1 - prune_ratio) * (params.sum() + other_params) - other_params.
        Blocks of importance 0 share evenly what is left when all others are full.

    Raises:
        BudgetError: other_params alone exceed what may stay; the message names the largest ratio that can be met.
        ValueError: an importance is negative or not finite.

    Source: arXiv 2506.23675. Departure: solved exactly instead of by repeated rescaling.
    """
    _require_finite(importance, "importance")
    if importance.min() < 0:
        raise ValueError(f"importance must be >= 0, got {importance.min().item()}")
    params = params.double()
    budget = block_budget(float(params.sum()), float(other_params), prune_ratio)
    weight = importance.double()

    # With blocks in descending importance the full ones are a prefix. Try every length of it at once: `level[j]` is what block
    # j keeps when exactly the j blocks before it are full and the rest of the budget goes to it and those after it in the ratio
    # of their importances; the first j whose block stays below 1 is the solution. Importances are divided by each other alone:
    # however far apart they lie, nothing that counts under- or overflows.
    order = torch.argsort(weight, descending=True, stable=True)
    weight, cost = weight[order], params[order]
    full_cost = torch.cat([cost.new_zeros(1), cost.cumsum(0)])[:-1]
    relative = torch.triu(weight / weight[:, None])  # row j: blocks j.. against block j, in [0, 1]
    level = (budget - full_cost).clamp(min=0) / (relative * cost).sum(1)
    solved = (level <= 1) & (weight > 0)
    if solved.any():
        first = int(solved.to(torch.uint8).argmax())
        ratio = torch.where(torch.arange(len(weight), device=weight.device) < first, 1.0, level[first] * relative[first])
    else:  # every block of positive importance is full
        useless = weight == 0
        left = (budget - cost[~useless].sum()).clamp(min=0)
        ratio = torch.where(useless, left / cost[useless].sum().clamp(min=1), 1.0)
    result = torch.empty_like(ratio)
    result[order] = ratio.clamp(0, 1)
    return result


def keep_ratios_sparing(importance: Tensor, params: Tensor, other_params: float, prune_ratio: float, spared: Tensor) -> Tensor:
    """Share the same budget among the blocks that are not spared: a spared block keeps all that it has.

    Args:
        importance, params, other_params, prune_ratio: as in `keep_ratios`.
        spared: (B,) bool.

    Returns:
        (B,) in [0, 1], 1 where spared; the sum of parameters is that of `keep_ratios`.

    Raises:
        BudgetError: what is spared, together with other_params, exceeds what may stay.
    """
    result = torch.ones_like(params, dtype=torch.float64)
    stays = other_params + float(params[spared].sum())
    result[~spared] = keep_ratios(importance[~spared], params[~spared], stays, prune_ratio)
    return result


def block_budget(block_params: float, other_params: float, prune_ratio: float) -> float:
    """Parameters that all blocks together may keep: (1 - rho) (P_blocks + P_rest) - P_rest.

    Raises:
        BudgetError: prune_ratio is outside [0, 1), or what lies outside the blocks alone exceeds what may stay.
    """
    if not 0 <= prune_ratio < 1:
        raise BudgetError(f"The prune ratio must lie in [0, 1), got {prune_ratio}. It is the share of parameters that goes.")
    budget = (1 - prune_ratio) * (block_params + other_params) - other_params
    if budget < -4 * sys.float_info.epsilon * (block_params + other_params):  # below zero by more than rounding
        largest = largest_prune_ratio(block_params, other_params)
        raise BudgetError(
            f"A prune ratio of {prune_ratio:g} cannot be met: the {other_params:,.0f} parameters outside the blocks "
            "(embeddings, final norm, head) stay and are more than the "
            f"{(1 - prune_ratio) * (block_params + other_params):,.0f} that may remain. "
            f"The largest ratio that can be met is {largest:.4f}; or count the blocks alone (--prune-blocks-only)."
        )
    return max(budget, 0.0)


def largest_prune_ratio(block_params: float, other_params: float) -> float:
    """Largest ratio that can be met where the blocks alone shrink: their share of all parameters, rounded down."""
    return math.floor(1e4 * block_params / (block_params + other_params)) / 1e4


def given_keep_ratios(ratios: Sequence[float], num_blocks: int) -> Tensor:
    """Keep ratios given by hand, one per block in network order (attention, MLP, attention, ...), as (B,) float64.

    Raises:
        BudgetError: another number of ratios than blocks, or a ratio outside [0, 1].
    """
    if len(ratios) != num_blocks:
        raise BudgetError(
            f"Got {len(ratios)} keep ratios for {num_blocks} blocks; give one for each block, attention and MLP in turn."
        )
    outside = [ratio for ratio in ratios if not 0 <= ratio <= 1]
    if outside:
        raise BudgetError(f"Keep ratios must lie in [0, 1], got {outside[0]}.")
    return torch.tensor(list(ratios), dtype=torch.float64)


def _any_block_helps(benefit: Tensor) -> bool:
    return bool(benefit.max() > 0)


def _require_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values.tolist()}")
