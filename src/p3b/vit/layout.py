"""A frozen map of a VisionTransformer: block -> prunable dimension -> the weights that it slices.

Every prunable dimension of a block is a set of channels that one gate speaks for (section 6 of the method):

    attention   in      input channels, after norm1          MLP   in      input channels, after norm2
                head    channels of a head, one gate               hidden  hidden channels, after the activation
                        shared by q, k, v and all heads            out     output channels, fc2's bias included
                out     output channels, proj's bias included

Two further dimensions are there for methods that ask for them (`read_layout(model, dims)`):

    attention   heads   whole heads: the columns of proj that read a head
    model       stream  channels of the residual stream, one gate for the whole model: everything that writes to them, while
                        each layer norm takes its moments over the channels that stay (`p3b.vit.gates`)

A weight's axis is written as a tuple of factors, outermost first: the rows of `qkv.weight` are (3, heads, "head"), so the
dimension "head" lies along that axis 3 * heads times. A factor is a name where the dimension is prunable and a number where it
is not: with whole heads alone it is (3, "heads", head), with both (3, "heads", "head"). Costs, gates, scores and cuts follow
from these tuples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention, LayerNorm, LayerNormFp32, LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from p3b.errors import ConfigError, ModelError, unknown_name
from p3b.vit.architecture import BLOCK_ARGUMENTS, classes_of
from p3b.vit.coverage import foreign_parts
from p3b.vit.wrappers import require_vision_transformer

Axis = tuple[int | str, ...]

DEFAULT_DIMS = ("in", "head", "hidden", "out")
"""Dimensions that a method prunes which does not ask for others."""
DIMS = ("in", "heads", "head", "hidden", "out", "stream")
"""All dimensions that a method may ask for."""
STREAM = "stream"
"""Name of the residual stream's dimension and of its gate."""


@dataclass(frozen=True)
class Weight:
    """One parameter: its key in the model, its axes, and which gates multiply it, each along one axis: (axis, dimension)."""

    key: str
    axes: tuple[Axis, ...]
    gated: tuple[tuple[int, str], ...] = ()

    def factors(self, axis: int, dim: str) -> Axis:
        """Factors of an axis as a gate on it sees them: the stream's gate looks through the "in" or "out" of a block."""
        return self.axes[axis] if dim in self.axes[axis] else (dim,)


@dataclass(frozen=True)
class BlockLayout:
    """One residual block x + f(x).

    Attributes:
        name: "blocks.3.attn" or "blocks.3.mlp".
        kind: "attn" or "mlp".
        depth: index of the timm block that it lies in.
        dims: size of every prunable dimension of the block by its short name, input first, output last; each has a gate.
        sizes: size of every dimension, prunable or not, that of the stream included.
        weights: all its parameters.
        inputs: factors of the channels that it reads: ("in",), ("stream",) or a number.
        inner: factors of the channels inside: ("heads", "head") or ("hidden",), with a number for what is not prunable.
        outputs: factors of the channels that it writes to: ("out",), ("stream",) or a number.
        heads: attention heads; 1 for an MLP.
        constant_without_input: it can still add a constant when it reads nothing (some bias feeds on).
        constant_without_inner: it can still add a constant when its inner channels are gone (its output has a bias).
    """

    name: str
    kind: str
    depth: int
    dims: Mapping[str, int]
    sizes: Mapping[str, int]
    weights: tuple[Weight, ...]
    inputs: Axis
    inner: Axis
    outputs: Axis
    heads: int
    constant_without_input: bool
    constant_without_inner: bool

    def gate(self, dim: str) -> str:
        """Full name of a dimension's gate, e.g. "blocks.3.attn.head"; that of the stream is the whole model's."""
        return STREAM if dim == STREAM else f"{self.name}.{dim}"


@dataclass(frozen=True)
class StreamLayout:
    """The residual stream as a dimension; its gate is named "stream".

    Attributes:
        size: D, its channels.
        weights: every parameter with an axis of the stream, outside the blocks and inside, with that axis alone named. Gated
            are those that write to the stream.
        outside: every parameter outside the blocks, also those without such an axis (the head's bias).
        norms: names of the modules that normalise over the stream.
        patches: patches of an image, which the patch embedding is computed for.
    """

    size: int
    weights: tuple[Weight, ...]
    outside: tuple[Weight, ...]
    norms: tuple[str, ...]
    patches: int


@dataclass(frozen=True)
class ModelLayout:
    """The whole model as the method sees it.

    Attributes:
        blocks: B = 2 * depth blocks, attention and MLP in turn.
        other_params: parameters outside all blocks, while the stream has all its channels.
        width: D, channels of the residual stream.
        prefix_tokens: class, distillation and register tokens, which come before the patches.
        has_class_token: whether token 0 is a class token.
        grid: (H, W) patches.
        num_classes: outputs of the head.
        stream: the residual stream where it is prunable.
    """

    blocks: tuple[BlockLayout, ...]
    other_params: int
    width: int
    prefix_tokens: int
    has_class_token: bool
    grid: tuple[int, int]
    num_classes: int
    stream: StreamLayout | None = None

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def gates(self) -> dict[str, int]:
        """Size of every gate by its full name: block after block, then "stream" where it is prunable."""
        sizes = {block.gate(dim): size for block in self.blocks for dim, size in block.dims.items()}
        return sizes if self.stream is None else {**sizes, STREAM: self.stream.size}


def read_layout(model: nn.Module, dims: Collection[str] = DEFAULT_DIMS) -> ModelLayout:
    """Map of a dense timm VisionTransformer that is built from timm's standard blocks.

    Args:
        model: dense; it is not changed.
        dims: which dimensions are prunable, of `DIMS`; their order means nothing.

    Raises:
        ModelError: the model is of another kind, has been pruned already, or has a part that is not covered; the message names
            the block and the reason.
        ConfigError: an unknown dimension, or none.
    """
    for dim in dims:
        if dim not in DIMS:
            raise ConfigError(unknown_name("prunable dimension", dim, DIMS))
    if not dims:
        raise ConfigError(f"There is nothing to prune: name at least one dimension of {', '.join(DIMS)}.")
    vit = require_vision_transformer(model)
    if BLOCK_ARGUMENTS in vit.__dict__:
        raise ModelError("blocks.0 or a later block has been pruned already; prune the dense model instead.")
    require_standard_blocks(vit)
    blocks = _block_layouts(vit, dims)
    shapes = {key: parameter.numel() for key, parameter in vit.named_parameters()}
    in_blocks = sum(shapes[weight.key] for block in blocks for weight in block.weights)
    return ModelLayout(
        blocks=blocks,
        other_params=sum(shapes.values()) - in_blocks,
        width=vit.embed_dim,
        prefix_tokens=vit.num_prefix_tokens,
        has_class_token=vit.cls_token is not None,
        grid=tuple(vit.patch_embed.grid_size),
        num_classes=classes_of(vit),
        stream=_stream_layout(vit) if STREAM in dims else None,
    )


def alike(blocks: Sequence[BlockLayout]) -> list[list[int]]:
    """Indices of the blocks of one shape together: what follows from the shape alone is worked out once for all of them."""
    groups: dict[object, list[int]] = {}
    for number, block in enumerate(blocks):
        constants = (block.constant_without_input, block.constant_without_inner)
        sizes = (tuple(block.dims.items()), tuple(block.sizes.items()))
        shape = (block.kind, *sizes, tuple(weight.axes for weight in block.weights), constants)
        groups.setdefault(shape, []).append(number)
    return list(groups.values())


def split_axis(tensor: Tensor, axis: int, factors: Axis, sizes: Mapping[str, int]) -> Tensor:
    """View of a weight with one axis unfolded into its factors, e.g. (3 * H * K, D) -> (3, H, K, D)."""
    shape = [sizes[factor] if isinstance(factor, str) else factor for factor in factors]
    return tensor.unflatten(axis, shape)


def expand_along(vector: Tensor, factors: Axis, dim: str, sizes: Mapping[str, int]) -> Tensor:
    """A dimension's vector repeated along an axis: (K,) -> (3 * H * K,) for "head" and the factors (3, H, "head")."""
    shape = [sizes[factor] if isinstance(factor, str) else factor for factor in factors]
    if math.prod(shape) == len(vector):
        return vector
    position = factors.index(dim)
    return vector.view([-1 if i == position else 1 for i in range(len(shape))]).expand(shape).flatten()


def dims_of(axis: Axis) -> tuple[str, ...]:
    """Names of the prunable dimensions along an axis."""
    return tuple(factor for factor in axis if isinstance(factor, str))


def require_standard_blocks(vit: VisionTransformer) -> None:
    """Refuse anything whose arithmetic is not that of timm's plain pre-norm blocks.

    Raises:
        ModelError: the message names the layer.
    """
    for depth, block in enumerate(vit.blocks):
        _check_block(f"blocks.{depth}", block)


def _check_block(name: str, block: nn.Module) -> None:
    if type(block) is not Block:
        raise ModelError(f"{name}: {type(block).__name__} is not covered; only timm's standard Block (attention, then MLP) is.")
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        raise ModelError(f"{name}.attn: {_pruned_or(type(attn).__name__)}; only timm's standard Attention is covered.")
    if type(mlp) is not Mlp:
        raise ModelError(f"{name}.mlp: {_pruned_or(type(mlp).__name__)}; only timm's standard Mlp is covered.")
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        if type(found := block.get_submodule(layer)) is not nn.Linear:
            raise ModelError(
                f"{name}.{layer}: {type(found).__name__} is not covered, only torch.nn.Linear is. {foreign_parts(found)}"
            )
    refused = {
        "attn.q_norm: query/key normalisation": not isinstance(attn.q_norm, nn.Identity),
        "attn.k_norm: query/key normalisation": not isinstance(attn.k_norm, nn.Identity),
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


def _block_layouts(vit: VisionTransformer, dims: Collection[str]) -> tuple[BlockLayout, ...]:
    layouts: list[BlockLayout] = []
    for depth, block in enumerate(vit.blocks):
        layouts += [_attention_layout(depth, block, dims), _mlp_layout(depth, block, dims)]
    return tuple(layouts)


def _attention_layout(depth: int, block: Block, dims: Collection[str]) -> BlockLayout:
    name, attn = f"blocks.{depth}", block.attn
    qkv_rows: Axis = (3, "heads", "head")
    weights = [
        *_affine(f"{name}.norm1", block.norm1),
        Weight(f"{name}.attn.qkv.weight", (qkv_rows, ("in",)), gated=((0, "head"), (1, "in"))),
        Weight(f"{name}.attn.qkv.bias", (qkv_rows,), gated=((0, "head"),)),
        # A head's output is what proj reads of it: scaling the columns scales the output, the value's bias included.
        Weight(f"{name}.attn.proj.weight", (("out",), ("heads", "head")), gated=((0, "out"), (1, "heads"), (0, STREAM))),
        Weight(f"{name}.attn.proj.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        Weight(f"{name}.ls1.gamma", (("out",),)),
    ]
    sizes = {
        "in": attn.qkv.in_features,
        "heads": attn.num_heads,
        "head": attn.head_dim,
        "out": attn.proj.out_features,
        STREAM: attn.qkv.in_features,
    }
    constants = (attn.qkv.bias is not None or attn.proj.bias is not None, attn.proj.bias is not None)
    return _residual_block(
        "attn", depth, block, dims, sizes, weights, ("heads", "head"), heads=attn.num_heads, constants=constants
    )


def _mlp_layout(depth: int, block: Block, dims: Collection[str]) -> BlockLayout:
    name, mlp = f"blocks.{depth}", block.mlp
    weights = [
        *_affine(f"{name}.norm2", block.norm2),
        Weight(f"{name}.mlp.fc1.weight", (("hidden",), ("in",)), gated=((1, "in"),)),
        Weight(f"{name}.mlp.fc1.bias", (("hidden",),)),
        Weight(f"{name}.mlp.fc2.weight", (("out",), ("hidden",)), gated=((0, "out"), (1, "hidden"), (0, STREAM))),
        Weight(f"{name}.mlp.fc2.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        Weight(f"{name}.ls2.gamma", (("out",),)),
    ]
    acts_on_zero = bool(mlp.act(torch.zeros(1)).abs() > 0)
    sizes = {
        "in": mlp.fc1.in_features,
        "hidden": mlp.fc1.out_features,
        "out": mlp.fc2.out_features,
        STREAM: mlp.fc1.in_features,
    }
    constants = (mlp.fc1.bias is not None or mlp.fc2.bias is not None or acts_on_zero, mlp.fc2.bias is not None)
    return _residual_block("mlp", depth, block, dims, sizes, weights, ("hidden",), heads=1, constants=constants)


def _residual_block(
    kind: str,
    depth: int,
    block: Block,
    dims: Collection[str],
    sizes: Mapping[str, int],
    weights: list[Weight],
    inner: Axis,
    *,
    heads: int,
    constants: tuple[bool, bool],
) -> BlockLayout:
    """One of a timm block's two parts; `constants` are those without input and without inner channels."""
    name = f"blocks.{depth}"
    return BlockLayout(
        name=f"{name}.{kind}",
        kind=kind,
        depth=depth,
        dims={dim: size for dim, size in sizes.items() if dim in dims and dim != STREAM},
        sizes=sizes,
        weights=_existing(weights, name, block, dims, sizes),
        inputs=_named(("in",), dims, sizes),
        inner=_named(inner, dims, sizes),
        outputs=_named(("out",), dims, sizes),
        heads=heads,
        constant_without_input=constants[0],
        constant_without_inner=constants[1],
    )


def _affine(name: str, norm: nn.Module, dim: str = "in") -> list[Weight]:
    return [Weight(f"{name}.{key}", ((dim,),)) for key, _ in norm.named_parameters()]


def _existing(
    weights: list[Weight], name: str, block: nn.Module, dims: Collection[str], sizes: Mapping[str, int]
) -> tuple[Weight, ...]:
    """Those that this block has (biases and LayerScale are optional), with a number for what is not prunable."""
    present = {f"{name}.{key}" for key, _ in block.named_parameters()}
    return tuple(
        Weight(
            weight.key,
            tuple(_named(axis, dims, sizes) for axis in weight.axes),
            tuple((axis, dim) for axis, dim in weight.gated if dim in dims),
        )
        for weight in weights
        if weight.key in present
    )


def _named(axis: Axis, dims: Collection[str], sizes: Mapping[str, int]) -> Axis:
    """The axis with names for prunable dimensions alone. A block's input and output are the stream, where that is prunable."""

    def factor(name: int | str) -> int | str:
        if isinstance(name, int) or name in dims:
            return name
        return STREAM if name in ("in", "out") and STREAM in dims else sizes[name]

    return tuple(factor(name) for name in axis)


def _stream_layout(vit: VisionTransformer) -> StreamLayout:
    """The stream through the whole model.

    Raises:
        ModelError: something outside the blocks reads or writes it in a way that is not covered.
    """
    kinds = {
        "patch_embed.norm": nn.Identity,
        "norm_pre": (nn.Identity, nn.LayerNorm),
        "norm": (nn.Identity, nn.LayerNorm),
        "fc_norm": (nn.Identity, nn.LayerNorm),
        "head": (nn.Identity, nn.Linear),
        "head_dist": (nn.Identity, nn.Linear),
    }
    refused = "is not covered where the residual stream itself is pruned; prune this model by other dimensions, or with another"
    if vit.attn_pool is not None:
        raise ModelError(f"attn_pool: attention pooling {refused} pooling (global_pool=avg).")
    for name, kind in kinds.items():
        part = vit.get_submodule(name) if name != "head_dist" or hasattr(vit, name) else nn.Identity()
        if not isinstance(part, kind) or (isinstance(part, nn.LayerNorm) and not _is_layer_norm(part)):
            raise ModelError(f"{name}: {type(part).__name__} {refused} {name}.")
    writers = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
    writers |= dict.fromkeys(("cls_token", "reg_token", "dist_token", "pos_embed"), 2)
    readers = {"head.weight": 1, "head_dist.weight": 1}
    norms = [name for name in ("norm_pre", "norm", "fc_norm") if isinstance(vit.get_submodule(name), nn.LayerNorm)]
    readers |= {f"{name}.{key}": 0 for name in norms for key, _ in vit.get_submodule(name).named_parameters()}
    places = {**writers, **readers}
    outside: list[Weight] = []
    for key, parameter in vit.named_parameters():
        if key.startswith("blocks."):
            continue
        if key not in places and key not in ("head.bias", "head_dist.bias"):
            raise ModelError(f"{key}: this parameter {refused} model.")
        axes: list[Axis] = [(size,) for size in parameter.shape]
        if key in places:
            axes[places[key]] = (STREAM,)
        outside.append(Weight(key, tuple(axes), ((writers[key], STREAM),) if key in writers else ()))
    blocks = _block_layouts(vit, (STREAM,))
    inside = [weight for block in blocks for weight in block.weights if any(STREAM in axis for axis in weight.axes)]
    return StreamLayout(
        size=vit.embed_dim,
        weights=(*(weight for weight in outside if weight.key in places), *inside),
        outside=tuple(outside),
        norms=(*norms, *(f"blocks.{depth}.{norm}" for depth in range(len(vit.blocks)) for norm in ("norm1", "norm2"))),
        patches=math.prod(vit.patch_embed.grid_size),
    )
