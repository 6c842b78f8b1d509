"""Models side by side in their runtimes: how long one image takes, how many a second, how much memory, how large the file.

Sides take turns, so that whatever else the machine does meets all of them. A ratio is the median of the ratios of the rounds,
and its spread their middle half. Where that holds 1, no difference was measured, and the ratio is called so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from p3b.deploy import choice
from p3b.deploy.metadata import Metadata
from p3b.deploy.photos import stand_in
from p3b.deploy.runners import ONNX, PROGRAM, Runner, TorchRunner, open_runner
from p3b.deploy.turns import in_turns
from p3b.errors import ConfigError
from p3b.storage import artifact
from p3b.vit.architecture import build_dense
from p3b.vit.layout import require_vision_transformer


@dataclass(frozen=True)
class Ratio:
    """How many times as quick as the first side.

    Attributes:
        median: over the rounds.
        low, high: the quartiles, between which half of the rounds lie.
    """

    median: float
    low: float
    high: float

    @property
    def is_a_difference(self) -> bool:
        """Whether the spread leaves 1 out."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        spread = f"{self.low:.2f} to {self.high:.2f}"
        return f"x {self.median:.2f} ({spread})" if self.is_a_difference else f"no difference ({spread})"


@dataclass(frozen=True)
class Timing:
    """Of one side at one batch size.

    Attributes:
        batch_size: images at a time.
        p50_ms, p90_ms: of a call, in milliseconds.
        images_per_second: at the median.
        ratio: to the first side; None for that itself.
        rounds: that were measured.
    """

    batch_size: int
    p50_ms: float
    p90_ms: float
    images_per_second: float
    ratio: Ratio | None
    rounds: int


@dataclass(frozen=True)
class Side:
    """What is measured: a file or folder, and how it runs.

    Attributes:
        path: of a saved model, an .onnx or a .pt2.
        compiled: by torch.compile.
        dense: not the model itself, but a dense one of its architecture with random weights, which is as quick as the one that
            it was pruned from.
        called: what a table calls it; by default its path.
    """

    path: Path
    compiled: bool = False
    dense: bool = False
    called: str | None = None

    @property
    def name(self) -> str:
        """What it is called in a table."""
        runtime = {ONNX: "ONNX Runtime", PROGRAM: "torch.export"}.get(self.path.suffix, "eager")
        runtime = "compiled" if self.compiled else runtime
        called = self.called or str(self.path)
        return f"dense of {called}, {runtime}" if self.dense else f"{called}, {runtime}"


def open_side(
    side: Side, *, layout: str = "index", batch_size: int = 1, device: str | torch.device = "cpu", threads: int | None = None
) -> Runner:
    """A side in its runtime; see `p3b.deploy.runners.open_runner`."""
    if side.path.suffix in (ONNX, PROGRAM):
        return open_runner(side.path, device=device, threads=threads, compiled=side.compiled)
    config = artifact.read_config(side.path)
    metadata = Metadata.of_config(config)
    model: nn.Module
    if side.dense:
        model = build_dense(config["architecture"]).to(device)
    else:
        model = choice.load(side.path, device, layout=layout, batch_size=batch_size).float()
    if metadata.preprocessing is None:
        metadata = replace(metadata, preprocessing=stand_in(require_vision_transformer(model)))
    return TorchRunner(model, metadata, compiled=side.compiled)


def measure(
    runners: Mapping[str, Runner],
    batch_size: int,
    *,
    rounds: int = 100,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all sides at one batch size.

    Args:
        runners: sides by name; the first is what ratios are to.
        batch_size: images at a time.
        rounds: at most.
        seconds: that the rounds may take, about.
        clock: what seconds are read from; wall time, or a processor's.
    """
    calls = {name: partial(runner, example(runner.metadata, batch_size)) for name, runner in runners.items()}
    taken = in_turns(calls, rounds=rounds, seconds=seconds, clock=clock)
    first = taken[next(iter(taken))]
    return {name: _timing(batch_size, each, None if each is first else ratio_of(first, each)) for name, each in taken.items()}


def _timing(batch_size: int, taken: Sequence[float], ratio: Ratio | None) -> Timing:
    p50, p90 = (1e3 * float(np.quantile(taken, share)) for share in (0.5, 0.9))
    return Timing(batch_size, p50, p90, 1e3 * batch_size / p50, ratio, len(taken))


def ratio_of(first: Sequence[float], other: Sequence[float]) -> Ratio:
    """How many times as quick the other side was, round by round; pure."""
    low, median, high = np.quantile(np.divide(first, other), (0.25, 0.5, 0.75))
    return Ratio(float(median), float(low), float(high))


def example(metadata: Metadata, batch_size: int) -> NDArray[Any]:
    """Random images as a model takes them: prepared ones, or uint8 ones as large as its preprocessing resizes to.

    Raises:
        ConfigError: the model does not say how large its images are.
    """
    if metadata.preprocessing is None:
        raise ConfigError("The model does not say how large its images are: save it with preprocessing, and export it again.")
    channels, height, width = metadata.preprocessing.input_size
    noise = np.random.default_rng(0)
    if metadata.takes == "images":
        extents = (int(extent / metadata.preprocessing.crop_pct) for extent in (height, width))
        return noise.integers(0, 256, (batch_size, channels, *extents), dtype=np.uint8)
    return noise.standard_normal((batch_size, channels, height, width), dtype=np.float32)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in the folder of a saved model."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
