"""The modules that a small model has where a dense one has timm's: those that read or write some channels, and those for less.

Everything that torch offers for a dense timm model works on these: TorchScript, `torch.fx`, `torch.export`. That is why this
file does without postponed annotations, which TorchScript cannot read, and why no shape is taken apart with a star, which
`torch.fx` cannot trace.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def flat_select(x: Tensor, index: Tensor) -> Tensor:
    """Channels of the last axis by index: (..., C) -> (..., len(index)); torch reads a matrix several times quicker.

    An exported graph gathers by element instead: ONNX Runtime takes several times as long for its Gather as for GatherElements.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript does not compile what stands behind this condition alone)
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return x.gather(-1, index.expand(x.shape[:-1] + index.shape))
    return x.reshape(-1, x.shape[-1]).index_select(1, index).reshape(x.shape[:-1] + index.shape)


class ReadChannels(nn.Module):
    """Layer norm over all D channels of which only some are read: (..., D) -> (..., len(inputs))."""

    __constants__ = ["eps", "normalized_shape"]  # noqa: RUF012 (TorchScript asks for a list on the class)

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

    def __init__(self, outputs: Sequence[int], width: int, example: Tensor, scaled: bool) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("index", torch.tensor(outputs, device=_index_device(example)), persistent=False)
        self.gamma = nn.Parameter(example.new_empty(len(outputs))) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is not None:
            x = x * self.gamma
        if torch.jit.is_scripting():
            zeros = x.new_zeros(x.shape[:-1] + [self.width])  # noqa: RUF005
        else:
            zeros = x.new_zeros(x.shape[:-1] + (self.width,))  # noqa: RUF005
        return zeros.index_copy_(-1, self.index, x)


class ConstantBranch(nn.Module):
    """A block that can only add a constant: `value` (len(outputs),) on some channels, whatever it is given."""

    def __init__(self, outputs: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.value = nn.Parameter(torch.empty(len(outputs), device=device, dtype=dtype))
        self.register_buffer("index", torch.tensor(outputs, device=_index_device(self.value)), persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.value.new_zeros([self.width]).index_copy(0, self.index, self.value).to(x.dtype)


class NoBranch(nn.Module):
    """A block that adds nothing."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x.new_zeros([])


class NoBlock(nn.Identity):
    """A timm block both halves of which add nothing; it takes what a block takes."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x


def _index_device(example: Tensor) -> torch.device | str:
    """Indices are data even in a skeleton on the meta device: loading fills in weights, not indices."""
    return "cpu" if example.is_meta else example.device
