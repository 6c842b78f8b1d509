"""One epoch of training. The loop can be read aloud: it knows no method's name, no rank and no screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p3b.core.finite import all_finite, step_where
from p3b.errors import TrainingError
from p3b.methods.base import Criterion, Decision
from p3b.train.losses import TrainingLoss
from p3b.train.optim import Precision
from p3b.vit.wrappers import unwrap

CHECK_LOSS_EVERY = 10
"""Optimizer steps between two looks at the loss and at the steps skipped: each look waits for the device."""
MOST_SKIPPED_IN_A_ROW = 30
"""Steps that mixed precision may skip one after the other. A loss scale that starts at 2**16 may take 16 to come down."""


class Batches(Iterable[tuple[Tensor, Tensor]], Sized, Protocol):
    """Batches of one epoch: (images, targets) on the device, and how many there are."""


class StepPruner(Protocol):
    """The part of `p3b.Pruner` that training uses."""

    def loss(self, criterion: Criterion, targets: Any) -> Tensor | float: ...

    def step(self, scaler: torch.amp.GradScaler | None = None, gradients_finite: Tensor | None = None) -> Decision | None: ...

    def kept_params(self) -> int: ...

    @property
    def phase(self) -> str: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NoPruning:
    """Stands in the pruner's place where nothing is pruned.

    Args:
        phase: what to call the training.
        params: parameters of the model.
    """

    def __init__(self, phase: str, params: int) -> None:
        self.phase, self._params = phase, params

    def loss(self, criterion: Criterion, targets: Any) -> float:
        return 0.0

    def step(self, scaler: torch.amp.GradScaler | None = None, gradients_finite: Tensor | None = None) -> None:
        return None

    def kept_params(self) -> int:
        return self._params

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


class SkippedSteps:
    """Counts steps at which the weights did not move; on the device, so that counting costs no waiting."""

    def __init__(self) -> None:
        self.load(0, 0)

    def load(self, steps: int, in_a_row: int) -> None:
        """Go on from these."""
        self._steps, self._in_a_row = torch.tensor(steps), torch.tensor(in_a_row)

    def add(self, skipped: Tensor) -> None:
        """Count a step; `skipped` is a 0-dim bool tensor."""
        self._steps = self._steps.to(skipped.device) + skipped
        self._in_a_row = torch.where(skipped, self._in_a_row.to(skipped.device) + 1, 0)

    @property
    def steps(self) -> int:
        """All of them. Waits for the device."""
        return int(self._steps)

    @property
    def in_a_row(self) -> int:
        """Those since the last step that was not skipped. Waits for the device."""
        return int(self._in_a_row)


@dataclass
class Learner:
    """What moves in training, and how: everything that a step reads or writes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: TrainingLoss
    precision: Precision
    scaler: torch.amp.GradScaler
    pruner: StepPruner
    scheduler: Scheduler | None = None
    ema: ModelEmaV3 | None = None
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    averaged: nn.Module | None = None
    """What the moving average is of, where that is not the model inside `model`: another module of the same parameters."""
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    steps_done: int = 0
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    """Steps, among those done, at which the weights did not move, since a gradient was not finite."""

    @property
    def may_skip(self) -> bool:
        """Whether a step whose gradients are not finite is skipped, as mixed precision does."""
        return self.precision.is_mixed or self.scaler.is_enabled()

    def require_finite_weights(self) -> None:
        """Raises:
        TrainingError: a weight is not finite. The next loss would tell, but a checkpoint comes before it.
        """
        if not all_finite([parameter.detach() for parameter in self.model.parameters()]):
            raise not_finite("A weight", self.steps_done - 1)


class EpochProgress:
    """How far an epoch has come; part of every checkpoint, so that a resumed epoch ends as if it had never stopped.

    Args:
        phase: what the epoch is called in the metrics: the phase of its first step.
        device: where losses are summed, so that adding one costs no waiting.
    """

    def __init__(self, phase: str, device: torch.device) -> None:
        self.phase, self.micro_steps = phase, 0
        self._loss_sum, self._losses = torch.zeros((), device=device), torch.zeros((), device=device)
        self._first_bad = torch.full((), -1, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Count the loss of a micro-batch of an optimizer step; one that is not finite stays out of the mean."""
        loss, finite = loss.detach(), loss.detach().isfinite()
        self._loss_sum += torch.where(finite, loss, 0.0)
        self._losses += finite
        self._first_bad = torch.where((self._first_bad < 0) & ~finite, step, self._first_bad)
        self.micro_steps += 1

    def mean_loss(self) -> float:
        """Mean over the micro-batches so far."""
        return float(self._loss_sum) / max(float(self._losses), 1.0)

    def require_finite(self) -> None:
        """Raises:
        TrainingError: a loss was not finite; the message says at which optimizer step.
        """
        if (step := int(self._first_bad)) >= 0:
            raise not_finite("The loss", step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "micro_steps": self.micro_steps,
            "loss_sum": float(self._loss_sum),
            "losses": float(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.phase, self.micro_steps = str(state["phase"]), int(state["micro_steps"])
        self._loss_sum.fill_(state["loss_sum"])
        self._losses.fill_(state["losses"])


def steps_per_epoch(batches: Sized, grad_accum_steps: int) -> int:
    """Optimizer steps in an epoch; the last one may see fewer micro-batches."""
    return -(-len(batches) // grad_accum_steps)


def train_epoch(
    learner: Learner,
    batches: Batches,
    progress: EpochProgress,
    on_decision: Callable[[Decision, str], None],
    on_step: Callable[[], None],
) -> float:
    """Train for one epoch, or for the rest of one.

    Args:
        learner: is changed.
        batches: this rank's batches, from `progress.micro_steps` on; their length is that of the whole epoch.
        progress: is changed.
        on_decision: hears of every mask update, and of the phase of the step that it ends.
        on_step: is called at the end of every optimizer step, where all can be saved; what it raises ends the epoch.

    Returns:
        Mean task loss (without what the method adds).

    Raises:
        TrainingError: the loss is not finite, or under mixed precision too many steps in a row had to be skipped.
    """
    model, pruner = learner.model, learner.pruner
    model.train()
    for images, hard_targets in batches:
        targets = hard_targets
        if learner.mixup is not None:
            images, targets = learner.mixup(images, hard_targets)
        window_start = progress.micro_steps - progress.micro_steps % learner.grad_accum_steps
        window = min(learner.grad_accum_steps, len(batches) - window_start)
        completes_step = progress.micro_steps == window_start + window - 1
        with _gradients_stay_local(model, until=completes_step):
            with learner.precision.autocast():
                task_loss = learner.loss(images, model(images), targets)
                loss = task_loss + pruner.loss(learner.loss.task, targets)
            learner.scaler.scale(loss / window).backward()
        progress.add(task_loss, learner.steps_done)
        if not completes_step:
            continue

        phase = pruner.phase
        decision = _optimizer_step(learner)
        if decision is not None:
            on_decision(decision, phase)
        if learner.steps_done % CHECK_LOSS_EVERY == 0:
            if learner.may_skip:
                _require_some_steps(learner)
            else:
                progress.require_finite()
        on_step()
    if not learner.precision.is_mixed:
        progress.require_finite()
    return progress.mean_loss()


def _optimizer_step(learner: Learner) -> Decision | None:
    """Move the weights by gradients that are complete; what the pruner decided, at a mask update."""
    model, optimizer, scaler = learner.model, learner.optimizer, learner.scaler
    scaler.unscale_(optimizer)
    # Looked at once a step, for everyone; in float32 a loss or weight that is not finite ends the run instead.
    finite = _gradients_finite(model) if learner.may_skip else None
    decision = learner.pruner.step(scaler, finite)  # gradients exist, weights have not moved yet
    if learner.clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), learner.clip_grad)
    if finite is None:
        optimizer.step()
    else:
        step_where(optimizer, finite)
        learner.skipped.add(~finite)
    scaler.update()
    optimizer.zero_grad()
    learner.steps_done += 1
    if learner.scheduler is not None:
        learner.scheduler.step_update(learner.steps_done)
    if learner.ema is not None:
        learner.ema.update(learner.averaged or unwrap(model), step=learner.steps_done)
    return decision


def not_finite(what: str, step: int) -> TrainingError:
    """The error of a run that has lost its way at an optimizer step."""
    return TrainingError(
        f"{what} is not finite at optimizer step {step}; the run stops and keeps its last checkpoint. Lower the learning rate "
        "(--lr), clip gradients (--clip-grad 1.0) or train in --precision fp32 (or bf16 in place of fp16), with --overwrite."
    )


def _gradients_stay_local(model: nn.Module, until: bool) -> Any:
    """Micro-batches before the last of a step need not average their gradients over ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not until else nullcontext()


def _gradients_finite(model: nn.Module) -> Tensor:
    """Whether all gradients are finite, the same on every rank once they are averaged; it stays on the device."""
    return all_finite([parameter.grad for parameter in model.parameters() if parameter.grad is not None])


def _require_some_steps(learner: Learner) -> None:
    if (in_a_row := learner.skipped.in_a_row) >= MOST_SKIPPED_IN_A_ROW:
        raise not_finite(f"A gradient, for the {in_a_row}th time in a row,", learner.steps_done - 1)
