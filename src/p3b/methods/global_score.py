"""One ranking of all elements of the network: the lowest go, in whichever block they lie, until the budget is met.

    remaining(t) = sum_b P_b(what the t lowest of the network leave of block b)
    cut            the t at which remaining(t) is nearest to (1 - rho) (P_blocks + P_rest) - P_rest
    m_e          = sigmoid( ln(9) * (position_e - t) / (N tau + 1e-8) ),   positions 1..N over the whole network

- `magnitude`: by the L2 norm of the weights that an element carries, as they are at the mask update (Li et al., "Pruning
  Filters for Efficient ConvNets", ICLR 2017, with the L2 norm instead of the L1 norm). Where weights are of one size, a norm
  grows with the root of their number: output channels of attention carry the fewest and go first, so that attention blocks
  vanish before MLPs.
- `taylor`: by the squared first-order Taylor score (Molchanov et al., "Importance Estimation for Neural Network Pruning",
  CVPR 2019), averaged over the interval, each gate's scores divided by their L2 norm (Molchanov et al., "Pruning
  Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017), without which gates whose gradients
  are large by their place in the network would keep everything.

Both rank by score, not by score per parameter. Dividing by what an element costs would be the alternative; it would also take
the number of weights out of `magnitude`.

No block is guarded. Whole blocks vanish where the ranking says so, at high ratios all of them but a few; a block whose masks
have gone to zero gets no gradient and with `taylor` no score either, so it stays away. That is what such a ranking is like, and
what P3B is measured against. One element is passed over all the same: what an element carries depends on what else is left of
its block, and the last one of a gate takes the whole rest of the block with it. Where the budget would be crossed by such
an element it stays and the ranking goes on behind it, since the budget could be missed by a block's worth otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from p3b.core.masks import count_to_prune, soft_mask
from p3b.core.schedule import applied_keep_ratio
from p3b.methods.base import Decision, ScoreMethod, decisions_by_kept, overall_keep_ratio
from p3b.scoring.criteria import by_gate
from p3b.scoring.meter import Reduce
from p3b.scoring.scores import MagnitudeScores, TaylorScores
from p3b.vit.cost import dense_params, prefix_cost
from p3b.vit.layout import BlockLayout, ModelLayout, alike


def magnitude(
    model: VisionTransformer, layout: ModelLayout, prune_ratio: float, reduce: Reduce, *, blocks_only: bool = False
) -> ScoreMethod:
    """Elements of the whole network by the L2 norm of the weights that they carry: the weights of `model` are measured.

    Arguments and errors as every method has them (`p3b.methods.base.Method`).
    """
    ranking = GlobalRanking(layout, prune_ratio, blocks_only)
    return ScoreMethod("magnitude", model, MagnitudeScores(layout, model, reduce), ranking.decide)


def taylor(
    model: VisionTransformer, layout: ModelLayout, prune_ratio: float, reduce: Reduce, *, blocks_only: bool = False
) -> ScoreMethod:
    """Elements of the whole network by squared first-order Taylor score over its L2 norm within the gate.

    Arguments and errors as in `magnitude`; the gradients of `model` are scored.
    """
    ranking = GlobalRanking(layout, prune_ratio, blocks_only)

    def decide(scores_N: Tensor, progress: float, tau: float, last: bool) -> Decision:
        return ranking.decide(normalised_by_gate(layout, scores_N), progress, tau, last)

    return ScoreMethod("taylor", model, TaylorScores(layout, model, reduce), decide)


def normalised_by_gate(layout: ModelLayout, scores_N: Tensor) -> Tensor:
    """(N,) float64 scores >= 0, each gate's divided by their L2 norm; a gate that is all zero stays so."""
    gates = by_gate(layout, scores_N.double()).values()
    return torch.cat([scores / scores.norm().clamp(min=torch.finfo(scores.dtype).tiny) for scores in gates])


class GlobalRanking:
    """From scores to masks by one cut through the ranking of all elements; arguments as in `magnitude`."""

    def __init__(self, layout: ModelLayout, prune_ratio: float, blocks_only: bool) -> None:
        self._layout = layout
        self._goal = overall_keep_ratio(layout, prune_ratio, blocks_only)

    def decide(self, scores_N: Tensor, progress: float, tau: float, _last: bool = False) -> Decision:
        """The budget walks to its goal as every keep ratio does. A block's goal is what it would keep if the ranking of now
        were cut at the whole budget; its keep ratio is what it keeps.
        """
        layout = self._layout
        in_blocks = sum(dense_params(block) for block in layout.blocks)
        goal = find_cut(layout.blocks, scores_N, self._goal * in_blocks)
        now = find_cut(layout.blocks, scores_N, applied_keep_ratio(self._goal, progress) * in_blocks)
        masks, masks_at_goal = by_gate(layout, now.masks(tau)), by_gate(layout, goal.masks(tau=0.0))
        return Decision(masks, decisions_by_kept(layout, masks, masks_at_goal), progress, tau)


@dataclass(frozen=True)
class Cut:
    """Where a ranking is cut.

    Attributes:
        ranking: (N,) float64, what elements are sorted by: their scores, with those that are passed over at the end.
        num_pruned: elements that go.
    """

    ranking: Tensor
    num_pruned: int

    def masks(self, tau: float) -> Tensor:
        """(N,) masks, exactly `num_pruned` below 0.5."""
        return soft_mask(self.ranking, self.num_pruned + 0.5, tau)


def find_cut(blocks: Sequence[BlockLayout], scores_N: Tensor, budget: float) -> Cut:
    """Cut the ranking of all elements where the blocks together come nearest to the budget.

    Args:
        blocks: B blocks with N elements over all their gates.
        scores_N: (N,) on the CPU, block after block and gate after gate; equal ones go in this order.
        budget: parameters that the blocks may keep together, in [0, sum of P_b].
    """
    ranking, passed_over = scores_N.double().clone(), set[int]()
    while True:
        order = torch.argsort(ranking, stable=True)
        remaining, is_last = _walk(blocks, order)
        below = int((remaining > budget).sum())  # the first t that meets the budget from below
        element = int(order[below - 1])
        if below == 0 or remaining[below] == budget or not is_last[below - 1] or element in passed_over:
            return Cut(ranking, count_to_prune(remaining, budget))
        passed_over.add(element)
        ranking[element] = torch.inf


def _walk(blocks: Sequence[BlockLayout], order_N: Tensor) -> tuple[Tensor, Tensor]:
    """Give up all elements, one after the other.

    An element saves what its block loses by it, and that depends on the elements of its own block alone that went before: so
    each block is walked through by itself, all of one shape at once, and the savings are put in the network's order.

    Returns:
        (N + 1,) float64 parameters left after t elements are gone, exact; and (N,) whether the t-th was the last of its gate.
    """
    places_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N)))
    places = places_N.split([sum(block.dims.values()) for block in blocks])
    saved, is_last = torch.empty(len(order_N), dtype=torch.float64), torch.empty(len(order_N), dtype=torch.bool)
    for group in alike(blocks):
        shape = blocks[group[0]]
        sizes = torch.tensor(list(shape.dims.values()))
        in_turn, elements = torch.stack([places[b] for b in group]).sort(dim=1)
        gates = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[elements]
        gone = torch.nn.functional.one_hot(gates, len(sizes)).cumsum(1)
        kept = torch.cat([sizes.expand(len(group), 1, -1), sizes - gone], dim=1)  # (blocks of the group, n + 1, gates)
        saved[in_turn] = -prefix_cost(shape)(kept).double().diff(dim=1)
        is_last[in_turn] = kept[:, 1:].gather(2, gates[..., None])[..., 0] == 0
    dense = torch.tensor([float(sum(dense_params(block) for block in blocks))], dtype=torch.float64)
    return torch.cat([dense, dense - saved.cumsum(0)]), is_last
