"""Accuracy on the parts of the data that a model was not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from p3b.data import Preprocessing, eval_batches
from p3b.run.final_table import reported_part
from p3b.run.guessing import chance
from p3b.run.machine import Machine
from p3b.train.distributed import all_reduce_sum, gather
from p3b.train.evaluate import Accuracy, Answers, evaluate


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
        answers: what the model of the last `final` said of the images that its final accuracy is over: name of the part, and
            the answers in the order of the data set; None before, and where an unreadable image was skipped.
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
        self.parts = parts
        self.answers: tuple[str, Answers] | None = None
        self._preprocessing, self._machine = preprocessing, machine
        self._batch_size, self._num_workers, self._shared = batch_size, num_workers, shared

    @property
    def chances(self) -> dict[str, float]:
        """Top-1 in percent of always answering the most frequent class, by part."""
        return {name: chance(images.targets) for name, images in self.parts.items()}

    def watched(self, model: nn.Module) -> tuple[str, Accuracy]:
        """Accuracy on the part that is watched during training: val where there is one, else test.

        Returns:
            Name of the part, and the accuracy over all its images.
        """
        name = next(iter(self.parts))
        return name, self._on(name, model)

    def final(self, model: nn.Module) -> dict[str, Accuracy]:
        """Accuracy on every part: val, which may have chosen the epoch, and test, which never does."""
        told = reported_part(self.parts)
        answers = Answers()
        accuracies = {name: self._on(name, model, answers if name == told else None) for name in self.parts}
        together = _in_order(gather(answers) if self._shared else [answers])
        complete = len(together.target) == len(self.parts[told])
        self.answers = (told, together) if complete else None
        return accuracies

    def _on(self, name: str, model: nn.Module, answers: Answers | None = None) -> Accuracy:
        return evaluate_part(
            model,
            self.parts[name],
            self._preprocessing,
            self._machine,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            shared=self._shared,
            answers=answers,
        )


def evaluate_part(
    model: nn.Module,
    images: Any,
    preprocessing: Preprocessing,
    machine: Machine,
    *,
    batch_size: int,
    num_workers: int,
    shared: bool,
    answers: Answers | None = None,
) -> Accuracy:
    """Accuracy over a data set, each image counted once; for the arguments see `Evaluation` and `evaluate`."""
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
    return evaluate(model, batches, machine.precision, all_reduce_sum if shared else _alone, answers)


def _in_order(by_rank: Sequence[Answers]) -> Answers:
    """Answers in the order of the data set: rank r has images r, r + ranks, and so on."""
    return Answers(*(_interleaved([getattr(each, entry.name) for each in by_rank]) for entry in fields(Answers)))


def _interleaved(lists: Sequence[list[Any]]) -> list[Any]:
    missing = object()
    return [value for row in zip_longest(*lists, fillvalue=missing) for value in row if value is not missing]


def _alone(tensor: Tensor) -> Tensor:
    return tensor
