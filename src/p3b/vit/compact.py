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

No forward pass is replaced: a small block is timm's own whose parts are narrower, which is the parts' matter
(`p3b.vit.anatomy`). `branch_shapes` reads the shapes off a
model and `reshape_branches` gives another model the same shapes, which is all that saving and loading needs.

Layers stay the objects that they were wherever they can, and what a user has set on them stays: a new parameter wants a
gradient if the old one did, keeps its dtype, device and attributes; a new module keeps mode and attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.body import in_place_of
from p3b.vit.anatomy.half import Half
from p3b.vit.anatomy.shape import CONSTANT, GONE, SMALL, WHOLE, BranchShape
from p3b.vit.anatomy.weights import STREAM, Weight, split_axis
from p3b.vit.architecture import BLOCK_ARGUMENTS, describe_blocks
from p3b.vit.cost import block_params, other_params
from p3b.vit.families import family_of, width_of
from p3b.vit.families.family import Block
from p3b.vit.layout import BlockLayout, ModelLayout, StreamLayout, read_layout
from p3b.vit.parts import ConstantBranch, NoBlock, NoBranch
from p3b.vit.shapes import keep_shapes


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
    width = width_of(model)
    if plan.stream is not None:
        width, sizes = len(plan.stream.kept), {STREAM: plan.stream.stream.size}
        for weight in plan.stream.stream.outside:
            values[weight.key] = _select(model.get_parameter(weight.key), weight, sizes, {STREAM: plan.stream.kept})
    branches = _branches(model)
    for cut in plan.cuts:
        values.update(_cut_weights(*branches[cut.block.name], cut, narrower=plan.stream is not None))
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
    whole = width_of(model)
    if not 1 <= width <= whole:
        raise ModelError(f"a residual stream of {width} channels cannot be cut from one of {whole}")
    if all(shape.form == WHOLE for shape in shapes) and width == whole:
        return
    arguments = describe_blocks(model)
    if width < whole:
        _narrow_stream(model, width)
    model.__dict__[BLOCK_ARGUMENTS] = arguments
    branches = _branches(model)
    for shape in shapes:
        block, half = branches[shape.name]
        if shape.form == SMALL:
            half.narrow(block.module, shape, block.width)
        elif shape.form == CONSTANT:
            example = half.body.last(block.module.get_submodule(half.name)).weight
            constant = ConstantBranch(shape.outputs, block.width, device=example.device, dtype=example.dtype)
            half.replace(block.module, constant)
        elif shape.form == GONE:
            half.replace(block.module, NoBranch())
    for block in family_of(model).blocks(model):
        if not block.pools and all(isinstance(block.module.get_submodule(half.name), NoBranch) for half in block.halves):
            owner, _, name = block.name.rpartition(".")
            setattr(model.get_submodule(owner), name, in_place_of(block.module, NoBlock()))
    keep_shapes(model, shapes)


def _branches(model: nn.Module) -> dict[str, tuple[Block, Half]]:
    """Every residual branch of a dense model by its name: its block, and which half of it."""
    return {block.branch(half): (block, half) for block in family_of(model).blocks(model) for half in block.halves}


def _shape(cut: BlockCut) -> BranchShape:
    """Shape of the cut block."""
    places = {channel: place for place, channel in enumerate(cut.channels(STREAM))}
    inputs, outputs = (tuple(places[channel] for channel in cut.channels(side)) for side in ("in", "out"))
    if cut.form == SMALL:
        counts = {dim: len(cut.channels(dim)) for dim in _inner_dims(cut.block)}
        last = _inner_dims(cut.block)[-1]
        pairs = cut.channels(last) if cut.block.unit > 1 else ()
        return BranchShape(cut.block.name, SMALL, inputs, counts[last] * cut.block.unit, outputs, counts.get("heads", 0), pairs)
    return BranchShape(cut.block.name, cut.form, outputs=outputs if cut.form == CONSTANT else ())


def _kept(mask: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(mask >= 0.5).flatten().tolist())


def _inner_dims(block: BlockLayout) -> tuple[str, ...]:
    """Names of the dimensions inside a branch, the prunable and the others."""
    return tuple(dim for dim in block.sizes if dim not in ("in", "out", STREAM))


def _form(cut: BlockCut) -> str:
    if cut.params == 0:
        return GONE
    inner = {dim: len(cut.channels(dim)) for dim in _inner_dims(cut.block)}
    if not cut.channels("in") or 0 in inner.values():
        return CONSTANT
    stream = len(cut.channels(STREAM))
    whole_sides = all(
        len(cut.channels(side)) == (stream if STREAM in cut.kept else cut.block.sizes[side]) for side in ("in", "out")
    )
    if stream < cut.block.sizes[STREAM] and not cut.block.any_input_width:
        return SMALL
    return WHOLE if whole_sides and all(count == cut.block.sizes[dim] for dim, count in inner.items()) else SMALL


def _cut_weights(block: Block, half: Half, cut: BlockCut, *, narrower: bool) -> dict[str, nn.Parameter]:
    """New parameters of a branch, by their keys in the small model; `narrower`: its stream is."""
    layout, prefix = cut.block, f"{block.name}."
    if cut.form == GONE or (cut.form == WHOLE and not narrower):
        return {}
    if cut.form == CONSTANT:
        return {f"{layout.name}.value": _constant(block, half, cut)}
    weights = {
        weight.key: _select(block.module.get_parameter(weight.key.removeprefix(prefix)), weight, layout.sizes, cut.kept)
        for weight in layout.weights
    }
    inside = f"{layout.name}."
    half.body.rescale(
        {key.removeprefix(inside): value for key, value in weights.items() if key.startswith(inside)},
        layout.sizes,
        {dim: len(cut.channels(dim)) for dim in _inner_dims(layout)},
    )
    if cut.form == WHOLE:
        return weights
    return {prefix + half.small_key(key.removeprefix(prefix)): value for key, value in weights.items()}


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


def _constant(block: Block, half: Half, cut: BlockCut) -> nn.Parameter:
    """What the branch adds on its output channels when its input, or all inside it, is masked: only biases are left."""
    body = block.module.get_submodule(half.name)
    last = half.body.last(body)
    value = last.weight.new_zeros(last.out_features) if last.bias is None else last.bias.detach().clone()
    inner = half.body.blind(body, {dim: cut.channels(dim) for dim in _inner_dims(cut.block)})
    if inner is not None:
        value = value + (last.weight.detach() @ inner.detach().to(last.weight.dtype)).to(value.dtype)
    outputs = torch.tensor(cut.channels("out"), device=value.device, dtype=torch.int64)
    made_of = [*half.body.makes_constant(body), half.scale(block.module)]
    mask = torch.zeros_like(value).index_fill(0, outputs, 1)
    return nn.Parameter(
        half.scaled(block.module, value, mask).detach()[outputs].to(value.dtype),
        requires_grad=any(each is not None and each.requires_grad for each in made_of),
    )


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
