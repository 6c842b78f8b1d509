"""The paper's probes: two per block that read features and answer with class logits (section 3 of the method).

S samples, N tokens, D width, (H, W) patch grid, C classes, B blocks.
Source: Glandorf and Rosenhahn, arXiv 2506.23675, section 3.1.

Batch norm in the patch probe looks at the whole batch, also where several processes share it: otherwise the benefit of a block
would depend on how many there are. torch's own batch norm for many processes works on GPUs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from p3b.scoring.estimator import Criterion, compare
from p3b.scoring.meter import Reduce, is_alone
from p3b.vit.layout import ModelLayout


class BlockProbes(nn.Module):
    """The class-token probe and the patch probe of every block: 2B probes, each applied to its block's input and output.

    Args:
        layout: of the model whose features are read.
        reduce: mean of a tensor over all ranks, which hold equal shares of the batch; the identity in a single process.
        rank: channels that both 3x3 convolutions of a patch probe work with, after a 1x1 convolution from D channels to
            them: a 3x3 convolution of that rank. None: D channels throughout, as in the paper.
    """

    def __init__(self, layout: ModelLayout, reduce: Reduce, rank: int | None = None) -> None:
        super().__init__()
        self._reduce = reduce
        self._alone: bool | None = None
        self._prefix_tokens, self._grid, self._has_class_token = layout.prefix_tokens, layout.grid, layout.has_class_token
        num_blocks = len(layout.blocks)
        self.cls_probes = nn.ModuleList(nn.Linear(layout.width, layout.num_classes) for _ in range(num_blocks))
        # Features arrive as (S, H * W, D): as a map that is channels-last, so the convolutions are laid out alike.
        self.patch_probes = nn.ModuleList(
            _patch_probe(layout.width, rank, layout.num_classes).to(memory_format=torch.channels_last)
            for _ in range(num_blocks)
        )

    def forward(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Score every block's input and output by the same probe.

        With several ranks the pass takes two reductions, and the backward pass two: all ranks have to come here together.

        Args:
            stream_SND: x_0 .. x_B, detached, each (S, N, D).
            criterion: the task loss, from (S, C) logits and targets to a scalar.
            targets: what the task loss takes; soft labels of mixup included.

        Returns:
            (2, B) benefits: CE(h(x_{b-1})) - CE(h(x_b)) for class token and patches, without a graph;
            and the sum of all 4B probe losses, to be added to the training loss. Both are over this rank's samples.
        """
        tokens_SD, maps_SDHW = zip(*(self._read(x_SND) for x_SND in stream_SND), strict=True)
        cls_logits = _before_and_after(self.cls_probes, tokens_SD)
        if self.alone:
            patch_logits, probes = _before_and_after(self.patch_probes, maps_SDHW), [*self.cls_probes, *self.patch_probes]
            return compare(chain(cls_logits, patch_logits), criterion, targets, probes)
        return compare(chain(cls_logits, self._in_lockstep(maps_SDHW)), criterion, targets)

    @property
    def alone(self) -> bool:
        """Whether one process has the whole batch. The first time all ranks have to ask together: it costs a reduction."""
        if self._alone is None:
            self._alone = is_alone(self._reduce, next(self.parameters()))
        return self._alone

    def _in_lockstep(self, maps_SDHW: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What `_before_and_after` yields, with batch norm over all ranks.

        All probes go layer by layer, side by side: reductions are dear, and so there is one for each norm, not for each probe.
        """
        probes: list[Any] = [probe for probe in self.patch_probes for _ in (0, 1)]
        features = [maps_SDHW[(number + 1) // 2] for number in range(len(probes))]
        for convolution, norm, relu in ((0, 1, 2), (3, 4, 5)):
            features = [probe[convolution](x_SDHW) for probe, x_SDHW in zip(probes, features, strict=True)]
            mean, square = _GlobalMoments.apply(self._reduce, *features).unbind(1)
            spread = (square - mean.square()).clamp(min=0)
            features = [
                probe[relu](_normalise(x_SDHW, probe[norm], mean[number], spread[number]))
                for number, (probe, x_SDHW) in enumerate(zip(probes, features, strict=True))
            ]
        logits = [probe[6:](x_SDHW) for probe, x_SDHW in zip(probes, features, strict=True)]
        return list(zip(logits[::2], logits[1::2], strict=True))

    def _read(self, x_SND: Tensor) -> tuple[Tensor, Tensor]:
        """What the two probes see: the class token (or the mean patch token where there is none), the patches as a map."""
        patches_SND = x_SND[:, self._prefix_tokens :]
        token_SD = x_SND[:, 0] if self._has_class_token else patches_SND.mean(1)
        kind = x_SND.device.type
        if torch.is_autocast_enabled(kind):  # once here, and not by each of the two probes that read it
            patches_SND = patches_SND.to(torch.get_autocast_dtype(kind))
        return token_SD, patches_SND.unflatten(1, self._grid).permute(0, 3, 1, 2)


def _patch_probe(width: int, rank: int | None, num_classes: int) -> nn.Sequential:
    channels, convolutions = rank or width, []
    for number in range(2):
        convolution: nn.Module = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        if number == 0 and rank is not None:
            convolution = nn.Sequential(nn.Conv2d(width, rank, 1, bias=False), convolution)
        # Running statistics are for evaluation, which a probe never meets.
        convolutions += [convolution, nn.BatchNorm2d(channels, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*convolutions, MeanOverPlaces(), nn.Linear(channels, num_classes))


class MeanOverPlaces(nn.Module):
    """(S, K, H, W) -> (S, K). torch's pooling gives a gradient in an order that the layer before is slow to read."""

    def forward(self, x_SKHW: Tensor) -> Tensor:
        return x_SKHW.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def _before_and_after(probes: nn.ModuleList, features: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (S, C) of each block's probe on the block's input and output, computed when they are asked for."""
    return ((probe(features[b]), probe(features[b + 1])) for b, probe in enumerate(probes))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _GlobalMoments(torch.autograd.Function):
    """Mean and mean square of each channel over the samples and places of all ranks.

    M maps (S, D, H, W), the same number on every rank -> (M, 2, D) float64. In float64 the variance may be taken as the mean
    square less the squared mean: what a rank measures is float32 and its variance is taken around its own mean.
    The gradient of a mean over ranks is the mean over ranks of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, reduce: Reduce, *maps_SDHW: Tensor) -> Tensor:
        ctx.reduce = reduce
        ctx.save_for_backward(*maps_SDHW)
        local = []
        for x_SDHW in maps_SDHW:
            spread, mean = torch.var_mean(_at_least_float32(x_SDHW), (0, 2, 3), correction=0)
            local += [mean.double(), spread.double() + mean.double().square()]
        return reduce(torch.stack(local).unflatten(0, (-1, 2)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d mean / dx = 1 / n and d square / dx = 2 x / n, with n = S H W of this rank."""
        by_map = ctx.reduce(gradients[0])
        found = []
        for x_SDHW, (by_mean, by_square) in zip(ctx.saved_tensors, by_map, strict=True):
            wide = _at_least_float32(x_SDHW)
            count = x_SDHW.numel() // x_SDHW.shape[1]
            constant, slope = (_as_channels(gradient / count, wide.dtype) for gradient in (by_mean, 2 * by_square))
            found.append(torch.addcmul(constant, wide, slope).to(x_SDHW.dtype))
        return None, *found


def _normalise(x_SDHW: Tensor, norm: nn.BatchNorm2d, mean: Tensor, spread: Tensor) -> Tensor:
    """Batch norm by (D,) mean and variance that are given; statistics and products are float32 or wider, as in torch's own."""
    wide = torch.promote_types(x_SDHW.dtype, torch.float32)
    scale = norm.weight * (spread + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    return (x_SDHW * _as_channels(scale, wide)).add_(_as_channels(shift, wide)).to(x_SDHW.dtype)


def _as_channels(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).view(1, -1, 1, 1)
