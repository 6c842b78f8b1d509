"""The training of a stage: some epochs (pruning, or fine-tuning after it), saved as they go and resumed anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from p3b.errors import Stopped
from p3b.methods.base import Decision
from p3b.run.distillation import SelfDistillation
from p3b.run.interruption import Wish
from p3b.run.machine import Machine
from p3b.run.pace import Moment
from p3b.run.recipe import Recipe
from p3b.run.stage import Stage
from p3b.train.checkpoint import restore, save_checkpoint
from p3b.train.compiled import compiled
from p3b.train.distributed import wait_for_all
from p3b.train.loop import CHECK_LOSS_EVERY, EpochProgress, Learner, NoPruning, StepPruner, not_finite, train_epoch
from p3b.train.optim import build_optimizer, cosine_schedule, scaled_lr
from p3b.vit.cost import count_parameters
from p3b.vit.trainable import trainable_form


@dataclass(frozen=True)
class Epochs:
    """Epochs of a stage that are trained in one go.

    Attributes:
        name: in checkpoints and, unless the epochs prune, in the metrics.
        count: how many.
        lr: for a global batch of 512.
        first: epochs that the stage has behind it.
        until: ends sooner, after so many optimizer steps of the stage, with a checkpoint of that moment.
        keeps_best: the model ends as the best one where a validation part chooses, unless it is pruned; else as the last.
    """

    name: str
    count: int
    lr: float
    first: int = 0
    until: int | None = None
    keeps_best: bool = True


def train_epochs(
    stage: Stage,
    model: VisionTransformer,
    epochs: Epochs,
    *,
    pruner: StepPruner | None = None,
    distillation: SelfDistillation | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> None:
    """Train for some epochs; see `Epochs.keeps_best` for how the model ends.

    Args:
        stage: that the epochs belong to; it has begun.
        model: on the device; is changed.
        epochs: to train.
        pruner: then the learning rate stays constant and no best epoch is chosen, since every epoch has fewer parameters.
        distillation: of the stage, where it has one.
        checkpoint: to go on from, within these epochs.

    Raises:
        Stopped: a signal asked for it, and everything is saved.
    """
    Training(stage, model, epochs, pruner, distillation).run(checkpoint)


class _Reached(Exception):  # noqa: N818 - it is none
    """The last step that was asked for lies within an epoch and is done."""


@dataclass
class _Place:
    """How far a stage has come: the plain values of a checkpoint."""

    part: str
    """Name of the epochs that are trained."""
    epoch: int
    """Epochs of the stage that are complete."""
    step: int
    """Optimizer steps of the stage that are done."""
    best: float = -1.0
    """Best validation top-1 so far, in percent."""
    within_epoch: dict[str, Any] | None = None
    """`EpochProgress` of an epoch that has begun, with its seconds and skipped steps so far."""


class Training:
    """Some epochs of a stage under way; for the arguments see `train_epochs`."""

    def __init__(
        self,
        stage: Stage,
        model: VisionTransformer,
        epochs: Epochs,
        pruner: StepPruner | None,
        distillation: SelfDistillation | None = None,
    ) -> None:
        self._stage, self._model = stage, model
        self._keeps_best = epochs.keeps_best and pruner is None
        self._steps_per_epoch = stage.recipe.steps_per_epoch
        self._distillation = distillation
        self._learner = _learner(stage.recipe, stage.machine, model, epochs, pruner)
        self._first_step, self._last_epoch = epochs.first * self._steps_per_epoch, epochs.first + epochs.count
        self._until = self._last_epoch * self._steps_per_epoch if epochs.until is None else epochs.until
        self._place = _Place(epochs.name, epochs.first, self._first_step)
        ema = self._learner.ema
        self._watched: nn.Module = model if ema is None else ema.module
        self._accuracy: tuple[str, float] | None = None

    def run(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Train, from the checkpoint on where there is one."""
        stage, batches = self._stage, self._stage.recipe.batches
        if checkpoint is not None:
            restore(self._learner, checkpoint, stage.machine.processes.rank)
            self._place = _Place(**checkpoint["progress"]["place"])
            if self._distillation is not None:
                self._distillation.expect(checkpoint["progress"].get("teacher"))
        self._distil()
        self._begin_epoch(self._place.within_epoch)
        self._shown_loss: float | None = None
        self._started, self._compiles = time.monotonic(), stage.recipe.options.compile
        with (
            suppress(_Reached),
            stage.screen.progress(self._steps_per_epoch),
            stage.screen.library_messages(),
            stage.interruption.listening(),
        ):
            self._show_moment()
            while self._place.epoch * self._steps_per_epoch < self._until and not self._reached():
                batches.set_epoch(self._place.epoch, start=self._progress.micro_steps)
                loss = train_epoch(self._learner, batches, self._progress, self._log_decision, self._after_step)
                self._end_epoch(loss)
                self._begin_epoch(None)
                self._show_moment()
                if stage.interruption.agreed_now() is Wish.STOP:
                    self._stop()
        wait_for_all()
        if self._place.best >= 0:
            self._watched = stage.products.load_best()
        self._model.load_state_dict(self._watched.state_dict())

    def _begin_epoch(self, resumed: dict[str, Any] | None) -> None:
        self._progress = EpochProgress(self._learner.pruner.phase, self._stage.machine.device)
        self._began, self._skipped_before = time.time(), self._learner.skipped.steps
        self._processor_began = time.process_time()
        if resumed is not None:
            self._progress.load_state_dict(resumed["progress"])
            self._began -= resumed["seconds"]
            self._processor_began -= resumed.get("processor_seconds", 0.0)
            self._skipped_before -= resumed["skipped"]

    def _after_step(self) -> None:
        """Show how it goes; save where it is time to, and stop where a signal asked for it."""
        self._distil()
        self._show_progress()
        interruption = self._stage.interruption
        wish = interruption.agreed()
        if (reached := self._reached()) and wish is not Wish.STOP:
            wish = max(wish, interruption.agreed_now())  # nobody comes to take an answer later
        if wish is Wish.GO_ON and not reached:
            return
        self._require_finite()
        taken = {"seconds": time.time() - self._began, "processor_seconds": time.process_time() - self._processor_began}
        self._save({"progress": self._progress.state_dict(), **taken, "skipped": self._skipped()})
        if wish is Wish.STOP:
            self._stop()
        if reached:
            raise _Reached

    def _distil(self) -> None:
        """From the end of the warm-up on, a distilled model learns from its teacher, too."""
        if self._distillation is not None:
            learner, step = self._learner, self._steps_done()
            learner.loss = self._distillation.loss_at(step, self._model, self._watched, learner.loss)
            self._distillation.tell_cost(self._place.part)

    def _show_progress(self) -> None:
        learner, screen = self._learner, self._stage.screen
        if self._compiles:
            self._compiles = False
            screen.say(f"compiled: the first step took {time.monotonic() - self._started:.1f} s")
        if learner.steps_done % CHECK_LOSS_EVERY == 0:
            self._shown_loss = self._progress.mean_loss()
            self._show_moment()

    def _show_moment(self) -> None:
        """Show how the training stands, without waiting for the device."""
        self._stage.screen.advance(
            Moment(
                step=self._steps_done(),
                epoch=min(self._place.epoch + 1, self._last_epoch),
                epochs=self._last_epoch,
                loss=self._shown_loss,
                accuracy=self._accuracy,
                kept_params=self._learner.pruner.kept_params(),
            )
        )

    def _reached(self) -> bool:
        """Whether the last step that was asked for is done and lies within an epoch; at the end of one there is more to do."""
        return self._steps_done() == self._until and self._until % self._steps_per_epoch != 0

    def _end_epoch(self, train_loss: float) -> None:
        """Evaluate, write the epoch's line, keep the best, save."""
        stage, learner, place = self._stage, self._learner, self._place
        self._require_finite()
        trained, processor = time.time(), time.process_time() - self._processor_began
        name, accuracy = stage.evaluation.watched(self._watched)
        if not math.isfinite(accuracy.loss):
            raise not_finite(f"The loss on the {name} part", self._steps_done())
        place.epoch += 1
        line = {
            "epoch": place.epoch,
            "step": self._steps_done(),
            "phase": self._progress.phase,
            "train_loss": train_loss,
            f"{name}_top1": accuracy.top1,
            f"{name}_top5": accuracy.top5,
            f"{name}_loss": accuracy.loss,
            "kept_params": learner.pruner.kept_params(),
            "lr": max(group["lr"] for group in learner.optimizer.param_groups),
            "skipped_steps": self._skipped(),
            "train_seconds": trained - self._began,
            "processor_seconds": processor,
            "seconds": time.time() - self._began,
        }
        stage.records.log_epoch(line, self._last_epoch, name, accuracy)
        self._accuracy = name, accuracy.top1
        if self._keeps_best and stage.splits.val is not None and accuracy.top1 > place.best:
            place.best = accuracy.top1
            stage.products.save_best(self._watched)
        self._save(None)

    def _save(self, within_epoch: dict[str, Any] | None) -> None:
        stage, place = self._stage, self._place
        place.step, place.within_epoch = self._steps_done(), within_epoch
        teacher = None if self._distillation is None else self._distillation.teacher_digest
        progress = {"place": asdict(place), "lines": stage.folder.lines, **({} if teacher is None else {"teacher": teacher})}
        save_checkpoint(stage.checkpoints, self._learner, stage.machine.is_main, **progress)
        stage.interruption.saved()

    def _require_finite(self) -> None:
        """The last good checkpoint must not make room for one that nothing can be done with."""
        if not self._stage.machine.precision.is_mixed:
            self._progress.require_finite()
        self._learner.require_finite_weights()

    def _stop(self) -> None:
        said = f"stopped by {self._stage.interruption.cause} after step {self._steps_done()}; everything is saved"
        self._stage.screen.warn(said)
        raise Stopped(said)

    def _log_decision(self, decision: Decision, phase: str) -> None:
        self._stage.records.log_decision(decision, phase, self._steps_done(), self._learner.pruner.kept_params())

    def _steps_done(self) -> int:
        return self._first_step + self._learner.steps_done

    def _skipped(self) -> int:
        return self._learner.skipped.steps - self._skipped_before


def _learner(recipe: Recipe, machine: Machine, model: VisionTransformer, epochs: Epochs, pruner: StepPruner | None) -> Learner:
    """What moves in training, after a recipe."""
    options = recipe.options
    rate = scaled_lr(epochs.lr, recipe.global_batch)
    optimizer = build_optimizer(model, options.opt, rate, options.weight_decay, options.layer_decay)
    quick = options.small_form == "quick" and pruner is None and machine.device.type == "cpu" and not options.compile
    wrapped: nn.Module = compiled(model) if options.compile else trainable_form(model) if quick else model
    if machine.processes.world_size > 1:
        on_gpu = [machine.device] if machine.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=on_gpu)
    scheduler = None
    if pruner is None:
        # min_lr is not scaled with the batch: where a small one starts below it, the rate must not climb to it.
        least = min(options.min_lr, rate)
        if epochs.until is None:
            warmup = min(options.warmup_epochs, epochs.count - 1)
            scheduler = cosine_schedule(optimizer, epochs.count, recipe.steps_per_epoch, least, warmup)
        else:  # it falls to its end in these steps, too
            scheduler = cosine_schedule(optimizer, 1, epochs.until - epochs.first * recipe.steps_per_epoch, least, 0)
    return Learner(
        model=wrapped,
        optimizer=optimizer,
        loss=recipe.loss,
        precision=machine.precision,
        scaler=machine.precision.scaler(),
        pruner=pruner or NoPruning(epochs.name, count_parameters(model)),
        scheduler=scheduler,
        ema=ModelEmaV3(model, decay=options.model_ema_decay) if options.model_ema else None,
        mixup=recipe.mixup,
        averaged=model,
        grad_accum_steps=options.grad_accum_steps,
        clip_grad=options.clip_grad,
    )
