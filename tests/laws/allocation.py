"""Laws of sharing a parameter budget among blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

import p3b.core.allocation as core
from laws.law import FINITE, HUGE, NOT_FINITE, NOT_NEGATIVE, ROUNDING, BrokenLawError, Law, demand, doubles, lists
from p3b.core.schedule import applied_keep_ratio
from p3b.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What `keep_ratios` is asked; `order` renames the blocks."""

    importance: list[float]
    params: list[int]
    other: int
    prune_ratio: float
    order: list[int]

    @property
    def total(self) -> int:
        return sum(self.params) + self.other

    @property
    def exact(self) -> Fraction:
        """Parameters that the blocks may keep, without rounding."""
        return (1 - Fraction(self.prune_ratio)) * self.total - self.other

    def ratios(self) -> list[float] | None:
        """The answer; None at the very edge, where rounding decides whether the budget can be met."""
        try:
            return core.keep_ratios(doubles(self.importance), doubles(self.params), self.other, self.prune_ratio).tolist()
        except BudgetError as error:
            demand(self.exact < ROUNDING * self.total, f"refused, though {float(self.exact)} may stay: {error}")
            return None


@st.composite
def _budgets(draw: st.DrawFn) -> Budget:
    size = draw(st.integers(1, 12))
    params = draw(st.lists(st.integers(1, 10 ** draw(st.integers(1, 8))), min_size=size, max_size=size))
    other = draw(st.one_of(st.just(0), st.integers(0, sum(params)), st.integers(0, 10**10)))
    share = draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)))
    return Budget(
        importance=draw(lists(NOT_NEGATIVE, size)),
        params=params,
        other=other,
        prune_ratio=min(share * sum(params) / (sum(params) + other), math.nextafter(1, 0)),
        order=draw(st.permutations(range(size))),
    )


def _budget_is_conserved(asked: Budget) -> None:
    ratios = asked.ratios()
    if ratios is None:
        return
    demand(all(0 <= ratio <= 1 for ratio in ratios), f"ratios outside [0, 1]: {ratios}")
    spent = sum(Fraction(ratio) * params for ratio, params in zip(ratios, asked.params, strict=True))
    miss = abs(spent - asked.exact)
    demand(miss <= 1e-9 * abs(asked.exact) + ROUNDING * asked.total, f"{float(spent)} spent of {float(asked.exact)}: {ratios}")


def _more_important_never_keeps_less(asked: Budget) -> None:
    """k_b = min(1, c * importance_b) for one c; blocks of importance 0 wait until all others are full."""
    ratios = asked.ratios()
    if ratios is None:
        return
    ranked = sorted(zip(asked.importance, ratios, strict=True))
    for (less, smaller), (more, larger) in pairwise(ranked):
        demand(smaller <= larger + 1e-12, f"importance {more} keeps {larger}, {less} keeps {smaller}")
        demand(less != more or abs(larger - smaller) <= 1e-12, f"equal importances keep {smaller} and {larger}")
    useful = [(Fraction(importance), ratio) for importance, ratio in ranked if importance > 0]
    level, height = max(((i, ratio) for i, ratio in useful if ratio < 1 - 1e-9), default=(None, 1.0))
    if level is None:
        return
    for importance, ratio in useful:
        # The height that the others are measured by is itself known to 1e-9 alone: beside a block of 1e300 it may be zero.
        least, most = (
            float(min(Fraction(1), max(Fraction(0), Fraction(height) + error) * importance / level))
            for error in (-Fraction(1, 10**9), Fraction(1, 10**9))
        )
        demand(least - 1e-9 <= ratio <= most + 1e-9, f"not in proportion to the importances: {ratios}")
    waiting = [ratio for importance, ratio in ranked if importance == 0]
    demand(max(waiting, default=0.0) <= 1e-9, f"a block of importance 0 is served before another is full: {ratios}")


def _renaming_only_renames(asked: Budget) -> None:
    ratios = asked.ratios()
    renamed = Budget(
        [asked.importance[b] for b in asked.order],
        [asked.params[b] for b in asked.order],
        asked.other,
        asked.prune_ratio,
        asked.order,
    ).ratios()
    demand((ratios is None) == (renamed is None), f"{ratios}, renamed {renamed}")
    if ratios is not None and renamed is not None:
        for b, ratio in zip(asked.order, renamed, strict=True):
            demand(abs(ratio - ratios[b]) <= 1e-9, f"{ratios}, renamed {renamed}")


@dataclass(frozen=True)
class Refusal:
    """A budget that may or may not be met."""

    block_params: int
    other: int
    prune_ratio: float


@st.composite
def _refusals(draw: st.DrawFn) -> Refusal:
    if draw(st.booleans()):  # the largest ratio has four decimals: what the message names is the edge itself
        blocks = draw(st.integers(1, 9999))
        unit = draw(st.integers(1, 1000))
        block_params, other = unit * blocks, unit * (10_000 - blocks)
    else:
        block_params, other = draw(st.integers(1, 10**9)), draw(st.integers(0, 10**11))
    edge = block_params / (block_params + other)
    return Refusal(
        block_params,
        other,
        draw(st.one_of(st.just(edge), st.floats(0, 1), st.floats(edge, 1), st.floats(), st.sampled_from([-1e-9, 1.0]))),
    )


def _refused_exactly_where_it_cannot_be_met(asked: Refusal) -> None:
    total = asked.block_params + asked.other
    in_range = 0 <= asked.prune_ratio < 1
    exact = (1 - Fraction(asked.prune_ratio)) * total - asked.other if in_range else Fraction(-total)
    try:
        budget = core.block_budget(asked.block_params, asked.other, asked.prune_ratio)
    except BudgetError as error:
        demand(exact < ROUNDING * total, f"refused, though {float(exact)} may stay: {error}")
        if in_range:
            named = re.search(r"largest ratio that can be met is (\d\.\d{4})\b", str(error))
            demand(named is not None, f"no ratio is named: {error}")
            _named_ratio_can_be_met(float(named[1]), asked)  # type: ignore[index]
        return
    demand(exact >= -ROUNDING * total, f"a budget of {budget}, though {float(-exact)} are too many")
    demand(abs(Fraction(budget) - exact) <= ROUNDING * total, f"a budget of {budget}, expected {float(exact)}")


def _named_ratio_can_be_met(named: float, asked: Refusal) -> None:
    try:
        core.keep_ratios(doubles([1.0]), doubles([asked.block_params]), asked.other, named)
    except BudgetError as error:
        raise BrokenLawError(f"the ratio that the message names is refused: {error}") from error
    edge = asked.block_params / (asked.block_params + asked.other)
    demand(0 <= edge - named <= 1.0001e-4, f"{named} is named, {edge} can be met")


@dataclass(frozen=True)
class Intervals:
    """Benefits and kept parameters of the blocks over a few intervals, and how they are weighed."""

    benefits: list[list[float]]
    kept: list[int]
    gamma: float
    alpha: float
    benefit_scale: float


@st.composite
def _intervals(draw: st.DrawFn, benefit_scale: st.SearchStrategy[float]) -> Intervals:
    size = draw(st.integers(1, 10))
    return Intervals(
        benefits=draw(st.lists(lists(FINITE, size), min_size=1, max_size=4)),
        kept=draw(st.lists(st.integers(0, 10 ** draw(st.integers(0, 12))), min_size=size, max_size=size)),
        gamma=draw(st.one_of(st.sampled_from([0.2, 1.0]), st.floats(0, 1, exclude_min=True))),
        alpha=draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))),
        benefit_scale=draw(benefit_scale),
    )


def _importance_is_finite(given: Intervals) -> None:
    kept = doubles(given.kept)
    smoothed: Tensor | None = None
    for benefit in map(doubles, given.benefits):
        try:
            fresh = core.block_importance(benefit, kept, given.benefit_scale)
        except ValueError as error:
            usual = 0.01 <= given.benefit_scale <= 1000
            demand(not usual and "benefit_scale" in str(error), f"refused: {error}")
            return
        demand(torch.isfinite(fresh).all() and (fresh >= 0).all(), f"importance {fresh.tolist()}")
        demand(abs(fresh.mean() - 1) <= 1e-9, f"a mean of {fresh.mean().item()}: {fresh.tolist()}")
        demand((benefit > 0).any() or (fresh == 1).all(), f"no block helps, yet the importance is {fresh.tolist()}")
        smoothed = core.update_importance(smoothed, benefit, kept, given.gamma, given.benefit_scale)
        mixed = core.mix_importance(smoothed, fresh, given.alpha)
        for values in (smoothed, mixed):
            demand(torch.isfinite(values).all() and (values >= 0).all(), f"smoothed or mixed: {values.tolist()}")


@dataclass(frozen=True)
class Spoiled:
    """Finite values of which one is not."""

    values: list[float]
    place: int
    bad: float


@st.composite
def _spoiled(draw: st.DrawFn) -> Spoiled:
    values = draw(st.lists(NOT_NEGATIVE, min_size=1, max_size=12))
    return Spoiled(values, draw(st.integers(0, len(values) - 1)), draw(NOT_FINITE))


def _not_finite_is_refused(given: Spoiled) -> None:
    values = [given.bad if number == given.place else value for number, value in enumerate(given.values)]
    spoiled, ones = doubles(values), torch.ones(len(values), dtype=torch.float64)
    attempts: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "benefit must be finite", lambda: core.block_importance(spoiled, ones)),
        (ValueError, "benefit must be finite", lambda: core.update_importance(ones, spoiled, ones)),
        (ValueError, "benefit must be finite", lambda: core.update_importance(None, spoiled, ones)),
        (ValueError, "importance must be finite", lambda: core.keep_ratios(spoiled, ones, 0, 0.5)),
        (BudgetError, "prune ratio must lie in", lambda: core.keep_ratios(ones, ones, 0, given.bad)),
        (BudgetError, "prune ratio must lie in", lambda: core.block_budget(1.0, 0.0, given.bad)),
        (BudgetError, "Keep ratios must lie in", lambda: core.given_keep_ratios([given.bad, *ones.tolist()], len(values) + 1)),
    ]
    if math.isnan(given.bad):
        attempts.append((ValueError, "must not be NaN", lambda: applied_keep_ratio(given.bad, 0.5)))
    for kind, words, attempt in attempts:
        try:
            answer = attempt()
        except kind as error:
            demand(words in str(error), f"refused with '{error}', expected '{words}'")
        else:
            raise BrokenLawError(f"not refused with '{words}': {answer}")


LAWS = (
    Law(
        "the parameter budget is conserved, and keep ratios lie in [0, 1]",
        700,
        _budgets(),
        _budget_is_conserved,
        known=(Budget([0.0, 1.0, 5e-324], [1, 1, 3], 0, 0.5, [0, 1, 2]), Budget([1.0, 5e-324], [10, 10], 0, 0.25, [0, 1])),
    ),
    Law(
        "a more important block never keeps less, equal ones keep equally",
        700,
        _budgets(),
        _more_important_never_keeps_less,
        known=(Budget([1e300, 5e-324, 0.0], [1, 1, 1], 0, 0.5, [0, 1, 2]), Budget([5e-324, 1e300], [1, 1], 0, 0.5, [0, 1])),
    ),
    Law(
        "renaming the blocks only renames the answer",
        600,
        _budgets(),
        _renaming_only_renames,
        known=(Budget([0.0, 0.0, 0.0, HUGE, 0.5, 0.5], [1, 1, 1, 1, 1, 3], 0, 0.5, [0, 1, 5, 3, 4, 2]),),
    ),
    Law(
        "a budget is refused exactly where it cannot be met, and the ratio that is named can be met",
        700,
        _refusals(),
        _refused_exactly_where_it_cannot_be_met,
        known=(Refusal(2499, 1, 0.9996), Refusal(1809, 8191, 0.5)),
    ),
    Law(
        "importance is finite and >= 0 with mean 1 for every finite benefit",
        700,
        _intervals(st.one_of(st.just(10.0), st.floats(0.01, 1000))),
        _importance_is_finite,
    ),
    Law(
        "a benefit_scale > 0 of any size gives a finite importance or is refused",
        300,
        _intervals(st.floats(0, exclude_min=True, allow_infinity=False)),
        _importance_is_finite,
        known=(Intervals([[1.0]], [0], 0.2, 0.0, 1e303), Intervals([[1.0]], [1], 0.2, 0.0, 1e-17)),
    ),
    Law("NaN and infinities are refused with the documented error", 300, _spoiled(), _not_finite_is_refused),
)
