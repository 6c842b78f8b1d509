"""Sides timed in turns: what one takes is compared with what another took in the same round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """Where a measurement runs, and whose clock counts.

    On a CPU that is the processor time of this process, so that other work on the machine counts little; on a GPU it is the
    wall clock, with synchronisation.
    """

    device: torch.device

    def now(self) -> tuple[float, float]:
        """(seconds that count, seconds on the wall); everything that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter(), time.perf_counter()
        return time.process_time(), time.perf_counter()

    def seconds(self, act: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        """The mean of some acts."""
        counted, wall = self.now()
        for _ in range(repeats):
            act()
        counted_after, wall_after = self.now()
        return (counted_after - counted) / repeats, (wall_after - wall) / repeats


CPU = Machine(torch.device("cpu"))


def take_turns(
    machine: Machine,
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Let every side act once a round, in the opposite order every other round.

    Args:
        machine: whose clock counts.
        sides: what is timed, by name; the first is what the others are compared with. Each acts once before, to warm up.
        rounds: at least 1.
        repeats: acts of a side in a round, where that is not one: a whole cycle where its acts differ. Its time is the mean.

    Returns:
        By side: median `seconds` (of the clock that counts) and `wall_seconds` of an act; `ratio` and `wall_ratio`, the median
        over rounds of its time by that of the first side; and `ratio_range`, the least and the largest ratio of a round.
    """
    for act in sides.values():
        act()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            times[name].append(machine.seconds(sides[name], (repeats or {}).get(name, 1)))
    first = times[next(iter(sides))]
    return {name: _summary(taken, first) for name, taken in times.items()}


def ratio(side: Mapping[str, Any]) -> str:
    """A ratio in words, with its range over rounds where that was recorded."""
    low, high = side.get("ratio_range", (None, None))
    return f"{side['ratio']:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _summary(taken: list[tuple[float, float]], first: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [mine[0] / base[0] for mine, base in zip(taken, first, strict=True)]
    return {
        "seconds": statistics.median(counted for counted, _ in taken),
        "wall_seconds": statistics.median(wall for _, wall in taken),
        "ratio": statistics.median(ratios),
        "wall_ratio": statistics.median(mine[1] / base[1] for mine, base in zip(taken, first, strict=True)),
        "ratio_range": [min(ratios), max(ratios)],
    }
