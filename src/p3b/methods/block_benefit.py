"""Pruning by Block Benefit (P3B).

Glandorf and Rosenhahn, "Pruning by Block Benefit: Exploring the Properties of Vision Transformer Blocks during Domain
Adaptation", arXiv 2506.23675.

    benefit_b    = CE(h_b(x_{b-1})) - CE(h_b(x_b))                    for a class-token and a patch probe h_b     scoring.probes
    r_t          = gamma * squash(benefit) / kept_params + (1 - gamma) * r_{t-1}                              core.allocation
    importance   = alpha * r^c + (1 - alpha) * r^p
    k_b          = min(1, c * importance_b),   sum k_b P_b = (1 - rho) (P_blocks + P_rest) - P_rest
    score_e      = mean over the interval of (m_e * dLoss/dm_e)^2                                           scoring.criteria
    mask         : the lowest ranks of a block go until it meets k_b P_b; soft, then hard                       core.masks

Departures from the paper and its published code:

- The budget is solved exactly and each block's share met to one element, instead of by trial and error.
- Where no block helps yet the last importance stands; the published division by max(u) would turn every sign.
- A block's kept parameters count as at least 1 % of its dense ones when the benefit is divided by them. Without this floor a
  block that has vanished for one interval has an unbounded importance in the next and takes the whole mean with it.
- Scores are read before the weights move, and gates are never moved by an optimizer.
- The model trains in training mode while it is pruned: drop path acts.
- Batch norm in the probes sees the batch of all processes, so that their number changes no benefit; it keeps no statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from p3b.core.allocation import (
    given_keep_ratios,
    keep_ratios,
    keep_ratios_sparing,
    mix_importance,
    update_importance,
)
from p3b.core.schedule import Schedule
from p3b.errors import ConfigError, ModelError, TrainingError, unknown_name
from p3b.methods.base import BlockShares, Criterion, Decision, require_align
from p3b.scoring.criteria import by_gate
from p3b.scoring.estimator import BenefitEstimator
from p3b.scoring.estimators import OF_MAPS, ProbeSettings, create_estimator
from p3b.scoring.first_order import FirstOrder, require_signal
from p3b.scoring.meter import IntervalMeter, Reduce
from p3b.scoring.removal import REMOVAL
from p3b.vit.active import ActiveWidths
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout
from p3b.vit.narrow_stream import narrow_stream
from p3b.vit.taps import Taps

LEAST_KEPT_SHARE = 0.01
ESTIMATORS_OF_MEANS = ("linear", "ridge")
"""Those that read the mean of the patches, whatever their number and places; the others read them as a map."""
OUTSIDE_BLOCKS = frozenset({"patch_embed", "pos_embed", "cls_token", "norm", "head"})
"""Parts that are never pruned: to spare them is to say what is so."""


class BlockBenefit:
    """P3B behind the `Method` protocol.

    Args:
        model: dense model whose residual stream is read and whose gradients are scored.
        layout: its map.
        prune_ratio: rho, share of parameters that goes, in [0, 1).
        reduce: mean of a tensor over all ranks.
        alpha: weight of the class token against the patches, in [0, 1].
        gamma: weight of a new interval in the smoothed importance, in (0, 1].
        benefit_scale: T in [0.01, 1000].
        blocks_only: count the budget over the blocks alone (P_rest = 0).
        stream: share of the residual stream's channels that goes, in [0, 1), the same ones in the whole model; 0, as published:
            the stream keeps its width. Else blocks read and write all of it, without indices; "auto" follows from the prune
            ratio (`p3b.vit.narrow_stream`).
        align: counts of kept channels are multiples of this in the last masks, and whole heads go where heads would be thin,
            if the layout has the dimension "heads"; 1 is off.
        spare: names of blocks that keep all they have: "blocks.0" (attention and MLP), "blocks.0.mlp"; the others give up more,
            the budget is met all the same. What lies outside the blocks ("head", "patch_embed") always stays.
        keep_ratios: given by hand, one per block; then nothing is probed and prune_ratio plays no part.
        estimator: how benefits are measured, by name (`p3b.scoring.estimators`); "paper" is the published way, "low_rank" that
            with narrow convolutions, "removal" a way without probes (`p3b.scoring.removal`).
        probe_lr: learning rate of the probes, not scaled with the batch size.
        probe_weight_decay: of the probes' weights; none on biases and norms.
        probe_seed: seed of the probes' first weights, the same on all ranks.
        probe_outputs: numbers that a probe answers with, which the criterion of `loss` is given: (S, probe_outputs), or
            (S, probe_outputs, H, W) with the estimator "places"; None: as many as the model's head has outputs.

    Where an estimator looks at some steps only, an interval in which it has not looked leaves the importance as it was.

    Raises:
        ConfigError: an option outside its range.
        BudgetError: a prune ratio that cannot be met, or keep ratios that do not fit the blocks.
        ModelError: the model has no head, or leaves out patches that the estimator reads.
    """

    def __init__(
        self,
        model: VisionTransformer,
        layout: ModelLayout,
        prune_ratio: float,
        reduce: Reduce,
        *,
        alpha: float = 0.5,
        gamma: float = 0.2,
        benefit_scale: float = 10.0,
        blocks_only: bool = False,
        align: int = 1,
        stream: float | str = 0.0,
        spare: Sequence[str] | None = None,
        keep_ratios: Sequence[float] | None = None,
        estimator: str = "low_rank",
        probe_lr: float = 5e-4,
        probe_weight_decay: float = 0.05,
        probe_seed: int = 0,
        probe_outputs: int | None = None,
    ) -> None:
        _require(0 <= alpha <= 1, "alpha", alpha, "[0, 1]")
        _require(0 < gamma <= 1, "gamma", gamma, "(0, 1]")
        _require(0.01 <= benefit_scale <= 1000, "benefit_scale", benefit_scale, "[0.01, 1000]")
        require_align(align)
        _require(probe_lr > 0, "probe_lr", probe_lr, "(0, inf)")
        _require(probe_weight_decay >= 0, "probe_weight_decay", probe_weight_decay, "[0, inf)")
        _require(probe_outputs is None or probe_outputs >= 1, "probe_outputs", probe_outputs, "[1, inf)")
        self._layout, self._reduce = layout, reduce
        self._alpha, self._gamma, self._benefit_scale = alpha, gamma, benefit_scale
        self._prune_ratio, self._other_params = prune_ratio, 0 if blocks_only else layout.other_params
        spared = spared_blocks(spare or (), layout)
        _require_combined(bool(spared), align, keep_ratios, stream)
        self._narrow = narrow_stream(layout, stream, align, prune_ratio, blocks_only)
        if self._narrow is not None:
            self._prune_ratio, self._other_params = self._narrow.ratio, self._narrow.others
        self._shares = BlockShares(layout.blocks, align, spared, self._narrow)
        self._params = self._shares.params
        self._spared = torch.tensor([b in spared for b in range(len(layout.blocks))])
        self._given = None if keep_ratios is None else given_keep_ratios(keep_ratios, len(layout.blocks))
        if self._given is None:
            self._goals(torch.ones_like(self._params))  # cannot be met: say so before training

        self._device = next(model.parameters()).device
        self._first_order = FirstOrder(layout, model, reduce)
        self._removal = estimator == REMOVAL and self._given is None
        self._meter = IntervalMeter()
        self._pending_benefits: list[Tensor] = []
        self._importance: list[Tensor | None] = [None, None]
        self._taps = Taps()
        self._estimator: BenefitEstimator | None = None
        self._reads_maps = estimator not in ESTIMATORS_OF_MEANS
        if self._given is None and not self._removal:
            self._require_readable(model, estimator, probe_outputs)
            first = next(model.parameters())
            read = layout if probe_outputs is None else replace(layout, num_classes=probe_outputs)
            settings = ProbeSettings(read, reduce, first.device, first.dtype, probe_lr, probe_weight_decay, probe_seed)
            self._estimator = create_estimator(estimator, settings)
            self._taps.attach(model)
            self._taps.recording = self._estimator.due()

    needs_gradients = True
    _active: ActiveWidths | None = None
    """What is computed, where that is not everything."""

    @property
    def probes(self) -> bool:
        return self._estimator is not None

    def attach(self, gates: Gates, schedule: Schedule) -> None:
        self._first_order.attach(gates)
        self._active = gates.active

    def loss(self, criterion: Criterion, targets: Any) -> Tensor:
        if self._estimator is None or not self._estimator.due():
            return torch.zeros((), device=self._device)
        stream = self._taps.take()
        if not stream:
            raise TrainingError(
                "No forward pass has been recorded: call model(images), with gradients enabled, before pruner.loss."
            )
        self._require_fitting(stream[0])
        benefits_2B, loss = self._estimator.observe(self._whole(stream), criterion, targets)
        self._pending_benefits.append(benefits_2B)
        return loss

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        self._first_order.add_to(self._meter, gradients_finite, scaler, removal=self._removal)
        if self._pending_benefits:
            # Reduced at every step, so that the sums, which a checkpoint keeps, are the same on every rank.
            benefits_2B = self._reduce(torch.stack(self._pending_benefits).mean(0))
            self._meter.add("benefits", benefits_2B, gradients_finite & benefits_2B.isfinite().all())
        self.discard()

    def discard(self) -> None:
        self._pending_benefits.clear()

    def train_own(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        if self._estimator is not None:
            self._estimator.train(gradients_finite, scaler)
            self._taps.recording = self._estimator.due()

    def renew(self, kept_params: Mapping[str, int], progress: float, tau: float) -> Decision:
        self._meter.close()
        require_signal(self._meter)
        return self._decide(self._meter.mean, kept_params, progress, tau)

    def last(self, kept_params: Mapping[str, int]) -> Decision:
        self._meter.close()
        return self._decide(self._meter.mean_of_last_two, kept_params, progress=1.0, tau=0.0, last=True)

    def detach(self) -> None:
        self._taps.detach()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"meter": self._meter.state_dict(), "importance": list(self._importance)}
        return state if self._estimator is None else state | self._estimator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._meter.load_state_dict(state["meter"], self._device)
        self._importance = list(state["importance"])
        if self._estimator is not None:
            self._estimator.load_state_dict(state)
            self._taps.recording = self._estimator.due()

    def _decide(
        self, mean: Any, kept_params: Mapping[str, int], progress: float, tau: float, *, last: bool = False
    ) -> Decision:
        """Benefits -> importance -> goals -> masks, all from means over an interval."""
        blocks = self._layout.blocks
        benefits_2B, removal_B = mean("benefits"), mean("removal")
        if removal_B is not None:
            # One benefit, of neither the class token nor the patches; in one shot every rank has seen images of its own.
            benefits_2B = self._reduce(removal_B).sqrt().expand(2, -1)
        if mean("scores") is None or (benefits_2B is None and not self._may_rest()):
            raise TrainingError(
                "Nothing has been measured that masks could be decided from. Call pruner.loss(criterion, targets) after each "
                "forward pass and pruner.step() after each backward pass, and let pruning start before it is due to end."
            )
        if benefits_2B is not None:
            # Decisions are made on the CPU, in float64 and from reduced sums: the same on every rank and every device.
            benefits_2B = benefits_2B.double().cpu()
            floor = LEAST_KEPT_SHARE * self._params
            kept = torch.tensor([kept_params[block.name] for block in blocks], dtype=torch.float64).maximum(floor)
            self._importance = [
                update_importance(previous, benefit, kept, self._gamma, self._benefit_scale)
                for previous, benefit in zip(self._importance, benefits_2B, strict=True)
            ]
        importance_B = None
        if self._given is None:
            cls_B, patch_B = (torch.ones_like(self._params) if each is None else each for each in self._importance)
            importance_B = mix_importance(cls_B, patch_B, self._alpha)
        # Mean scores over the interval and over ranks.
        scores = by_gate(self._layout, self._reduce(mean("scores")).cpu())
        return self._shares.decide(self._goals(importance_B), scores, progress, tau, benefits_2B, importance_B, last=last)

    def _whole(self, stream: Sequence[Tensor]) -> Sequence[Tensor]:
        """The features at full width, where only some channels of the stream are computed: the others are zero."""
        active, prefix = self._active, self._layout.prefix_tokens
        if active is None or stream[0].shape[-1] == self._layout.width:
            return stream
        if not self._reads_maps:  # the mean of the patches in their place: less to widen, and all that is read
            stream = [torch.cat([x_SND[:, :prefix], x_SND[:, prefix:].mean(1, keepdim=True)], 1) for x_SND in stream]
        return [active.whole_stream(x_SND) for x_SND in stream]

    def _require_readable(self, model: VisionTransformer, estimator: str, probe_outputs: int | None) -> None:
        """ModelError where probes could not be built for this model, or not be given what they read."""
        others = f"{', '.join(map(repr, ESTIMATORS_OF_MEANS))}"
        if estimator in OF_MAPS and probe_outputs is None:
            raise ConfigError(
                f"The estimator {estimator!r} is for dense prediction, where a criterion judges maps of answers: give "
                "probe_outputs=, the channels of such a map. To classify images choose another estimator."
            )
        if self._layout.num_classes < 1 and probe_outputs is None:
            raise ModelError(
                "The model has no head (num_classes=0), so the probes of block_benefit do not know how many classes there are. "
                "Give it the head itself: model.reset_classifier(num_classes). In a larger model, whose head lies elsewhere, "
                "give probe_outputs=, the numbers that your criterion reads. Or do without probes: estimator='removal'."
            )
        dropout = getattr(model, "patch_drop", None)  # not every class of timm's has it
        if self._reads_maps and isinstance(dropout, (PatchDropout, PatchDropoutWithIndices)) and dropout.prob > 0:
            raise ModelError(
                f"patch_drop_rate={dropout.prob:g}: the estimator {estimator!r} reads the patches as a map, and patch "
                f"dropout leaves some out. Prune with patch_drop_rate=0, or with an estimator that reads their mean: {others}."
            )

    def _require_fitting(self, x_SND: Tensor) -> None:
        """TrainingError where an estimator that reads patches as a map was given another one than that of the model."""
        grid = self._taps.grid or self._layout.grid
        patches = x_SND.shape[1] - self._layout.prefix_tokens
        if self._reads_maps and (grid != self._layout.grid or patches != math.prod(grid)):
            raise TrainingError(
                f"An image of this batch has {patches} patches in a grid of {grid[0]}x{grid[1]}; the probes read a grid of "
                f"{self._layout.grid[0]}x{self._layout.grid[1]}, the size that the model was made for. Call "
                "model.set_input_size(img_size=...) before the pruner is made, give images of that size, or choose an "
                f"estimator that reads the mean of the patches: {', '.join(map(repr, ESTIMATORS_OF_MEANS))}."
            )

    def _may_rest(self) -> bool:
        """Whether there may be intervals without a benefit."""
        return self._estimator is None or self._estimator.every > 1

    def _goals(self, importance_B: Tensor | None) -> list[float]:
        if self._given is not None:
            return self._given.tolist()
        assert importance_B is not None
        budget = (importance_B, self._shares.params_at_goal, self._other_params, self._prune_ratio)
        shared = keep_ratios_sparing(*budget, self._spared) if self._spared.any() else keep_ratios(*budget)
        return shared.tolist()


def spared_blocks(names: Sequence[str], layout: ModelLayout) -> list[int]:
    """Numbers of the blocks that are named, or that lie in what is named.

    Raises:
        ConfigError: a name that is no part of the model, or every block.
    """
    known = {part for block in layout.blocks for part in (block.name, block.name.rpartition(".")[0])}
    for name in names:
        if name not in known | OUTSIDE_BLOCKS:
            raise ConfigError(unknown_name("block to spare", name, known | OUTSIDE_BLOCKS))
    found = [b for b, block in enumerate(layout.blocks) if block.name in names or block.name.rpartition(".")[0] in names]
    if len(found) == len(layout.blocks):
        raise ConfigError("Every block is spared, so there is nothing to prune; spare fewer.")
    return found


def _require_combined(spared: bool, align: int, keep_ratios: Sequence[float] | None, stream: float | str) -> None:
    """ConfigError where options are given that contradict each other."""
    if spared and (align > 1 or keep_ratios):
        other = "align, whose rounding may cut any block" if align > 1 else "keep_ratios, where a spared block has 1"
        raise ConfigError(f"spare cannot be combined with {other}; give one of them.")
    if stream and (spared or keep_ratios):
        other = "spare: a narrower stream cuts every block" if spared else "keep_ratios, which are shares at its full width"
        raise ConfigError(f"stream cannot be combined with {other}; give one of them.")


def _require(holds: bool, name: str, value: float | None, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must lie in {allowed}, got {value}.")
