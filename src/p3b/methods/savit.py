"""SAViT: how much of heads, hidden channels and the residual stream goes is decided together, by how they interact.

Over the last two intervals before the schedule ends two statistics are averaged: for every element the squared first-order
Taylor score, and the matrix H of interactions between the three kinds (`p3b.scoring.interactions`). The shares a, b, c of the
kinds that go minimise (a, b, c) H (a, b, c)^T where the network meets its budget (`p3b.core.collaboration`, which finds the
minimum directly), and each kind drops its lowest elements, ranked over all layers. Nothing goes before that: the method prunes
once, and fine-tuning has to follow.

Zheng et al., "SAViT: Structure-Aware Vision Transformer Pruning via Collaborative Optimization", NeurIPS 2022. As published:
scores, H, its weights, one cut for all. Not as published: the exact minimum in place of a search by evolution; a budget in
parameters, met exactly (hidden channels make up for what whole heads round); statistics over two intervals between mask updates
in place of a tenth of an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.core.collaboration import CostSurface, cheapest_shares
from p3b.core.schedule import Schedule
from p3b.errors import BudgetError, ConfigError, TrainingError
from p3b.methods.base import Criterion, Decision, decisions_by_kept
from p3b.scoring.first_order import FirstOrder, require_signal
from p3b.scoring.interactions import KINDS, draw_layers, interaction_matrix
from p3b.scoring.meter import IntervalMeter, Reduce
from p3b.vit.anatomy.weights import STREAM, dims_of
from p3b.vit.cost import block_params, other_params
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout
from p3b.vit.narrow_stream import LEAST_STREAM


class Savit:
    """The method `savit`.

    Args:
        model: dense model whose gradients are scored.
        layout: its map, with the dimensions heads, hidden and stream.
        prune_ratio: rho, share of parameters that goes, in [0, 1).
        reduce: mean of a tensor over all ranks.
        blocks_only: count the budget over the blocks alone; what the stream saves outside them comes on top.
        every: H is measured at every so many optimizer steps, >= 1.
        images: of a rank's batch that it is measured on, >= 1: it costs about as much as five ordinary steps on them.
        seed: of the layers that are drawn, the same on all ranks.

    Raises:
        ConfigError: an option outside its range. BudgetError: a prune ratio that cannot be met.
    """

    def __init__(
        self,
        model: VisionTransformer,
        layout: ModelLayout,
        prune_ratio: float,
        reduce: Reduce,
        *,
        blocks_only: bool = False,
        every: int = 10,
        images: int = 16,
        seed: int = 0,
    ) -> None:
        if every < 1 or images < 1:
            raise ConfigError(f"every and images must be at least 1, got {every} and {images}.")
        self._model, self._layout, self._reduce = model, layout, reduce
        self._blocks_only, self._every, self._images, self._seed = blocks_only, every, images, seed
        self._device = next(model.parameters()).device
        self._first_order = FirstOrder(layout, model, reduce)
        self._surface = cost_surface(layout, blocks_only)
        dense = self._surface.at(np.zeros(3))
        if not 0 <= prune_ratio < 1:
            raise BudgetError(f"The prune ratio must lie in [0, 1), got {prune_ratio}.")
        self._budget = (1 - prune_ratio) * dense
        # Whether the budget can be met is asked before training.
        heads = sum(block.sizes["heads"] for block in layout.blocks if block.kind == "attn")
        self._least_heads = int(layout.has_class_token)  # without any head a class token hears nothing of the image
        self._most = (1 - self._least_heads / heads, 1.0, max(0.0, 1 - LEAST_STREAM / layout.width))
        cheapest_shares(np.eye(3), self._surface, self._budget, self._most)

        self._meter = IntervalMeter()
        self._first_step = 0
        self._steps, self._looks, self._next_look = 0, 0, 0
        self._batch: tuple[Criterion, Tensor, Any] | None = None
        self._seen: Tensor | None = None
        self._listen()

    needs_gradients = True
    probes = False

    def attach(self, gates: Gates, schedule: Schedule) -> None:
        self._first_order.attach(gates)
        # Only the last two intervals count, the last of which may be cut short: what is measured before them is thrown away.
        # Steps are counted from the end of the warm-up, which leaves no trace here, so that runs may share one.
        updates = (schedule.final - schedule.start - 1) // schedule.update_every
        self._first_step = self._next_look = max(0, updates - 1) * schedule.update_every

    def loss(self, criterion: Criterion, targets: Any) -> Tensor:
        if self._seen is not None and isinstance(targets, Tensor):
            self._batch = (criterion, self._seen[: self._images], targets[: self._images])
        self._seen = None
        return torch.zeros((), device=self._device)

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        if self._measures():
            self._first_order.add_to(self._meter, gradients_finite, scaler)
            if self._batch is not None:
                self._look(*self._batch, gradients_finite)
        self._first_order.forget()
        self._steps += 1
        self.discard()

    def discard(self) -> None:
        self._batch = None

    def train_own(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        pass

    def renew(self, kept_params: Mapping[str, int], progress: float, tau: float) -> Decision:
        self._meter.close()
        masks = {gate: torch.ones(size) for gate, size in self._layout.gates.items()}
        return self._decision(masks, progress, tau)

    def last(self, kept_params: Mapping[str, int]) -> Decision:
        self._meter.close()
        require_signal(self._meter)
        scores_N, interactions = (self._meter.mean_of_last_two(name) for name in ("scores", "interactions"))
        if scores_N is None or interactions is None:
            raise TrainingError(
                "Nothing has been measured that masks could be decided from. Call pruner.loss(criterion, targets) after each "
                "forward pass, with targets as a tensor, and pruner.step() after each backward pass until the schedule ends. "
                "If that was done, no gradient was finite in the last two intervals: lower the learning rate, or train in "
                "--precision fp32 or bf16."
            )
        gates = self._layout.gates
        scores = dict(zip(gates, self._reduce(scores_N).double().cpu().split(list(gates.values())), strict=True))
        form = interactions.double().cpu().numpy()
        shares = cheapest_shares(form, self._surface, self._budget, self._most)
        masks = self._cut(scores, shares)
        decision = self._decision(masks, 1.0, 0.0)
        told = ", ".join(
            f"{share:.1%} of {kind}" for kind, share in zip(("heads", "hidden channels", "the stream"), shares, strict=True)
        )
        rows = "; ".join(", ".join(f"{value:.3g}" for value in row) for row in form)
        return replace(decision, note=f"SAViT prunes {told}; interactions {rows}")

    def detach(self) -> None:
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        counts = {"steps": self._steps, "looks": self._looks, "next_look": self._next_look}
        return {"name": "savit", "meter": self._meter.state_dict(), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError, KeyError: it belongs to another method.
        """
        if state["name"] != "savit":
            raise ValueError(f"it is a state of {state['name']}, this is savit")
        self._meter.load_state_dict(state["meter"], self._device)
        self._steps, self._looks, self._next_look = (int(state[key]) for key in ("steps", "looks", "next_look"))

    def _listen(self) -> None:
        """Take note of the images of steps at which H is measured."""

        def see(_model: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # a function: a copy of the model shares it
            if torch.is_grad_enabled() and self._steps >= self._next_look:
                self._seen = inputs[0].detach()

        self._handle = self._model.register_forward_pre_hook(see)

    def _measures(self) -> bool:
        return self._steps >= self._first_step

    def _look(self, criterion: Criterion, images: Tensor, targets: Tensor, gradients_finite: Tensor) -> None:
        """Measure H once; all ranks look at the same steps and draw the same layers. Where that fails, the next step looks."""
        if not gradients_finite:
            return
        layers = draw_layers(self._layout, torch.Generator().manual_seed(self._seed * 1_000_003 + self._looks))
        self._handle.remove()
        try:
            found = interaction_matrix(self._model, self._layout, images, lambda outputs: criterion(outputs, targets), layers)
        finally:
            self._listen()
        self._looks += 1
        found = self._reduce(found)
        if finite := found.isfinite().all():
            self._meter.add("interactions", found, finite)
            self._next_look = self._steps + self._every

    def _cut(self, scores: Mapping[str, Tensor], shares: np.ndarray) -> dict[str, Tensor]:
        """Hard masks: heads and stream by the nearest counts, hidden channels by what is left of the budget."""
        layout = self._layout
        orders = {
            kind: _Ranking({name: score for name, score in scores.items() if name.split(".")[-1] == kind}) for kind in KINDS
        }
        heads, stream = (shares[KINDS.index(kind)] * orders[kind].size for kind in ("heads", STREAM))
        hidden = orders["hidden"].kept_of_each()  # (T + 1, gates) still there when t have gone
        most_heads = orders["heads"].size - self._least_heads
        best: tuple[float, dict[str, Tensor]] | None = None
        for away in range(layout.width):
            # The nearest counts come first, further ones only where hidden channels alone cannot make up for what they miss.
            for pruned_heads, pruned_stream in itertools.product(_near(heads, 0), _near(stream, away)):
                if not (0 <= pruned_heads <= most_heads and 0 <= pruned_stream <= layout.width - LEAST_STREAM):
                    continue
                masks = orders["heads"].masks(pruned_heads) | orders[STREAM].masks(pruned_stream)
                left = self._params_left(masks, hidden)
                count = int((left - self._budget).abs().argmin())
                missed = abs(float(left[count]) - self._budget)
                if best is None or missed < best[0]:
                    best = (missed, masks | orders["hidden"].masks(count))
            if best is not None and best[0] <= 5e-4 * self._budget:
                break
        if best is None:
            raise BudgetError(
                "No counts of heads, hidden channels and stream channels meet the budget; choose another prune ratio."
            )
        return {gate: best[1][gate] for gate in layout.gates}

    def _params_left(self, masks: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """(T + 1,) float64 parameters that count when t hidden channels of the network have gone, beside what masks say."""
        layout, stream = self._layout, masks[STREAM].sum().long()
        total = torch.zeros(len(hidden), dtype=torch.float64)
        if not self._blocks_only:
            total += int(other_params(layout, stream))
        gates = iter(hidden.unbind(1))
        for block in layout.blocks:
            kept = {STREAM: stream} | (
                {"hidden": next(gates)} if block.kind == "mlp" else {"heads": masks[block.gate("heads")].sum().long()}
            )
            total += block_params(block, kept)
        return total

    def _decision(self, masks: Mapping[str, Tensor], progress: float, tau: float) -> Decision:
        return Decision(masks, decisions_by_kept(self._layout, masks), progress, tau)


def cost_surface(layout: ModelLayout, blocks_only: bool) -> CostSurface:
    """Parameters as a function of the shares of heads, hidden channels and stream channels that stay, read off the layout."""
    coefficients: dict[tuple[bool, bool, bool], float] = {}

    def add(dims: set[str], size: int) -> None:
        along = ("heads" in dims, "hidden" in dims, STREAM in dims)
        coefficients[along] = coefficients.get(along, 0.0) + size

    for block in layout.blocks:
        for weight in block.weights:
            size = 1
            for axis in weight.axes:
                for factor in axis:
                    size *= block.sizes[factor] if isinstance(factor, str) else factor
            add({dim for axis in weight.axes for dim in dims_of(axis)}, size)
    if not blocks_only:
        with_stream = int(other_params(layout, layout.width)) - int(other_params(layout, 0))
        add({STREAM}, with_stream)
        add(set(), layout.other_params - with_stream)
    return CostSurface(coefficients)


class _Ranking:
    """All elements of one kind in one ranking, lowest score first; equal ones in the network's order."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._sizes = {gate: len(score) for gate, score in scores.items()}
        self._order = torch.argsort(torch.cat(list(scores.values())), stable=True)
        self.size = len(self._order)

    def masks(self, pruned: int) -> dict[str, Tensor]:
        """0/1 masks by gate name with so many elements gone."""
        mask = torch.ones(self.size)
        mask[self._order[:pruned]] = 0
        return dict(zip(self._sizes, mask.split(list(self._sizes.values())), strict=True))

    def kept_of_each(self) -> Tensor:
        """(n + 1, gates) elements that each gate still has when t of all have gone."""
        sizes = torch.tensor(list(self._sizes.values()))
        gates = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[self._order]
        gone = torch.nn.functional.one_hot(gates, len(sizes)).cumsum(0)
        return torch.cat([sizes[None], sizes - gone])


def _near(count: float, away: int) -> list[int]:
    """The whole numbers next to a count, so many further away."""
    below = int(count)
    return sorted({below - away, below + 1 + away})
