"""Block benefit: two small probes per block that read features and answer with class logits (section 3 of the method).

S samples, N tokens, D width, (H, W) patch grid, C classes, B blocks.
Source: Glandorf and Rosenhahn, arXiv 2506.23675, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from p3b.vit.layout import ModelLayout

Criterion = Callable[[Tensor, Tensor], Tensor]


class BlockProbes(nn.Module):
    """The class-token probe and the patch probe of every block: 2B probes, each applied to its block's input and output."""

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        self._prefix_tokens, self._grid, self._has_class_token = layout.prefix_tokens, layout.grid, layout.has_class_token
        num_blocks = len(layout.blocks)
        self.cls_probes = nn.ModuleList(nn.Linear(layout.width, layout.num_classes) for _ in range(num_blocks))
        # Features arrive as (S, H * W, D): as a map that is channels-last, so the convolutions are laid out alike.
        self.patch_probes = nn.ModuleList(
            _patch_probe(layout.width, layout.num_classes).to(memory_format=torch.channels_last) for _ in range(num_blocks)
        )

    def forward(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Score every block's input and output by the same probe.

        Args:
            stream_SND: x_0 .. x_B, detached, each (S, N, D).
            criterion: the task loss, from (S, C) logits and targets to a scalar.
            targets: what the task loss takes; soft labels of mixup included.

        Returns:
            (2, B) benefits: CE(h(x_{b-1})) - CE(h(x_b)) for class token and patches, without a graph;
            and the sum of all 4B probe losses, to be added to the training loss.
        """
        readings = [self._read(x_SND) for x_SND in stream_SND]
        losses = [
            [criterion(probe(readings[b + side][which]).float(), targets) for side in (0, 1)]
            for which, probes in enumerate((self.cls_probes, self.patch_probes))
            for b, probe in enumerate(probes)
        ]
        before_after = torch.stack([torch.stack(pair) for pair in losses]).view(2, len(self.cls_probes), 2)
        benefits_2B = (before_after[..., 0] - before_after[..., 1]).detach()
        return benefits_2B, before_after.sum()

    def _read(self, x_SND: Tensor) -> tuple[Tensor, Tensor]:
        """What the two probes see: the class token (or the mean patch token where there is none), the patches as a map."""
        patches_SND = x_SND[:, self._prefix_tokens :]
        token_SD = x_SND[:, 0] if self._has_class_token else patches_SND.mean(1)
        return token_SD, patches_SND.unflatten(1, self._grid).permute(0, 3, 1, 2)


def _patch_probe(width: int, num_classes: int) -> nn.Sequential:
    convolutions: list[nn.Module] = []
    for _ in range(2):
        convolutions += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
