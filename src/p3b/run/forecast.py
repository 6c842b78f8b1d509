"""What a pruning run would take and give, measured on this machine without training: seconds a step, size and speed by budget.

The small models are stand-ins: every block keeps the same share, elements at random. Their parameters are those of the budget;
MACs and speed are near what another sharing of the same budget gives.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy

from p3b.core.schedule import Schedule
from p3b.deploy.choice import with_layout
from p3b.deploy.speed import images_per_second
from p3b.errors import BudgetError
from p3b.pruner import Pruner
from p3b.run.machine import Machine
from p3b.run.options import TrainingOptions
from p3b.train.losses import task_loss
from p3b.train.optim import build_optimizer
from p3b.vit.cost import count_macs, count_parameters
from p3b.vit.families import images_of
from p3b.vit.layout import read_layout


@dataclass(frozen=True)
class BudgetForecast:
    """What a prune ratio gives.

    Attributes:
        prune_ratio: share of the parameters that goes; 0 is the dense model.
        params, macs: of the small model, for one image.
        latency_ms: of one image.
        images_per_second: in batches of 32.
    """

    prune_ratio: float
    params: int
    macs: int
    latency_ms: float
    images_per_second: float


@dataclass(frozen=True)
class Seconds:
    """How long a run takes, by its parts."""

    pruning: float
    """All before the cut: where that is in one shot, its warm-up."""
    fine_tuning: float
    evaluation: float
    cut: float = 0.0
    """Measuring, cutting and compensating in one shot; in a gradual run they are parts of steps, or take next to nothing."""

    @property
    def total(self) -> float:
        return self.pruning + self.cut + self.fine_tuning + self.evaluation


def largest_ratio(model: VisionTransformer) -> float:
    """The largest prune ratio that can be met: what lies outside the blocks stays."""
    return 1 - read_layout(model).other_params / count_parameters(model)


def budget_forecasts(
    model: VisionTransformer, ratios: Sequence[float], machine: Machine, widths: Mapping[str, Any]
) -> list[BudgetForecast]:
    """Size and speed of the dense model and of a stand-in for each ratio that can be met, measured side by side.

    Args:
        model: dense, on the device; it is not changed.
        ratios: that are asked for.
        machine: that it runs on.
        widths: as of `stand_in`.
    """
    shape = images_of(model).shape
    models, kept = [copy.deepcopy(model).eval()], [0.0]
    for ratio in ratios:
        try:
            models.append(stand_in(model, ratio, widths).eval())
        except BudgetError:
            continue
        kept.append(ratio)
    sizes = [(count_parameters(each), count_macs(each, shape[1:])) for each in models]
    speeds = {}
    for batch_size in (1, 32):
        laid_out = [models[0], *(with_layout(each, batch_size=batch_size) for each in models[1:])]
        speeds[batch_size] = images_per_second(
            laid_out, shape, batch_size=batch_size, device=machine.device, rounds=5, seconds_per_round=0.05, seconds=10.0
        )
    return [
        BudgetForecast(ratio, params, macs, 1000 / single, many)
        for ratio, (params, macs), single, many in zip(kept, sizes, speeds[1], speeds[32], strict=True)
    ]


def stand_in(model: VisionTransformer, prune_ratio: float, widths: Mapping[str, Any]) -> VisionTransformer:
    """A small model of that budget, every block with the same share; `model` is not changed.

    Args:
        model: dense.
        prune_ratio: share of the parameters that goes.
        widths: options of a method, of which those that say what widths are like ("align", "stream") are taken.

    Raises:
        BudgetError: the ratio cannot be met.
    """
    taken = {key: widths[key] for key in ("align", "stream") if key in widths}
    schedule = Schedule(start=0, sparse=1, final=1, update_every=1)
    pruner = Pruner(copy.deepcopy(model), prune_ratio, "random", schedule, **taken)
    small = pruner.finalize()
    return cast("VisionTransformer", small)


def seconds_of_run(
    model: VisionTransformer,
    pruning: Mapping[str, Any],
    options: TrainingOptions,
    machine: Machine,
    *,
    steps: tuple[int, int],
    evaluated: int,
    measured_steps: int,
    gradual: bool = True,
) -> Seconds:
    """How long a run takes, from a few steps with random images; loading images, which goes on beside it, is left out.

    Args:
        model: dense, on the device; it is not changed.
        pruning: keyword arguments of the `Pruner`, besides model and schedule.
        options: of training.
        machine: that it runs on.
        steps: optimizer steps of pruning and of fine-tuning.
        evaluated: images that are evaluated in all.
        measured_steps: that are measured.
        gradual: whether the model is pruned step by step; else steps before its cut are those of the dense model.
    """
    never = Schedule(start=0, sparse=10**6, final=10**6, update_every=10**6)
    pruned = copy.deepcopy(model)
    pruner = Pruner(pruned, schedule=never, **pruning) if gradual else None
    step = _seconds_a_step(pruned, pruner, options, machine, measured_steps) if steps[0] else 0.0
    small = stand_in(model, pruning["prune_ratio"], pruning)
    small_step = _seconds_a_step(small, None, options, machine, measured_steps) if steps[1] else 0.0
    images = _images(model, options.batch_size, machine)
    with torch.no_grad(), machine.precision.autocast():
        model.eval()
        model(images)
        began = time.perf_counter()
        float(model(images).sum())
        forward = (time.perf_counter() - began) / len(images)
    return Seconds(step * steps[0], small_step * steps[1], forward * evaluated)


def seconds_of_cut(
    model: VisionTransformer, pruner: Pruner, machine: Machine, *, images: int, at_a_time: int, order: bool, compensated: bool
) -> float:
    """How long a cut in one shot takes, from one batch of random images: nearly all of it grows with their number.

    Args:
        model: dense, on the device; it is cut.
        pruner: of the model, without a schedule.
        machine: that it runs on.
        images: that the cut is decided on, by this process.
        at_a_time: images of a batch.
        order: whether heads are ordered (`Pruner.calibrate`).
        compensated: whether what goes is made up for by what stays.
    """
    count = min(images, at_a_time)
    batch = _images(model, count, machine)
    began = time.perf_counter()
    pruner.calibrate([(batch, torch.arange(count, device=machine.device) % model.num_classes)], cross_entropy, order=order)
    pruner.decide_last()
    pruner.shrink([batch] if compensated else None)
    return (time.perf_counter() - began) * images / count


def _seconds_a_step(
    model: VisionTransformer, pruner: Pruner | None, options: TrainingOptions, machine: Machine, measured_steps: int
) -> float:
    """Of an optimizer step, the mean over so many after one that warms up."""
    criterion = task_loss(soft_targets=False, smoothing=options.smoothing)
    optimizer = build_optimizer(model, options.opt, 1e-6, options.weight_decay)
    images = _images(model, options.batch_size, machine)
    targets = torch.arange(len(images), device=machine.device) % model.num_classes
    model.train()
    began = 0.0
    for number in range(measured_steps + 1):
        if number == 1:
            began = time.perf_counter()
        for _ in range(options.grad_accum_steps):
            with machine.precision.autocast():
                loss: Tensor = criterion(model(images), targets)
                if pruner is not None:
                    loss = loss + pruner.loss(criterion, targets)
            loss.backward()
        if pruner is not None:
            pruner.step()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
    return (time.perf_counter() - began) / measured_steps


def _images(model: VisionTransformer, count: int, machine: Machine) -> Tensor:
    return torch.rand(count, *images_of(model).shape, device=machine.device)
