"""Accuracy on the parts of the data that a model was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from p3b.data import Preprocessing, eval_batches
from p3b.run.machine import Machine
from p3b.train.distributed import all_reduce_sum
from p3b.train.evaluate import Accuracy, evaluate


class Evaluation:
    """Evaluates models on the same images in the same way.

    Args:
        parts: images by the name of their part ("val", "test"), in the order in which they are reported; at least one. The
            first is watched during training.
        preprocessing: of the images.
        machine: that evaluates.
        batch_size: images of a batch on each process.
        num_workers: that load them.
        shared: whether processes share the images; else each of them evaluates all.

    Attributes:
        parts: as given.
        last: the last result, in words.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        preprocessing: Preprocessing,
        machine: Machine,
        *,
        batch_size: int,
        num_workers: int,
        shared: bool,
    ) -> None:
        self.parts, self.last = parts, "not evaluated yet"
        self._preprocessing, self._machine = preprocessing, machine
        self._batch_size, self._num_workers, self._shared = batch_size, num_workers, shared

    def watched(self, model: nn.Module) -> tuple[str, Accuracy]:
        """Accuracy on the part that is watched during training: val where there is one, else test.

        Returns:
            Name of the part, and the accuracy over all its images.
        """
        name = next(iter(self.parts))
        return name, self._on(name, model)

    def final(self, model: nn.Module) -> dict[str, Accuracy]:
        """Accuracy on every part: val, which may have chosen the epoch, and test, which never does."""
        return {name: self._on(name, model) for name in self.parts}

    def _on(self, name: str, model: nn.Module) -> Accuracy:
        accuracy = evaluate_part(
            model,
            self.parts[name],
            self._preprocessing,
            self._machine,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            shared=self._shared,
        )
        self.last = f"{name} top-1 {accuracy.top1:.1f} %"
        return accuracy


def evaluate_part(
    model: nn.Module,
    images: Any,
    preprocessing: Preprocessing,
    machine: Machine,
    *,
    batch_size: int,
    num_workers: int,
    shared: bool,
) -> Accuracy:
    """Accuracy over a data set, each image counted once; for the arguments see `Evaluation`."""
    processes = machine.processes
    batches = eval_batches(
        images,
        preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        device=machine.device,
        rank=processes.rank if shared else 0,
        world_size=processes.world_size if shared else 1,
    )
    return evaluate(model, batches, machine.precision, all_reduce_sum if shared else _alone)


def _alone(tensor: Tensor) -> Tensor:
    return tensor
