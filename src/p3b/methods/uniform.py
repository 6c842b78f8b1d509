"""The simplest allocation: every block keeps the same share of its parameters.

    k_b = ((1 - rho) (P_blocks + P_rest) - P_rest) / P_blocks    for every block b

Two methods of it, both with gates, order within a block, masks and schedule as P3B has them, so that rows of a table differ in
one thing. Against P3B, `uniform` shows what sharing the budget out by benefit is worth; against `uniform`, `random` shows what
the element score is worth.

- `uniform`: elements by squared first-order Taylor score, averaged over the interval.
- `random`: elements at random, the floor that every method has to beat. The order is drawn once: were it drawn at every mask
  update, elements would come and go by chance, and what is left in the end would never have been trained without the rest.
  How many channels of each gate go is not left to chance: a block's gates take turns as in every other method.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.core.allocation import block_budget
from p3b.methods.base import BlockShares, Decision, ScoreMethod, overall_keep_ratio, require_align
from p3b.scoring.criteria import by_gate
from p3b.scoring.meter import Reduce
from p3b.scoring.scores import RandomScores, TaylorScores
from p3b.vit.layout import ModelLayout
from p3b.vit.narrow_stream import narrow_stream


def uniform(
    model: VisionTransformer,
    layout: ModelLayout,
    prune_ratio: float,
    reduce: Reduce,
    *,
    blocks_only: bool = False,
    align: int = 1,
    stream: float | str = 0.0,
) -> ScoreMethod:
    """The same share for every block, elements by Taylor score; arguments and errors as in `p3b.methods.base.Method`.

    `align` and `stream` are those of `p3b.methods.block_benefit`.
    """
    shares = EqualShares(layout, prune_ratio, blocks_only, align, stream)
    return ScoreMethod("uniform", model, TaylorScores(layout, model, reduce), shares.decide)


def random(
    model: nn.Module,
    layout: ModelLayout,
    prune_ratio: float,
    reduce: Reduce,
    *,
    blocks_only: bool = False,
    align: int = 1,
    stream: float | str = 0.0,
    seed: int = 0,
) -> ScoreMethod:
    """The same share for every block, elements at random; nothing is measured, so nothing is reduced over ranks.

    Arguments and errors as `uniform` has them, and `seed` of the draw, the same on all ranks.
    """
    shares = EqualShares(layout, prune_ratio, blocks_only, align, stream)
    return ScoreMethod("random", model, RandomScores(layout, seed), shares.decide)


class EqualShares:
    """From scores to masks, with one keep ratio for all blocks; arguments as in `uniform`."""

    def __init__(
        self, layout: ModelLayout, prune_ratio: float, blocks_only: bool, align: int = 1, stream: float | str = 0.0
    ) -> None:
        require_align(align)
        narrow = narrow_stream(layout, stream, align, prune_ratio, blocks_only)
        self._layout, self._shares = layout, BlockShares(layout.blocks, align, stream=narrow)
        if narrow is None:
            self._goal = overall_keep_ratio(layout, prune_ratio, blocks_only)
        else:
            self._goal = block_budget(narrow.in_blocks, narrow.others, narrow.ratio) / narrow.in_blocks

    def decide(self, scores_N: Tensor, progress: float, tau: float, last: bool = False) -> Decision:
        goals = [self._goal] * len(self._layout.blocks)
        return self._shares.decide(goals, by_gate(self._layout, scores_N), progress, tau, last=last)
