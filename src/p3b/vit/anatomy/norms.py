"""Layer norms: which are covered, and the same norm over the channels that stay."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, LayerNormFp32
from torch import Tensor, nn

NORMS: dict[str, type[nn.Module]] = {"LayerNorm": LayerNorm, "LayerNormFp32": LayerNormFp32}
"""Norms by the name that a description has for them."""


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm that is covered."""
    return type(module) in (nn.LayerNorm, *NORMS.values())


def norm_name(module: nn.Module) -> str | None:
    """Name of a norm in a description; torch's own layer norm computes what timm's does. None for another module."""
    return next((name for name, kind in NORMS.items() if type(module) in (kind, nn.LayerNorm)), None)


def norm_of_kept(norm: nn.LayerNorm, x: Tensor, mask: Tensor) -> Tensor:
    """A layer norm over the channels that stay: (..., D) -> (..., D), channels that go are zero.

    Moments are taken in float32 at least, as an ordinary layer norm takes them. Where no channel stays all is zero.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, mask = x.to(dtype), mask.to(dtype)
    share = mask / mask.sum().clamp_min(torch.finfo(dtype).tiny)
    centred = x - (x * share).sum(-1, keepdim=True)
    variance = (centred.square() * share).sum(-1, keepdim=True)
    x = centred * torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        x = x * norm.weight.to(dtype)
    if norm.bias is not None:
        x = x + norm.bias.to(dtype)
    return x * mask
