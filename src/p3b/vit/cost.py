"""Parameters and multiply-accumulates (MACs) of a block from its layout and what is kept; of a whole model by counting.

A dimension's count may be a number or a tensor of many candidates at once; results have its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from p3b.errors import ModelError
from p3b.vit.anatomy.weights import STREAM, Axis
from p3b.vit.families import CLASSES, images_of
from p3b.vit.layout import BlockLayout, ModelLayout, alike

Count = TypeVar("Count", int, Tensor)


def block_params(block: BlockLayout, kept: Mapping[str, Tensor]) -> Tensor:
    """Parameters that the shrunk block has when `kept[dim]` channels of each dimension stay; a dimension not named is whole.

    A block that reads nothing or has no inner channels left is a constant of one number per output channel, or nothing where no
    bias feeds it; one that writes nothing is gone. See `p3b.vit.compact`, which shrinks by the same rules.

    Args:
        block: layout of the block.
        kept: counts of its dimensions and, where it is prunable, of the stream ("stream"). Counts of "in" and "out" are then of
            channels that the stream still has (`kept_channels`).
    """
    kept = {**block.sizes, **kept}
    inputs, inner, outputs = (torch.as_tensor(_size(axis, kept)) for axis in (block.inputs, block.inner, block.outputs))
    whole = sum(_numel(weight.axes, kept) for weight in block.weights)
    no_input = outputs * int(block.constant_without_input)
    no_inner = outputs * int(block.constant_without_inner)
    remaining = torch.where(inputs == 0, no_input, torch.as_tensor(whole))
    return torch.where(inner == 0, no_inner, remaining) * (outputs > 0)


def dense_params(block: BlockLayout) -> int:
    """P_b: parameters of the block as it is, norm, biases and LayerScale included."""
    return sum(math.prod(_size(axis, block.sizes) for axis in weight.axes) for weight in block.weights)


def other_params(layout: ModelLayout, stream: Count) -> Count | int:
    """Parameters outside the blocks when so many channels of the stream stay; as they are where it is not prunable."""
    if layout.stream is None:
        return layout.other_params
    return sum(_numel(weight.axes, {STREAM: stream}) for weight in layout.stream.outside)


def prefix_cost(block: BlockLayout, dims: Sequence[str] | None = None, stream: int | None = None) -> Callable[[Tensor], Tensor]:
    """The block's parameters as a function of (n + 1, G) kept elements, G its gates.

    Args:
        block: layout of the block.
        dims: its G dimensions in the order of the columns; by default all, as in `block.dims`. What is not named stays whole.
        stream: channels that the residual stream has, where it is prunable; None: all.
    """
    named = tuple(block.dims if dims is None else dims)
    narrowed = {} if stream is None else {STREAM: torch.tensor(stream)}

    def cost(kept: Tensor) -> Tensor:
        return block_params(block, {**dict(zip(named, kept.unbind(-1), strict=True)), **narrowed})

    return cost


def kept_channels(block: BlockLayout, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Channels of each dimension that count as kept (mask >= 0.5), as 0-dim tensors.

    Where the stream has a mask its count comes last, and the block's inputs and outputs are those that lie in it.
    """
    kept = {dim: masks[block.gate(dim)] >= 0.5 for dim in block.dims}
    if STREAM in masks:
        stream = masks[STREAM] >= 0.5
        kept = {dim: mask & stream if dim in ("in", "out") else mask for dim, mask in kept.items()} | {STREAM: stream}
    return {dim: mask.sum() for dim, mask in kept.items()}


def kept_params(layout: ModelLayout, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters that each block keeps under the masks, by block name."""
    kept = [kept_channels(block, masks) for block in layout.blocks]
    by_block = {block.name: 0 for block in layout.blocks}
    for group in alike(layout.blocks):
        shape = layout.blocks[group[0]]
        counts = block_params(shape, {dim: torch.stack([kept[b][dim] for b in group]) for dim in kept[group[0]]})
        by_block |= zip((layout.blocks[b].name for b in group), counts.expand(len(group)).tolist(), strict=True)
    return by_block


def kept_other_params(layout: ModelLayout, masks: Mapping[str, Tensor]) -> int:
    """Parameters outside the blocks that stay under the masks."""
    return layout.other_params if layout.stream is None else int(other_params(layout, (masks[STREAM] >= 0.5).sum()))


def block_macs(block: BlockLayout, kept: Mapping[str, int], tokens: int) -> int:
    """MACs of the shrunk block for one image of `tokens` tokens: linear layers, attention scores and values.

    Norms, biases, softmax and activations count as nothing, as is usual. `kept` as in `block_params`.
    """
    kept = {**block.sizes, **kept}
    inner = _size(block.inner, kept)
    compared = tokens
    if block.window is not None and block.kind == "attn":
        compared, tokens = block.window
    if not (inner and _size(block.inputs, kept) and _size(block.outputs, kept)):
        return 0
    linear = sum(
        math.prod(_size(axis, kept) for axis in weight.axes) * (tokens if weight.times is None else weight.times)
        for weight in block.weights
        if len(weight.axes) == 2
    )
    return linear + (tokens * (2 * compared + block.distances) * inner if block.kind == "attn" else 0)


def other_macs(layout: ModelLayout, stream: int) -> int:
    """MACs outside the blocks, patch embedding and head, when so many channels of the stream stay.

    Raises:
        ModelError: the layout was read without the dimension "stream".
    """
    if layout.stream is None:
        raise ModelError('The stream is not prunable here: read the layout with the dimension "stream".')
    sizes = {STREAM: stream}
    macs = 0
    for weight in layout.stream.outside:
        times = {4: layout.stream.patches, 2: 1}.get(len(weight.axes), 0)  # a convolution, a linear layer, anything else
        macs += times * math.prod(_size(axis, sizes) for axis in weight.axes)
    return macs


def model_macs(layout: ModelLayout, kept: Mapping[str, Mapping[str, int]], other_macs: int) -> int:
    """MACs of the shrunk model: its blocks (`kept` by block name) and `other_macs` outside them (patch embedding, head)."""
    tokens = [layout.prefix_tokens + math.prod(block.grid) for block in layout.blocks]
    return other_macs + sum(map(block_macs, layout.blocks, (kept[block.name] for block in layout.blocks), tokens))


def count_parameters(model: nn.Module) -> int:
    """sum(p.numel()) over the model's parameters: what a prune ratio is checked against."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: int | tuple[int, int] = 224) -> int:
    """MACs of one image through any model, counted by running it on torch's meta device: nothing is computed.

    Args:
        model: a dense or a pruned model; it is not changed.
        img_size: side of the square image in pixels, or (height, width).
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    parameters = {key: tensor.detach().to("meta") for key, tensor in model.named_parameters()}
    buffers = {key: tensor.to("meta") for key, tensor in model.named_buffers()}
    if type(model) in CLASSES.values():
        channels = images_of(model).channels
    else:
        channels = next(tensor.shape[1] for tensor in parameters.values() if tensor.ndim == 4)
    image = torch.empty(1, channels, height, width, device="meta", dtype=next(iter(parameters.values())).dtype)
    was_training = model.training
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(model, {**parameters, **buffers}, (image,))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


def _numel(axes: tuple[Axis, ...], kept: Mapping[str, Count]) -> Count | int:
    """Elements of a weight: a product of cumulative counts, in int64, exact."""
    size: Count | int = 1
    for axis in axes:
        size = size * _size(axis, kept)
    return size


def _size(axis: Axis, sizes: Mapping[str, Count]) -> Count | int:
    size: Count | int = 1
    for factor in axis:
        size = size * (sizes[factor] if isinstance(factor, str) else factor)
    return size
