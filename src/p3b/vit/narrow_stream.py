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
        share: of the stream's channels that goes, in (0, 1).
        multiple: of which its last width is one.
        prune_ratio: rho, share of parameters that goes, in [0, 1).
        blocks_only: count the budget over the blocks alone; what the stream saves outside them comes on top.

    Attributes:
        goal: D', channels that stay in the end.
        ratio: of the parameters that there are at D' channels, the share that goes, in [0, 1).
        in_blocks, others: parameters inside the blocks, and outside as far as they count, at D' channels.

    Raises:
        BudgetError: the budget cannot be met at this width.
    """

    def __init__(self, layout: ModelLayout, share: float, multiple: int, prune_ratio: float, blocks_only: bool) -> None:
        assert layout.stream is not None
        self._blocks, self._size = layout.blocks, layout.stream.size
        wanted = max(LEAST_STREAM, (1 - share) * self._size)
        self.goal = min(max(1, round(wanted / multiple)) * multiple, self._size)
        if not 0 <= prune_ratio < 1:
            raise BudgetError(
                f"The prune ratio must lie in [0, 1), got {prune_ratio}. It is the share of parameters that goes."
            )
        dense_blocks = sum(map(dense_params, layout.blocks))
        self.others = 0 if blocks_only else int(other_params(layout, self.goal))
        may_stay = (1 - prune_ratio) * (dense_blocks + (0 if blocks_only else layout.other_params))
        self.in_blocks = float(self.params(self.goal).sum())
        there_are = int(self.in_blocks) + self.others
        if may_stay < self.others:
            raise BudgetError(
                f"A prune ratio of {prune_ratio:g} cannot be met with {self.goal} of {self._size} channels of the residual "
                f"stream: the {self.others:,} parameters outside the blocks stay then and are more than the {may_stay:,.0f} "
                "that may remain. Narrow the stream further (--prune-stream), or prune less."
            )
        if may_stay > there_are:
            raise BudgetError(
                f"--prune-stream {share:g} leaves {self.goal} of {self._size} channels of the residual stream, and with them "
                f"{there_are:,} parameters, fewer than the {may_stay:,.0f} that prune ratio {prune_ratio:g} asks for. Narrow "
                "the stream less, or prune more."
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
    """A `NarrowStream`, or None where the share is 0 and the stream stays; arguments and errors as there, and "auto"."""
    if share == AUTO:
        share = 1 - (1 - prune_ratio) ** AUTO_POWER if 0 <= prune_ratio < 1 else 0.0
    if isinstance(share, str) or not 0 <= share < 1:
        raise ConfigError(
            f'stream must be "auto" or lie in [0, 1), got {share}: the share of the residual stream\'s channels that goes.'
        )
    return None if share == 0 else NarrowStream(layout, share, multiple, prune_ratio, blocks_only)
