"""A step of the real training loop, taken apart: processor time of each of its parts, without those that it calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from timm.utils import ModelEmaV3

import p3b.core.finite
import p3b.data
import p3b.data.images
import p3b.data.loaders
import p3b.pruner
import p3b.scoring.trained
import p3b.train.loop
from p3b.train.evaluate import evaluate
from p3b.train.losses import TrainingLoss
from p3b.train.optim import Precision, build_optimizer
from p3b.vit.attention import choose_attention
from training import Shape

STEPS = 3
"""Steps that are timed, after one that is not."""
CPU = torch.device("cpu")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Clock:
    """Processor seconds by part; time in an inner part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._parts = ["the rest"]
        self._since = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens within for this part."""
        self._switch()
        self._parts.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        try:
            yield
        finally:
            self._switch()
            self._parts.pop()

    def begin(self) -> None:
        """Forget what was measured, and begin."""
        self.seconds, self.calls, self._since = {}, {}, time.process_time()

    def end(self, steps: int) -> dict[str, Any]:
        """Milliseconds and calls a step, by part."""
        self._switch()
        return {
            "ms": {name: 1000 * seconds / steps for name, seconds in self.seconds.items()},
            "calls": {name: calls / steps for name, calls in self.calls.items()},
        }

    def around(self, owner: Any, method: str, part: str) -> None:
        """From now on, count the calls of a method for a part."""
        function = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        setattr(owner, method, counted)

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._parts[-1]] = self.seconds.get(self._parts[-1], 0.0) + now - self._since
        self._since = now


def measure_step(shape: Shape, images: int, precision: str, prune: bool, data: str) -> dict[str, Any]:
    """A step of `train_epoch`, and the evaluation of as many images: milliseconds and calls by part.

    Functions of torch and p3b are wrapped for good: run it in a process of its own.

    Args:
        shape: of the model and its batch.
        images: of the data set, training and validation.
        precision: "fp32" or "bf16".
        prune: with soft masks in place.
        data: folder or archive of images in class folders, or "DIGITS".
    """
    torch.set_num_threads(1)
    clock, size = Clock(), shape.arguments.get("img_size", 224)
    data_set = ("DIGITS", None) if data == "DIGITS" else ("FOLDER", data)
    splits = p3b.data.open_data(*data_set, val_share=0.2, max_train_images=images)
    p3b.data.keep_decoded(splits, "auto")
    preprocessing = p3b.data.Preprocessing((3, size, size), *IMAGENET)
    options: dict[str, Any] = {"batch_size": shape.cpu_batch, "num_workers": 0, "device": CPU}
    batches = p3b.data.train_batches(splits.train, preprocessing, p3b.data.Augmentation(repeats=1), seed=0, **options)
    samples = batches._loader.loader._loader.dataset
    clock.around(samples, "_transform", "data: augment")
    clock.around(samples, "_read", "data: read and decode")
    learner = _learner(shape, len(splits.class_names), Precision.choose(precision, CPU), prune, clock)
    endless = _Endless(batches, clock)
    for _ in p3b.data.eval_batches(splits.train, preprocessing, **options):  # images are decoded in the first epoch
        pass

    def train(steps: int) -> None:
        endless.steps = steps
        progress = p3b.train.loop.EpochProgress("train", CPU)
        p3b.train.loop.train_epoch(learner, endless, progress, lambda *_: None, lambda: None)

    train(4 if prune else 1)  # soft masks are in place
    clock.begin()
    train(STEPS)
    found = clock.end(STEPS)
    some = splits.val.subset(range(min(len(splits.val), 2 * shape.cpu_batch)))
    began = time.process_time()
    accuracy = evaluate(
        learner.model, p3b.data.eval_batches(some, preprocessing, **options), learner.precision, lambda sums: sums
    )
    return {**found, "evaluation": 1000 * (time.process_time() - began) / accuracy.images * shape.cpu_batch}


def _learner(shape: Shape, classes: int, precision: Precision, prune: bool, clock: Clock) -> p3b.train.loop.Learner:
    """A model in training whose parts are counted."""
    model = choose_attention(replace(shape, classes=classes).build(), CPU, precision.dtype)
    optimizer, ema = build_optimizer(model, "adamw", 1e-4, 0.05), ModelEmaV3(model, decay=0.99)
    pruner: Any = p3b.train.loop.NoPruning("train", 0)
    if prune:
        schedule = p3b.Schedule(start=0, sparse=1, final=10**6, update_every=3)
        pruner = p3b.Pruner(model, 0.5, schedule=schedule, estimator="linear")
    clock.around(pruner, "step", "method")
    clock.around(pruner, "loss", "method")
    clock.around(optimizer, "step", "optimizer")
    clock.around(ema, "update", "moving average")
    for module in (p3b.train.loop, p3b.pruner, p3b.scoring.trained):
        clock.around(module, "all_finite", "finite?")
    clock.around(torch.Tensor, "backward", "backward")
    clock.around(model, "forward", "forward")
    loss = TrainingLoss(torch.nn.functional.cross_entropy)
    return p3b.train.loop.Learner(model, optimizer, loss, precision, precision.scaler(), pruner, ema=ema)


class _Endless:
    """So many batches, epoch after epoch; making one is counted."""

    def __init__(self, batches: Any, clock: Clock) -> None:
        self._batches, self._clock, self.steps = batches, clock, 1
        self._epoch, self._coming = 0, iter(batches)  # kept from call to call: one batch is always made ahead

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            with self._clock.part("data: collate, normalise, erase"):
                batch = next(self._coming, None)
                if batch is None:
                    self._epoch += 1
                    self._batches.set_epoch(self._epoch)
                    self._coming = iter(self._batches)
                    batch = next(self._coming)
            yield batch
