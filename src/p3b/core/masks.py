"""From keep ratio to mask: section 6 of the method.

A block has gates; a gate has elements. G gates, n elements over all gates of one block, t elements to go. Blocks of one shape
may be treated together: where a shape begins with "...", those dimensions count blocks.

What a block gives up goes by ranks within its gates alone. So the way in which its gates take turns, and what is left after t
elements, follow from the sizes of the gates before any score is known (`take_turns`); at a mask update nothing but the scores
of each gate have to be sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

GATE_FACTORS: Mapping[str, float] = {"in": 1.0, "heads": 1.0, "head": 1.0, "hidden": 0.75, "out": 1.5}
"""Factor on the ranks of a gate's elements, by kind: output channels are given up later, hidden channels earlier."""

LEAST_HEAD_SHARE = 0.75
"""Share of its width that a head keeps where whole heads can go: below it they do. A head's softmax takes the same time at
any width, so a thin head is dear. Measured with 75 % pruned and 32 images at a time: 3.02 times as fast as dense with all heads
thin, 3.14 with this at 0.5, 3.34 at 0.75, 3.41 at 1.0 (whole heads alone): at 0.75 most of it is there."""

_BELOW_HALF = 0.5 - 2.0**-25
"""The largest float32 below 0.5."""


def soft_mask(scores: Tensor, num_pruned: float, tau: float) -> Tensor:
    """Mask that gives up the lowest scores but lets a gradient through, so that they can return.

        m_e = sigmoid( ln(9) * (position_e - t) / (n * tau + 1e-8) ),   positions 1..n in ascending order of the scores

    A distance of n * tau positions from t means 0.1 or 0.9. Equal scores keep their order.

    Args:
        scores: (n,) any scale; only their order counts.
        num_pruned: t, the elements to go, in [0, n]. With a whole number the t-th element gets exactly 0.5 and counts as kept;
            t + 0.5 puts the edge between two elements, so that exactly t fall below 0.5 (that is what the methods use).
        tau: softness >= 0; at 0 the mask is hard.

    Returns:
        (n,) in [0, 1], float32. An element counts as kept where its mask is >= 0.5.

    Source: arXiv 2506.23675, with the slope of its published run.
    """
    return _mask_at(_positions(scores), num_pruned, tau)


def rank_scores(scores: Tensor) -> Tensor:
    """Ranks 1/n .. n/n of (..., n) scores in ascending order, float64; equal scores keep their order."""
    return _positions(scores).double() / scores.shape[-1]


@dataclass(frozen=True)
class Turns:
    """How the gates of a block take turns in giving up elements, whatever the scores.

    Attributes:
        places: G tensors, each (size of the gate,), int64: the place, 1..n, at which the element of rank 1, 2, .. goes.
        kept: (n + 1, G) elements that each gate still has after the t lowest of the block are gone, t = 0..n.
    """

    places: tuple[Tensor, ...]
    kept: Tensor


@lru_cache(maxsize=64)
def take_turns(sizes: tuple[int, ...], factors: tuple[float, ...]) -> Turns:
    """Sort the ranks of all gates of a block together, each times its gate's factor; at a tie the earlier gate gives first.

    Args:
        sizes: elements of each gate, summing to n.
        factors: G factors on the ranks (see `GATE_FACTORS`).
    """
    ranks = (torch.arange(1, size + 1, dtype=torch.float64) / size for size in sizes)
    merit = torch.cat([factor * rank for factor, rank in zip(factors, ranks, strict=True)])
    gate_of_element = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    gone = torch.nn.functional.one_hot(gate_of_element[torch.argsort(merit, stable=True)], len(sizes)).cumsum(0)
    total = torch.tensor(sizes)
    return Turns(torch.split(_positions(merit), list(sizes)), torch.cat([total[None], total - gone]))


@dataclass(frozen=True)
class BlockOrder:
    """In which order a block gives up its elements, over all its gates.

    Attributes:
        positions: (..., n) int64, the place, 1..n, at which each element goes; gates one after the other.
        sizes: elements of each gate, summing to n.
        kept: (n + 1, G) elements that each gate still has after the t lowest of the block are gone, t = 0..n.
    """

    positions: Tensor
    sizes: tuple[int, ...]
    kept: Tensor


def order_elements(gate_scores: Sequence[Tensor], factors: Sequence[float]) -> BlockOrder:
    """Sort the elements of all gates of a block together, by their rank within the gate times the gate's factor.

    Args:
        gate_scores: G tensors, each (..., size of the gate), finite, on the CPU.
        factors: G factors on the ranks (see `GATE_FACTORS`).
    """
    sizes = tuple(scores.shape[-1] for scores in gate_scores)
    turns = take_turns(sizes, tuple(factors))
    positions = [places[_positions(scores) - 1] for places, scores in zip(turns.places, gate_scores, strict=True)]
    return BlockOrder(torch.cat(positions, dim=-1), sizes, turns.kept)


def count_to_prune(remaining: Tensor, share: float, surplus: float = 0.0) -> int:
    """How many of the lowest elements go so that a block meets its share, found exactly.

    Args:
        remaining: (n + 1,) parameters left after t elements are gone; it never rises with t.
        share: parameters that the block may keep, >= 0; with less than the last of `remaining` all n go.
        surplus: parameters by which the blocks before this one together miss (below 0) or exceed (above 0) their shares.

    Returns:
        t in 0..n. One of the two counts next to the share, so never more than one element away from it: the one that
        brings the total of all blocks nearer to the budget.
    """
    below = min(int((remaining > share).sum()), len(remaining) - 1)  # the first t that meets the share from below
    if below == 0 or remaining[below] == share:
        return below
    missed = abs(float(remaining[below]) - share + surplus)
    exceeded = abs(float(remaining[below - 1]) - share + surplus)
    return below if missed <= exceeded else below - 1


def shares_to_counts(remaining: Sequence[Tensor], shares: Sequence[float]) -> list[int]:
    """Elements to give up in every block.

    Each block ends within one element of its share, and all together within about one element of the sum of shares.

    Args:
        remaining: B tensors, each (n + 1,): parameters left after t elements of the block are gone.
        shares: B numbers of parameters that may stay.
    """
    counts, surplus = [], 0.0
    for left, share in zip(remaining, shares, strict=True):
        count = count_to_prune(left, share, surplus)
        surplus += float(left[count]) - share
        counts.append(count)
    return counts


def block_masks(order: BlockOrder, num_pruned: int | Tensor, tau: float) -> list[Tensor]:
    """Soft (tau > 0) or hard (tau = 0) masks of a block's gates, exactly `num_pruned` elements of each block below 0.5.

    Args:
        order: of one block or of several alike.
        num_pruned: elements to go; for several blocks a tensor that broadcasts against (..., n).
        tau: softness >= 0.

    Returns:
        G tensors, each (..., size of the gate).
    """
    return list(torch.split(_mask_at(order.positions, num_pruned + 0.5, tau), list(order.sizes), dim=-1))


@dataclass(frozen=True)
class Heads:
    """The attention heads of a block, which can go whole beside the channels that all of them give up together.

    Attributes:
        gate: place of the gate of their channels among the gates of the block's order; its size is the width of a head.
        count: heads of the dense block.
    """

    gate: int
    count: int

    def least_width(self, width: int, multiple: int) -> int:
        """Channels that a head has to keep where it is not the only one: `LEAST_HEAD_SHARE` of its width, aligned."""
        return min(math.ceil(LEAST_HEAD_SHARE * width / multiple) * multiple, width)


def align_counts(
    orders: Sequence[BlockOrder],
    costs: Sequence[Callable[[Tensor], Tensor]],
    counts: Sequence[int],
    multiple: int,
    heads: Sequence[Heads | None] | None = None,
) -> list[tuple[int, ...]]:
    """Elements that every gate keeps so that all are multiples of a number and the sum of parameters stays what it was.

    Each block starts from the multiples around its own counts whose parameters come nearest to its own, what is missed being
    passed on to the next block; then single gates move by one multiple as long as that brings the total nearer. A gate that
    keeps all or nothing may go on so, whatever its size, and none that keeps some is emptied.

    Where heads can go whole, and those of a block would be narrower than `Heads.least_width`, it keeps fewer and wider ones
    with about as many channels altogether: as many as are wide enough, one at least, which alone may be narrower. Single heads
    of such a block then move as single multiples do. Any other block keeps all its heads, and so does one that is a constant or
    gone because one of its gates keeps nothing.

    Args:
        orders: B orders, each of one block.
        costs: B functions from (n, G) kept elements to (n,) parameters that remain; from (n, G + 1) where heads can go whole,
            the heads that stay being last.
        counts: elements to give up in every block, as `shares_to_counts` returns them.
        multiple: >= 1; 1 changes nothing.
        heads: of each block, None where none can go whole; by default of none.

    Returns:
        B tuples of G kept elements, and of the heads that stay after them where heads can go whole.
    """
    heads = [None] * len(orders) if heads is None else heads
    kept = [
        (*order.kept[count].tolist(), *([] if own is None else [own.count]))
        for order, count, own in zip(orders, counts, heads, strict=True)
    ]
    if multiple == 1:
        return kept
    thin = [_is_thin(each, order.sizes, multiple, own) for each, order, own in zip(kept, orders, heads, strict=True)]
    surplus, params = 0.0, []
    for b, (order, cost) in enumerate(zip(orders, costs, strict=True)):
        before = float(cost(torch.tensor([kept[b]])))
        candidates = torch.tensor(_choices(kept[b], order.sizes, multiple, heads[b] if thin[b] else None))
        totals = cost(candidates).double()
        chosen = int((totals - before + surplus).abs().argmin())
        kept[b] = tuple(candidates[chosen].tolist())
        params.append(float(totals[chosen]))
        surplus += params[b] - before
    while True:
        moves = [
            (abs(surplus + float(cost(torch.tensor([moved]))) - params[b]), b, moved)
            for b, (order, cost) in enumerate(zip(orders, costs, strict=True))
            for moved in _moves(kept[b], order.sizes, multiple, heads[b], whole_heads=thin[b])
        ]
        if not moves or min(moves)[0] >= abs(surplus):
            return kept
        _, b, kept[b] = min(moves)
        now = float(costs[b](torch.tensor([kept[b]])))
        surplus, params[b] = surplus + now - params[b], now


def spend_rest(
    kept: Sequence[tuple[int, ...]],
    costs: Sequence[Callable[[Tensor], Tensor]],
    gates: Sequence[int | None],
    sizes: Sequence[Sequence[int]],
    rest: float,
) -> list[tuple[int, ...]]:
    """Let the widest of some gates take up what counts in multiples have left over of a budget, to one element.

    Args:
        kept: B tuples of kept elements, as `align_counts` returns them.
        costs: B functions from (n, G) kept elements to (n,) parameters that remain.
        gates: of each block which gate may keep no multiple, or None.
        sizes: of the gates of each block.
        rest: parameters that are still to be spent, or below 0 to be saved.

    Returns:
        The same with at most one count changed. None is emptied.
    """
    found = list(kept)
    able = [(b, gate) for b, gate in enumerate(gates) if gate is not None and 0 not in kept[b]]
    for b, gate in sorted(able, key=lambda each: -kept[each[0]][each[1]]):
        counts = torch.tensor(kept[b]).repeat(sizes[b][gate], 1)
        counts[:, gate] = torch.arange(1, len(counts) + 1)
        params = costs[b](counts).double()
        missed = (params - params[kept[b][gate] - 1] - rest).abs()
        best = int(missed.argmin())
        if 2 * missed[best] <= params[-1] - params[-2]:
            found[b] = (*kept[b][:gate], best + 1, *kept[b][gate + 1 :])
            break
    return found


def gate_masks(order: BlockOrder, kept: Sequence[int]) -> list[Tensor]:
    """Hard masks of a block's gates that keep so many elements of each, those that would go last."""
    places = torch.split(order.positions, list(order.sizes))
    return [soft_mask(place, len(place) - count + 0.5, tau=0.0) for place, count in zip(places, kept, strict=True)]


def hard_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same masks with 1 where an element counts as kept (>= 0.5) and 0 elsewhere."""
    return {name: (mask >= 0.5).to(mask.dtype) for name, mask in masks.items()}


def _mask_at(positions: Tensor, num_pruned: float | Tensor, tau: float) -> Tensor:
    distance = positions.double() - num_pruned
    mask = torch.sigmoid(math.log(9) * distance / (positions.shape[-1] * tau + 1e-8)).float()
    # With a very large tau the sigmoid rounds to 0.5; what was given up must still count as given up.
    return torch.where(distance < 0, mask.clamp(max=_BELOW_HALF), mask)


def _neighbours(count: int, size: int, multiple: int) -> list[int]:
    """The multiples next to a count; the size itself where that is nearer than one beyond it."""
    if count in (0, size):
        return [count]
    below, above = count // multiple * multiple, -(-count // multiple) * multiple
    return sorted({min(max(below, multiple), size), min(above, size)})


def _is_thin(kept: Sequence[int], sizes: Sequence[int], multiple: int, heads: Heads | None) -> bool:
    """Whether whole heads of a block are to go. One that is a constant or gone has no attention left to be slow."""
    if heads is None or 0 in kept:
        return False
    return kept[heads.gate] < heads.least_width(sizes[heads.gate], multiple)


def _choices(kept: Sequence[int], sizes: Sequence[int], multiple: int, heads: Heads | None) -> list[tuple[int, ...]]:
    """Aligned counts around those of a block; with `heads` some of them go whole, without all stay that are there."""
    near = [_neighbours(count, size, multiple) for count, size in zip(kept, sizes, strict=False)]
    if heads is None:
        return list(product(*near, *([count] for count in kept[len(sizes) :])))
    found: list[tuple[int, ...]] = []
    for count, width in _fewer_heads(kept[heads.gate], sizes[heads.gate], multiple, heads):
        found += product(*near[: heads.gate], [width], *near[heads.gate + 1 :], [count])
    return found


def _fewer_heads(kept_width: int, width: int, multiple: int, heads: Heads) -> list[tuple[int, int]]:
    """(heads, width) pairs with about as many channels as all the heads have together that are too narrow.

    As many heads as are wide enough, with the multiples next to the width that they would need, and one more of the least
    width: one pair has no more channels than the narrow heads (but for a share of less than one multiple), one no fewer.
    """
    channels, least = heads.count * kept_width, heads.least_width(width, multiple)
    most = max(1, channels // least)
    narrowest = min(least if channels >= least else multiple, width)
    steps = channels // (most * multiple), -(-channels // (most * multiple))
    pairs = {(most, min(max(step * multiple, narrowest), width)) for step in steps}
    if channels > most * least:
        pairs.add((most + 1, least))
    return sorted(pairs)


def _moves(
    kept: Sequence[int], sizes: Sequence[int], multiple: int, heads: Heads | None, *, whole_heads: bool
) -> list[tuple[int, ...]]:
    """The same counts with one gate moved to the multiple below or above, or with a head less or more."""
    moved: list[tuple[int, ...]] = []
    for gate, (count, size) in enumerate(zip(kept, sizes, strict=False)):
        if count == 0:
            continue
        for other in ((count - 1) // multiple * multiple, min((count // multiple + 1) * multiple, size)):
            if other > 0 and other != count:
                moved.append((*kept[:gate], other, *kept[gate + 1 :]))
    if heads is None or 0 in kept:
        return moved
    if whole_heads:
        moved += [(*kept[:-1], count) for count in (kept[-1] - 1, kept[-1] + 1) if 1 <= count <= heads.count]
    least = heads.least_width(sizes[heads.gate], multiple)
    return [counts for counts in moved if counts[-1] == 1 or counts[heads.gate] >= least]


def _positions(scores: Tensor) -> Tensor:
    """(..., n) int64: 1 for the lowest of the last dimension, n for the highest; equal scores keep their order."""
    order = torch.argsort(scores, dim=-1, stable=True)
    places = torch.arange(1, scores.shape[-1] + 1, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
