"""Shape of one residual branch of a small model, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

WHOLE, SMALL, CONSTANT, GONE = "whole", "small", "constant", "gone"
"""What can become of a branch."""


@dataclass(frozen=True)
class BranchShape:
    """Shape of one block of a small model: all that is needed to build it without weights.

    Attributes:
        name: "blocks.3.attn" or "blocks.3.mlp".
        form: "whole", "small", "constant" or "gone".
        inputs: sorted channels of the residual stream that it reads; empty for a constant.
        inner: channels of a head, or hidden channels.
        outputs: sorted channels of the residual stream that it writes to.
        heads: attention heads of a small attention, of its keys where queries have more; 0 for anything else.
        pairs: where positions turn a head's channels in pairs, the sorted pairs that stay, as the dense model counts them.

    Channels of the residual stream are those of the small model, from 0 to D' - 1.
    """

    name: str
    form: str
    inputs: tuple[int, ...] = ()
    inner: int = 0
    outputs: tuple[int, ...] = ()
    heads: int = 0
    pairs: tuple[int, ...] = ()
