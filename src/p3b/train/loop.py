"""One epoch of training. The loop can be read aloud: it knows no method's name, no rank and no screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p3b.errors import TrainingError
from p3b.methods.base import Criterion, Decision
from p3b.train.distributed import unwrap
from p3b.train.losses import TrainingLoss
from p3b.train.optim import Precision

CHECK_LOSS_EVERY = 10
"""Optimizer steps between two looks at the loss: each look waits for the device."""


class Batches(Iterable[tuple[Tensor, Tensor]], Sized, Protocol):
    """Batches of one epoch: (images, targets) on the device, and how many there are."""


class StepPruner(Protocol):
    """The part of `p3b.Pruner` that training uses."""

    def loss(self, criterion: Criterion, targets: Any) -> Tensor | float: ...

    def step(self, scaler: torch.amp.GradScaler | None = None) -> Decision | None: ...

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

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        return None

    def kept_params(self) -> int:
        return self._params

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


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
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    steps_done: int = 0


@dataclass(frozen=True)
class StepReport:
    """What a look at the running epoch shows: optimizer steps done in it, and the mean task loss so far."""

    steps: int
    loss: float


def steps_per_epoch(batches: Sized, grad_accum_steps: int) -> int:
    """Optimizer steps in an epoch; the last one may see fewer micro-batches."""
    return -(-len(batches) // grad_accum_steps)


def train_epoch(
    learner: Learner,
    batches: Batches,
    on_decision: Callable[[Decision, str], None],
    on_look: Callable[[StepReport], None],
) -> float:
    """Train for one epoch.

    Args:
        learner: is changed.
        batches: this rank's batches.
        on_decision: hears of every mask update, and of the phase of the step that it ends.
        on_look: hears of the running loss every few steps.

    Returns:
        Mean task loss (without what the method adds).

    Raises:
        TrainingError: the loss, or a weight after the last step, is not finite; the message says at which optimizer step.
    """
    model, pruner, scaler = learner.model, learner.pruner, learner.scaler
    model.train()
    watch = _LossWatch(learner.precision.device)
    for micro_step, (images, hard_targets) in enumerate(batches):
        targets = hard_targets
        if learner.mixup is not None:
            images, targets = learner.mixup(images, hard_targets)
        window_start = micro_step - micro_step % learner.grad_accum_steps
        window = min(learner.grad_accum_steps, len(batches) - window_start)
        completes_step = micro_step == window_start + window - 1
        with _gradients_stay_local(model, until=completes_step):
            with learner.precision.autocast():
                task_loss = learner.loss(images, model(images), targets)
                loss = task_loss + pruner.loss(learner.loss.task, targets)
            scaler.scale(loss / window).backward()
        watch.add(task_loss, learner.steps_done)
        if not completes_step:
            continue

        scaler.unscale_(learner.optimizer)
        phase = pruner.phase
        decision = pruner.step(scaler)  # gradients exist, weights have not moved yet
        if learner.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), learner.clip_grad)
        scaler.step(learner.optimizer)
        scaler.update()
        learner.optimizer.zero_grad()
        learner.steps_done += 1
        if learner.scheduler is not None:
            learner.scheduler.step_update(learner.steps_done)
        if learner.ema is not None:
            learner.ema.update(unwrap(model), step=learner.steps_done)
        if decision is not None:
            on_decision(decision, phase)
        if learner.steps_done % CHECK_LOSS_EVERY == 0:
            watch.require_finite()
            on_look(StepReport(micro_step // learner.grad_accum_steps + 1, watch.mean()))
    watch.require_finite()
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise not_finite("A weight", learner.steps_done - 1)  # the next loss would tell, but a checkpoint comes before it
    return watch.mean()


def not_finite(what: str, step: int) -> TrainingError:
    """The error of a run that has lost its way at an optimizer step."""
    return TrainingError(
        f"{what} is not finite at optimizer step {step}; the run stops and keeps its last checkpoint. Lower the "
        "learning rate (--lr), clip gradients (--clip-grad 1.0) or train in --precision fp32 or bf16."
    )


def _gradients_stay_local(model: nn.Module, until: bool) -> Any:
    """Micro-batches before the last of a step need not average their gradients over ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not until else nullcontext()


class _LossWatch:
    """Sums the loss on the device and remembers the first step at which it was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._count = 0
        self._first_bad = torch.full((), -1, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        loss = loss.detach()
        self._sum += loss
        self._count += 1
        self._first_bad = torch.where((self._first_bad < 0) & ~loss.isfinite(), step, self._first_bad)

    def require_finite(self) -> None:
        if (step := int(self._first_bad)) >= 0:
            raise not_finite("The loss", step)

    def mean(self) -> float:
        return float(self._sum) / max(self._count, 1)
