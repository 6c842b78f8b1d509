"""Laws of the mathematics and of shrinking, tried on random shapes, ratios, benefits and scores.

A law is a sentence that a docstring of `p3b.core` or `p3b.vit` promises, a strategy that draws examples of everything that
the sentence speaks of, and a check. Hypothesis draws, and shrinks what breaks a law to its smallest form. Drawn are zeros,
negatives, ties, subnormal and huge numbers, empty and whole gates; what is not finite has to be refused.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from torch import Tensor

import p3b
from p3b.core.allocation import (
    block_budget,
    block_importance,
    given_keep_ratios,
    keep_ratios,
    mix_importance,
    update_importance,
)
from p3b.core.masks import (
    GATE_FACTORS,
    block_masks,
    count_to_prune,
    hard_masks,
    order_elements,
    rank_scores,
    shares_to_counts,
    soft_mask,
)
from p3b.core.schedule import Schedule, applied_keep_ratio, parse_duration
from p3b.errors import BudgetError, ScheduleError
from p3b.methods.block_benefit import BlockBenefit
from p3b.scoring.meter import IntervalMeter
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import block_params, dense_params, prefix_cost
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout, read_layout

ROUNDING = 64 * sys.float_info.epsilon
"""What sums of a few dozen float64 numbers may be off by, relative to the largest of them."""

FULL = 10_000
"""Examples that the shares of the laws below are stated for."""


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


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """Try every law; one dict each, with the examples that were really run and the smallest one that breaks it.

    Args:
        count: examples over all laws.
        seed: the same seed draws the same examples.
        work: not used; the laws leave nothing behind.
    """
    torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
    for law, examples in zip(LAWS, examples_of_each(count), strict=True):
        yield try_law(law, examples, seed)


def examples_of_each(count: int) -> list[int]:
    """Examples for every law by its share: `count` in all, and at least what is known to have broken it and one more."""
    bounds = [round(count * sum(law.share for law in LAWS[:end]) / FULL) for end in range(len(LAWS) + 1)]
    return [max(bounds[number + 1] - bounds[number], len(law.known) + 1) for number, law in enumerate(LAWS)]


def try_law(law: Law, examples: int, seed: int) -> dict[str, Any]:
    """Run one law on so many examples, or until one breaks it.

    Returns:
        A case of the campaign. `cases` counts the examples up to the first that broke the law, not the search for a smaller
        one; `violations` is 1 where the law is broken, since the search ends there.
    """
    ran, broken, latest = 0, False, ""

    def check(example: Any) -> None:
        nonlocal ran, broken, latest
        ran += not broken
        latest = repr(example)
        try:
            law.check(example)
        except Exception:
            broken = True
            raise

    trial = hypothesis.given(law.examples)(check)
    for example in law.known:
        trial = hypothesis.example(example)(trial)
    trial = settings(
        max_examples=examples - len(law.known),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
    )(trial)
    detail = ""
    try:
        hypothesis.seed(seed)(trial)()
    except Exception as error:
        detail = f"{latest}: {type(error).__name__}: {error}"
    return {
        "part": "laws",
        "case": law.name,
        "ok": not broken and not detail,
        "cases": ran,
        "violations": int(broken or bool(detail)),
        "detail": detail,
    }


class BrokenLawError(AssertionError):
    """An example that a law does not hold for."""


def demand(holds: bool | Tensor, otherwise: str) -> None:
    """Break the law unless something holds; unlike `assert` also under `python -O`."""
    if not bool(holds):
        raise BrokenLawError(otherwise)


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


# --- numbers

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


def _lists(elements: st.SearchStrategy[float], size: int) -> st.SearchStrategy[list[float]]:
    """Lists of so many numbers; half of them take theirs from a few, so that there are ties."""
    ties = st.lists(elements, min_size=1, max_size=3).flatmap(
        lambda few: st.lists(st.sampled_from(few), min_size=size, max_size=size)
    )
    return st.one_of(st.lists(elements, min_size=size, max_size=size), ties)


# --- allocation


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
            return keep_ratios(_doubles(self.importance), _doubles(self.params), self.other, self.prune_ratio).tolist()
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
        importance=draw(_lists(NOT_NEGATIVE, size)),
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
        budget = block_budget(asked.block_params, asked.other, asked.prune_ratio)
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
        keep_ratios(_doubles([1.0]), _doubles([asked.block_params]), asked.other, named)
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
        benefits=draw(st.lists(_lists(FINITE, size), min_size=1, max_size=4)),
        kept=draw(st.lists(st.integers(0, 10 ** draw(st.integers(0, 12))), min_size=size, max_size=size)),
        gamma=draw(st.one_of(st.sampled_from([0.2, 1.0]), st.floats(0, 1, exclude_min=True))),
        alpha=draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))),
        benefit_scale=draw(benefit_scale),
    )


def _importance_is_finite(given: Intervals) -> None:
    kept = _doubles(given.kept)
    smoothed: Tensor | None = None
    for benefit in map(_doubles, given.benefits):
        try:
            fresh = block_importance(benefit, kept, given.benefit_scale)
        except ValueError as error:
            usual = 0.01 <= given.benefit_scale <= 1000
            demand(not usual and "benefit_scale" in str(error), f"refused: {error}")
            return
        demand(torch.isfinite(fresh).all() and (fresh >= 0).all(), f"importance {fresh.tolist()}")
        demand(abs(fresh.mean() - 1) <= 1e-9, f"a mean of {fresh.mean().item()}: {fresh.tolist()}")
        demand((benefit > 0).any() or (fresh == 1).all(), f"no block helps, yet the importance is {fresh.tolist()}")
        smoothed = update_importance(smoothed, benefit, kept, given.gamma, given.benefit_scale)
        mixed = mix_importance(smoothed, fresh, given.alpha)
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
    spoiled, ones = _doubles(values), torch.ones(len(values), dtype=torch.float64)
    attempts: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "benefit must be finite", lambda: block_importance(spoiled, ones)),
        (ValueError, "benefit must be finite", lambda: update_importance(ones, spoiled, ones)),
        (ValueError, "benefit must be finite", lambda: update_importance(None, spoiled, ones)),
        (ValueError, "importance must be finite", lambda: keep_ratios(spoiled, ones, 0, 0.5)),
        (BudgetError, "prune ratio must lie in", lambda: keep_ratios(ones, ones, 0, given.bad)),
        (BudgetError, "prune ratio must lie in", lambda: block_budget(1.0, 0.0, given.bad)),
        (BudgetError, "Keep ratios must lie in", lambda: given_keep_ratios([given.bad, *ones.tolist()], len(values) + 1)),
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


# --- masks


@dataclass(frozen=True)
class Scores:
    """Scores of a gate and the softness of its mask."""

    values: list[float]
    tau: float
    single: bool

    @property
    def tensor(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32 if self.single else torch.float64)


@st.composite
def _scores(draw: st.DrawFn) -> Scores:
    single = draw(st.booleans())
    number = st.floats(allow_nan=False, allow_infinity=False, width=32 if single else 64)
    values = draw(st.integers(1, 24).flatmap(lambda size: _lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0]), number), size)))
    return Scores(values, draw(st.one_of(st.sampled_from([0.0, 0.1]), st.floats(0, 1), NOT_NEGATIVE)), single)


def _ascending(scores: Sequence[float]) -> list[int]:
    """Elements from the lowest score to the highest; equal ones keep their order."""
    return sorted(range(len(scores)), key=lambda element: (scores[element], element))


def _exactly_t_fall_below_one_half(given: Scores) -> None:
    scores, ascending = given.tensor, _ascending(given.values)
    for t in range(len(scores) + 1):
        mask = soft_mask(scores, t + 0.5, given.tau)
        demand(mask.dtype == torch.float32 and ((mask >= 0) & (mask <= 1)).all(), f"t = {t}: {mask.tolist()}")
        below = torch.nonzero(mask < 0.5).flatten().tolist()
        demand(below == sorted(ascending[:t]), f"t = {t}, below one half are {below}: {mask.tolist()}")


def _masks_rise_with_the_rank(given: Scores) -> None:
    scores, ascending, whole = given.tensor, _ascending(given.values), len(given.values)
    ranks = rank_scores(scores)
    demand([round(rank * whole) for rank in ranks[ascending].tolist()] == list(range(1, whole + 1)), f"ranks {ranks.tolist()}")
    before = torch.ones(whole)
    for t in range(whole + 1):
        mask = soft_mask(scores, t + 0.5, given.tau)
        demand((mask[ascending].diff() >= 0).all(), f"t = {t}: not rising with the rank: {mask[ascending].tolist()}")
        demand((mask <= before).all(), f"t = {t}: an element rises though one more has to go: {mask.tolist()}")
        before = mask
        hard = soft_mask(scores, t + 0.5, 0.0)
        demand(((hard == 0) | (hard == 1)).all(), f"t = {t}: at tau 0 the mask is not hard: {hard.tolist()}")
        made = hard_masks({"gate": mask})["gate"]
        demand(torch.equal(made, (mask >= 0.5).float()), f"t = {t}: hard_masks gives {made.tolist()} for {mask.tolist()}")
        if given.tau <= 1:
            demand(torch.equal(made, hard), f"t = {t}: hardened {made.tolist()}, at tau 0 {hard.tolist()}")


@dataclass(frozen=True)
class Shares:
    """Blocks as tables of what remains after 0, 1, ... elements are gone, and the share of each."""

    remaining: list[list[int]]
    shares: list[float]


@st.composite
def _shares(draw: st.DrawFn) -> Shares:
    remaining, shares = [], []
    for _ in range(draw(st.integers(1, 8))):
        drops = draw(st.lists(st.integers(0, 10 ** draw(st.integers(0, 6))), min_size=1, max_size=10))
        table = [sum(drops[t:]) for t in range(len(drops) + 1)]
        share = st.floats(0, 1).map(lambda part, whole=table[0]: part * whole)
        remaining.append(table)
        shares.append(draw(st.one_of(share, st.sampled_from(table).map(float))))
    return Shares(remaining, shares)


def _shares_are_met(given: Shares) -> None:
    """Each block ends at one of the two counts around its share; the sum misses by at most half of the largest such step.

    Why half: the two sums to choose from lie on both sides of what the blocks before missed, one step apart. Either they
    enclose zero, and the nearer one is at most half a step away, or the one taken misses no more than the blocks before did.
    """
    tables = [_doubles(table) for table in given.remaining]
    counts = shares_to_counts(tables, given.shares)
    missed, largest = Fraction(0), Fraction(0)
    for table, share, count in zip(given.remaining, given.shares, counts, strict=True):
        demand(0 <= count < len(table), f"{count} elements of {len(table) - 1} go")
        step = _step_around(table, count, share)
        alone = abs(table[count_to_prune(_doubles(table), share)] - share)
        demand(alone == min(abs(left - share) for left in table), f"alone, the block could come nearer to {share} than {alone}")
        missed, largest = missed + table[count] - Fraction(share), max(largest, Fraction(step))
    rounding = ROUNDING * sum(table[0] for table in given.remaining)
    demand(abs(missed) <= largest / 2 + Fraction(rounding), f"all together miss by {float(missed)}: {counts}")


def _step_around(remaining: Sequence[float], count: int, share: float) -> float:
    """Size of the element at the edge of a block's share; breaks the law where `count` is not beside that edge.

    Args:
        remaining: what is left after 0, 1, ... elements are gone; never rising.
        share: within what the table holds.
    """
    first = next(t for t, left in enumerate(remaining) if left <= share)
    beside = (first,) if remaining[first] == share or first == 0 else (first - 1, first)
    demand(count in beside, f"{count} elements go, but the share {share} lies beside {beside} in {list(remaining)}")
    return remaining[beside[0]] - remaining[beside[-1]]


# --- schedule


@dataclass(frozen=True)
class Plan:
    """Phases in any order, and steps to look at."""

    start: int
    sparse: int
    final: int
    update_every: int
    tau_max: float
    steps: list[int]


@st.composite
def _plans(draw: st.DrawFn) -> Plan:
    if draw(st.integers(0, 3)):
        reach = 10 ** draw(st.integers(0, 7))
        start = draw(st.integers(0, reach))
        sparse = start + draw(st.integers(1, reach))
        final, update_every = sparse + draw(st.integers(0, reach)), draw(st.integers(1, reach))
    else:
        start, sparse, final, update_every = draw(st.tuples(*[st.integers(-3, 6)] * 4))
    tau_max = draw(st.one_of(st.just(0.1), st.floats(0, 1)))
    return Plan(start, sparse, final, update_every, tau_max, draw(st.lists(st.integers(0, max(final, 0) + 3), max_size=8)))


def _phases_are_exact(given: Plan) -> None:
    valid = 0 <= given.start < given.sparse <= given.final and given.update_every >= 1
    try:
        plan = Schedule(given.start, given.sparse, given.final, given.update_every, given.tau_max)
    except ScheduleError:
        demand(not valid, "refused")
        return
    demand(valid, "not refused")
    start, sparse, final = plan.start, plan.sparse, plan.final
    near_edges = {edge + offset for edge in (0, start, sparse, final) for offset in range(-2, 3)}
    renewals = range(start + plan.update_every - 1, final - 1, plan.update_every)
    near_edges |= {step + offset for step in (*renewals[:2], *renewals[-2:]) for offset in (-1, 0, 1)}
    steps = sorted(step for step in near_edges | set(given.steps) if step >= 0)
    spans = {"warm-up": range(start), "sparsify": range(start, sparse), "sharpen": range(sparse, final)}
    for step in steps:
        name = next((name for name, span in spans.items() if step in span), "done")
        demand(plan.phase(step) == name, f"step {step} lies in {plan.phase(step)}, expected {name}")
        demand(plan.update_due(step) == (step in renewals), f"step {step}: an update is due: {plan.update_due(step)}")
        demand(step >= start or plan.progress(step) == 0, f"step {step}: progress {plan.progress(step)} in the warm-up")
        demand(step < sparse - 1 or plan.progress(step) == 1, f"step {step}: progress {plan.progress(step)} once it is sparse")
        demand(step > sparse or plan.tau(step) == given.tau_max, f"step {step}: tau falls before it is sparse")
        demand(step <= sparse or step < final or plan.tau(step) == 0, f"step {step}: a tau after the end")
    demand(not plan.update_due(final - 1), "an update in the last step")
    for values, rises in (
        ([plan.progress(step) for step in steps], 1),
        ([plan.tau(step) / max(given.tau_max, 5e-324) for step in steps], -1),
    ):
        demand(all(0 <= value <= 1 for value in values), f"outside the range: {values}")
        walks = [rises * (after - before) for before, after in pairwise(values)]
        demand(all(walk >= 0 for walk in walks), f"not monotone: {values}")
    for goal in (0.0, 1e-300, 0.25, 1.0):
        applied = [applied_keep_ratio(goal, plan.progress(step)) for step in steps]
        demand(all(goal - 1e-15 <= ratio <= 1 for ratio in applied), f"goal {goal}, applied {applied}")
        demand(applied == sorted(applied, reverse=True), f"goal {goal}: an applied ratio rises: {applied}")


@dataclass(frozen=True)
class Epochs:
    """Phases in epochs."""

    start: float
    sparse: float
    final: float
    steps_per_epoch: int
    update_every: int | None


@st.composite
def _epochs(draw: st.DrawFn) -> Epochs:
    number = st.one_of(st.integers(0, 400), st.floats(-1, 400), NOT_FINITE)
    edges = draw(st.tuples(number, number, number))
    if draw(st.booleans()):
        edges = tuple(sorted(edges, key=lambda edge: (math.isnan(edge), edge)))
    return Epochs(*edges, draw(st.integers(1, 5000)), draw(st.one_of(st.none(), st.integers(-1, 500))))


def _epochs_become_steps(given: Epochs) -> None:
    edges = (given.start, given.sparse, given.final)
    try:
        plan = Schedule.from_epochs(*edges, given.steps_per_epoch, given.update_every)
    except ScheduleError:
        if all(map(math.isfinite, edges)):
            start, sparse, final = (round(edge * given.steps_per_epoch) for edge in edges)
            in_order = 0 <= start < sparse <= final and (given.update_every is None or given.update_every >= 1)
            demand(not in_order, "refused")
        return
    demand(all(map(math.isfinite, edges)), f"not refused: {plan}")
    for edge, step in zip(edges, (plan.start, plan.sparse, plan.final), strict=True):
        miss = abs(step - Fraction(edge) * given.steps_per_epoch)
        demand(miss <= Fraction(1, 2) + Fraction(1e-9), f"{edge} epochs are {step} steps")
        demand(not isinstance(edge, int) or Fraction(step, given.steps_per_epoch) == edge, f"{edge} epochs became {step} steps")
    renewals = Fraction(given.steps_per_epoch, plan.update_every)
    demand(given.update_every in (None, plan.update_every), f"masks renewed every {plan.update_every}")
    demand(given.update_every is not None or given.steps_per_epoch < 3 or 2 <= renewals <= 4, f"{float(renewals)} an epoch")


@dataclass(frozen=True)
class Duration:
    """A text that may be a duration; `number` and `unit` where it is one."""

    text: str
    total_epochs: float
    steps_per_epoch: int
    number: Fraction | None = None
    unit: str = ""


@st.composite
def _durations(draw: st.DrawFn) -> Duration:
    total, steps = draw(st.floats(0.5, 5000)), draw(st.integers(1, 10**5))
    if draw(st.integers(0, 2)) == 0:
        return Duration(draw(st.one_of(st.text(max_size=8), st.text("0123456789.-+e% epochsnaif_", max_size=12))), total, steps)
    digits = st.integers(0, 10**6).map(str)
    long = st.integers(1, 400).map(lambda length: "9" * length)
    decimal = st.tuples(st.one_of(digits, st.just("")), digits).map(".".join)
    number = draw(st.one_of(digits, decimal, digits.map("{}.".format), long))
    unit = draw(st.sampled_from(["", "epoch", "epochs", "step", "steps", "%"]))
    spaces = st.sampled_from(["", " ", "  ", "\t"])
    text = draw(spaces) + number + draw(spaces) + unit + draw(spaces)
    return Duration(text, total, steps, Fraction("0" + number.rstrip(".")), unit.rstrip("s"))


def _durations_are_read(given: Duration) -> None:
    factor = {"step": Fraction(1, given.steps_per_epoch), "%": Fraction(given.total_epochs) / 100}.get(given.unit, Fraction(1))
    expected = None if given.number is None else given.number * factor
    try:
        epochs = parse_duration(given.text, given.total_epochs, given.steps_per_epoch)
    except ScheduleError:
        demand(expected is None or expected > 1e300, "refused")
        return
    demand(math.isfinite(epochs) and epochs >= 0, f"{epochs} epochs")
    if expected is not None:
        demand(abs(Fraction(epochs) - expected) <= ROUNDING * expected, f"{epochs} epochs, expected {float(expected)}")
        if given.unit == "step" and given.number == int(given.number):  # type: ignore[arg-type]
            there = round(epochs * given.steps_per_epoch)
            demand(there == given.number or there > 2**50, f"{given.text} are {there} steps there and back")


# --- models


@dataclass(frozen=True)
class Shape:
    """A tiny network; its arguments are those of timm."""

    depth: int
    heads: int
    head_width: int
    hidden: int
    classes: int
    seed: int
    more: dict[str, Any]

    def build(self) -> torch.nn.Module:
        from tiny import tiny_vit

        width = self.heads * self.head_width
        return tiny_vit(
            **{
                "seed": self.seed,
                "dtype": torch.float64,
                "img_size": 16,
                "depth": self.depth,
                "embed_dim": width,
                "num_heads": self.heads,
                "mlp_ratio": self.hidden / width,
                "num_classes": self.classes,
                **self.more,
            }
        )


@st.composite
def _shapes(draw: st.DrawFn) -> Shape:
    from tiny import DISTILLED

    heads, head_width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    more = {
        "init_values": draw(st.sampled_from([None, 0.1])),
        "qkv_bias": draw(st.booleans()),
        "proj_bias": draw(st.booleans()),
        "reg_tokens": draw(st.integers(0, 2)),
        "act_layer": draw(st.sampled_from(["gelu", "relu", "sigmoid"])),
    }
    kind = draw(st.sampled_from(["class token", "mean of the patches", "no class token", "distilled"]))
    more |= {
        "class token": {},
        "mean of the patches": {"global_pool": "avg"},
        "no class token": {"class_token": False, "global_pool": "avg"},
        "distilled": {"name": DISTILLED, "reg_tokens": 0},
    }[kind]
    return Shape(
        depth=draw(st.integers(1, 3)),
        heads=heads,
        head_width=head_width,
        hidden=draw(st.integers(1, 4 * heads * head_width)),
        classes=draw(st.integers(1, 6)),
        seed=draw(SEEDS),
        more=more,
    )


KEPT = {"nothing": 0.0, "one": 0.0, "few": 0.2, "half": 0.5, "most": 0.9, "everything": 1.1}
"""What a gate keeps, and about which share of its elements that is."""


@dataclass(frozen=True)
class Cut:
    """A network and what each of its gates keeps, in their order."""

    shape: Shape
    kept: list[str]
    seed: int

    def masks(self, layout: ModelLayout) -> dict[str, Tensor]:
        generator, gates = torch.Generator().manual_seed(self.seed), iter(self.kept)
        masks = {}
        for block in layout.blocks:
            for dim, size in block.dims.items():
                kept = next(gates)
                masks[block.gate(dim)] = (torch.rand(size, generator=generator) < KEPT[kept]).float()
                if kept == "one":
                    masks[block.gate(dim)][int(torch.randint(size, (), generator=generator))] = 1.0
        return masks


@st.composite
def _cuts(draw: st.DrawFn) -> Cut:
    shape = draw(_shapes())
    gates = 6 * shape.depth
    return Cut(shape, draw(st.lists(st.sampled_from(sorted(KEPT)), min_size=gates, max_size=gates)), draw(SEEDS))


def _small_is_the_masked_one(given: Cut) -> None:
    dense = given.shape.build()
    layout = read_layout(dense)
    masks = given.masks(layout)
    masked, small = deepcopy(dense), deepcopy(dense)
    gates = Gates(layout, masked)
    gates.attach(masked)
    gates.set(masks)
    plan = plan_cuts(layout, masks)
    apply_cuts(small, plan)
    counted = sum(parameter.numel() for parameter in small.parameters())
    demand(counted == plan.params, f"{counted} parameters, planned were {plan.params}")

    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(given.seed))
    with torch.no_grad():
        answer, expected = small(images), masked(images)
    miss = float((answer - expected).abs().max())
    demand(miss <= 1e-10, f"the small network's answers differ from the masked one's by {miss}")

    with tempfile.TemporaryDirectory() as folder:
        loaded = p3b.load(p3b.save(small, Path(folder)))
    state, again = small.state_dict(), loaded.state_dict()
    demand(state.keys() == again.keys(), "other tensors after saving and loading")
    demand(all(torch.equal(state[key], again[key]) for key in state), "other values after saving and loading")
    with torch.no_grad():
        demand(torch.equal(loaded(images), answer), "other answers after saving and loading")


@dataclass(frozen=True)
class Case:
    """A network, and everything that masks are decided from."""

    shape: Shape
    benefits: list[list[float]]
    share: float
    blocks_only: bool
    levels: int
    seed: int
    progress: float
    tau: float

    def scores(self, layout: ModelLayout) -> dict[str, Tensor]:
        """Scores of every gate; with few levels most are ties, with none all are 0."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            block.gate(dim): (torch.rand(size, generator=generator) * self.levels).floor()
            for block in layout.blocks
            for dim, size in block.dims.items()
        }


@st.composite
def _decisions(draw: st.DrawFn) -> Case:
    shape = draw(_shapes())
    number = st.one_of(
        st.sampled_from([0.0, 1.0, -50.0]),
        st.floats(-1, 1, width=32),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
    )
    return Case(
        shape=shape,
        benefits=[draw(_lists(number, 2 * shape.depth)) for _ in range(2)],
        share=draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))),
        blocks_only=draw(st.booleans()),
        levels=draw(st.sampled_from([0, 3, 10**6])),
        seed=draw(SEEDS),
        progress=draw(st.one_of(st.just(1.0), st.floats(0, 1))),
        tau=draw(st.floats(0, 0.1)),
    )


def _prefixes_never_rise(given: Case) -> None:
    """Elements go one at a time, and no parameter comes back."""
    layout = read_layout(given.shape.build())
    scores = given.scores(layout)
    for block in layout.blocks:
        order = order_elements([scores[block.gate(dim)] for dim in block.dims], [GATE_FACTORS[dim] for dim in block.dims])
        demand(order.kept[0].tolist() == list(block.dims.values()), f"{block.name} begins with {order.kept[0].tolist()}")
        demand((order.kept[:-1] - order.kept[1:]).sum(-1).eq(1).all(), f"{block.name}: not one element at a time")
        demand((order.kept.diff(dim=0) <= 0).all(), f"{block.name}: an element comes back")
        remaining = prefix_cost(block)(order.kept)
        demand((remaining.diff() <= 0).all(), f"{block.name}: the cost rises: {remaining.tolist()}")
        demand(
            remaining[0] == dense_params(block) and remaining[-1] == 0, f"{block.name}: from {remaining[0]} to {remaining[-1]}"
        )
        count = given.seed % len(remaining)
        masks = dict(zip(map(block.gate, block.dims), block_masks(order, count, given.tau), strict=True))
        kept = {dim: (masks[block.gate(dim)] >= 0.5).sum() for dim in block.dims}
        demand(torch.stack(list(kept.values())).equal(order.kept[count]), f"{block.name}: the masks keep {kept}")
        demand(block_params(block, kept) == remaining[count], f"{block.name}: the masks leave {block_params(block, kept)}")


def _decision_meets_the_budget(given: Case) -> None:
    """The real method, with measurements put in: budget -> benefits -> ratios -> shares -> masks -> small network."""
    model = given.shape.build()
    layout = read_layout(model)
    params = [dense_params(block) for block in layout.blocks]
    other = 0 if given.blocks_only else layout.other_params
    prune_ratio = min(given.share, 0.999) * sum(params) / (sum(params) + other)
    scores, method = (
        given.scores(layout),
        BlockBenefit(model, layout, prune_ratio, lambda tensor: tensor, blocks_only=given.blocks_only),
    )
    method.detach()
    meter = IntervalMeter()
    for name, values in {"scores": torch.cat(list(scores.values())), "benefits": torch.tensor(given.benefits)}.items():
        meter.add(name, values, torch.tensor(True))
    method.load_state_dict({**method.state_dict(), "meter": meter.state_dict()})
    kept_now = dict(zip((block.name for block in layout.blocks), params, strict=True))
    decision = method.renew(kept_now, given.progress, given.tau)

    missed, largest = 0.0, 0.0
    for block, decided in zip(layout.blocks, decision.blocks, strict=True):
        order = order_elements([scores[block.gate(dim)] for dim in block.dims], [GATE_FACTORS[dim] for dim in block.dims])
        remaining, share = prefix_cost(block)(order.kept).tolist(), decided.keep_ratio * decided.params
        count = int(sum(int((decision.masks[block.gate(dim)] < 0.5).sum()) for dim in block.dims))
        demand(remaining[count] == decided.kept_params, f"{block.name}: {decided.kept_params} said, {remaining[count]} kept")
        largest = max(largest, _step_around(remaining, count, share))
        missed += decided.kept_params - share
    demand(abs(missed) <= largest / 2 + 1e-6, f"all blocks together miss their shares by {missed}, an element has {largest}")

    plan = plan_cuts(layout, hard_masks(decision.masks))
    small = p3b.count_parameters(apply_cuts(model, plan))
    demand(small == plan.params, f"{small} parameters, planned were {plan.params}")
    blocks_left = small - layout.other_params
    goal = (1 - prune_ratio) * (sum(params) + other) - other
    budget = sum(params) - (sum(params) - goal) * given.progress
    demand(abs(blocks_left - budget) <= largest / 2 + 1e-6, f"{blocks_left} parameters in blocks, the budget is {budget}")


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
    Law(
        "exactly t elements of a mask fall below one half",
        700,
        _scores(),
        _exactly_t_fall_below_one_half,
        known=(Scores([0.0], 1e300, False), Scores([1.0, 2.0], 1e8, True)),
    ),
    Law("masks rise with the rank, and hard masks agree", 600, _scores(), _masks_rise_with_the_rank),
    Law("every block ends beside its share, all together within half an element", 700, _shares(), _shares_are_met),
    Law("what remains of a block never rises as elements go", 500, _decisions(), _prefixes_never_rise),
    Law("phases, progress, tau and mask updates are exact at their edges", 700, _plans(), _phases_are_exact),
    Law(
        "epochs become steps and back",
        400,
        _epochs(),
        _epochs_become_steps,
        known=(Epochs(0, 1, math.nan, 1, None), Epochs(0, 1, math.inf, 1, None)),
    ),
    Law(
        "durations are read, and nothing else is",
        400,
        _durations(),
        _durations_are_read,
        known=(Duration("9" * 309, 1.0, 1, Fraction("9" * 309)),),
    ),
    Law("the small network is the masked one, also saved and loaded", 1200, _cuts(), _small_is_the_masked_one),
    Law("a whole decision meets the budget within half an element", 800, _decisions(), _decision_meets_the_budget),
)
