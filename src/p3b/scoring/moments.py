"""Batch norm over the samples of all ranks; torch's own for many processes works on GPUs alone.

S samples, K channels, (H, W) places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p3b.scoring.estimator import at_least_float32
from p3b.scoring.meter import Reduce

EPS = 1e-5
"""What torch's batch norm adds to the variance."""


def moments_of_all(reduce: Reduce, maps_SKHW: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each map's channels over the samples and places of all ranks, (K,) float64 each.

    Takes one reduction for all maps, and one in the backward pass.
    """
    means_MK, squares_MK = _GlobalMoments.apply(reduce, *maps_SKHW).unbind(1)
    variances_MK = (squares_MK - means_MK.square()).clamp(min=0)
    return list(zip(means_MK, variances_MK, strict=True))


def normalise(x_SKHW: Tensor, scale_K: Tensor, shift_K: Tensor, mean_K: Tensor, variance_K: Tensor) -> Tensor:
    """Batch norm by moments that are given; statistics and products are float32 or wider, as in torch's own."""
    wide = torch.promote_types(x_SKHW.dtype, torch.float32)
    scale_K = scale_K * (variance_K + EPS).rsqrt()
    shift_K = shift_K - mean_K * scale_K
    return (x_SKHW * _as_channels(scale_K, wide)).add_(_as_channels(shift_K, wide)).to(x_SKHW.dtype)


class _GlobalMoments(torch.autograd.Function):
    """Mean and mean square of each channel over the samples and places of all ranks.

    M maps (S, K, H, W), the same number on every rank -> (M, 2, K) float64. In float64 the variance may be taken as the mean
    square less the squared mean: what a rank measures is float32 and its variance is taken around its own mean.
    The gradient of a mean over ranks is the mean over ranks of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, reduce: Reduce, *maps_SKHW: Tensor) -> Tensor:
        ctx.reduce = reduce
        ctx.save_for_backward(*maps_SKHW)
        local = []
        for x_SKHW in maps_SKHW:
            spread, mean = torch.var_mean(at_least_float32(x_SKHW), (0, 2, 3), correction=0)
            local += [mean.double(), spread.double() + mean.double().square()]
        return reduce(torch.stack(local).unflatten(0, (-1, 2)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d mean / dx = 1 / n and d square / dx = 2 x / n, with n = S H W of this rank."""
        by_map = ctx.reduce(gradients[0])
        found = []
        for x_SKHW, (by_mean, by_square) in zip(ctx.saved_tensors, by_map, strict=True):
            wide = at_least_float32(x_SKHW)
            count = x_SKHW.numel() // x_SKHW.shape[1]
            constant, slope = (_as_channels(gradient / count, wide.dtype) for gradient in (by_mean, 2 * by_square))
            found.append(torch.addcmul(constant, wide, slope).to(x_SKHW.dtype))
        return None, *found


def _as_channels(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).view(1, -1, 1, 1)
