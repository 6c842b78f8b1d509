"""The library's front door: a pruner for anybody's training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.core.finite import all_finite
from p3b.core.masks import hard_masks
from p3b.core.schedule import ONE_SHOT, Schedule
from p3b.errors import ConfigError, ModelError, ScheduleError, TrainingError, WeightsError, unknown_name
from p3b.methods import create_method, method_dims, options_of_one_shot, require_active_alone
from p3b.methods.base import Criterion, Decision
from p3b.methods.calibration import Batches, measure
from p3b.scoring.meter import Reduce
from p3b.train.distributed import all_reduce_mean, require_agreement
from p3b.vit.active import ActiveWidths, LeftOut
from p3b.vit.basis import head_moments, order_heads
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.compensation import compensate
from p3b.vit.cost import dense_params, kept_other_params, kept_params
from p3b.vit.coverage import require_not_gated, require_nothing_shared, require_prunable_layers
from p3b.vit.described import require_described
from p3b.vit.gates import Gates
from p3b.vit.layout import read_layout
from p3b.vit.replaced import forbid_steps
from p3b.vit.wrappers import forget_compiled, require_not_compiled, require_single_replica, require_vision_transformer

COMPUTE = ("full", "active")
"""What of the masked model a step computes."""


class Pruner:
    """Prunes a VisionTransformer while it trains, or a trained one in one shot.

        pruner = p3b.Pruner(model, prune_ratio=0.5, schedule=p3b.Schedule(start=500, sparse=1500, final=3000, update_every=100))
        for images, targets in batches:
            loss = criterion(model(images), targets) + pruner.loss(criterion, targets)
            loss.backward()
            pruner.step()          # gradients exist, weights have not moved yet
            optimizer.step()
            optimizer.zero_grad()
            if pruner.done:
                break
        model = pruner.finalize()  # an ordinary module, small; it has new parameters, so give it a new optimizer

    Without a schedule it is one shot: a trained model is measured on some hundred images and cut, nothing is trained.

        pruner = p3b.Pruner(trained, prune_ratio=0.5, method="taylor")
        pruner.calibrate(batches, criterion)              # (images, targets); what the model computes stays
        model = pruner.finalize(images)                   # batches of images that what closes is compensated on

    Args:
        model: dense timm VisionTransformer; may be wrapped in DistributedDataParallel and torch.compile, before or after.
            Layers may be frozen: they are scored and cut like any other, and stay frozen (docs/model.md says what is covered).
        prune_ratio: share of all parameters that goes, in [0, 1).
        method: name of a method: "block_benefit" (P3B, published as "block_pr"), or one to compare it with: "uniform",
            "random", "magnitude", "taylor", "wdpruning", "savit".
        schedule: phases in optimizer steps; None: one shot.
        reduce: mean of a tensor over all ranks, which hold equal shares of each batch; by default over torch.distributed's
            group, if there is one, whose ranks then compare their masks after every decision.
        compute: "full" computes every element, as published; "active" leaves out elements whose mask is below 0.03
            (`p3b.vit.active`), so that steps take less time the more is pruned. It is not for torch.compile, whose kernels
            would be made anew at every mask update, nor for methods that look at closed elements (wdpruning, savit).
        method_options: keyword arguments of the method, e.g. alpha=0.5, estimator="linear", keep_ratios=[...]; those that it
            does not take are refused.

    Raises:
        ModelError: a part of the model is not covered, or a pruner is attached already; the message says how to mend it.
            BudgetError, ConfigError, ScheduleError: settings that cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        prune_ratio: float = 0.5,
        method: str = "block_benefit",
        schedule: Schedule | None = None,
        *,
        reduce: Reduce = all_reduce_mean,
        compute: str = "full",
        **method_options: Any,
    ) -> None:
        self.one_shot = schedule is None
        schedule = ONE_SHOT if schedule is None else schedule
        if self.one_shot:
            method_options = options_of_one_shot(method, method_options)
        require_single_replica(model)
        _check_compute(compute, method, model, one_shot=self.one_shot)
        self._model: VisionTransformer = require_vision_transformer(model)
        self.schedule = schedule
        require_not_gated(self._model, "Call finalize() or detach() of that pruner first.")
        require_nothing_shared(self._model)
        self.layout = read_layout(self._model, method_dims(method, method_options))
        require_described(self._model, "pruned")
        require_prunable_layers(self._model)
        self._reduce = reduce
        self._method = create_method(method, self._model, self.layout, prune_ratio, reduce, method_options)
        self.gates = Gates(self.layout, self._model)
        self._left_out: LeftOut | None = None
        if compute == "active":
            self.gates.active = ActiveWidths(self.layout, self._model)
            self._left_out = LeftOut(self.gates.active, self._model)
        self.gates.attach(self._model)
        self._method.attach(self.gates, schedule)
        forget_compiled()
        self._attached = True
        self._parts = _parts(self._model)
        self._gated = list(self.gates.gated_parameters(self._model).values())
        self._first = next(self._model.parameters())
        self._place = self._first.device, self._first.dtype
        self._kept_params = {block.name: dense_params(block) for block in self.layout.blocks}
        self._kept_other_params = self.layout.other_params
        sizes = torch.tensor([size for block in self.layout.blocks for size in block.dims.values()])
        blocks = torch.tensor([b for b, block in enumerate(self.layout.blocks) for _ in block.dims])
        self._block_of_element_N = torch.repeat_interleave(blocks, sizes)
        self._pruned_N = torch.zeros(int(sizes.sum()), dtype=torch.bool)
        self.steps_done = 0
        self._see_to_frozen()

    def loss(self, criterion: Criterion, targets: Any) -> Tensor:
        """What the method adds to the loss of the forward pass just done (P3B: its probe losses); a scalar, 0 where nothing.

        Call it once after each forward pass, micro-batches included, inside the same autocast context.
        """
        self._require_in_place()
        return self._method.loss(criterion, targets)

    def step(self, scaler: torch.amp.GradScaler | None = None, gradients_finite: Tensor | None = None) -> Decision | None:
        """Collect what the finished backward passes measured, and renew the masks when due.

        Call it once per optimizer step: gradients complete (accumulated, averaged over ranks), weights not yet moved. With a
        GradScaler call `scaler.unscale_(optimizer)` before and pass the scaler. Where a gradient is not finite, on any rank,
        the step counts and nothing that it measured does: a loop that leaves such steps out calls this all the same.

        Args:
            scaler: of the loss.
            gradients_finite: 0-dim bool tensor, the same on all ranks: whether all gradients of the model are finite, from a
                loop that has looked already. By default they are looked at here.

        Returns:
            What was decided, at a mask update; None otherwise.

        Raises:
            TrainingError: a call of `loss` or earlier steps are missing, or the processes have come to different masks.
        """
        self._require_in_place()
        if self.one_shot:
            raise ScheduleError(
                "This pruner was made without a schedule, for one shot: call calibrate(batches, criterion), then finalize(). "
                "To prune while the model trains, give schedule=p3b.Schedule(start=, sparse=, final=, update_every=), in steps."
            )
        step = self.steps_done
        self.steps_done += 1
        if gradients_finite is None:
            gradients_finite = self._gradients_finite()
        if step >= self.schedule.start:
            self._method.collect(gradients_finite, scaler)
        else:
            self._method.discard()
        self._method.train_own(gradients_finite, scaler)
        decision = self._renew(step) if self.schedule.update_due(step) else None
        self._see_to_frozen()
        return decision

    def calibrate(self, batches: Batches, criterion: Criterion, *, order: bool = True) -> int:
        """Measure all that one shot is decided by; what the model computes stays. Then `finalize`.

        Args:
            batches: (images, targets) on the model's device, shuffled, some hundred images in all. They are gone through
                two or three times (heads, probes, scores): give a loader or a list, no generator.
            criterion: the task loss, from outputs and targets to a scalar, as in training.
            order: put the channels of attention heads into the order of what they carry first (`p3b.vit.basis`), where a
                method prunes them: then channel i of all heads, which go together, means something in each of them.

        Returns:
            How many images there were. The model's gradients are gone.

        Raises:
            TrainingError: the pruner has a schedule, or there is nothing finite to measure.
        """
        self._require_in_place()
        if not self.one_shot:
            raise TrainingError(
                "This pruner has a schedule, by which it measures while the model trains: call step() after each backward "
                "pass. To prune a trained model in one shot, make the pruner without a schedule."
            )
        if order and any("head" in block.dims for block in self.layout.blocks):
            order_heads(self._model, head_moments(self._model, (images for images, _ in batches), self._reduce))
        self._see_to_frozen()
        images = measure(self._model, self._method, batches, criterion, self._gradients_finite)
        self.steps_done = self.schedule.final
        return images

    @property
    def done(self) -> bool:
        """Whether the schedule has ended, so that `finalize` is due."""
        return self.steps_done >= self.schedule.final

    @property
    def phase(self) -> str:
        """Phase of the step to come: warm-up, sparsify, sharpen or done."""
        return self.schedule.phase(self.steps_done)

    def kept_params_by_block(self) -> dict[str, int]:
        """Parameters that each block keeps under the masks of now, by block name."""
        return dict(self._kept_params)

    def kept_params(self) -> int:
        """Parameters of the model that would come out if the masks of now were the last."""
        return self._kept_other_params + sum(self._kept_params.values())

    def decide_last(self) -> Decision:
        """The last decision, from the last two intervals together, with hard masks; the model is not changed yet.

        Raises:
            TrainingError: nothing has been measured, or the processes have come to different masks.
            ModelError: layers were exchanged since the pruner was attached.
        """
        self._require_in_place()
        self._require_unchanged()
        decision = self._method.last(self._kept_params)
        return self._adopt(decision, hard_masks(decision.masks))

    def finalize(self, compensate_on: Iterable[Tensor] | None = None) -> nn.Module:
        """Decide for the last time and shrink.

        Args:
            compensate_on: batches of images, a few hundred in all, that what closes is made up for on by what stays
                (`p3b.vit.compensation`); None: what stays keeps the values that it was trained to.

        Returns:
            The model itself, now small: hard masks applied, gates and probes gone, an ordinary module that computes exactly
            what the masked one computed. What was frozen, modes, dtypes and attributes stay. Its replaced parameters are new
            ones: build a new optimizer (a step of the old one raises a TrainingError).
        """
        self.decide_last()
        return self.shrink(compensate_on)

    def shrink(self, compensate_on: Iterable[Tensor] | None = None) -> nn.Module:
        """Cut the model by the masks that the gates hold, and detach everything. `finalize` is `decide_last` and this.

        Raises:
            ModelError: the model was changed since the pruner was attached: layers exchanged, hooks or adapters added.
        """
        self._require_attached()
        self._require_unchanged()
        require_described(self._model, "pruned")
        require_prunable_layers(self._model)
        plan, masks = plan_cuts(self.layout, self.gates.masks), dict(self.gates.masks)
        self.detach()
        if compensate_on is not None:
            compensate(self._model, self.layout, masks, compensate_on, self._reduce)
        before = dict(self._model.named_parameters())
        small = apply_cuts(self._model, plan)
        forbid_steps(before, small)
        return small

    def detach(self) -> None:
        """Take everything off the model, which stays dense and computes what it did before; the pruner has ended then."""
        self.gates.detach()
        if self._left_out is not None:
            self._left_out.detach()
        self._method.detach()
        self._attached = False
        forget_compiled()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides the model's own weights: tensors and plain values only."""
        state = {"steps_done": self.steps_done, "masks": dict(self.gates.masks), "method": self._method.state_dict()}
        return state if self.gates.active is None else state | {"active": self.gates.active.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` as if there had been no stop.

        Raises:
            WeightsError: the state belongs to another model or method.
        """
        self._require_in_place()
        try:
            self._method.load_state_dict(state["method"])
            self.steps_done = int(state["steps_done"])
            if self.steps_done > self.schedule.start:
                self._set_masks(state["masks"])
                self._take_up_active(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise WeightsError(f"The pruner's state belongs to another model, method or version: {error}") from error
        self._see_to_frozen()

    def _take_up_active(self, state: Mapping[str, Any]) -> None:
        """What was measured of elements that are not computed, once pruning has begun."""
        active = self.gates.active
        if (active is None) != ("active" not in state):
            raise ValueError("it was pruned with another `compute` (--prune-compute)")
        if active is not None:
            active.load_state_dict(state["active"])

    def _see_to_frozen(self) -> None:
        """Once pruning has begun: where a gated weight is frozen its score is found by the gates."""
        if self.steps_done < self.schedule.start or self.gates.collects or not self._method.needs_gradients:
            return
        if not all(parameter.requires_grad for parameter in self._gated):
            self.gates.collect_gradients(writers_only=True)

    def _require_attached(self) -> None:
        if not self._attached:
            raise TrainingError(
                "This pruner has ended: its model was shrunk, or it was detached. Go on with the model that finalize() "
                "returned, or make a new pruner for a dense model."
            )

    def _require_in_place(self) -> None:
        """TrainingError where the model was moved while it is measured; what is decided can be cut in any dtype."""
        self._require_attached()
        place = self._first.device, self._first.dtype
        if place != self._place:
            raise TrainingError(
                f"The model is on {place[0]} as {place[1]} now; when the pruner was made it was on {self._place[0]} as "
                f"{self._place[1]}. Move the model, or change its dtype, before the pruner is made."
            )

    def _require_unchanged(self) -> None:
        now = _parts(self._model)
        changed = [name for name in {**self._parts, **now} if self._parts.get(name) != now.get(name)]
        if changed:
            raise ModelError(
                f"{changed[0]} was exchanged, added or taken away since the pruner was attached, which scores and masks know "
                "nothing of. Change the model first (heads, adapters, sizes), then make the pruner."
            )

    def _renew(self, step: int) -> Decision:
        """A mask update, as it is due at the end of a step."""
        self._require_unchanged()
        decision = self._method.renew(self._kept_params, self.schedule.progress(step), self.schedule.tau(step))
        decision = self._adopt(decision, decision.masks)
        active = self.gates.active
        if active is None or self._left_out is None:
            return decision
        return replace(decision, computed=float(active.computed_N.double().mean()), left_out=self._left_out.measure())

    def _adopt(self, decision: Decision, masks: Mapping[str, Tensor]) -> Decision:
        """Set masks that have just been decided, if all ranks have decided the same; the decision with what they change."""
        if self._reduce is all_reduce_mean:  # a reduction of the caller's own may span other processes than the group
            require_agreement("the masks", _digest(masks))
        before_N = self._pruned_N
        self._set_masks(masks)
        pruned, returned = self._by_block(self._pruned_N), self._by_block(before_N & ~self._pruned_N)
        counted = [
            replace(block, pruned=gone, returned=back)
            for block, gone, back in zip(decision.blocks, pruned, returned, strict=True)
        ]
        return replace(decision, blocks=tuple(counted))

    def _by_block(self, chosen_N: Tensor) -> list[int]:
        """How many of the chosen elements each block has."""
        found: list[int] = self._block_of_element_N[chosen_N].bincount(minlength=len(self.layout.blocks)).tolist()
        return found

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self.gates.set(masks)
        if self.gates.active is not None:
            self.gates.active.set(masks)
        self._kept_params = kept_params(self.layout, masks)  # of those just decided, which are on the CPU
        self._kept_other_params = kept_other_params(self.layout, masks)
        self._pruned_N = (torch.cat([masks[block.gate(dim)] for block in self.layout.blocks for dim in block.dims]) < 0.5).cpu()

    def _gradients_finite(self) -> Tensor:
        """Whether all gradients are finite, one answer for all ranks; it stays on the device."""
        parameters = list(self._model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return self._reduce(all_finite(gradients).to(parameters[0].device, torch.float32)) == 1


def _check_compute(compute: str, method: str, model: nn.Module, *, one_shot: bool) -> None:
    """ConfigError where what is to be computed is unknown, or means nothing to this method or model."""
    if compute not in COMPUTE:
        raise ConfigError(unknown_name("compute", compute, COMPUTE))
    if compute == "active":
        if one_shot:
            raise ConfigError("compute='active' (--prune-compute) means nothing in one shot: nothing is trained. Leave it out.")
        require_active_alone(method)
        require_not_compiled(model)


def _parts(model: nn.Module) -> dict[str, int]:
    """Identity of every module and parameter of the model, by name."""
    parts = {name: id(module) for name, module in model.named_modules()}
    return parts | {name: id(parameter) for name, parameter in model.named_parameters()}


def _digest(masks: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].cpu().numpy().tobytes())
    return digest.hexdigest()
