"""The form that a small model trains in: the same function of the same parameters, with fewer and quicker operations.

`trainable_form` makes a second module around the very parameters of a small model (section 7 of the method, `p3b.vit.compact`).
A step of an optimizer on either is a step on both, state-dict keys are the same, and what is saved is the small model, as ever.
In each block

- the layer norm has its affine part over all D channels (ones and zeros where nothing is read), and only then channels are
  gathered: the affine part and its gradient are no operations of their own;
- channels of a head are padded by zeros up to a multiple of 4, hidden channels and the rows of the last layer up to a multiple
  of 8: the products of float32 take fewer tiles, and attention is slow at widths in between;
- what the block adds is gathered from its last layer's rows, one of which is zero, in place of zeros and a scatter. Going back
  it is a gather too.

Padding lies in the weights, which are far smaller than activations; its gradient is dropped. Both forms agree to rounding.
"""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.vit.anatomy.shape import SMALL, BranchShape
from p3b.vit.architecture import BLOCK_ARGUMENTS
from p3b.vit.parts import ReadChannels, WriteChannels, flat_select
from p3b.vit.shapes import branch_shapes

HEAD_MULTIPLE = 4
"""Of the channels of a head: fused attention, forward and backward, 32 images of 65 tokens, 4 heads: 11.6 ms at 12 channels,
17.6 at 11, 13.4 at 5, 11.3 at 4."""
ROW_MULTIPLE = 8
"""Of hidden channels and of rows of the last layer: the widest vector of float32 that the libraries tile by."""


def trainable_form(model: VisionTransformer) -> VisionTransformer:
    """A module that computes what a small model does, quicker in training on a CPU; every parameter is the small model's own.

    A block with dropout inside is left as it is, since which channels are dropped depends on how many there are, and so are
    attention and MLPs of other kinds than timm's plain ones.

    Args:
        model: dense or small, as it is saved, on its device and in its dtype; it is not changed.

    Returns:
        The model itself where it is dense.
    """
    if BLOCK_ARGUMENTS not in model.__dict__:
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    built = deepcopy(model, shared)
    for shape in branch_shapes(model):
        owner, _, half = shape.name.rpartition(".")
        block = built.get_submodule(owner)
        dropouts = [module for module in block.modules() if isinstance(module, nn.Dropout)]
        if shape.form == SMALL and is_plain(block, half) and not any(dropout.p > 0 for dropout in dropouts):
            _rebuild(block, half, shape)
    return built


def is_plain(block: nn.Module, half: str) -> bool:
    """Whether half a block, "attn" or "mlp", is timm's Attention or Mlp in timm's Block, without norms inside."""
    if type(block) is not Block:
        return False
    body = block.attn if half == "attn" else block.mlp
    norms = (body.q_norm, body.k_norm, body.norm) if type(body) is Attention else (getattr(body, "norm", None),)
    return type(body) in (Attention, Mlp) and all(type(norm) is nn.Identity for norm in norms)


def _rebuild(block: Block, half: str, shape: BranchShape) -> None:
    """Put quicker modules into one half of a block."""
    norm = block.norm1 if half == "attn" else block.norm2
    write = block.ls1 if half == "attn" else block.ls2
    first, last = (block.attn.qkv, block.attn.proj) if half == "attn" else (block.mlp.fc1, block.mlp.fc2)
    copies = shape.heads if half == "attn" else 1
    inner = round_up(shape.inner, HEAD_MULTIPLE if half == "attn" else ROW_MULTIPLE)
    rows = last.out_features
    if isinstance(write, WriteChannels):
        rows = round_up(rows + 1, ROW_MULTIPLE)  # one row of zeros at least
        write = _Spread(write, rows)
    if isinstance(norm, ReadChannels) and norm.centred:
        norm = _NormThenRead(norm)
    parts = 3 if half == "attn" else 1
    query_scale = math.sqrt(inner / shape.inner) if half == "attn" else 1.0
    first = _PaddedLinear(first, rows=(parts * copies, shape.inner, inner), queries=copies * inner, query_scale=query_scale)
    last = _PaddedLinear(last, rows=(1, last.out_features, rows), columns=(copies, shape.inner, inner))
    if half == "attn":
        attn = block.attn
        attn.qkv, attn.proj = first, last
        attn.head_dim, attn.attn_dim, attn.scale = inner, copies * inner, inner**-0.5
        block.norm1, block.ls1 = norm, write
    else:
        block.mlp.fc1, block.mlp.fc2 = first, last
        block.norm2, block.ls2 = norm, write


class _PaddedLinear(nn.Module):
    """A linear layer with zeros among the rows and columns of its weight.

    Args:
        layer: whose parameters it computes with.
        rows, columns: (groups, width, padded width) of an axis that is so many groups of channels, each padded at its end.
        queries, query_scale: the first so many padded rows are multiplied by this: attention divides by the root of the width
            that it finds.
    """

    def __init__(
        self,
        layer: nn.Linear,
        rows: tuple[int, int, int],
        columns: tuple[int, int, int] | None = None,
        queries: int = 0,
        query_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)
        self._rows, self._columns = rows, columns
        self._scale: Tensor | None = None
        if query_scale != 1.0:
            self._scale = layer.weight.new_ones(rows[0] * rows[2])
            self._scale[:queries] = query_scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self._columns is not None:
            weight = _padded(weight.t(), self._columns).t()
        weight = _padded(weight, self._rows)
        bias = None if self.bias is None else _padded(self.bias, self._rows)
        if self._scale is not None:
            weight = weight * self._scale[:, None]
            bias = None if bias is None else bias * self._scale
        return F.linear(x, weight, bias)


class _NormThenRead(nn.Module):
    """A layer norm with its affine part over all D channels, then a gather: (..., D) -> (..., len(inputs))."""

    def __init__(self, read: ReadChannels) -> None:
        super().__init__()
        self.weight, self.bias = read.weight, read.bias
        self.train(read.training)
        self._index, self._shape, self._eps = read.index, read.normalized_shape, read.eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight is not None:
            weight = weight.new_ones(self._shape).index_copy(0, self._index, weight)
        if bias is not None:
            bias = bias.new_zeros(self._shape).index_copy(0, self._index, bias)
        return flat_select(F.layer_norm(x, self._shape, weight, bias, self._eps), self._index)


class _Spread(nn.Module):
    """Spreads what a block adds over the D channels: (..., rows) -> (..., D), zeros where it adds nothing."""

    def __init__(self, write: WriteChannels, rows: int) -> None:
        super().__init__()
        self.gamma = write.gamma
        self.train(write.training)
        outputs = write.get_buffer("index")
        self._rows, self._padding = rows, rows - len(outputs)
        self._source = torch.full((write.width,), len(outputs), device=outputs.device)
        self._source[outputs] = torch.arange(len(outputs), device=outputs.device)
        # What the rows of zeros are given as a gradient is dropped with them: that of any channel will do.
        self._back = torch.cat([outputs, outputs[-1:].expand(self._padding)])

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is not None:
            x = x * F.pad(self.gamma, (0, self._padding))
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.float()  # as the stream is there: gathering and adding half precision takes several times as long
        spread = gather_both_ways(x.reshape(-1, self._rows), self._source, self._back)
        return spread.reshape(*x.shape[:-1], len(self._source))


class _GatherBothWays(torch.autograd.Function):
    """Columns of a matrix by index, whose gradient is gathered by another index: exact for all that is not dropped."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, source: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return matrix.index_select(1, source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(1, back), None, None


def gather_both_ways(matrix: Tensor, source: Tensor, back: Tensor) -> Tensor:
    """Columns of a matrix by index: (S, C), (D,) -> (S, D); its gradient is that of the columns `back` (C,) of the result."""
    return _GatherBothWays.apply(matrix, source, back)


def _padded(tensor: Tensor, groups: tuple[int, int, int]) -> Tensor:
    """The first axis, so many groups of a width, with each group padded at its end by zeros."""
    count, width, padded = groups
    if padded == width:
        return tensor
    tail = (0, 0) * (tensor.ndim - 1)
    return F.pad(tensor.unflatten(0, (count, width)), (*tail, 0, padded - width)).flatten(0, 1)


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is no smaller."""
    return -(-count // multiple) * multiple
