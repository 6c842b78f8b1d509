"""How fast models are, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

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
) -> list[float]:
    """Throughput of each model in evaluation mode, images per second, the median over rounds.

    The models take turns in every round, so that a change of the machine's speed meets all of them alike.

    Args:
        models: on the device.
        image_shape: (C, H, W).
        batch_size: images at a time.
    """
    images = torch.rand(batch_size, *image_shape, device=device)
    repeats = []
    for model in models:
        model.eval()
        _timed(model, images, 1, device)
        one = _timed(model, images, 1, device)
        repeats.append(max(1, round(seconds_per_round / one)))
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, count, measured in zip(models, repeats, times, strict=True):
            measured.append(_timed(model, images, count, device) / count)
    return [batch_size / statistics.median(measured) for measured in times]


def _timed(model: nn.Module, images: torch.Tensor, repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        model(images)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
