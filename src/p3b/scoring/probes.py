"""The paper's probes: two per block that read features and answer with class logits (section 3 of the method).

S samples, N tokens, D width, (H, W) patch grid, C classes, B blocks.
Source: Glandorf and Rosenhahn, arXiv 2506.23675, section 3.1.

Batch norm in the patch probe looks at the whole batch, also where several processes share it: otherwise the benefit of a block
would depend on how many there are. Blocks go one after the other, so that what is published stays as it is, bit for bit;
`batched` holds cheaper probes, of all blocks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from p3b.scoring.estimator import Criterion, Probes, compare
from p3b.scoring.maps import as_map
from p3b.scoring.meter import Reduce, is_alone
from p3b.scoring.moments import moments_of_all, normalise
from p3b.vit.layout import ModelLayout


class BlockProbes(Probes):
    """The class-token probe and the patch probe of every block: 2B probes, each applied to its block's input and output.

    Args:
        layout: of the model whose features are read.
        reduce: mean of a tensor over all ranks, which hold equal shares of the batch; the identity in a single process.
    """

    def __init__(self, layout: ModelLayout, reduce: Reduce) -> None:
        super().__init__()
        self._reduce = reduce
        self._alone: bool | None = None
        self._layout = layout
        num_blocks = len(layout.blocks)
        self.cls_probes = nn.ModuleList(nn.Linear(layout.width, layout.num_classes) for _ in range(num_blocks))
        # Features arrive as (S, H * W, D): as a map that is channels-last, so the convolutions are laid out alike.
        self.patch_probes = nn.ModuleList(
            _patch_probe(layout.width, layout.num_classes).to(memory_format=torch.channels_last) for _ in range(num_blocks)
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

    def no_weight_decay(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.ndim <= 1]

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
            features = [
                probe[relu](normalise(x_SDHW, probe[norm].weight, probe[norm].bias, *moments))
                for probe, x_SDHW, moments in zip(probes, features, moments_of_all(self._reduce, features), strict=True)
            ]
        logits = [probe[6:](x_SDHW) for probe, x_SDHW in zip(probes, features, strict=True)]
        return list(zip(logits[::2], logits[1::2], strict=True))

    def _read(self, x_SND: Tensor) -> tuple[Tensor, Tensor]:
        """What the two probes see: the class token (or the mean patch token where there is none), the patches as a map."""
        patches_SND = x_SND[:, self._layout.prefix_tokens :]
        token_SD = x_SND[:, 0] if self._layout.has_class_token else patches_SND.mean(1)
        kind = x_SND.device.type
        if torch.is_autocast_enabled(kind):  # once here, and not by each of the two probes that read it
            patches_SND = patches_SND.to(torch.get_autocast_dtype(kind))
        return token_SD, as_map(patches_SND, self._layout)


def _patch_probe(width: int, num_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        # Running statistics are for evaluation, which a probe never meets.
        layers += [
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, MeanOverPlaces(), nn.Linear(width, num_classes))


class MeanOverPlaces(nn.Module):
    """(S, K, H, W) -> (S, K). torch's pooling gives a gradient in an order that the layer before is slow to read."""

    def forward(self, x_SKHW: Tensor) -> Tensor:
        return x_SKHW.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def _before_and_after(probes: nn.ModuleList, features: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (S, C) of each block's probe on the block's input and output, computed when they are asked for."""
    return ((probe(features[b]), probe(features[b + 1])) for b, probe in enumerate(probes))
