"""Norms: which are covered, and the same norm over the channels that stay."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from torch import Tensor, nn

NORMS: dict[str, type[nn.Module]] = {
    "LayerNorm": LayerNorm,
    "LayerNormFp32": LayerNormFp32,
    "RmsNorm": RmsNorm,
    "RmsNormFp32": RmsNormFp32,
}
"""Norms by the name that a description has for them."""
_UNCENTRED = (RmsNorm, RmsNormFp32)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm that is covered."""
    return type(module) in (nn.LayerNorm, *NORMS.values())


def is_none_or_norm(module: nn.Module) -> bool:
    """Whether nothing is there, or a norm that is covered."""
    return type(module) is nn.Identity or is_norm(module)


def is_centred(norm: nn.Module) -> bool:
    """Whether it takes the mean out: a layer norm does, RMSNorm does not."""
    return not isinstance(norm, _UNCENTRED)


def norm_name(module: nn.Module) -> str | None:
    """Name of a norm in a description; torch's own layer norm computes what timm's does. None for another module."""
    return next((name for name, kind in NORMS.items() if type(module) in (kind, nn.LayerNorm)), None)


def has_shift(module: nn.Module) -> bool:
    """Whether it gives something where it is given zeros."""
    return getattr(module, "bias", None) is not None


def narrow_norm(norm: nn.Module, width: int) -> None:
    """Give a norm another number of channels; its weights hold no values yet. Where none is there, nothing happens."""
    if isinstance(norm, nn.Identity):
        return
    norm.normalized_shape = (width,)
    for key, parameter in list(norm.named_parameters()):
        setattr(norm, key, nn.Parameter(parameter.new_empty(width)))


def norm_of_kept(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """A norm over the channels that stay: (..., D) -> (..., D), channels that go are zero.

    Moments are taken in float32 at least, as an ordinary norm takes them. Where no channel stays all is zero.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, mask = x.to(dtype), mask.to(dtype)
    share = mask / mask.sum().clamp_min(torch.finfo(dtype).tiny)
    if is_centred(norm):
        x = x - (x * share).sum(-1, keepdim=True)
    variance = (x.square() * share).sum(-1, keepdim=True)
    x = x * torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        x = x * norm.weight.to(dtype)
    if has_shift(norm):
        x = x + norm.bias.to(dtype)
    return x * mask
