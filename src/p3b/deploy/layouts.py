"""How a small model carries out what it computes: deployment layouts, exact to float rounding.

The saved model stays the compact one of `p3b.vit.compact`, whose parameters are counted. A layout is made of it in memory:

    index       as saved: a layer norm without affine part, a gather, the affine part; zeros and a scatter at the end
    padded      as index, but `proj` and `fc2` have zero rows, so that they write all D channels and nothing is scattered
    folded      as padded, and the norm's affine part is folded into `qkv` and `fc1` (one operation less)
    gathered    a layer norm with its own affine part, a gather, aligned layers, and a second gather in the place of the scatter
    zeros       no index at all: zero columns where nothing is read, zero rows where nothing is written
    balanced    gathered or zeros, for each side of each block, whichever costs less by `GATHER_COST`
    reordered   balanced, after the channels of the stream were renamed so that some selections are slices

What was learnt by profiling (docs/layouts.md has the figures): matrix products whose number of rows is no multiple of 8 run at
two thirds of the speed in float32; a layer norm with affine part is quicker than one without; a gather from a matrix is several
times quicker than the same gather along the last axis of a 3-D tensor; attention likes head widths that are multiples of 8.
All layouts from `gathered` on therefore pad rows up with zeros: queries are multiplied by sqrt(padded / kept width), since
attention divides by the root of the width that it finds.

LayerScale is folded into the last layer of its block in every layout but index. "Exact" means: the same to 1e-12, relative, in
float64. The features inside a reordered model are those of the compact one in another order; its logits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.deploy.sides import Addend, FloatWrite, GatherNorm, GatherWrite, IndexNorm, SliceNorm, SliceWrite
from p3b.errors import ConfigError, ModelError, unknown_name
from p3b.vit.anatomy.shape import CONSTANT, GONE, WHOLE, BranchShape
from p3b.vit.architecture import describe_dense
from p3b.vit.deployment import Deployment, compact_of
from p3b.vit.families import width_of
from p3b.vit.families.vision_transformer import VISION_TRANSFORMER
from p3b.vit.parts import ConstantBranch
from p3b.vit.shapes import branch_shapes

Side = Literal["index", "folded", "gather", "zeros", "slice"]

LAYOUTS: Mapping[str, str] = {
    "index": "as saved: gather and scatter by index",
    "padded": "zero rows instead of the scatter",
    "folded": "padded, with the norm's affine part folded into the next layer",
    "gathered": "gathers on both sides, aligned layers",
    "zeros": "zero rows and columns instead of any index, aligned layers",
    "balanced": "gathered or zeros, whichever costs less by rule, for each side of each block",
    "reordered": "balanced, with renamed channels so that some selections become slices",
}
"""Layouts by name, and what each is."""

ROWS = 8
"""Rows of a matrix product are padded up to a multiple of this: the widest vector of float32 that the libraries tile by."""
MOST_HEAD_PADDING = 3
"""Channels that a head may be padded by: a head of 13 is quicker as 16, one of 17 is slower as 24."""
GATHER_COST = 28
"""Multiply-accumulates that take as long as gathering one element (float32, x86, one thread: 0.6 ns against 0.021 ns)."""


@dataclass(frozen=True)
class BranchPlan:
    """How one block is carried out.

    Attributes:
        name: "blocks.3.attn" or "blocks.3.mlp".
        read: "index" (gather, then affine), "folded" (gather, affine in the next layer), "gather" (affine, then gather),
            "zeros" (zero columns) or "slice".
        write: "index" (scatter), "gather", "zeros" (zero rows) or "slice" (zeros around it).
        inner: channels of a head or hidden channels after padding.
        touched: whether anything is other than as saved.
    """

    name: str
    read: Side
    write: Side
    inner: int
    touched: bool = True


@dataclass(frozen=True)
class LayoutPlan:
    """A layout for one model: the plan of each of the B blocks, and the order of the residual stream (None: as it is)."""

    name: str
    branches: tuple[BranchPlan, ...]
    order: tuple[int, ...] | None = None


def plan_layout(model: VisionTransformer, name: str) -> LayoutPlan:
    """What a layout makes of a model; pure.

    Args:
        model: dense or small, in any layout.
        name: a key of `LAYOUTS`. Models with other blocks than timm's plain ones stay as they are saved: "index".

    Raises:
        ConfigError: the name is unknown. ModelError: the layout cannot be had for this model.
    """
    check_layout(name)
    compact = compact_of(model)
    shapes = branch_shapes(compact)
    if not is_covered(compact):
        name = "index"
    order = None
    if name == "reordered":
        if getattr(compact, "attn_pool", None) is not None:
            raise ModelError("attn_pool: the layout 'reordered' does not cover attention pooling; choose 'balanced'.")
        order = _slicing_order(shapes, width_of(compact))
    place = None if order is None else {channel: position for position, channel in enumerate(order)}
    return LayoutPlan(name, tuple(_plan_branch(compact, shape, name, place) for shape in shapes), order)


@torch.no_grad()
def apply_layout(model: VisionTransformer, plan: LayoutPlan) -> VisionTransformer:
    """A model in the planned layout, for inference alone.

    Args:
        model: dense or small, in any layout; it is not changed.
        plan: of `plan_layout` for this model.

    Returns:
        The compact model itself where the plan changes nothing; else a new model in evaluation mode that keeps the compact one
        beside it: that one is what is saved, and what a further layout is made of. Its parameters want no gradient, and
        `train()` raises a ModelError.
    """
    compact = compact_of(model)
    if not any(branch.touched for branch in plan.branches) and plan.order is None:
        return compact
    built = deepcopy(compact).eval()
    width = width_of(compact)
    place = torch.arange(width) if plan.order is None else torch.tensor(plan.order).argsort()
    if plan.order is not None:
        _reorder_outside(built, torch.tensor(plan.order))
    for shape, branch in zip(branch_shapes(compact), plan.branches, strict=True):
        if branch.touched and shape.form != GONE:
            _, depth, half = shape.name.split(".")
            block: Block = built.blocks[int(depth)]
            if shape.form == CONSTANT:
                _build_constant(block, half, place, width)
            else:
                _build(block, half, _pieces(block, half, shape, width, place), branch, width)
    built.requires_grad_(False)
    built.add_module("deployment", Deployment(plan.name, compact, partial(apply_layout, plan=plan)))
    return built


def is_covered(compact: VisionTransformer) -> bool:
    """Whether layouts are written for a model's blocks: plain attention and MLP, layer norms before them, none inside."""
    description = describe_dense(compact)
    usual = {"qk_norm": False, "scale_attn_norm": False, "scale_mlp_norm": False, "mlp_layer": "Mlp"}
    arguments = {**usual, **description["arguments"]}
    return (
        description["class"] in VISION_TRANSFORMER.classes
        and arguments["norm_layer"].startswith("LayerNorm")
        and all(arguments[name] == value for name, value in usual.items())
    )


def check_layout(name: str, more: Sequence[str] = ()) -> None:
    """ConfigError where no layout, nor any of `more`, has this name."""
    if name not in (*LAYOUTS, *more):
        raise ConfigError(unknown_name("layout", name, [*more, *LAYOUTS]))


# ----------------------------------------------------------------------------------------------------------- planning


def _plan_branch(model: VisionTransformer, shape: BranchShape, name: str, place: Mapping[int, int] | None) -> BranchPlan:
    if name == "index" or shape.form == GONE or (shape.form == WHOLE and place is None):
        return BranchPlan(shape.name, "index", "index", shape.inner, touched=False)
    if shape.form == CONSTANT:
        return BranchPlan(shape.name, "index", "index", 0)
    _, depth, half = shape.name.split(".")
    block, width = model.blocks[int(depth)], model.embed_dim
    inner = block.attn.head_dim if half == "attn" else block.mlp.fc1.out_features
    copies = block.attn.num_heads if half == "attn" else 1
    if name in ("padded", "folded"):
        return BranchPlan(shape.name, "index" if name == "padded" else "folded", "zeros", inner)
    inner = _padded_head(inner) if half == "attn" else _up(inner)
    inputs, outputs = (channels or tuple(range(width)) for channels in (shape.inputs, shape.outputs))
    rows, columns = (3 if half == "attn" else 1) * copies * inner, copies * inner
    cost = {"gathered": 0.0, "zeros": math.inf}.get(name, float(GATHER_COST))
    read: Side = "zeros" if rows * (width - len(inputs)) <= cost * len(inputs) else "gather"
    write: Side = "zeros" if columns * (width - _up(len(outputs) + 1)) <= cost * width else "gather"
    if place is not None:
        read = "slice" if read == "gather" and _is_slice(inputs, place) else read
        write = "slice" if write == "gather" and _is_slice(outputs, place) else write
    return BranchPlan(shape.name, read, write, inner)


def _up(count: int) -> int:
    return -(-count // ROWS) * ROWS


def _padded_head(width: int) -> int:
    return _up(width) if _up(width) - width <= MOST_HEAD_PADDING else width


def _is_slice(channels: Sequence[int], place: Mapping[int, int]) -> bool:
    positions = [place[channel] for channel in channels]
    return max(positions) - min(positions) + 1 == len(positions)


def _slicing_order(shapes: Sequence[BranchShape], width: int) -> tuple[int, ...]:
    """An order of the channels in which as many selections as a greedy search finds lie side by side.

    Cells of channels that no selection tells apart yet stand in a row. A selection fits if the cells that it touches stand side
    by side and all but the outer two lie in it whole; the outer ones are split. Any two selections fit, a third seldom does.
    """
    cells: list[list[int]] = [list(range(width))]
    selections = {channels for shape in shapes for channels in (shape.inputs, shape.outputs) if 0 < len(channels) < width}
    for selection in sorted(selections, key=lambda channels: (-len(channels), channels)):
        cells = _split(cells, set(selection)) or cells
    return tuple(channel for cell in cells for channel in cell)


def _split(cells: list[list[int]], selection: set[int]) -> list[list[int]] | None:
    inside = [[channel for channel in cell if channel in selection] for cell in cells]
    touched = [position for position, part in enumerate(inside) if part]
    first, last = touched[0], touched[-1]
    if any(len(inside[position]) < len(cells[position]) for position in range(first + 1, last)):
        return None
    split: list[list[int]] = []
    for position, cell in enumerate(cells):
        outside = [channel for channel in cell if channel not in selection]
        # The selected part of the first cell goes to its end, that of the last to its beginning.
        parts = [outside, inside[position]] if position == first and last > first else [inside[position], outside]
        split += [part for part in parts if part]
    return split


# ----------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class _Pieces:
    """One block without its layout: channels read (I,), norm, first layer (rows, I), last layer (O, columns), channels written.

    For an attention the first layer's rows are (3, heads, inner), the last one's columns (heads, inner); for an MLP they are
    (1, 1, inner) and (1, inner). LayerScale is in the last layer.
    """

    inputs: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    first: Tensor
    first_bias: Tensor | None
    last: Tensor
    last_bias: Tensor | None
    outputs: Tensor
    copies: int
    inner: int


def _pieces(block: Block, half: str, shape: BranchShape, width: int, place: Tensor) -> _Pieces:
    """The block's weights, with its channels at their places of the (reordered) stream in rising order."""
    if half == "attn":
        norm, first, last, scale = block.norm1, block.attn.qkv, block.attn.proj, block.ls1
        copies, inner = block.attn.num_heads, block.attn.head_dim
    else:
        norm, first, last, scale = block.norm2, block.mlp.fc1, block.mlp.fc2, block.ls2
        copies, inner = 1, first.out_features
    device = first.weight.device
    channels = [torch.tensor(given or tuple(range(width)), device=device) for given in (shape.inputs, shape.outputs)]
    places = [place.to(device)[given] for given in channels]
    by_input, by_output = (given.argsort() for given in places)
    gamma = getattr(scale, "gamma", None)
    last_weight, last_bias = last.weight.detach(), _take(last.bias, by_output)
    if gamma is not None:
        last_weight = gamma.detach()[:, None] * last_weight
        last_bias = None if last_bias is None else gamma.detach()[by_output] * last_bias
    return _Pieces(
        places[0][by_input],
        _take(norm.weight, by_input),
        _take(norm.bias, by_input),
        norm.eps,
        first.weight.detach()[:, by_input],
        _take(first.bias, torch.arange(first.out_features, device=device)),
        last_weight[by_output],
        last_bias,
        places[1][by_output],
        copies,
        inner,
    )


def _build(block: Block, half: str, pieces: _Pieces, plan: BranchPlan, width: int) -> None:
    """Put modules of the planned layout into one half of a timm block."""
    pieces = _pad_inner(pieces, plan.inner, 3 if half == "attn" else 1)
    norm: nn.Module
    if plan.read == "folded":
        pieces = _fold(pieces)
    if plan.read in ("index", "folded"):
        norm = IndexNorm(pieces.inputs, pieces.norm_weight, pieces.norm_bias, pieces.eps, width)
    else:
        norm = _full_norm(pieces, width)
    first, first_bias = pieces.first, pieces.first_bias
    if plan.read == "gather":
        norm = GatherNorm(norm, pieces.inputs)
    elif plan.read == "slice":
        norm = SliceNorm(norm, int(pieces.inputs[0]), len(pieces.inputs))
    elif plan.read == "zeros":
        first = first.new_zeros(len(first), width).index_copy(1, pieces.inputs, first)
    last, last_bias = pieces.last, pieces.last_bias
    write: nn.Module = FloatWrite()
    if plan.write == "gather":
        rows = _up(len(last) + 1)  # one row of zeros at least: what is read where nothing is written
        last, last_bias = (None if given is None else _grown(given, rows) for given in (last, last_bias))
        write = GatherWrite(pieces.outputs, width)
    elif plan.write == "slice":
        write = SliceWrite(int(pieces.outputs[0]), len(last), width)
    else:
        last, last_bias = (
            None if given is None else given.new_zeros(width, *given.shape[1:]).index_copy(0, pieces.outputs, given)
            for given in (last, last_bias)
        )
    assert last is not None
    if half == "attn":
        attn = block.attn
        attn.qkv, attn.proj = _linear(first, first_bias), _linear(last, last_bias)
        attn.head_dim, attn.attn_dim, attn.scale = pieces.inner, pieces.copies * pieces.inner, pieces.inner**-0.5
        block.norm1, block.ls1 = norm, write
    else:
        block.mlp.fc1, block.mlp.fc2 = _linear(first, first_bias), _linear(last, last_bias)
        block.norm2, block.ls2 = norm, write


def _build_constant(block: Block, half: str, place: Tensor, width: int) -> None:
    constant = block.attn if half == "attn" else block.mlp
    assert isinstance(constant, ConstantBranch)
    value = constant.value.detach()
    addend = Addend(value.new_zeros(width).index_copy(0, place.to(value.device)[constant.index], value))
    if half == "attn":
        block.attn = addend
    else:
        block.mlp = addend


def _pad_inner(pieces: _Pieces, inner: int, parts: int) -> _Pieces:
    """Widen heads or hidden channels by channels whose weights and biases are zero: they add nothing."""
    if inner == pieces.inner:
        return pieces
    more = inner - pieces.inner
    shape = (parts, pieces.copies, pieces.inner)
    first = F.pad(pieces.first.unflatten(0, shape), (0, 0, 0, more))
    bias = None if pieces.first_bias is None else F.pad(pieces.first_bias.unflatten(0, shape), (0, more))
    if parts == 3:
        for queries in (first[0], *([] if bias is None else [bias[0]])):
            queries.mul_(math.sqrt(inner / pieces.inner))
    last = F.pad(pieces.last.unflatten(1, shape[1:]), (0, more)).flatten(1)
    return replace(
        pieces, first=first.flatten(0, 2), first_bias=None if bias is None else bias.flatten(), last=last, inner=inner
    )


def _fold(pieces: _Pieces) -> _Pieces:
    """Move the norm's affine part into the first layer: W (g x + b) + c = (W g) x + (W b + c)."""
    first, bias = pieces.first, pieces.first_bias
    if pieces.norm_bias is not None:
        shift = first @ pieces.norm_bias
        bias = shift if bias is None else bias + shift
    if pieces.norm_weight is not None:
        first = first * pieces.norm_weight
    return replace(pieces, first=first, first_bias=bias, norm_weight=None, norm_bias=None)


def _full_norm(pieces: _Pieces, width: int) -> nn.LayerNorm:
    """A layer norm over all channels whose affine part is ones and zeros where nothing is read."""
    example, affine = pieces.first, pieces.norm_weight is not None
    norm = nn.LayerNorm(
        width, pieces.eps, affine, bias=pieces.norm_bias is not None, device=example.device, dtype=example.dtype
    )
    if pieces.norm_weight is not None:
        norm.weight.copy_(torch.ones_like(norm.weight).index_copy(0, pieces.inputs, pieces.norm_weight))
    if pieces.norm_bias is not None:
        norm.bias.copy_(torch.zeros_like(norm.bias).index_copy(0, pieces.inputs, pieces.norm_bias))
    return norm


def _grown(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _take(vector: Tensor | None, index: Tensor) -> Tensor | None:
    return None if vector is None else vector.detach()[index]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return layer


def _reorder_outside(model: VisionTransformer, order: Tensor) -> None:
    """Rename the residual stream's channels in everything outside the blocks: position i holds what channel order[i] held."""
    order = order.to(next(model.parameters()).device)
    patches = model.patch_embed.proj
    for parameter in (patches.weight, patches.bias):
        if parameter is not None:
            parameter.copy_(parameter[order])
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        parameter = getattr(model, name, None)
        if parameter is not None:
            parameter.copy_(parameter[..., order])
    for norm in (getattr(model.patch_embed, "norm", nn.Identity()), model.norm_pre, model.norm, model.fc_norm):
        for parameter in norm.parameters():
            parameter.copy_(parameter[order])
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            head.weight.copy_(head.weight[:, order])
