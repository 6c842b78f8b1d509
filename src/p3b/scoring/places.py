"""Benefit for dense prediction: a linear probe answers at every patch, and the task's own criterion judges the map of answers.

    benefit_b = L(h_b(x_{b-1})) - L(h_b(x_b)),    h_b(x) = W_b x + c_b at each place of the patch grid

L is whatever the task has for maps: a cross-entropy of pixels, a regression of depths, or the distance to what another network
says at each place. There is one probe for each block and no second one for a class token, which knows no places.

S samples, N tokens, D width, (H, W) patch grid, C numbers at each place, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p3b.scoring.estimator import Criterion, Probes, at_least_float32
from p3b.scoring.maps import as_map
from p3b.vit.layout import ModelLayout


class PlaceProbes(Probes):
    """B linear probes of patches, each applied to its block's input and output.

    Args:
        layout: of the model whose features are read; its `num_classes` is C.
    """

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        self._layout = layout
        self.probes = nn.ModuleList(nn.Linear(layout.width, layout.num_classes) for _ in layout.blocks)

    def forward(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `BenefitEstimator.observe`, where the criterion is given (S, C, H, W); both rows of benefits are the same."""
        losses = [
            torch.stack([criterion(self._answers(probe, x_SND), targets) for x_SND in stream_SND[b : b + 2]])
            for b, probe in enumerate(self.probes)
        ]
        losses_B2 = torch.stack(losses)
        benefits_B = (losses_B2[:, 0] - losses_B2[:, 1]).detach()
        return torch.stack([benefits_B, benefits_B]), losses_B2.sum()

    def no_weight_decay(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.ndim <= 1]

    def _answers(self, probe: nn.Module, x_SND: Tensor) -> Tensor:
        """(S, C, H, W)"""
        return as_map(at_least_float32(probe(x_SND[:, self._layout.prefix_tokens :])), self._layout)
