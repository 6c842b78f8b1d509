"""The search for the largest prune ratio that loses little: a bisection over a grid, decided by pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p3b.errors import ConfigError

MOST_RATIOS = 10_000
"""Prune ratios on a grid, at most."""


def grid(lowest: float, highest: float, step: float) -> list[float]:
    """Prune ratios lowest, lowest + step, ... up to `highest`, which is the last; ascending.

    Args:
        lowest, highest: 0 <= lowest < highest < 1.
        step: above 0.

    Raises:
        ConfigError: out of range, or a grid of more than `MOST_RATIOS`.
    """
    if not 0 <= lowest < highest < 1:
        raise ConfigError(f"--lowest {lowest} and --highest {highest} are no range: expected 0 <= lowest < highest < 1.")
    if not (highest - lowest) / MOST_RATIOS <= step <= highest - lowest:
        raise ConfigError(
            f"--ratio-step {step} does not fit between --lowest {lowest} and --highest {highest}: expected a step above 0, at "
            f"most their distance, and at most {MOST_RATIOS:,} steps."
        )
    steps = math.ceil(round((highest - lowest) / step, 6))
    return [*(round(lowest + number * step, 10) for number in range(steps)), highest]


def candidates(ratios: Sequence[float], known: Mapping[float, bool]) -> list[float]:
    """The ratios that are still in question in a bisection for the largest one that holds.

    They lie above the largest ratio that is known to hold and below the next one that is known not to. Should a larger ratio
    hold where a smaller one does not, the one that holds counts. With the middle one tried next, m of them take at most
    ceil(log2(m + 1)) tries; where none is left, `largest(known)` is the answer.

    Args:
        ratios: that may be tried, ascending.
        known: whether a ratio holds, for those that have been tried; others than `ratios` too.
    """
    best = largest(known)
    above = -math.inf if best is None else best
    below = min((ratio for ratio, holds in known.items() if not holds and ratio > above), default=math.inf)
    return [ratio for ratio in ratios if above < ratio < below]


def middle(ratios: Sequence[float]) -> float:
    """The ratio to try next; of two in the middle the smaller one."""
    return ratios[(len(ratios) - 1) // 2]


def largest(known: Mapping[float, bool]) -> float | None:
    """The largest ratio that holds; None where none does."""
    return max((ratio for ratio, holds in known.items() if holds), default=None)


def standard_error(top1: float, images: int) -> float:
    """Of an accuracy in percent over so many images, in points: that of a proportion."""
    share = top1 / 100
    return 100 * math.sqrt(share * (1 - share) / images)


@dataclass(frozen=True)
class Budget:
    """A budget that was tried, on the validation part.

    Attributes:
        ratio: share of the parameters that goes.
        top1: percent.
        loss: points under the dense model; below 0 where it is better.
        standard_error: of `loss` in points, as if both accuracies were of different images. They are of the same ones, on which
            the models mostly agree, so the true one is smaller.
        holds: whether the loss is small enough.
    """

    ratio: float
    top1: float
    loss: float
    standard_error: float
    holds: bool


def judge(dense: Mapping[str, Any], pruned: Mapping[str, Any], ratio: float, max_loss: float) -> Budget:
    """Whether a pruned model loses at most `max_loss` points against the dense one.

    Args:
        dense, pruned: "top1" in percent and "images" of the validation part.
        ratio: share of the parameters that went.
        max_loss: in points of top-1, >= 0.
    """
    # Accuracies are quotients of whole numbers: what differs by rounding alone must not decide.
    loss = round(dense["top1"] - pruned["top1"], 9)
    error = math.hypot(*(standard_error(each["top1"], each["images"]) for each in (dense, pruned)))
    return Budget(ratio, pruned["top1"], loss, error, loss <= max_loss)
