"""One part of a stage: some epochs of training (pruning, or fine-tuning after it), saved as they go and resumed anywhere."""

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
from p3b.run.interruption import Wish
from p3b.run.stage import Session
from p3b.storage import saved_model as artifact
from p3b.train.checkpoint import restore, save_checkpoint
from p3b.train.compiled import compiled
from p3b.train.distributed import wait_for_all
from p3b.train.loop import CHECK_LOSS_EVERY, EpochProgress, Learner, NoPruning, StepPruner, not_finite, train_epoch
from p3b.train.optim import build_optimizer, cosine_schedule, scaled_lr
from p3b.vit.cost import count_parameters


def train_part(
    session: Session,
    model: VisionTransformer,
    part: str,
    epochs: int,
    lr: float,
    *,
    first_epoch: int = 0,
    pruner: StepPruner | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    until: int | None = None,
) -> None:
    """Train for some epochs; the model ends as the best one where a validation part chooses and nothing is pruned.

    Args:
        session: the stage that this is a part of; it has begun.
        model: on the device; is changed.
        part: what this part of the stage is called in checkpoints and, unless it prunes, in the metrics.
        epochs: of this part.
        lr: for a global batch of 512.
        first_epoch: epochs that the stage has behind it.
        pruner: then the learning rate stays constant and no best epoch is chosen, since every epoch has fewer parameters.
        checkpoint: to go on from, within this part.
        until: ends sooner, after so many optimizer steps of the stage, with a checkpoint of that moment.

    Raises:
        Stopped: a signal asked for it, and everything is saved.
    """
    _Part(session, model, part, epochs, lr, first_epoch, pruner, until).run(checkpoint)


class _Reached(Exception):  # noqa: N818 - it is none
    """The last step that was asked for lies within an epoch and is done."""


@dataclass
class _Place:
    """Where in a stage a part stands: the plain values of a checkpoint."""

    part: str
    epoch: int
    """Epochs of the stage that are complete."""
    step: int
    """Optimizer steps of the stage that are done."""
    best: float = -1.0
    """Best validation top-1 so far, in percent."""
    within_epoch: dict[str, Any] | None = None
    """`EpochProgress` of an epoch that has begun, with its seconds and skipped steps so far."""


class _Part:
    def __init__(
        self,
        session: Session,
        model: VisionTransformer,
        part: str,
        epochs: int,
        lr: float,
        first_epoch: int,
        pruner: StepPruner | None,
        until: int | None,
    ) -> None:
        self._session, self._model, self._prunes = session, model, pruner is not None
        self._learner = _learner(session, model, part, epochs, lr, pruner)
        self._first_step, self._last_epoch = first_epoch * session.steps_per_epoch, first_epoch + epochs
        self._until = self._last_epoch * session.steps_per_epoch if until is None else until
        self._place = _Place(part, first_epoch, self._first_step)
        self._best_file = session.folder.path / "best.pth"
        ema = self._learner.ema
        self._watched: nn.Module = model if ema is None else ema.module

    def run(self, checkpoint: Mapping[str, Any] | None) -> None:
        session = self._session
        if checkpoint is not None:
            restore(self._learner, checkpoint, session.processes.rank)
            self._place = _Place(**checkpoint["progress"]["place"])
        self._begin_epoch(self._place.within_epoch)
        self._started, self._compiles = time.monotonic(), session.config.training.compile
        total = self._until - self._first_step
        with (
            suppress(_Reached),
            session.display.progress(total, self._learner.steps_done),
            session.display.library_messages(),
            session.interruption.listening(),
        ):
            while self._place.epoch * session.steps_per_epoch < self._until and not self._reached():
                session.batches.set_epoch(self._place.epoch, start=self._progress.micro_steps)
                loss = train_epoch(self._learner, session.batches, self._progress, self._log_decision, self._after_step)
                self._end_epoch(loss)
                self._begin_epoch(None)
                if session.interruption.agreed_now() is Wish.STOP:
                    self._stop()
        wait_for_all()
        if self._place.best >= 0:
            self._watched = artifact.load(self._best_file, session.device)
        self._model.load_state_dict(self._watched.state_dict())

    def _begin_epoch(self, resumed: dict[str, Any] | None) -> None:
        self._progress = EpochProgress(self._learner.pruner.phase, self._session.device)
        self._began, self._skipped_before = time.time(), self._learner.skipped.steps
        if resumed is not None:
            self._progress.load_state_dict(resumed["progress"])
            self._began -= resumed["seconds"]
            self._skipped_before -= resumed["skipped"]

    def _after_step(self) -> None:
        learner, session = self._learner, self._session
        if self._compiles:
            self._compiles = False
            session.display.say(f"compiled: the first step took {time.monotonic() - self._started:.1f} s")
        if learner.steps_done % CHECK_LOSS_EVERY == 0:
            kept = f"{learner.pruner.kept_params():,} parameters"
            text = f"{self._progress.phase}, loss {self._progress.mean_loss():.3f}, {kept}, {session.last_top1}"
            session.display.advance(learner.steps_done, text)
        wish = session.interruption.agreed()
        if (reached := self._reached()) and wish is not Wish.STOP:
            wish = max(wish, session.interruption.agreed_now())  # nobody comes to take an answer later
        if wish is Wish.GO_ON and not reached:
            return
        self._require_finite()
        self._save({"progress": self._progress.state_dict(), "seconds": time.time() - self._began, "skipped": self._skipped()})
        if wish is Wish.STOP:
            self._stop()
        if reached:
            raise _Reached

    def _reached(self) -> bool:
        """Whether the last step that was asked for is done and lies within an epoch; at the end of one there is more to do."""
        return self._steps_done() == self._until and self._until % self._session.steps_per_epoch != 0

    def _end_epoch(self, train_loss: float) -> None:
        """Evaluate, write the epoch's line, keep the best, save."""
        session, learner, place = self._session, self._learner, self._place
        self._require_finite()
        trained = time.time()
        name, accuracy = session.evaluate(self._watched)
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
            "seconds": time.time() - self._began,
        }
        session.log_epoch(line, self._last_epoch, name, accuracy)
        if not self._prunes and session.splits.val is not None and accuracy.top1 > place.best:
            place.best = accuracy.top1
            session.on_main(lambda: artifact.save_checkpoint(self._watched, self._best_file, **session.description()))
        self._save(None)

    def _save(self, within_epoch: dict[str, Any] | None) -> None:
        session, place = self._session, self._place
        place.step, place.within_epoch = self._steps_done(), within_epoch
        save_checkpoint(
            session.checkpoints, self._learner, session.processes.is_main, place=asdict(place), lines=session.folder.lines
        )
        session.interruption.saved()

    def _require_finite(self) -> None:
        """The last good checkpoint must not make room for one that nothing can be done with."""
        if not self._session.precision.is_mixed:
            self._progress.require_finite()
        self._learner.require_finite_weights()

    def _stop(self) -> None:
        session = self._session
        said = f"stopped by {session.interruption.cause} after step {self._steps_done()}; all of it is saved"
        session.display.say(said)
        raise Stopped(said)

    def _log_decision(self, decision: Decision, phase: str) -> None:
        self._session.log_decision(decision, phase, self._steps_done(), self._learner.pruner.kept_params())

    def _steps_done(self) -> int:
        return self._first_step + self._learner.steps_done

    def _skipped(self) -> int:
        return self._learner.skipped.steps - self._skipped_before


def _learner(
    session: Session, model: VisionTransformer, part: str, epochs: int, lr: float, pruner: StepPruner | None
) -> Learner:
    training = session.config.training
    rate = scaled_lr(lr, session.global_batch)
    optimizer = build_optimizer(model, training.opt, rate, training.weight_decay)
    wrapped: nn.Module = compiled(model) if training.compile else model
    if session.processes.world_size > 1:
        on_gpu = [session.device] if session.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=on_gpu)
    scheduler = None
    if pruner is None:
        # min_lr is not scaled with the batch: where a small one starts below it, the rate must not climb to it.
        least = min(training.min_lr, rate)
        scheduler = cosine_schedule(optimizer, epochs, session.steps_per_epoch, least, min(training.warmup_epochs, epochs - 1))
    return Learner(
        model=wrapped,
        optimizer=optimizer,
        loss=session.loss,
        precision=session.precision,
        scaler=session.precision.scaler(),
        pruner=pruner or NoPruning(part, count_parameters(model)),
        scheduler=scheduler,
        ema=ModelEmaV3(model, decay=training.model_ema_decay) if training.model_ema else None,
        mixup=session.mixup,
        grad_accum_steps=training.grad_accum_steps,
        clip_grad=training.clip_grad,
    )
