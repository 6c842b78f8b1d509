"""Branches whose norm comes last, x + path(norm(body(x))), and the cosine attention in windows that Swin v2 has in them.

The norm is over what the body gives. An output that goes is gone before the norm, which takes its moments over those that
stay, in the masked model as in the small one. What is read is not picked by a norm but by the body's first layer.

Cosine attention compares directions: queries and keys are brought to length one over the channels that stay, and a narrower
head needs no other scale.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from timm.layers import LayerNorm
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn

from p3b.vit.anatomy.body import in_place_of, narrow_linear, pruned_or, refuse
from p3b.vit.anatomy.half import PlainPreNorm
from p3b.vit.anatomy.mlp import PlainMlp
from p3b.vit.anatomy.norms import has_shift, narrow_norm, norm_of_kept
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Axis, Moments, Weight, affine
from p3b.vit.anatomy.window import WindowSelfAttention, compare_nothing
from p3b.vit.parts import CosineWindowAttention, InPlaceOfBranch, NormOfFirst, QueryValueLinear, ReadingLinear


@dataclass(frozen=True)
class CosineAttention(WindowSelfAttention):
    """timm's WindowAttention of Swin v2 (`p3b.vit.anatomy.body.Body`)."""

    classes: tuple[type[nn.Module], ...] = (WindowAttention,)

    def weights(self, body: nn.Module) -> list[Weight]:
        rows: Axis = (3, *self.inner(body))
        reader = None if body.q_bias is None else ""  # with biases the weight is read without its layer being called
        first, _, last = body.cpb_mlp
        places = body.relative_coords_table.shape[1] * body.relative_coords_table.shape[2]
        return [
            Weight("logit_scale", (("heads",), (1,), (1,))),
            Weight("cpb_mlp.0.weight", ((first.out_features,), (first.in_features,)), times=places),
            Weight("cpb_mlp.0.bias", ((first.out_features,),)),
            Weight("cpb_mlp.2.weight", (("heads",), (last.in_features,)), times=places),
            Weight("qkv.weight", (rows, ("in",)), gated=((0, "head"), (1, "in")), user=reader),
            *(Weight(name, (self.inner(body),), gated=((0, "head"),)) for name in ("q_bias", "v_bias")),
            Weight("proj.weight", (("out",), self.inner(body)), gated=((0, "out"), (1, "heads"), (0, STREAM))),
            Weight("proj.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        ]

    def value_bias(self, body: Any) -> Tensor | None:
        bias: Tensor | None = body.v_bias
        return bias

    def makes_constant(self, body: nn.Module) -> list[Tensor | None]:
        return [self.value_bias(body), *self.last(body).parameters()]

    def narrow(self, body: nn.Module, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        rows, stream, example = shape.heads * shape.inner, body.proj.out_features, body.proj.weight
        if body.q_bias is None:
            narrow_linear(body.qkv, inputs, 3 * rows)
        else:
            body.qkv = QueryValueLinear(inputs, rows, example).train(body.training)
        narrow_linear(body.proj, rows, outputs)
        narrow_linear(body.cpb_mlp[2], body.cpb_mlp[2].in_features, shape.heads)
        body.logit_scale = nn.Parameter(example.new_empty(shape.heads, 1, 1))
        small = CosineWindowAttention(body, shape.heads, shape.inner, shape.inputs, stream)
        for moved in ("dim", "qkv_bias_separate", "num_heads", "k_bias"):
            body.__dict__.pop(moved, None)
        return in_place_of(body, small)

    def small_key(self, key: str) -> str:
        if key == "logit_scale":
            return "q_norm.logit_scale"
        return f"qkv.{key}" if key in ("q_bias", "v_bias") else key

    def rescale(self, weights: MutableMapping[str, nn.Parameter], sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
        """Nothing: directions are compared, however many channels they have."""


@dataclass(frozen=True)
class PostNorm(PlainPreNorm):
    """x + path(norm(body(x))), each by its name in the block (`p3b.vit.anatomy.half.Half`)."""

    @property
    def stream_norms(self) -> tuple[str, ...]:
        return ()

    def require_covered(self, name: str, block: nn.Module) -> None:
        super().require_covered(name, block)
        norm = block.get_submodule(self.norm)
        other = type(norm) not in (nn.LayerNorm, LayerNorm)
        refuse(name, {f"{self.norm}: {pruned_or(type(norm).__name__)} after the branch": other})

    def weights(self, block: nn.Module) -> list[Weight]:
        return [*self.body_weights(block), *affine(self.norm, block.get_submodule(self.norm), ("out",))]

    def moments(self, block: nn.Module) -> list[Moments]:
        return [*super().moments(block), Moments(self.norm, ("out",))]

    def constant_without(self, block: nn.Module) -> tuple[bool, bool]:
        without_input, without_inner = super().constant_without(block)
        shift = has_shift(block.get_submodule(self.norm))
        return without_input or shift, without_inner or shift

    def entry(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.name)

    def scaled(self, block: nn.Module, value: Tensor, mask: Tensor) -> Tensor:
        return norm_of_kept(block.get_submodule(self.norm), value, mask)

    def scale(self, block: nn.Module) -> Tensor | None:
        weight: Tensor | None = block.get_submodule(self.norm).weight
        return weight

    def read(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        """Let the first layers of the narrowed body read some of the stream's channels."""
        assert isinstance(self.body, PlainMlp)
        mlp = block.get_submodule(self.name)
        for name in self.body.layers if len(shape.inputs) < width else ():
            layer: nn.Linear = mlp.get_submodule(name)
            setattr(mlp, name, in_place_of(layer, ReadingLinear(shape.inputs, layer)))

    def write(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        super().write(block, shape, width, example)
        self.narrow_norm(block, len(shape.outputs))

    def narrow_norm(self, block: nn.Module, outputs: int) -> None:
        """Make the norm for so many channels."""
        narrow_norm(block.get_submodule(self.norm), outputs)


@dataclass(frozen=True)
class WindowPostNorm(PostNorm):
    """The half of an attention in windows: it gives as many channels as the stream has, zeros at the end."""

    def read(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        """Nothing: the small attention picks what it reads."""

    def narrow_norm(self, block: nn.Module, outputs: int) -> None:
        norm: nn.LayerNorm = block.get_submodule(self.norm)
        like = norm.weight if norm.weight is not None else block.get_submodule(self.name).proj.weight
        affine, shift = norm.weight is not None, has_shift(norm)
        small = NormOfFirst(outputs, norm.eps, affine, bias=shift, device=like.device, dtype=like.dtype)
        setattr(block, self.norm, in_place_of(norm, small))

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        replacement.fills = True  # the block cuts and joins what it gives as if it were that of all tokens
        super().replace(block, replacement)
        compare_nothing(block)
