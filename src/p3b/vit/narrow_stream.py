"""The residual stream as a further dimension: some of its channels go, the same ones in the whole model.

P3B as published leaves the stream at its width D. Each block then reads some of its channels and writes to some, by index, and
every norm and addition still runs over all D. Where the stream itself is narrower, D' channels, blocks read and write all of
them: nothing is gathered, and norms and additions get cheaper with the rest. What each block may keep is then shared out
as ever, by what a block has at D' channels:

    sum_b k_b P_b(D') = (1 - rho) (P_blocks + P_rest) - P_rest(D')

The stream walks to D' as keep ratios walk to their goals, by the score of everything that writes to a channel. "auto" is

    D' = (1 - rho)^0.3 D

so that blocks lose more than the stream does: with 90 % pruned it keeps half of its channels, with 75 % two thirds, with 50 %
four fifths.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from p3b.core.masks import soft_mask
from p3b.errors import BudgetError, ConfigError
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.cost import block_params, dense_params, other_params
from p3b.vit.layout import ModelLayout

AUTO, AUTO_POWER = "auto", 0.3
LEAST_STREAM = 3
"""Channels of the stream that stay at least: a layer norm over one gives zero and over two a sign, whatever it is given."""


class NarrowStream:
    """How wide the stream is when, and what that leaves to the blocks.

    Args:
        layout: of the model, with the dimension "stream".
        goal: D', channels that stay in the end, in [1, D].
        prune_ratio: rho, share of parameters that goes, in [0, 1).
        blocks_only: count the budget over the blocks alone; what the stream saves outside them comes on top.

    Attributes:
        goal: D'.
        ratio: of the parameters that there are at D' channels, the share that goes, in [0, 1).
        in_blocks, others: parameters inside the blocks, and outside as far as they count, at D' channels.

    Raises:
        BudgetError: the budget cannot be met at this width.
    """

    def __init__(self, layout: ModelLayout, goal: int, prune_ratio: float, blocks_only: bool) -> None:
        assert layout.stream is not None
        self._blocks, self._size, self.goal = layout.blocks, layout.stream.size, goal
        if not 0 <= prune_ratio < 1:
            raise BudgetError(
                f"The prune ratio must lie in [0, 1), got {prune_ratio}; it is the share of parameters that goes."
            )
        dense_blocks = sum(map(dense_params, layout.blocks))
        self.others = 0 if blocks_only else int(other_params(layout, goal))
        may_stay = (1 - prune_ratio) * (dense_blocks + (0 if blocks_only else layout.other_params))
        self.in_blocks = float(self.params(goal).sum())
        there_are = int(self.in_blocks) + self.others
        asked = f"prune ratio {prune_ratio:g} with {goal} of {self._size} channels of the residual stream"
        if may_stay < self.others:
            raise BudgetError(
                f"{asked} cannot be met: the {self.others:,} parameters outside the blocks stay and are more than the "
                f"{may_stay:,.0f} that may remain. Narrow the stream further (--prune-stream), or prune less."
            )
        if may_stay > there_are:
            raise BudgetError(
                f"{asked} cannot be met: {there_are:,} parameters are left by the narrower stream alone, fewer than the "
                f"{may_stay:,.0f} that are to remain. Narrow the stream less (--prune-stream), or prune more."
            )
        self.ratio = max(0.0, 1 - may_stay / there_are)

    def width(self, progress: float) -> int:
        """Channels that stay at a progress in [0, 1], from D to D'."""
        return round(self._size + (self.goal - self._size) * progress)

    def params(self, width: int) -> Tensor:
        """(B,) float64: parameters of each block, all of it, at so many channels of the stream."""
        kept = {STREAM: torch.tensor(width)}
        return torch.tensor([int(block_params(block, kept)) for block in self._blocks], dtype=torch.float64)

    def mask(self, scores: Tensor, progress: float, tau: float) -> Tensor:
        """(D,) mask of the channels, those with the lowest scores first to go."""
        width = self.width(progress)
        return torch.ones(self._size) if width == self._size else soft_mask(scores, self._size - width + 0.5, tau)


def narrow_stream(
    layout: ModelLayout, share: float | str, multiple: int, prune_ratio: float, blocks_only: bool
) -> NarrowStream | None:
    """The stream as an option asks for it.

    Args:
        layout: of the model; with the dimension "stream" unless the share is 0.
        share: of the stream's channels that goes, in [0, 1), or "auto": by the prune ratio, and where the budget cannot be met
            at that width, the nearest at which it can.
        multiple: of which D' is one, to the nearest.
        prune_ratio, blocks_only: as in `NarrowStream`.

    Returns:
        None where the share is 0: the stream keeps its width.

    Raises:
        ConfigError: another share.
        BudgetError: the budget cannot be met.
    """
    if share == 0:
        return None
    assert layout.stream is not None
    size = layout.stream.size
    if share == AUTO:
        wanted = max(0.0, 1 - prune_ratio) ** AUTO_POWER * size
        widths = sorted({*range(multiple, size, multiple), size}, key=lambda width: (abs(width - wanted), width))
        widths = [width for width in widths if width >= LEAST_STREAM] or [size]
        for width in widths:
            with suppress(BudgetError):
                return NarrowStream(layout, width, prune_ratio, blocks_only)
        raise _never_met(layout, min(widths), prune_ratio)
    if isinstance(share, str) or not 0 < share < 1:
        raise ConfigError(
            f'stream must be "auto" or lie in [0, 1), got {share}: the share of the residual stream\'s channels that goes.'
        )
    wanted = max(LEAST_STREAM, (1 - share) * size)
    return NarrowStream(layout, min(max(1, round(wanted / multiple)) * multiple, size), prune_ratio, blocks_only)


def _never_met(layout: ModelLayout, narrowest: int, prune_ratio: float) -> BudgetError:
    """What to say where no width of the stream will do."""
    assert layout.stream is not None
    others = int(other_params(layout, narrowest))
    largest = 1 - others / (layout.other_params + sum(map(dense_params, layout.blocks)))
    return BudgetError(
        f"A prune ratio of {prune_ratio:g} cannot be met: even with {narrowest} of {layout.stream.size} channels of the "
        f"residual stream the {others:,} parameters outside the blocks stay, so that at most {largest:.1%} can go. Prune "
        "less, or count the blocks alone (--prune-blocks-only)."
    )
