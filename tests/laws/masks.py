"""Laws of masks: how many elements are pruned, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from laws.law import NOT_NEGATIVE, ROUNDING, Law, demand, doubles, lists
from p3b.core.masks import count_to_prune, hard_masks, rank_scores, shares_to_counts, soft_mask


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
    values = draw(st.integers(1, 24).flatmap(lambda size: lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0]), number), size)))
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
    tables = [doubles(table) for table in given.remaining]
    counts = shares_to_counts(tables, given.shares)
    missed, largest = Fraction(0), Fraction(0)
    for table, share, count in zip(given.remaining, given.shares, counts, strict=True):
        demand(0 <= count < len(table), f"{count} elements of {len(table) - 1} go")
        step = step_around(table, count, share)
        alone = abs(table[count_to_prune(doubles(table), share)] - share)
        demand(alone == min(abs(left - share) for left in table), f"alone, the block could come nearer to {share} than {alone}")
        missed, largest = missed + table[count] - Fraction(share), max(largest, Fraction(step))
    rounding = ROUNDING * sum(table[0] for table in given.remaining)
    demand(abs(missed) <= largest / 2 + Fraction(rounding), f"all together miss by {float(missed)}: {counts}")


def step_around(remaining: Sequence[float], count: int, share: float) -> float:
    """Size of the element at the edge of a block's share; breaks the law where `count` is not beside that edge.

    Args:
        remaining: what is left after 0, 1, ... elements are gone; never rising.
        share: within what the table holds.
    """
    first = next(t for t, left in enumerate(remaining) if left <= share)
    beside = (first,) if remaining[first] == share or first == 0 else (first - 1, first)
    demand(count in beside, f"{count} elements go, but the share {share} lies beside {beside} in {list(remaining)}")
    return remaining[beside[0]] - remaining[beside[-1]]


LAWS = (
    Law(
        "exactly t elements of a mask fall below one half",
        700,
        _scores(),
        _exactly_t_fall_below_one_half,
        known=(Scores([0.0], 1e300, False), Scores([1.0, 2.0], 1e8, True)),
    ),
    Law("masks rise with the rank, and hard masks agree", 600, _scores(), _masks_rise_with_the_rank),
    Law("every block ends beside its share, all together within half an element", 700, _shares(), _shares_are_met),
)
