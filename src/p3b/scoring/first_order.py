"""(m_e * dLoss/dm_e)^2 of every element at each step, whichever weights are frozen.

Where all gated weights want a gradient, their own gradients tell it (`criteria.taylor`), at no cost. A frozen weight has none,
and that is no score of zero: then the gates' own gradients are collected while the model is pruned, which says the same by the
chain rule. Nothing of it reaches the weights: what is frozen stays as it is, and its gradient stays absent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p3b.errors import TrainingError
from p3b.scoring.criteria import of_all, taylor, taylor_of_stream
from p3b.scoring.meter import IntervalMeter, Reduce
from p3b.scoring.removal import by_gates, by_weights
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout


class FirstOrder:
    """Reads the scores of a step; the gates collect where a weight is frozen when pruning begins (`p3b.pruner`).

    Args:
        layout: of the model; where the stream is prunable its channels come last.
        model: whose gradients are read.
        reduce: mean of a tensor over all ranks: gradients of gates are not averaged by a distributed wrapper.
    """

    def __init__(self, layout: ModelLayout, model: nn.Module, reduce: Reduce) -> None:
        self._layout, self._model, self._reduce = layout, model, reduce
        self._weights = dict(model.named_parameters())
        self._gates: Gates | None = None
        self._gated: dict[str, nn.Parameter] = {}

    def attach(self, gates: Gates) -> None:
        """Take note of the gates that the masks act through."""
        self._gates, self._gated = gates, gates.gated_parameters(self._model)

    def add_to(
        self,
        meter: IntervalMeter,
        gradients_finite: Tensor,
        scaler: torch.amp.GradScaler | None = None,
        *,
        removal: bool = False,
    ) -> None:
        """Add (N,) float32 "scores" from the backward passes since the last step.

        Args:
            meter: of the interval.
            gradients_finite: 0-dim bool, of the weights' gradients: where it is false nothing is added.
            scaler: of the loss: gradients of weights are unscaled by now, those of gates are not.
            removal: add (B,) float32 "removal" as well, (dLoss/ds_b)^2 of every block (`p3b.scoring.removal`).

        Raises:
            TrainingError: there is no gradient, or a weight was frozen after pruning had begun.
        """
        if self._gates is not None and self._gates.collects:
            scores_N, removal_B = self._of_gates(self._gates, scaler, removal)
            gradients_finite = gradients_finite & scores_N.isfinite().all()
        else:
            self._require_gradients()
            removal_B = by_weights(self._layout, self._weights) if removal else None
            scores_N = of_all(taylor, self._layout, self._weights)
            if self._layout.stream is not None:
                scores_N = torch.cat([scores_N, taylor_of_stream(self._layout.stream, self._weights)])
        if self._gates is not None and self._gates.active is not None:
            scores_N = self._gates.active.complete(scores_N, gradients_finite)
        meter.add("scores", scores_N, gradients_finite)
        if removal_B is not None:
            meter.add("removal", removal_B.square(), gradients_finite)

    def forget(self) -> None:
        """Let go of what the step has left in the gates."""
        if self._gates is not None:
            self._gates.clear_gradients()

    def _of_gates(self, gates: Gates, scaler: torch.amp.GradScaler | None, removal: bool) -> tuple[Tensor, Tensor | None]:
        gradients = gates.gradients()
        by_mask_N = torch.cat([gates.masks[gate] * gradients[gate] for gate in self._layout.gates]).float()
        removal_B = by_gates(self._layout, gates, gradients) if removal else by_mask_N[:0]
        gates.clear_gradients()
        both = torch.cat([by_mask_N, removal_B])
        if scaler is not None and scaler.is_enabled():
            both = both / scaler.get_scale()
        scores_N, removal_B = self._reduce(both).split([len(by_mask_N), len(removal_B)])
        return scores_N.square(), removal_B if removal else None

    def _require_gradients(self) -> None:
        frozen = [key for key, parameter in self._gated.items() if not parameter.requires_grad]
        if frozen:
            raise TrainingError(
                f"{frozen[0]} was frozen after pruning had begun, so that it has no gradient to be scored by. Freeze layers "
                "before the step at which pruning starts, or before the pruner is made."
            )
        if self._gated and all(parameter.grad is None for parameter in self._gated.values()):
            raise TrainingError(
                "No layer has a gradient that elements could be scored by. Call pruner.step() after loss.backward(), before "
                "optimizer.step() and optimizer.zero_grad()."
            )


def require_signal(meter: IntervalMeter) -> None:
    """TrainingError where steps were counted in the last interval and every score of it is zero: that ranks nothing."""
    scores_N = meter.mean("scores")
    if scores_N is not None and meter.steps("scores") > 0 and not scores_N.any():
        raise TrainingError(
            "Every score of the last interval is zero, so that there is no order to prune by: gradients were zero whenever "
            "pruner.step() was called. Call it after loss.backward(), before optimizer.zero_grad()."
        )
