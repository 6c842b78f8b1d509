"""What a block in a layout reads and writes the residual stream with: modules in the places of its norm and its LayerScale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.vit.parts import flat_select


class IndexNorm(nn.Module):
    """Layer norm over all D channels without affine part, a gather, then the affine part: (..., D) -> (..., len(inputs)).

    Args:
        inputs: channels that are read.
        weight, bias: affine part of these; None where it lies in the next layer, or there is none.
        eps: of the norm.
        width: D.
    """

    index: Tensor

    def __init__(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, width: int) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (width,), eps
        self.register_buffer("index", inputs, persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        if len(self.index) < self.normalized_shape[0]:
            x = flat_select(x, self.index)
        if self.weight is None:
            return x
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)


class GatherNorm(nn.Module):
    """Layer norm over all D channels with its affine part, of which some channels are read: (..., D) -> (..., len(inputs))."""

    index: Tensor

    def __init__(self, norm: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("index", inputs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return flat_select(self.norm(x), self.index)


class SliceNorm(nn.Module):
    """The same where the channels that are read lie side by side: no copy is made."""

    def __init__(self, norm: nn.Module, start: int, length: int) -> None:
        super().__init__()
        self.norm, self.start, self.length = norm, start, length

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).narrow(-1, self.start, self.length)


class FloatWrite(nn.Module):
    """The output of a block that writes all D channels, in float32 under a CPU's autocast.

    The stream is float32 there, and adding or gathering float32 is several times quicker than bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _as_stream(x)


class GatherWrite(nn.Module):
    """Spreads a block's output over the D channels by reading a zero where it adds nothing: (..., rows) -> (..., D)."""

    index: Tensor

    def __init__(self, outputs: Tensor, width: int) -> None:
        super().__init__()
        source = torch.full((width,), len(outputs), device=outputs.device)
        source[outputs] = torch.arange(len(outputs), device=outputs.device)
        self.register_buffer("index", source, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return flat_select(_as_stream(x), self.index)


class SliceWrite(nn.Module):
    """The same where the channels lie side by side: zeros are put around them."""

    def __init__(self, start: int, length: int, width: int) -> None:
        super().__init__()
        self.around = (start, width - start - length)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(_as_stream(x), self.around)


class Addend(nn.Module):
    """A constant block over all D channels."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self, x: Tensor, **_attention: object) -> Tensor:
        return self.value.to(x.dtype)


def _as_stream(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") else x
