"""The models that a stage leaves in the output folder, and the best epoch's in its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.run.machine import Machine
from p3b.storage import artifact
from p3b.train.distributed import wait_for_all
from p3b.vit.architecture import build_skeleton, describe_dense

PRODUCTS = {"train": "dense", "prune": "pruned", "finetune": "finetuned"}
"""Folder of each stage's model; a stage that is not here leaves none."""
SPARSE_CHECKPOINT = "first_sparse_checkpoint.pth"
"""The shrunk model before fine-tuning, under its published name."""
BEST, TEACHER = "best.pth", "teacher.pth"


def products_of(stage: str) -> tuple[str, ...]:
    """Names of what a stage leaves in the output folder, besides its own folder."""
    product = (PRODUCTS[stage],) if stage in PRODUCTS else ()
    return (*product, SPARSE_CHECKPOINT) if stage == "prune" else product


class Products:
    """Saves the models of a stage; the main process writes.

    Args:
        root: the output folder.
        stage: name of the stage.
        description: what a saved model says of itself, besides its shape: class_names, preprocessing, provenance.
        machine: that the models are on.
    """

    def __init__(self, root: Path, stage: str, description: Mapping[str, Any], machine: Machine) -> None:
        self._root, self._stage, self._description, self._machine = root, stage, description, machine

    def save(self, model: VisionTransformer) -> Path:
        """Write the stage's model folder, which is returned."""
        folder = self._root / PRODUCTS[self._stage]
        self._machine.on_main(lambda: artifact.save(model, folder, **self._description))
        wait_for_all()
        return folder

    @property
    def sparse_checkpoint(self) -> Path:
        """File of the shrunk model before fine-tuning."""
        return self._root / SPARSE_CHECKPOINT

    def save_sparse_checkpoint(self, model: VisionTransformer) -> None:
        """Write the shrunk model before fine-tuning."""
        self._machine.on_main(lambda: artifact.save_checkpoint(model, self.sparse_checkpoint, **self._description))
        wait_for_all()

    def save_best(self, model: nn.Module) -> None:
        """Write the model of the best epoch so far."""
        self._machine.on_main(lambda: artifact.save_checkpoint(model, self._best, **self._description))

    def load_best(self) -> nn.Module:
        """The model of the best epoch."""
        return artifact.load(self._best, self._machine.device)

    @property
    def teacher(self) -> Path:
        """File of the model that a distilled run learns from, where it is the run's own."""
        return self._root / self._stage / TEACHER

    def save_teacher(self, model: VisionTransformer) -> None:
        """Write the model that the run will learn from: the weights of a dense one, whose masks are still all open."""
        plain = build_skeleton(describe_dense(model))  # the model itself is being pruned: gates and taps hang on it
        plain.load_state_dict(model.state_dict(), assign=True)
        self._machine.on_main(lambda: artifact.save_checkpoint(plain, self.teacher, **self._description))
        wait_for_all()

    @property
    def _best(self) -> Path:
        return self._root / self._stage / BEST
