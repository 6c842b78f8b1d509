"""Norms: which are covered, and the same norm over the channels that stay."""

from __future__ import annotations

from typing import Any, cast

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

    Moments are taken in float32 at least, as an ordinary norm takes them. Where no channel stays all is zero. A mask that wants
    a gradient gets it.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, mask = x.to(dtype), mask.to(dtype)
    weight, bias = (None if each is None else each.to(dtype) for each in (norm.weight, getattr(norm, "bias", None)))
    if mask.requires_grad or torch.compiler.is_compiling():  # a compiler fuses what follows by itself
        return _norm_by_parts(x, weight, bias, mask, norm.eps, is_centred(norm))
    return cast(Tensor, _NormOfKept.apply(x, weight, bias, mask, norm.eps, is_centred(norm)))


def _norm_by_parts(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor, eps: float, centred: bool) -> Tensor:
    """The definition, operation by operation."""
    share = _share(mask)
    if centred:
        x = x - (x * share).sum(-1, keepdim=True)
    x = x * torch.rsqrt((x.square() * share).sum(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight
    if bias is not None:
        x = x + bias
    return x * mask


class _NormOfKept(torch.autograd.Function):
    """The same with a backward pass of its own: of all that lies in between, the moments alone are kept.

    With s = mask / sum(mask), r = 1 / sqrt(var + eps), h = (x - mu) r, scale = mask * weight and g the gradient of the result:

        dx = r (g scale - s (sum(g scale) + h sum(g scale h)));   without the first sum where the norm is not centred
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor, eps: float, centred: bool
    ) -> Tensor:
        share = _share(mask)
        mean = (x @ share)[..., None] if centred else None
        square = x.square() if mean is None else (x - mean).square_()
        rate = torch.rsqrt((square @ share)[..., None] + eps)
        ctx.save_for_backward(x, weight, bias, mask, mean, rate)
        ctx.further = eps, centred
        result = _normalised(x, mean, rate, out=square).mul_(mask if weight is None else mask * weight)
        return result if bias is None else result.add_(mask * bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mask, mean, rate = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            wanted = [each for each, wants in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if wants]
            found = iter(
                torch.autograd.grad(_norm_by_parts(x, weight, bias, mask, *ctx.further), wanted, gradient, create_graph=True)
            )
            return (*(next(found) if wants else None for wants in ctx.needs_input_grad[:3]), None, None, None)
        by_x = by_weight = by_bias = None
        scale, channels = mask if weight is None else mask * weight, x.shape[-1]
        hat = _normalised(x, mean, rate)
        both = gradient * hat
        if ctx.needs_input_grad[1]:
            by_weight = both.reshape(-1, channels).sum(0).mul_(mask)
        if ctx.needs_input_grad[2]:
            by_bias = gradient.reshape(-1, channels).sum(0).mul_(mask)
        if ctx.needs_input_grad[0]:
            hat.mul_((both @ scale)[..., None])
            if mean is not None:
                hat.add_((gradient @ scale)[..., None])
            by_x = torch.mul(gradient, scale, out=both).addcmul_(hat, _share(mask), value=-1).mul_(rate)
        return by_x, by_weight, by_bias, None, None, None


def _share(mask: Tensor) -> Tensor:
    return mask / mask.sum().clamp_min(torch.finfo(mask.dtype).tiny)


def _normalised(x: Tensor, mean: Tensor | None, rate: Tensor, out: Tensor | None = None) -> Tensor:
    """(x - mean) * rate, in one pass over x."""
    return torch.mul(x, rate, out=out) if mean is None else torch.addcmul(-mean * rate, x, rate, out=out)
