"""How fast models are, measured side by side."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn


@torch.inference_mode()
def images_per_second(
    models: Sequence[nn.Module],
    image_shape: tuple[int, int, int],
    *,
    batch_size: int,
    device: torch.device,
    rounds: int = 7,
    seconds_per_round: float = 0.25,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Throughput of each model in evaluation mode, images per second, the median over rounds.

    The models take turns in every round, so that a change of the machine's speed meets all of them alike.

    Args:
        models: on the device.
        image_shape: (C, H, W).
        batch_size: images at a time; fewer where a batch takes so long that not even three rounds fit into `seconds`.
        rounds: at most.
        seconds_per_round: of each model; at least one batch.
        seconds: that the rounds may take, about.
        clock: what seconds are read from; `time.process_time` counts the processor's alone, for one thread on a busy machine.
    """
    images = torch.rand(1, *image_shape, device=device)
    singly = sum(_warm(model, images, device, clock) for model in models)
    batch_size = max(1, min(batch_size, int(seconds / (3 * singly))))
    images = torch.rand(batch_size, *image_shape, device=device)
    batches = [_warm(model, images, device, clock) for model in models]
    repeats = [max(1, round(seconds_per_round / batch)) for batch in batches]
    rounds = max(1, min(rounds, int(seconds / sum(map(operator.mul, batches, repeats)))))
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, count, measured in zip(models, repeats, times, strict=True):
            measured.append(_timed(model, images, count, device, clock) / count)
    return [batch_size / statistics.median(measured) for measured in times]


def _warm(model: nn.Module, images: torch.Tensor, device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of a batch, after one that warms up."""
    model.eval()
    _timed(model, images, 1, device, clock)
    return _timed(model, images, 1, device, clock)


def _timed(model: nn.Module, images: torch.Tensor, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    _wait(device)
    start = clock()
    for _ in range(repeats):
        model(images)
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
