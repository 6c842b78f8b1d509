"""What a law is, and the numbers that examples are drawn from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

ROUNDING = 64 * sys.float_info.epsilon
"""What sums of a few dozen float64 numbers may be off by, relative to the largest of them."""
FULL = 10_000
"""Examples that the shares of the laws are stated for."""


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: the sentence that holds, in plain words.
        share: examples out of `FULL` that it gets.
        examples: draws what the law speaks of.
        check: raises where the law does not hold for an example.
        known: examples that broke it once; they are always tried, and first.
    """

    name: str
    share: int
    examples: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    known: tuple[Any, ...] = ()


class BrokenLawError(AssertionError):
    """An example that a law does not hold for."""


def demand(holds: bool | Tensor, otherwise: str) -> None:
    """Break the law unless something holds; unlike `assert` also under `python -O`."""
    if not bool(holds):
        raise BrokenLawError(otherwise)


def doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


HUGE = sys.float_info.max
FINITE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1e-300, 1e300, HUGE, -HUGE]),
    st.floats(-1, 1),
    st.floats(allow_nan=False, allow_infinity=False),
)
NOT_NEGATIVE = st.one_of(
    st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 1e300, HUGE]), st.floats(0, 2), st.floats(0, allow_infinity=False)
)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
SEEDS = st.integers(0, 2**31)


def lists(elements: st.SearchStrategy[float], size: int) -> st.SearchStrategy[list[float]]:
    """Lists of so many numbers; half of them take theirs from a few, so that there are ties."""
    ties = st.lists(elements, min_size=1, max_size=3).flatmap(
        lambda few: st.lists(st.sampled_from(few), min_size=size, max_size=size)
    )
    return st.one_of(st.lists(elements, min_size=size, max_size=size), ties)
