"""Benefit by probes that learn by gradient beside the model, with an optimizer of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor

from p3b.core.finite import all_finite, step_where
from p3b.scoring.estimator import Criterion, Probes
from p3b.scoring.meter import Reduce, average, is_alone


class TrainedProbes:
    """Observes at every step; probes learn by the sum of their losses, with AdamW.

    Args:
        probes: what measures and learns.
        reduce: mean of a tensor over all ranks; the identity in a single process.
        lr: learning rate, not scaled with the batch size.
        weight_decay: of the probes' weights; none on biases and norms.
    """

    every = 1

    def __init__(self, probes: Probes, reduce: Reduce, lr: float, weight_decay: float) -> None:
        self.probes, self._reduce = probes, reduce
        self._alone: bool | None = None
        groups = param_groups_weight_decay(probes, weight_decay, no_weight_decay_list=probes.no_weight_decay())
        self._optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)

    def due(self) -> bool:
        return True

    def observe(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.probes(stream_SND, criterion, targets)

    def train(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        gradients = self._average_gradients()
        if gradients:
            if scaler is not None:
                scaler.unscale_(self._optimizer)
            step_where(self._optimizer, gradients_finite & all_finite(gradients))
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"probes": self.probes.state_dict(), "probe_optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: the state holds other probes.
        """
        found, own = state["probes"], self.probes.state_dict()
        if {name: tensor.shape for name, tensor in found.items()} != {name: tensor.shape for name, tensor in own.items()}:
            raise ValueError(
                "its probes are not those that measure benefit here; they belong to another --prune-benefit or model, or to a "
                "version of P3B that kept the probes of each block apart"
            )
        self.probes.load_state_dict(found)
        self._optimizer.load_state_dict(state["probe_optimizer"])

    def _average_gradients(self) -> list[Tensor]:
        """Average over ranks: probes are outside the distributed wrapper, since they run after its forward pass.

        Returns:
            The gradients, which the probes' parameters hold.
        """
        gradients = [parameter.grad for parameter in self.probes.parameters() if parameter.grad is not None]
        if not gradients:
            return []
        if self._alone is None:
            self._alone = is_alone(self._reduce, gradients[0])
        if not self._alone:  # a single process is spared the copies
            average(self._reduce, gradients)
        return gradients
