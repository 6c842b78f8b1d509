"""A frozen map of a VisionTransformer: block -> prunable dimension -> the weights that it slices.

Every prunable dimension of a block is a set of channels that one gate speaks for (section 6 of the method):

    attention   in      input channels, after norm1          MLP   in      input channels, after norm2
                head    channels of a head, one gate               hidden  hidden channels, after the activation
                        shared by q, k, v and all heads            out     output channels, fc2's bias included
                out     output channels, proj's bias included

A weight's axis is written as a tuple of factors, outermost first: the rows of `qkv.weight` are (3, heads, "head"), so the
dimension "head" lies along that axis 3 * heads times. Costs, gates, scores and cuts all follow from these tuples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention, LayerNorm, LayerNormFp32, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.architecture import BLOCK_ARGUMENTS

Axis = tuple[int | str, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter of a block: its key in the model, its axes, and which of them a gate multiplies."""

    key: str
    axes: tuple[Axis, ...]
    gated: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockLayout:
    """One residual block x + f(x).

    Attributes:
        name: "blocks.3.attn" or "blocks.3.mlp".
        kind: "attn" or "mlp".
        depth: index of the timm block that it lies in.
        dims: size of every prunable dimension by its short name, input first, output last.
        weights: all its parameters.
        heads: attention heads; 1 for an MLP.
        constant_without_input: it can still add a constant when it reads nothing (some bias feeds on).
        constant_without_inner: it can still add a constant when its inner channels are gone (its output has a bias).
    """

    name: str
    kind: str
    depth: int
    dims: Mapping[str, int]
    weights: tuple[Weight, ...]
    heads: int
    constant_without_input: bool
    constant_without_inner: bool

    @property
    def inner(self) -> str:
        """Short name of the dimension inside the block: "head" or "hidden"."""
        return "head" if self.kind == "attn" else "hidden"

    def gate(self, dim: str) -> str:
        """Full name of a dimension's gate, e.g. "blocks.3.attn.head"."""
        return f"{self.name}.{dim}"


@dataclass(frozen=True)
class ModelLayout:
    """The whole model as the method sees it.

    Attributes:
        blocks: B = 2 * depth blocks, attention and MLP in turn.
        other_params: parameters outside all blocks.
        width: D, channels of the residual stream.
        prefix_tokens: class, distillation and register tokens, which come before the patches.
        has_class_token: whether token 0 is a class token.
        grid: (H, W) patches.
        num_classes: outputs of the head.
    """

    blocks: tuple[BlockLayout, ...]
    other_params: int
    width: int
    prefix_tokens: int
    has_class_token: bool
    grid: tuple[int, int]
    num_classes: int

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]


def read_layout(model: nn.Module) -> ModelLayout:
    """Map of a dense timm VisionTransformer that is built from timm's standard blocks.

    Raises:
        ModelError: the model is of another kind, has been pruned already, or has a part that is not covered; the message names
            the block and the reason.
    """
    vit = require_vision_transformer(model)
    if BLOCK_ARGUMENTS in vit.__dict__:
        raise ModelError("blocks.0 or a later block has been pruned already; prune the dense model instead.")
    blocks: list[BlockLayout] = []
    for depth, block in enumerate(vit.blocks):
        _check_block(f"blocks.{depth}", block)
        blocks += [_attention_layout(depth, block), _mlp_layout(depth, block)]
    shapes = {key: parameter.numel() for key, parameter in vit.named_parameters()}
    in_blocks = sum(shapes[weight.key] for block in blocks for weight in block.weights)
    return ModelLayout(
        blocks=tuple(blocks),
        other_params=sum(shapes.values()) - in_blocks,
        width=vit.embed_dim,
        prefix_tokens=vit.num_prefix_tokens,
        has_class_token=vit.cls_token is not None,
        grid=tuple(vit.patch_embed.grid_size),
        num_classes=vit.num_classes,
    )


def require_vision_transformer(model: nn.Module) -> VisionTransformer:
    """The model itself, as a timm VisionTransformer whose parts outside the blocks are covered.

    Raises:
        ModelError: it is of another kind; the message says which kinds are covered.
    """
    if not isinstance(model, VisionTransformer):
        raise ModelError(
            f"Only timm VisionTransformer models can be pruned, got {type(model).__name__}. Covered are the ViT and DeiT "
            "families (also distilled, without class token, with registers or LayerScale), such as deit_small_patch16_224."
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise ModelError(f"patch_embed: {type(model.patch_embed).__name__} is not covered, only timm's PatchEmbed is.")
    return model


def alike(blocks: Sequence[BlockLayout]) -> list[list[int]]:
    """Indices of the blocks of one shape together: what follows from the shape alone is worked out once for all of them."""
    groups: dict[object, list[int]] = {}
    for number, block in enumerate(blocks):
        constants = (block.constant_without_input, block.constant_without_inner)
        shape = (block.kind, tuple(block.dims.items()), tuple(weight.axes for weight in block.weights), constants)
        groups.setdefault(shape, []).append(number)
    return list(groups.values())


def split_axis(tensor: Tensor, axis: int, factors: Axis, sizes: Mapping[str, int]) -> Tensor:
    """View of a weight with one axis unfolded into its factors, e.g. (3 * H * K, D) -> (3, H, K, D)."""
    shape = [sizes[factor] if isinstance(factor, str) else factor for factor in factors]
    return tensor.unflatten(axis, shape)


def expand_along(vector: Tensor, factors: Axis) -> Tensor:
    """A dimension's vector repeated along an axis: (K,) -> (3 * H * K,) for the factors (3, H, "head")."""
    times = math.prod(factor for factor in factors if isinstance(factor, int))
    return vector if times == 1 else vector.repeat(times)


def dims_of(axis: Axis) -> tuple[str, ...]:
    """Names of the prunable dimensions along an axis."""
    return tuple(factor for factor in axis if isinstance(factor, str))


def _check_block(name: str, block: nn.Module) -> None:
    """Refuse anything whose arithmetic is not that of timm's plain pre-norm block."""
    if type(block) is not Block:
        raise ModelError(f"{name}: {type(block).__name__} is not covered; only timm's standard Block (attention, then MLP) is.")
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        raise ModelError(f"{name}.attn: {_pruned_or(type(attn).__name__)}; only timm's standard Attention is covered.")
    if type(mlp) is not Mlp or type(mlp.fc1) is not nn.Linear:
        raise ModelError(f"{name}.mlp: {_pruned_or(type(mlp).__name__)}; only timm's standard Mlp is covered.")
    refused = {
        "attn.q_norm: query/key normalisation": not isinstance(attn.q_norm, nn.Identity),
        "attn.norm: a norm on the attention output": not isinstance(attn.norm, nn.Identity),
        "attn.gate: gated attention": attn.gate is not None,
        "mlp.norm: a norm on the hidden channels": not isinstance(mlp.norm, nn.Identity),
        f"ls1: {_pruned_or(type(block.ls1).__name__)}": type(block.ls1) not in (nn.Identity, LayerScale),
        f"ls2: {_pruned_or(type(block.ls2).__name__)}": type(block.ls2) not in (nn.Identity, LayerScale),
        f"norm1: {_pruned_or(type(block.norm1).__name__)}": not _is_layer_norm(block.norm1),
        f"norm2: {_pruned_or(type(block.norm2).__name__)}": not _is_layer_norm(block.norm2),
    }
    for reason, present in refused.items():
        if present:
            raise ModelError(f"{name}.{reason} is not covered.")
    width = attn.qkv.in_features
    if attn.attn_dim != width or attn.proj.out_features != width or mlp.fc2.out_features != width:
        raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")


def _pruned_or(name: str) -> str:
    pruned = name in ("ReadChannels", "WriteChannels", "ConstantBranch", "NoBranch")
    return f"{name} (of a model that has been pruned already)" if pruned else name


def _is_layer_norm(norm: nn.Module) -> bool:
    return type(norm) in (nn.LayerNorm, LayerNorm, LayerNormFp32)


def _attention_layout(depth: int, block: Block) -> BlockLayout:
    name, attn = f"blocks.{depth}", block.attn
    heads = attn.num_heads
    qkv_rows: Axis = (3, heads, "head")
    weights = [
        *_affine(f"{name}.norm1", block.norm1),
        Weight(f"{name}.attn.qkv.weight", (qkv_rows, ("in",)), gated=(0, 1)),
        Weight(f"{name}.attn.qkv.bias", (qkv_rows,), gated=(0,)),
        Weight(f"{name}.attn.proj.weight", (("out",), (heads, "head")), gated=(0,)),
        Weight(f"{name}.attn.proj.bias", (("out",),), gated=(0,)),
        Weight(f"{name}.ls1.gamma", (("out",),)),
    ]
    return BlockLayout(
        name=f"{name}.attn",
        kind="attn",
        depth=depth,
        dims={"in": attn.qkv.in_features, "head": attn.head_dim, "out": attn.proj.out_features},
        weights=_existing(weights, name, block),
        heads=heads,
        constant_without_input=attn.qkv.bias is not None or attn.proj.bias is not None,
        constant_without_inner=attn.proj.bias is not None,
    )


def _mlp_layout(depth: int, block: Block) -> BlockLayout:
    name, mlp = f"blocks.{depth}", block.mlp
    weights = [
        *_affine(f"{name}.norm2", block.norm2),
        Weight(f"{name}.mlp.fc1.weight", (("hidden",), ("in",)), gated=(1,)),
        Weight(f"{name}.mlp.fc1.bias", (("hidden",),)),
        Weight(f"{name}.mlp.fc2.weight", (("out",), ("hidden",)), gated=(0, 1)),
        Weight(f"{name}.mlp.fc2.bias", (("out",),), gated=(0,)),
        Weight(f"{name}.ls2.gamma", (("out",),)),
    ]
    acts_on_zero = bool(mlp.act(torch.zeros(1)).abs() > 0)
    return BlockLayout(
        name=f"{name}.mlp",
        kind="mlp",
        depth=depth,
        dims={"in": mlp.fc1.in_features, "hidden": mlp.fc1.out_features, "out": mlp.fc2.out_features},
        weights=_existing(weights, name, block),
        heads=1,
        constant_without_input=mlp.fc1.bias is not None or mlp.fc2.bias is not None or acts_on_zero,
        constant_without_inner=mlp.fc2.bias is not None,
    )


def _affine(name: str, norm: nn.Module) -> list[Weight]:
    return [Weight(f"{name}.{key}", (("in",),)) for key, _ in norm.named_parameters()]


def _existing(weights: list[Weight], name: str, block: nn.Module) -> tuple[Weight, ...]:
    """Those that this block has: biases and LayerScale are optional."""
    present = {f"{name}.{key}" for key, _ in block.named_parameters()}
    return tuple(weight for weight in weights if weight.key in present)
