"""timm's attention in windows, of Swin, and the halves of blocks that cut tokens into windows, those of SAM among them.

A block of Swin cuts the tokens into windows after the norm, and puts them together again, with as many channels, after the
attention. A small block therefore has as many channels on both sides, the larger of those that it reads and those that it
writes: what is missing on one side are zeros at the end. A table of biases has a column for each head, which goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.attention import SelfAttention
from p3b.vit.anatomy.body import Body, in_place_of, narrow_linear, pruned_or, refuse, require_linear
from p3b.vit.anatomy.half import AsItsBody, PreNorm, narrow_body, read_channels, small_key
from p3b.vit.anatomy.norms import is_centred, is_norm
from p3b.vit.anatomy.relative import TABLE, visible
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Moments, Weight, affine
from p3b.vit.parts import (
    ConstantBranch,
    DropAndWrite,
    NoBranch,
    PaddedDropAndWrite,
    PaddedReadChannels,
    PaddedWindowAttention,
)


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

    def constant_without(self, body: nn.Module) -> tuple[bool, bool]:
        last = body.proj.bias is not None
        return last or self.value_bias(body) is not None, last

    def blind(self, body: nn.Module, kept: Mapping[str, Sequence[int]]) -> Tensor | None:
        values = self.value_bias(body)
        return None if values is None else visible(values.detach(), kept, self.sizes(body))

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
class PlainPreNorm(AsItsBody):
    """x + path(body(norm(x))), each by its name in the block (`p3b.vit.anatomy.half.Half`)."""

    name: str
    body: Body
    norm: str
    drop_path: str

    @property
    def stream_norms(self) -> tuple[str, ...]:
        return (self.norm,)

    def weights(self, block: nn.Module) -> list[Weight]:
        body = self.body.weights(block.get_submodule(self.name))
        return [
            *affine(self.norm, block.get_submodule(self.norm), ("in",)),
            *(weight.inside(self.name) for weight in body),
        ]

    def require_covered(self, name: str, block: nn.Module) -> None:
        self.body.require_covered(f"{name}.{self.name}", block.get_submodule(self.name))
        norm = block.get_submodule(self.norm)
        refuse(name, {f"{self.norm}: {pruned_or(type(norm).__name__)}": not is_norm(norm)})

    def entry(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.norm)

    def scaled(self, block: nn.Module, value: Tensor, mask: Tensor) -> Tensor:
        return value

    def scale(self, block: nn.Module) -> Tensor | None:
        return None

    def small_key(self, key: str) -> str:
        return small_key(self, key)

    def set_drop_path(self, block: nn.Module, path: nn.Module) -> None:
        there = block.get_submodule(self.drop_path)
        if isinstance(there, DropAndWrite):
            there.drop_prob = getattr(path, "drop_prob", 0.0)
        else:
            setattr(block, self.drop_path, path)

    def narrow(self, block: nn.Module, shape: BranchShape, width: int) -> None:
        example = narrow_body(self, block, shape)
        read_channels(block, self.norm, shape, width, example)
        if len(shape.outputs) < width:
            path = block.get_submodule(self.drop_path)
            write = DropAndWrite(shape.outputs, width, example, getattr(path, "drop_prob", 0.0))
            setattr(block, self.drop_path, in_place_of(path, write))

    def replace(self, block: nn.Module, replacement: nn.Module) -> None:
        setattr(block, self.name, replacement.train(block.training))
        for around in (self.norm, self.drop_path):
            setattr(block, around, nn.Identity().train(block.training))


@dataclass(frozen=True)
class WindowPreNorm(PlainPreNorm):
    """The half of an attention in windows."""

    def narrow(self, block: nn.Module, shape: BranchShape, width: int) -> None:
        example = narrow_body(self, block, shape)
        between = max(len(shape.inputs), len(shape.outputs))
        if len(shape.inputs) < width:
            norm = block.get_submodule(self.norm)
            read = PaddedReadChannels(shape.inputs, width, norm, example, is_centred(norm), between)
            setattr(block, self.norm, in_place_of(norm, read))
        if len(shape.outputs) < width:
            path = block.get_submodule(self.drop_path)
            write = PaddedDropAndWrite(shape.outputs, width, example, getattr(path, "drop_prob", 0.0))
            setattr(block, self.drop_path, in_place_of(path, write))

    def replace(self, block: nn.Module, replacement: nn.Module) -> None:
        assert isinstance(replacement, ConstantBranch | NoBranch)
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

    def replace(self, block: nn.Module, replacement: nn.Module) -> None:
        assert isinstance(replacement, ConstantBranch | NoBranch)
        replacement.fills = True  # the block joins what it gives as if it were that of all tokens
        super().replace(block, replacement)


def tokens_in_windows(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """(tokens that are compared with each other, tokens in all windows together, padding included)."""
    high, wide = window
    rows, columns = (-(-side // extent) for side, extent in zip(grid, window, strict=True))
    return high * wide, high * wide * rows * columns
