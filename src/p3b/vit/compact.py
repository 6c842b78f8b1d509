"""From mask to small network: section 7 of the method. `plan_cuts` decides, `apply_cuts` is the one place that edits weights.

The small network computes exactly what the hard-masked one computed:

- layer norm takes mean and variance over all D channels; only afterwards are channels left out (`ReadChannels`);
- a head narrowed from d to d' would be scaled by 1/sqrt(d'), so its query weights and bias are multiplied by sqrt(d'/d);
- a block that reads nothing, or has no inner channels left, is the constant that its biases make (`ConstantBranch`), and a
  block that adds nothing disappears (`NoBranch`; both halves of a timm block gone: the identity);
- the residual stream keeps its D channels: a block reads some of them and writes to some of them (`WriteChannels`);
- only where the stream itself is pruned it becomes narrower, D' channels: embeddings, tokens, positions, norms, head and every
  block are made for D' then, and what a block reads and writes is counted within the D'. A layer norm takes its moments over
  the D', as the gates did;
- a head that goes leaves the others as they are: nothing is scaled.

No forward pass is replaced: a small block is timm's own Block whose parts are narrower. `branch_shapes` reads the shapes off a
model and `reshape_branches` gives another model the same shapes, which is all that saving and loading needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.errors import ModelError
from p3b.vit.architecture import BLOCK_ARGUMENTS, describe_blocks
from p3b.vit.cost import block_params, other_params
from p3b.vit.layout import STREAM, BlockLayout, ModelLayout, StreamLayout, Weight, read_layout, split_axis

WHOLE, SMALL, CONSTANT, GONE = "whole", "small", "constant", "gone"
MOST_INNER = 1 << 24
"""Far above any width inside a block."""
_SHAPES = "p3b_branch_shapes"
"""Attribute of a small model that says what its blocks were given: widths alone do not tell a small MLP from a dense one."""


@dataclass(frozen=True)
class BlockCut:
    """What becomes of one block.

    Attributes:
        block: the block as it is.
        form: "whole", "small", "constant" or "gone".
        kept: sorted indices of the channels that stay, by dimension, as the dense model counts them; where the stream is
            prunable, "stream" is one of them, and "in" and "out" lie within it.
        params: parameters that the cut block will have.
    """

    block: BlockLayout
    form: str
    kept: Mapping[str, tuple[int, ...]]
    params: int

    def channels(self, dim: str) -> tuple[int, ...]:
        """What stays of any dimension, prunable or not. Inputs and outputs that are not are those of the stream."""
        if dim in self.kept:
            return self.kept[dim]
        if dim in ("in", "out") and STREAM in self.kept:
            return self.kept[STREAM]
        return tuple(range(self.block.sizes[dim]))


@dataclass(frozen=True)
class StreamCut:
    """The residual stream and the sorted indices of the channels that stay, some but not all."""

    stream: StreamLayout
    kept: tuple[int, ...]


@dataclass(frozen=True)
class CutPlan:
    """All cuts of a model, and the parameters to expect of the whole small model; `stream` is None where all of it stays."""

    cuts: tuple[BlockCut, ...]
    params: int
    stream: StreamCut | None = None


@dataclass(frozen=True)
class BranchShape:
    """Shape of one block of a small model: all that is needed to build it without weights.

    Attributes:
        name: "blocks.3.attn" or "blocks.3.mlp".
        form: "whole", "small", "constant" or "gone".
        inputs: sorted channels of the residual stream that it reads; empty for a constant.
        inner: channels of a head, or hidden channels.
        outputs: sorted channels of the residual stream that it writes to.
        heads: attention heads of a small attention; 0 for anything else.

    Channels of the residual stream are those of the small model, from 0 to D' - 1.
    """

    name: str
    form: str
    inputs: tuple[int, ...] = ()
    inner: int = 0
    outputs: tuple[int, ...] = ()
    heads: int = 0


def shapes_from_plain(entries: object, depth: int, width: int, heads: int, *, tells_heads: bool) -> list[BranchShape]:
    """Shapes of all blocks from plain values of unknown origin: what `dataclasses.asdict` made of them, as JSON keeps it.

    Args:
        entries: one mapping for each block.
        depth: timm blocks of the model, each with an attention and an MLP.
        width: channels of the small model's residual stream.
        heads: attention heads of the dense model.
        tells_heads: whether an entry says how many heads it has; those of older files do not, and have all of them.

    Raises:
        ModelError: blocks are missing, too many or out of order, or one has a form or channels that cannot be.
    """
    names = [f"blocks.{index}.{branch}" for index in range(depth) for branch in ("attn", "mlp")]
    if not isinstance(entries, list) or len(entries) != len(names):
        found = len(entries) if isinstance(entries, list) else "no list of"
        raise ModelError(f"there are {found} blocks for a model of depth {depth}; expected {len(names)}")
    return [
        _shape_from_plain(entry, name, width, heads, tells_heads=tells_heads)
        for entry, name in zip(entries, names, strict=True)
    ]


def plan_cuts(layout: ModelLayout, masks: Mapping[str, Tensor]) -> CutPlan:
    """Indices and sizes of the small model; pure.

    Args:
        layout: map of the dense model.
        masks: by gate name; an element stays where its mask is >= 0.5.

    Raises:
        ModelError: no channel of the residual stream stays.
    """
    stream = None if layout.stream is None else _kept(masks[STREAM])
    if stream == ():
        raise ModelError("The masks leave no channel of the residual stream: keep one at least.")
    cuts = []
    for block in layout.blocks:
        kept = {dim: _kept(masks[block.gate(dim)]) for dim in block.dims}
        if stream is not None:
            staying = set(stream)
            for dim in kept.keys() & {"in", "out"}:
                kept[dim] = tuple(channel for channel in kept[dim] if channel in staying)
            kept[STREAM] = stream
        counts = {dim: torch.tensor(len(indices)) for dim, indices in kept.items()}
        params = int(block_params(block, counts))
        cut = BlockCut(block, WHOLE, kept, params)
        cuts.append(replace(cut, form=_form(cut)))
    others = layout.other_params if stream is None else int(other_params(layout, len(stream)))
    narrower = layout.stream is not None and stream is not None and len(stream) < layout.stream.size
    return CutPlan(
        tuple(cuts),
        others + sum(cut.params for cut in cuts),
        StreamCut(layout.stream, stream) if narrower else None,
    )


@torch.no_grad()
def apply_cuts(model: VisionTransformer, plan: CutPlan) -> VisionTransformer:
    """Shrink the model in place by the plan; every replaced parameter is a new one, the rest is untouched."""
    shapes, weights = [], {}
    width = model.embed_dim
    if plan.stream is not None:
        width, sizes = len(plan.stream.kept), {STREAM: plan.stream.stream.size}
        for weight in plan.stream.stream.outside:
            weights[weight.key] = _select(model.get_parameter(weight.key), weight, sizes, {STREAM: plan.stream.kept})
    for cut in plan.cuts:
        timm_block = model.blocks[cut.block.depth]
        weights.update(_cut_weights(timm_block, cut, narrower=plan.stream is not None))
        shapes.append(_shape(cut))
    reshape_branches(model, shapes, width)
    for key, value in weights.items():
        model.get_parameter(key).copy_(value)
    return model


def branch_shapes(model: VisionTransformer) -> list[BranchShape]:
    """Shapes of all B blocks of a dense or small model, in order."""
    given = model.__dict__.get(_SHAPES)
    return list(given) if given else [BranchShape(block.name, WHOLE) for block in read_layout(model).blocks]


def reshape_branches(model: VisionTransformer, shapes: Sequence[BranchShape], width: int) -> None:
    """Give a dense model the shape of a small one; the new parameters hold no meaningful values yet.

    Args:
        model: dense; it is changed in place.
        shapes: of its B blocks.
        width: channels of the small model's residual stream.

    Raises:
        ModelError: the stream cannot be narrowed to so many channels, or not in this model.
    """
    if not 1 <= width <= model.embed_dim:
        raise ModelError(f"a residual stream of {width} channels cannot be cut from one of {model.embed_dim}")
    if all(shape.form == WHOLE for shape in shapes) and width == model.embed_dim:
        return
    arguments = describe_blocks(model)
    if width < model.embed_dim:
        _narrow_stream(model, width)
    model.__dict__[BLOCK_ARGUMENTS] = arguments
    for shape in shapes:
        _, depth, branch = shape.name.split(".")
        block = model.blocks[int(depth)]
        if shape.form == SMALL:
            _make_small(block, branch, shape, model.embed_dim)
        elif shape.form == CONSTANT:
            example = _branch_parameter(block, branch)
            constant = ConstantBranch(shape.outputs, model.embed_dim, device=example.device, dtype=example.dtype)
            _replace_branch(block, branch, constant)
        elif shape.form == GONE:
            _replace_branch(block, branch, NoBranch())
    for depth, block in enumerate(model.blocks):
        if isinstance(block.attn, NoBranch) and isinstance(block.mlp, NoBranch):
            model.blocks[depth] = nn.Identity()
    model.__dict__[_SHAPES] = tuple(shapes)


def flat_select(x: Tensor, index: Tensor) -> Tensor:
    """Channels of the last axis by index: (..., C) -> (..., len(index)); torch reads a matrix several times quicker.

    An exported graph gathers by element instead: ONNX Runtime takes several times as long for its Gather as for GatherElements.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return x.gather(-1, index.expand(*x.shape[:-1], -1))
    return x.reshape(-1, x.shape[-1]).index_select(1, index).reshape(*x.shape[:-1], len(index))


class ReadChannels(nn.Module):
    """Layer norm over all D channels of which only some are read: (..., D) -> (..., len(inputs))."""

    index: Tensor

    def __init__(self, inputs: Sequence[int], width: int, norm: nn.LayerNorm, example: Tensor) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (width,), norm.eps
        self.register_buffer("index", torch.tensor(inputs, device=_index_device(example)), persistent=False)
        for key in ("weight", "bias"):
            dense = getattr(norm, key)
            self.register_parameter(key, None if dense is None else nn.Parameter(dense.new_empty(len(inputs))))

    def forward(self, x: Tensor) -> Tensor:
        x = flat_select(F.layer_norm(x, self.normalized_shape, eps=self.eps), self.index)
        if self.weight is None:
            return x
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)


class WriteChannels(nn.Module):
    """Spreads a block's output over the D channels of the residual stream: (..., len(outputs)) -> (..., D), zeros elsewhere.

    Stands in the place of timm's LayerScale and carries its gamma where there is one.
    """

    index: Tensor

    def __init__(self, outputs: Sequence[int], width: int, example: Tensor, scaled: bool) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("index", torch.tensor(outputs, device=_index_device(example)), persistent=False)
        self.gamma = nn.Parameter(example.new_empty(len(outputs))) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is not None:
            x = x * self.gamma
        return x.new_zeros((*x.shape[:-1], self.width)).index_copy_(-1, self.index, x)


class ConstantBranch(nn.Module):
    """A block that can only add a constant: `value` (len(outputs),) on some channels, whatever it is given."""

    index: Tensor

    def __init__(self, outputs: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.value = nn.Parameter(torch.empty(len(outputs), device=device, dtype=dtype))
        self.register_buffer("index", torch.tensor(outputs, device=_index_device(self.value)), persistent=False)

    def forward(self, x: Tensor, **_attention: object) -> Tensor:
        return self.value.new_zeros(self.width).index_copy(0, self.index, self.value).to(x.dtype)


class NoBranch(nn.Module):
    """A block that adds nothing."""

    def forward(self, x: Tensor, **_attention: object) -> Tensor:
        return x.new_zeros(())


def _shape_from_plain(entry: object, name: str, width: int, dense_heads: int, *, tells_heads: bool) -> BranchShape:
    known = {field.name for field in fields(BranchShape)} - (set() if tells_heads else {"heads"})
    if not isinstance(entry, dict) or entry.keys() != known or entry["name"] != name:
        raise ModelError(f"the entry of {name} is missing, misplaced or incomplete")
    form, inner = entry["form"], entry["inner"]
    for side in ("inputs", "outputs"):
        channels = entry[side]
        if not isinstance(channels, list) or not all(type(channel) is int and 0 <= channel < width for channel in channels):
            raise ModelError(f"the {side} of {name} are not whole numbers within 0..{width - 1}")
        if any(low >= high for low, high in pairwise(channels)):
            raise ModelError(f"the {side} of {name} are not in rising order")
    has = (bool(entry["inputs"]), bool(entry["outputs"]), type(inner) is int and 1 <= inner <= MOST_INNER)
    allowed = {WHOLE: (False, False, False), GONE: (False, False, False), CONSTANT: (False, True, False), SMALL: (True,) * 3}
    if type(form) is not str or allowed.get(form) != has or (form != SMALL and inner != 0) or type(inner) is not int:
        raise ModelError(f"the form of {name}, {str(form)[:20]!r}, does not go with its channels")
    most = dense_heads if form == SMALL and name.endswith(".attn") else 0
    heads = entry["heads"] if tells_heads else most
    if type(heads) is not int or not min(1, most) <= heads <= most:
        raise ModelError(f"the heads of {name} are {str(heads)[:20]}; expected {f'1 to {most}' if most else 'none (0)'}")
    return BranchShape(name, form, tuple(entry["inputs"]), inner, tuple(entry["outputs"]), heads)


def _kept(mask: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(mask >= 0.5).flatten().tolist())


def _inner_dims(block: BlockLayout) -> tuple[str, ...]:
    return ("heads", "head") if block.kind == "attn" else ("hidden",)


def _form(cut: BlockCut) -> str:
    if cut.params == 0:
        return GONE
    inner = {dim: len(cut.channels(dim)) for dim in _inner_dims(cut.block)}
    if not cut.channels("in") or 0 in inner.values():
        return CONSTANT
    whole_sides = all(len(cut.channels(side)) == len(cut.channels(STREAM)) for side in ("in", "out"))
    return WHOLE if whole_sides and all(count == cut.block.sizes[dim] for dim, count in inner.items()) else SMALL


def _shape(cut: BlockCut) -> BranchShape:
    places = {channel: place for place, channel in enumerate(cut.channels(STREAM))}
    inputs, outputs = (tuple(places[channel] for channel in cut.channels(side)) for side in ("in", "out"))
    if cut.form == SMALL:
        heads = len(cut.channels("heads")) if cut.block.kind == "attn" else 0
        inner = len(cut.channels(_inner_dims(cut.block)[-1]))
        return BranchShape(cut.block.name, SMALL, inputs, inner, outputs, heads)
    return BranchShape(cut.block.name, cut.form, outputs=outputs if cut.form == CONSTANT else ())


def _cut_weights(timm_block: Block, cut: BlockCut, *, narrower: bool) -> dict[str, Tensor]:
    """New values of the block's parameters, by their keys in the small model; `narrower`: its stream is."""
    block, prefix = cut.block, f"blocks.{cut.block.depth}."
    if cut.form == GONE or (cut.form == WHOLE and not narrower):
        return {}
    if cut.form == CONSTANT:
        return {f"{block.name}.value": _constant(timm_block, cut)}
    weights = {
        weight.key: _select(timm_block.get_parameter(weight.key.removeprefix(prefix)), weight, block.sizes, cut.kept)
        for weight in block.weights
    }
    if block.kind == "attn":
        # The attention divides by the root of the width it finds; the queries make up for the width it had.
        head_width, kept_width = block.sizes["head"], len(cut.channels("head"))
        for key in (f"{block.name}.qkv.weight", f"{block.name}.qkv.bias"):
            if key in weights:
                weights[key].unflatten(0, (3, -1))[0].mul_(math.sqrt(kept_width / head_width))
    return weights


def _select(parameter: Tensor, weight: Weight, sizes: Mapping[str, int], kept: Mapping[str, tuple[int, ...]]) -> Tensor:
    """The kept rows and columns of one parameter, as a new tensor."""
    value = parameter.detach()
    for axis, factors in enumerate(weight.axes):
        value = split_axis(value, axis, factors, sizes)
        for position, factor in enumerate(factors):
            if isinstance(factor, str):
                index = torch.tensor(kept[factor], device=value.device, dtype=torch.int64)
                value = value.index_select(axis + position, index)
        value = value.flatten(axis, axis + len(factors) - 1)
    return value.clone()


def _constant(timm_block: Block, cut: BlockCut) -> Tensor:
    """What the block adds on its output channels when its input, or all inside it, is masked: only biases are left."""
    if cut.block.kind == "attn":
        inner_bias, last, scale = timm_block.attn.qkv.bias, timm_block.attn.proj, timm_block.ls1
        # Every token offers the same value, so attention returns it, whatever its weights.
        sizes = (3, cut.block.sizes["heads"], cut.block.sizes["head"])
        inner = None if inner_bias is None else inner_bias.unflatten(0, sizes)[2]
        rows = cut.channels("heads")
    else:
        fc1, last, scale = timm_block.mlp.fc1, timm_block.mlp.fc2, timm_block.ls2
        inner = timm_block.mlp.act(fc1.weight.new_zeros(fc1.out_features) if fc1.bias is None else fc1.bias.detach())[None]
        rows = (0,)
    device = last.weight.device
    row_index, column_index, outputs = (
        torch.tensor(channels, device=device, dtype=torch.int64)
        for channels in (rows, cut.channels(_inner_dims(cut.block)[-1]), cut.channels("out"))
    )
    value = last.weight.new_zeros(last.out_features) if last.bias is None else last.bias.detach().clone()
    if inner is not None:
        visible = torch.zeros_like(inner)
        visible[row_index[:, None], column_index] = inner[row_index[:, None], column_index]
        value = value + last.weight.detach() @ visible.flatten()
    return (value * scale.gamma if isinstance(scale, LayerScale) else value)[outputs]


def _narrow_stream(model: VisionTransformer, width: int) -> None:
    """Make everything that the residual stream runs through for fewer channels: parameters without values, and sizes."""
    stream = read_layout(model, (STREAM,)).stream
    assert stream is not None
    for weight in stream.weights:
        owner, _, name = weight.key.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module.get_parameter(name)
        axis = next(axis for axis, factors in enumerate(weight.axes) if STREAM in factors)
        shape = (*parameter.shape[:axis], width, *parameter.shape[axis + 1 :])
        setattr(module, name, nn.Parameter(parameter.new_empty(shape)))
        if isinstance(module, nn.Linear):
            setattr(module, "in_features" if axis == 1 else "out_features", width)
        elif isinstance(module, nn.Conv2d):
            module.out_channels = width
    for name in stream.norms:
        model.get_submodule(name).normalized_shape = (width,)
    model.embed_dim = model.num_features = model.head_hidden_size = width
    for feature in model.feature_info:
        feature["num_chs"] = width


def _make_small(block: Block, branch: str, shape: BranchShape, width: int) -> None:
    """Narrow one half of a timm block; what is left whole keeps its module."""
    if branch == "attn":
        attn = block.attn
        rows = shape.heads * shape.inner
        attn.qkv = _linear(attn.qkv, len(shape.inputs), 3 * rows)
        attn.proj = _linear(attn.proj, rows, len(shape.outputs))
        attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale = shape.heads, shape.inner, rows, shape.inner**-0.5
        block.norm1 = _reader(block.norm1, shape, width, attn.qkv.weight)
        block.ls1 = _writer(block.ls1, shape, width, attn.proj.weight)
    else:
        mlp = block.mlp
        mlp.fc1 = _linear(mlp.fc1, len(shape.inputs), shape.inner)
        mlp.fc2 = _linear(mlp.fc2, shape.inner, len(shape.outputs))
        block.norm2 = _reader(block.norm2, shape, width, mlp.fc1.weight)
        block.ls2 = _writer(block.ls2, shape, width, mlp.fc2.weight)


def _linear(dense: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    weight = dense.weight
    return nn.Linear(inputs, outputs, bias=dense.bias is not None, device=weight.device, dtype=weight.dtype)


def _reader(norm: nn.LayerNorm, shape: BranchShape, width: int, example: Tensor) -> nn.Module:
    return norm if len(shape.inputs) == width else ReadChannels(shape.inputs, width, norm, example)


def _writer(scale: nn.Module, shape: BranchShape, width: int, example: Tensor) -> nn.Module:
    return scale if len(shape.outputs) == width else WriteChannels(shape.outputs, width, example, isinstance(scale, LayerScale))


def _replace_branch(block: Block, branch: str, replacement: nn.Module) -> None:
    """Put a constant or nothing in the place of one half: no norm, scale or drop path is left around it."""
    if branch == "attn":
        block.norm1, block.attn = nn.Identity(), replacement
        block.ls1, block.drop_path1 = nn.Identity(), nn.Identity()
    else:
        block.norm2, block.mlp = nn.Identity(), replacement
        block.ls2, block.drop_path2 = nn.Identity(), nn.Identity()


def _branch_parameter(block: Block, branch: str) -> Tensor:
    return block.attn.qkv.weight if branch == "attn" else block.mlp.fc1.weight


def _index_device(example: Tensor) -> torch.device | str:
    """Indices are data even in a skeleton on the meta device: loading fills in weights, not indices."""
    return "cpu" if example.is_meta else example.device
