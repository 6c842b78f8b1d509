"""From mask to small network: section 7 of the method. `plan_cuts` decides, `apply_cuts` is the one place that edits weights.

The small network computes exactly what the hard-masked one computed:

- layer norm takes mean and variance over all D channels; only afterwards are channels left out (`ReadChannels`);
- a head narrowed from d to d' would be scaled by 1/sqrt(d'), so its query weights and bias are multiplied by sqrt(d'/d);
- a block that reads nothing, or has no inner channels left, is the constant that its biases make (`ConstantBranch`), and a
  block that adds nothing disappears (`NoBranch`; both halves of a timm block gone: `NoBlock`);
- the residual stream keeps its D channels: a block reads some of them and writes to some of them (`WriteChannels`);
- only where the stream itself is pruned it becomes narrower, D' channels: embeddings, tokens, positions, norms, head and every
  block are made for D' then, and what a block reads and writes is counted within the D'. A layer norm takes its moments over
  the D', as the gates did;
- a head that goes leaves the others as they are: nothing is scaled.

No forward pass is replaced: a small block is timm's own Block whose parts are narrower. `branch_shapes` reads the shapes off a
model and `reshape_branches` gives another model the same shapes, which is all that saving and loading needs.

Layers stay the objects that they were wherever they can, and what a user has set on them stays: a new parameter wants a
gradient if the old one did, keeps its dtype, device and attributes; a new module keeps mode and attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.architecture import BLOCK_ARGUMENTS, describe_blocks
from p3b.vit.cost import block_params, other_params
from p3b.vit.layout import STREAM, BlockLayout, ModelLayout, StreamLayout, Weight, read_layout, split_axis
from p3b.vit.parts import ConstantBranch, NoBlock, NoBranch, ReadChannels, WriteChannels
from p3b.vit.shapes import CONSTANT, GONE, SMALL, WHOLE, BranchShape, keep_shapes

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
"""Where torch's modules keep their hooks."""


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
    values: dict[str, nn.Parameter] = {}
    width = model.embed_dim
    if plan.stream is not None:
        width, sizes = len(plan.stream.kept), {STREAM: plan.stream.stream.size}
        for weight in plan.stream.stream.outside:
            values[weight.key] = _select(model.get_parameter(weight.key), weight, sizes, {STREAM: plan.stream.kept})
    for cut in plan.cuts:
        values.update(_cut_weights(model.blocks[cut.block.depth], cut, narrower=plan.stream is not None))
    reshape_branches(model, [_shape(cut) for cut in plan.cuts], width)
    for key, value in values.items():
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        assert module.get_parameter(name).shape == value.shape
        module.register_parameter(name, value)
    return model


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
            model.blocks[depth] = _in_place_of(block, NoBlock())
    keep_shapes(model, shapes)


def _shape(cut: BlockCut) -> BranchShape:
    """Shape of the cut block."""
    places = {channel: place for place, channel in enumerate(cut.channels(STREAM))}
    inputs, outputs = (tuple(places[channel] for channel in cut.channels(side)) for side in ("in", "out"))
    if cut.form == SMALL:
        heads = len(cut.channels("heads")) if cut.block.kind == "attn" else 0
        inner = len(cut.channels(_inner_dims(cut.block)[-1]))
        return BranchShape(cut.block.name, SMALL, inputs, inner, outputs, heads)
    return BranchShape(cut.block.name, cut.form, outputs=outputs if cut.form == CONSTANT else ())


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


def _cut_weights(timm_block: Block, cut: BlockCut, *, narrower: bool) -> dict[str, nn.Parameter]:
    """New parameters of the block, by their keys in the small model; `narrower`: its stream is."""
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


def _select(
    parameter: nn.Parameter, weight: Weight, sizes: Mapping[str, int], kept: Mapping[str, tuple[int, ...]]
) -> nn.Parameter:
    """The kept rows and columns of one parameter, as a new one."""
    value = parameter.detach()
    for axis, factors in enumerate(weight.axes):
        value = split_axis(value, axis, factors, sizes)
        for position, factor in enumerate(factors):
            if isinstance(factor, str):
                index = torch.tensor(kept[factor], device=value.device, dtype=torch.int64)
                value = value.index_select(axis + position, index)
        value = value.flatten(axis, axis + len(factors) - 1)
    selected = nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)
    selected.__dict__.update(parameter.__dict__)  # what a user has noted on it
    return selected


def _constant(timm_block: Block, cut: BlockCut) -> nn.Parameter:
    """What the block adds on its output channels when its input, or all inside it, is masked: only biases are left."""
    if cut.block.kind == "attn":
        inner_bias, last, scale = timm_block.attn.qkv.bias, timm_block.attn.proj, timm_block.ls1
        # Every token offers the same value, so attention returns it, whatever its weights.
        sizes = (3, cut.block.sizes["heads"], cut.block.sizes["head"])
        inner = None if inner_bias is None else inner_bias.unflatten(0, sizes)[2]
        rows = cut.channels("heads")
    else:
        fc1, last, scale = timm_block.mlp.fc1, timm_block.mlp.fc2, timm_block.ls2
        inner_bias = fc1.bias
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
        value = value + (last.weight.detach() @ visible.flatten().to(last.weight.dtype)).to(value.dtype)
    made_of = [inner_bias, last.weight, last.bias, getattr(scale, "gamma", None)]
    value = (value * scale.gamma if isinstance(scale, LayerScale) else value)[outputs]
    return nn.Parameter(value, requires_grad=any(each is not None and each.requires_grad for each in made_of))


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
        _narrow(attn.qkv, len(shape.inputs), 3 * rows)
        _narrow(attn.proj, rows, len(shape.outputs))
        attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale = shape.heads, shape.inner, rows, shape.inner**-0.5
        block.norm1 = _reader(block.norm1, shape, width, attn.qkv.weight)
        block.ls1 = _writer(block.ls1, shape, width, attn.proj.weight)
    else:
        mlp = block.mlp
        _narrow(mlp.fc1, len(shape.inputs), shape.inner)
        _narrow(mlp.fc2, shape.inner, len(shape.outputs))
        block.norm2 = _reader(block.norm2, shape, width, mlp.fc1.weight)
        block.ls2 = _writer(block.ls2, shape, width, mlp.fc2.weight)


def _narrow(layer: nn.Linear, inputs: int, outputs: int) -> None:
    weight = layer.weight
    fresh = nn.Linear(inputs, outputs, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight, layer.bias = fresh.weight, fresh.bias


def _reader(norm: nn.LayerNorm, shape: BranchShape, width: int, example: Tensor) -> nn.Module:
    if len(shape.inputs) == width:
        return norm
    return _in_place_of(norm, ReadChannels(shape.inputs, width, norm, example))


def _writer(scale: nn.Module, shape: BranchShape, width: int, example: Tensor) -> nn.Module:
    if len(shape.outputs) == width:
        return scale
    return _in_place_of(scale, WriteChannels(shape.outputs, width, example, isinstance(scale, LayerScale)))


def _in_place_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """A module that takes another's place: in its mode, with what a user has set on it, and heard by who listened to it."""
    new.train(old.training)
    own = {"elementwise_affine", "_fast_norm", "inplace"}
    new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in new.__dict__ and key not in own})
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    return new


def _replace_branch(block: Block, branch: str, replacement: nn.Module) -> None:
    """Put a constant or nothing in the place of one half: no norm, scale or drop path is left around it."""
    nothing = [nn.Identity().train(block.training) for _ in range(3)]
    if branch == "attn":
        block.attn = replacement.train(block.training)
        block.norm1, block.ls1, block.drop_path1 = nothing
    else:
        block.mlp = replacement.train(block.training)
        block.norm2, block.ls2, block.drop_path2 = nothing


def _branch_parameter(block: Block, branch: str) -> Tensor:
    return block.attn.qkv.weight if branch == "attn" else block.mlp.fc1.weight
