"""Self-distillation: a model that is pruned learns from its own dense transfer, besides the labels.

The teacher is the model as it stands when the warm-up is over (its moving average, where one is kept), which costs no training
of its own, or the model of a finished `p3b train`. It is asked from the first step after the warm-up to the end of
fine-tuning, on the very images that the student sees. The former is written to <stage>/teacher.pth and always read from there,
so that a run that is resumed has the same one; checkpoints name the teacher by the digest of its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.errors import ConfigError, WeightsError
from p3b.run.options import PruneConfig
from p3b.run.products import PRODUCTS
from p3b.run.recipe import answer_teacher_apart
from p3b.run.stage import Stage
from p3b.storage import artifact
from p3b.train.losses import TrainingLoss, check_distillation
from p3b.train.optim import Precision
from p3b.train.teacher import Teacher
from p3b.vit.layout import require_vision_transformer

TAU = 2.0
"""Temperature where none is given: between a model and its own smaller self more than the likeliest class has to tell."""


def open_distillation(stage: Stage, config: PruneConfig, start: int) -> SelfDistillation | None:
    """What --distill-from asks for; None where nothing.

    Args:
        stage: that has not begun: whatever is wrong is refused now.
        config: of the run.
        start: optimizer step at which the warm-up ends.

    Raises:
        ConfigError: settings that cannot be, or a dense run of other classes or images. WeightsError: its model is not there.
    """
    source, dense_run = config.prune.distill_from, config.prune.dense_run
    if source == "none":
        return None
    if source == "warm-up" and start == 0:
        raise ConfigError(
            "--distill-from warm-up learns from the model at the end of the warm-up, and there is none: pruning starts at "
            "once. Give a later --prune-start-epoch, or --distill-from dense-run."
        )
    given = None
    if source == "dense-run":
        assert dense_run is not None
        given = dense_run / PRODUCTS["train"]
        _require_same_task(given, stage)
    return SelfDistillation(stage, config, start, given)


class SelfDistillation:
    """The teacher of a stage, from the moment on that there is one.

    Args:
        stage, config, start: see `open_distillation`.
        given: folder of the teacher; None: it is the model itself at the end of the warm-up.

    Attributes:
        teacher_digest: of the teacher's weights; None as long as there is no teacher.
    """

    def __init__(self, stage: Stage, config: PruneConfig, start: int, given: Path | None) -> None:
        training = config.training
        self._kind = "soft" if training.distillation_type == "none" else training.distillation_type
        self._alpha = training.distillation_alpha
        self._tau = TAU if training.distillation_tau is None else training.distillation_tau
        check_distillation(self._kind, self._alpha, self._tau)
        self._stage, self._start, self._given = stage, start, given
        self.teacher_digest = None if given is None else teacher_digest(given)
        self._teacher: Teacher | None = None
        self._loss: TrainingLoss | None = None
        self._measured: str | None = None
        """Name of the epochs that the teacher's cost is measured in."""
        self._costs: dict[str, float] = {}
        """Share of a step's time by name of the epochs."""

    def expect(self, digest: str | None) -> None:
        """Go on from a checkpoint that names this teacher, or none yet.

        Raises:
            ConfigError: the run began with another dense run. WeightsError: its teacher is gone, or another one lies there.
        """
        if digest is None:
            return
        if self._given is not None and self.teacher_digest != digest:
            raise ConfigError(
                f"--resume needs the teacher that the run began with; the model of --dense-run {self._given.parent} has other "
                "weights. Give that dense run, or start again with --overwrite."
            )
        if self._given is None and teacher_digest(self._stage.products.teacher) != digest:
            raise WeightsError(
                f"{self._stage.products.teacher} is not the teacher that the run has learnt from so far. Put that one back, or "
                "start again with --overwrite."
            )

    def loss_at(self, step: int, student: VisionTransformer, watched: nn.Module, loss: TrainingLoss) -> TrainingLoss:
        """The loss of the step to come.

        Args:
            step: optimizer steps of the stage that are done.
            student: is told to answer teacher and task apart, where it can.
            watched: the student, or its moving average.
            loss: of the task; returned as it is while there is no teacher.
        """
        if step < self._start:
            return loss
        if self._loss is None:
            if self._given is None and step == self._start:
                self._stage.products.save_teacher(require_vision_transformer(watched))
            self._teacher = self._open()
            self._loss = TrainingLoss(loss.task, self._teacher, self._kind, self._alpha, self._tau)
            answer_teacher_apart(student, enable=True)
        return self._loss

    def tell_cost(self, epochs: str) -> None:
        """Say once what the teacher costs in these epochs, when it is known.

        Args:
            epochs: their name.
        """
        if self._teacher is None or epochs in self._costs:
            return
        if self._measured != epochs:
            self._measured = epochs
            self._teacher.measure()
        elif (share := self._teacher.share) is not None:
            self._costs[epochs] = share
            self._stage.screen.say(f"teacher: {share:.0%} of a step's time ({epochs})")

    def summary(self) -> dict[str, Any]:
        """What the summary of the stage says of it; the cost is of the epochs that this process has trained."""
        return {
            "teacher": str(self._place),
            "digest": self.teacher_digest,
            "type": self._kind,
            "alpha": self._alpha,
            "tau": self._tau,
            "share_of_time": self._costs,
        }

    @property
    def _place(self) -> Path:
        return self._stage.products.teacher if self._given is None else self._given

    def _open(self) -> Teacher:
        machine = self._stage.machine
        self.teacher_digest = teacher_digest(self._place)
        precision = Precision.choose("auto", machine.device)
        teacher = Teacher(machine.put(artifact.load(self._place)), precision)
        whose = "the model at the end of the warm-up" if self._given is None else "the dense model"
        how = f"{self._kind}, alpha {self._alpha:g}" + (f", temperature {self._tau:g}" if self._kind == "soft" else "")
        self._stage.screen.say(f"teacher: {whose}, {self._place} ({how})")
        return teacher


def teacher_digest(saved: Path) -> str:
    """Names a teacher: the digest of its weights.

    Args:
        saved: folder or file of the model.

    Raises:
        WeightsError: it is not there.
    """
    if not saved.exists():
        raise WeightsError(
            f"{saved} is gone: the teacher that this run learns from. Put it back, or start again with --overwrite."
        )
    digest: str | None = artifact.read_config(saved).get("weights_digest")
    if digest is None:
        raise WeightsError(f"{saved} is of an early version and tells no digest of its weights: save it anew (p3b.save).")
    return digest


def _require_same_task(teacher: Path, stage: Stage) -> None:
    """Refuse a dense run that has learnt other classes, or from images that were prepared in another way."""
    said, names = artifact.read_config(teacher), list(stage.splits.class_names)
    if said["class_names"] != names:
        raise ConfigError(
            f"The teacher of --dense-run {teacher.parent} knows other classes than the data has, or in another order: "
            f"{_few(said['class_names'] or [])}; expected {_few(names)}."
        )
    ours, theirs = stage.preprocessing.to_dict(), said["preprocessing"] or {}
    if odd := [key for key in ("input_size", "mean", "std") if theirs.get(key) != ours[key]]:
        key = odd[0]
        raise ConfigError(
            f"The teacher of --dense-run {teacher.parent} was trained on images with {key} {theirs.get(key)}, this run's have "
            f"{ours[key]}; it sees the same images, so both must agree (--input-size, --mean, --std)."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
