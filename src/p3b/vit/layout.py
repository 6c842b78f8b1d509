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

The names are those of the parts that a block consists of (`p3b.vit.anatomy`), which a family puts together
(`p3b.vit.families`): nothing here knows what a block looks like. Costs, gates, scores and cuts follow from the names that a
weight's axes have (`p3b.vit.anatomy.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from p3b.errors import ConfigError, ModelError, unknown_name
from p3b.vit.anatomy.half import Half
from p3b.vit.anatomy.weights import STREAM, Axis, Moments, Weight
from p3b.vit.architecture import BLOCK_ARGUMENTS
from p3b.vit.families import family_of, images_of
from p3b.vit.families.family import Block, classes_of
from p3b.vit.wrappers import require_vision_transformer

DEFAULT_DIMS = ("in", "head", "hidden", "out")
"""Dimensions that a method prunes which does not ask for others."""
DIMS = ("in", "heads", "head", "hidden", "out", "stream")
"""All dimensions that a method may ask for."""


@dataclass(frozen=True)
class BlockLayout:
    """One residual block x + f(x).

    Attributes:
        name: "blocks.3.attn" or "blocks.3.mlp".
        kind: "attn" or "mlp".
        depth: index of the timm block that it lies in, counted through the whole model.
        dims: size of every prunable dimension of the block by its short name, input first, output last; each has a gate.
        sizes: size of every dimension, prunable or not, that of the stream included.
        weights: all its parameters.
        inputs: factors of the channels that it reads: ("in",), ("stream",) or a number.
        inner: factors of the channels inside: ("heads", "head") or ("hidden",), with a number for what is not prunable.
        unit: channels that one element of the last inner dimension stands for: 2 where positions turn them in pairs.
        outputs: factors of the channels that it writes to: ("out",), ("stream",) or a number.
        moments: norms inside it, whose moments are taken over the inner channels that stay.
        heads: attention heads; 1 for an MLP.
        any_input_width: left whole, it computes in a narrower stream; else it is made anew for one.
        constant_without_input: it can still add a constant when it reads nothing (some bias feeds on).
        constant_without_inner: it can still add a constant when its inner channels are gone (its output has a bias).
        stage: number of the stage that it lies in; 0 where all blocks have one residual stream.
        grid: (H, W) tokens beside the prefix tokens.
        window: where tokens are compared in windows, the tokens of one and those of all of them; else None.
        distances: vectors of relative positions that a query is multiplied with, beside the keys.
        unrolled: strides by which its tokens were taken out of the map (`p3b.vit.families.family.Block`).
    """

    name: str
    kind: str
    depth: int
    dims: Mapping[str, int]
    sizes: Mapping[str, int]
    weights: tuple[Weight, ...]
    inputs: Axis
    inner: Axis
    unit: int
    outputs: Axis
    moments: tuple[Moments, ...]
    heads: int
    any_input_width: bool
    constant_without_input: bool
    constant_without_inner: bool
    stage: int
    grid: tuple[int, int]
    window: tuple[int, int] | None
    distances: int = 0
    unrolled: tuple[tuple[int, int], ...] = ()

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
        unrolled: strides by which the patches were taken out of the map (`p3b.vit.families.family.Block`).
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
    unrolled: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def stages(self) -> list[ModelLayout]:
        """The model stage by stage, each as a model of its blocks alone; the model itself where it is no hierarchy."""
        numbers = sorted({block.stage for block in self.blocks})
        if len(numbers) == 1:
            return [self]
        parts = [tuple(block for block in self.blocks if block.stage == number) for number in numbers]
        return [
            replace(
                self,
                blocks=part,
                width=part[0].sizes[STREAM],
                grid=part[0].grid,
                unrolled=part[0].unrolled,
                stream=None,
            )
            for part in parts
        ]

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
        width=blocks[0].sizes[STREAM],
        prefix_tokens=getattr(vit, "num_prefix_tokens", 0),
        has_class_token=getattr(vit, "has_class_token", getattr(vit, "cls_token", None) is not None),
        grid=images_of(vit).grid,
        num_classes=classes_of(vit),
        stream=_stream_layout(vit) if STREAM in dims else None,
        unrolled=blocks[0].unrolled,
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


def require_standard_blocks(vit: nn.Module) -> None:
    """Refuse blocks whose arithmetic is not that of the parts that their family has.

    Raises:
        ModelError: the message names the layer.
    """
    family = family_of(vit)
    family.require_blocks_covered(vit)
    for block in family.blocks(vit):
        for half in block.halves:
            half.require_covered(block.name, block.module)


def _block_layouts(vit: nn.Module, dims: Collection[str]) -> tuple[BlockLayout, ...]:
    blocks, grid = family_of(vit).blocks(vit), images_of(vit).grid
    return tuple(_branch_layout(depth, block, half, dims, grid) for depth, block in enumerate(blocks) for half in block.halves)


def _branch_layout(depth: int, block: Block, half: Half, dims: Collection[str], grid: tuple[int, int]) -> BlockLayout:
    """One of a block's residual branches."""
    body, module = half.body, block.module.get_submodule(half.name)
    for dim, reason in body.dims_refused(module).items():
        if dim in dims:
            raise ModelError(
                f"{block.branch(half)}: the dimension '{dim}' cannot be pruned here, since {reason}. Choose a method that "
                "prunes other dimensions."
            )
    sizes = {**body.sizes(module), STREAM: block.width}
    without_input, without_inner = half.constant_without(block.module)
    return BlockLayout(
        name=block.branch(half),
        kind=body.kind,
        depth=depth,
        dims={dim: size for dim, size in sizes.items() if dim in dims and dim != STREAM},
        sizes=sizes,
        weights=_existing(half.weights(block.module), block, dims, sizes),
        inputs=_named(("in",), dims, sizes),
        inner=_named(body.inner(module), dims, sizes),
        unit=body.unit(module),
        outputs=_named(("out",), dims, sizes),
        moments=tuple(
            Moments(f"{block.name}.{moments.norm}", _named(moments.axis, dims, sizes)) for moments in half.moments(block.module)
        ),
        heads=sizes.get("heads", 1),
        any_input_width=body.any_input_width,
        constant_without_input=without_input,
        constant_without_inner=without_inner,
        stage=block.stage,
        grid=grid if block.grid is None else block.grid,
        window=block.window,
        distances=block.distances if body.kind == "attn" else 0,
        unrolled=block.unrolled,
    )


def _existing(weights: Sequence[Weight], block: Block, dims: Collection[str], sizes: Mapping[str, int]) -> tuple[Weight, ...]:
    """Those that this block has (biases and LayerScale are optional), with a number for what is not prunable."""
    present = {key for key, _ in block.module.named_parameters()}
    return tuple(
        replace(
            weight.inside(block.name),
            axes=tuple(_named(axis, dims, sizes) for axis in weight.axes),
            gated=tuple((axis, dim) for axis, dim in weight.gated if dim in dims),
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


def _stream_layout(vit: nn.Module) -> StreamLayout:
    """The stream through the whole model.

    Raises:
        ModelError: something outside the blocks reads or writes it in a way that is not covered.
    """
    family = family_of(vit)
    outside = family.outside(vit)
    blocks = _block_layouts(vit, (STREAM,))
    along = [
        weight
        for weight in (*outside.weights, *(weight for block in blocks for weight in block.weights))
        if any(STREAM in axis for axis in weight.axes)
    ]
    norms = [f"{block.name}.{norm}" for block in family.blocks(vit) for half in block.halves for norm in half.stream_norms]
    return StreamLayout(
        size=vit.embed_dim,
        weights=tuple(along),
        outside=outside.weights,
        norms=(*outside.norms, *norms),
        patches=math.prod(images_of(vit).grid),
    )
