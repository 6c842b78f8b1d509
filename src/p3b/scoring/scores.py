"""Scores of all elements of a network in one vector: what a method ranks them by.

N elements over all gates, block after block and gate after gate, as the layout has them (`criteria.by_gate` takes them apart).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p3b.scoring.criteria import magnitude, of_all
from p3b.scoring.first_order import FirstOrder, require_signal
from p3b.scoring.meter import IntervalMeter, Reduce
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout


class ElementScores(Protocol):
    """A score for every element, whichever it is; the same on every rank."""

    @property
    def needs_gradients(self) -> bool:
        """Whether scores are read off gradients, so that those of frozen weights have to be found by their gates."""
        ...

    def attach(self, gates: Gates) -> None:
        """Take note of the gates that the masks act through."""
        ...

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take in what the step measured; a step whose gradients are not finite (0-dim bool) counts for nothing."""
        ...

    def close(self) -> None:
        """End the interval between two mask updates."""
        ...

    def of_interval(self) -> Tensor | None:
        """(N,) scores of the last finished interval, on the CPU; None where nothing was measured."""
        ...

    def of_last_two(self) -> Tensor | None:
        """(N,) scores of the last two finished intervals together, on the CPU; None where nothing was measured."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that later scores depend on, besides the model's weights."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


class TaylorScores:
    """Squared first-order Taylor scores (`FirstOrder`), averaged over the interval and over ranks.

    Args:
        layout: of the model.
        model: whose gradients are scored.
        reduce: mean of a tensor over all ranks.
    """

    needs_gradients = True

    def __init__(self, layout: ModelLayout, model: nn.Module, reduce: Reduce) -> None:
        self._reduce, self._device = reduce, next(model.parameters()).device
        self._first_order = FirstOrder(layout, model, reduce)
        self._meter = IntervalMeter()

    def attach(self, gates: Gates) -> None:
        self._first_order.attach(gates)

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        self._first_order.add_to(self._meter, gradients_finite, scaler)

    def close(self) -> None:
        self._meter.close()

    def of_interval(self) -> Tensor | None:
        require_signal(self._meter)
        return self._reduced(self._meter.mean("scores"))

    def of_last_two(self) -> Tensor | None:
        return self._reduced(self._meter.mean_of_last_two("scores"))

    def state_dict(self) -> dict[str, Any]:
        return self._meter.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._meter.load_state_dict(state, self._device)

    def _reduced(self, scores_N: Tensor | None) -> Tensor | None:
        return None if scores_N is None else self._reduce(scores_N).cpu()


class _Unmeasured:
    """What scores that are read off no training step have in common."""

    needs_gradients = False

    def attach(self, gates: Gates) -> None:
        pass

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        pass

    def close(self) -> None:
        pass


class MagnitudeScores(_Unmeasured):
    """L2 norms of the weights that elements carry (`criteria.magnitude`), as they are when they are asked for.

    Args:
        layout: of the model.
        model: whose weights are measured.
        reduce: mean of a tensor over all ranks, whose weights are equal: it irons out what their devices round differently.
    """

    def __init__(self, layout: ModelLayout, model: nn.Module, reduce: Reduce) -> None:
        self._layout, self._weights, self._reduce = layout, dict(model.named_parameters()), reduce

    def of_interval(self) -> Tensor:
        return self._reduce(of_all(magnitude, self._layout, self._weights)).cpu()

    def of_last_two(self) -> Tensor:
        return self.of_interval()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class RandomScores(_Unmeasured):
    """Scores in [0, 1) that are drawn once, so that an element that is given up stays so.

    They are part of the state: a run that is resumed goes on with them, whatever torch would draw by then.

    Args:
        layout: of the model.
        seed: of the draw, the same on all ranks; torch's global generator is left alone.
    """

    def __init__(self, layout: ModelLayout, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self._scores_N = torch.rand(sum(layout.gates.values()), generator=drawn, dtype=torch.float64)

    def of_interval(self) -> Tensor:
        return self._scores_N

    def of_last_two(self) -> Tensor:
        return self._scores_N

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores_N}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: the scores are those of a model with other gates.
        """
        if state["scores"].shape != self._scores_N.shape:
            raise ValueError(f"{len(state['scores'])} random scores for {len(self._scores_N)} elements")
        self._scores_N = state["scores"].cpu()
