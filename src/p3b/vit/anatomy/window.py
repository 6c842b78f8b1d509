"""timm's attention in windows, of Swin, and the halves of blocks that cut tokens into windows, those of SAM among them.

A block of Swin cuts the tokens into windows after the norm, and puts them together again, with as many channels, after the
attention. A small block therefore has as many channels on both sides, the larger of those that it reads and those that it
writes: what is missing on one side are zeros at the end. A table of biases has a column for each head, which goes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.attention import SelfAttention
from p3b.vit.anatomy.body import in_place_of, narrow_linear, pruned_or, require_linear
from p3b.vit.anatomy.half import PlainPreNorm, PreNorm
from p3b.vit.anatomy.norms import is_centred
from p3b.vit.anatomy.relative import TABLE
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Moments, Weight
from p3b.vit.parts import DropAndWrite, InPlaceOfBranch, PaddedDropAndWrite, PaddedReadChannels, PaddedWindowAttention


@dataclass(frozen=True)
class WindowSelfAttention(SelfAttention):
    """timm's WindowAttention of Swin (`p3b.vit.anatomy.body.Body`)."""

    classes: tuple[type[nn.Module], ...] = (WindowAttention,)

    def require_covered(self, name: str, body: nn.Module) -> None:
        if type(body) not in self.classes:
            known = ", ".join(kind.__name__ for kind in self.classes)
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)} is not covered; of timm's attentions {known} is.")
        require_linear(name, body, ("qkv", "proj"))
        if body.qkv.out_features != 3 * body.proj.in_features or body.proj.out_features != body.qkv.in_features:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def sizes(self, body: nn.Module) -> dict[str, int]:
        return {
            "in": body.qkv.in_features,
            "heads": body.num_heads,
            "head": body.proj.in_features // body.num_heads,
            "out": body.proj.out_features,
        }

    def weights(self, body: nn.Module) -> list[Weight]:
        table = body.get_parameter(TABLE)
        return [
            Weight(TABLE, ((len(table),), ("heads",)), times=0),
            *self.read_weights(body),
            Weight("proj.weight", (("out",), self.inner(body)), gated=((0, "out"), (1, "heads"), (0, STREAM))),
            Weight("proj.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        ]

    def moments(self, body: nn.Module) -> list[Moments]:
        return []

    def makes_constant(self, body: nn.Module) -> list[Tensor | None]:
        return [self.first(body).bias, self.last(body).weight, self.last(body).bias]

    def narrow(self, body: nn.Module, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        rows, table = shape.heads * shape.inner, body.get_parameter(TABLE)
        narrow_linear(body.qkv, inputs, 3 * rows)
        narrow_linear(body.proj, rows, outputs)
        body.relative_position_bias_table = nn.Parameter(table.new_empty(len(table), shape.heads))
        body.num_heads, body.scale = shape.heads, shape.inner**-0.5
        return in_place_of(body, PaddedWindowAttention(body))


@dataclass(frozen=True)
class WindowPreNorm(PlainPreNorm):
    """The half of an attention in windows."""

    writer: ClassVar[type[DropAndWrite]] = PaddedDropAndWrite

    def read(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        if len(shape.inputs) < width:
            norm, between = block.get_submodule(self.norm), max(len(shape.inputs), len(shape.outputs))
            read = PaddedReadChannels(shape.inputs, width, norm, example, is_centred(norm), between)
            setattr(block, self.norm, in_place_of(norm, read))

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        replacement.fills = True  # the block cuts and joins what it gives as if it were that of all tokens
        super().replace(block, replacement)
        compare_nothing(block)


def compare_nothing(block: nn.Module) -> None:
    """Tell a block of Swin that nothing is compared, so that there is nothing to be shifted or masked."""
    block.shift_size = block.target_shift_size = (0, 0)
    block.dynamic_mask, block.attn_mask = True, None


@dataclass(frozen=True)
class MapPreNorm(PreNorm):
    """The half of an attention over a map of tokens, which a block of SAM may cut into windows and join after it."""

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        replacement.fills = True  # the block joins what it gives as if it were that of all tokens
        super().replace(block, replacement)


def tokens_in_windows(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """(tokens that are compared with each other, tokens in all windows together, padding included)."""
    high, wide = window
    rows, columns = (-(-side // extent) for side, extent in zip(grid, window, strict=True))
    return high * wide, high * wide * rows * columns
