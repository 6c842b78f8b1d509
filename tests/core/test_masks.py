"""Section 6 of the method: soft masks, and a block's budget met to one element without trial and error."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from p3b.core.masks import (
    GATE_FACTORS,
    LEAST_HEAD_SHARE,
    BlockOrder,
    Heads,
    align_counts,
    block_masks,
    count_to_prune,
    gate_masks,
    hard_masks,
    order_elements,
    rank_scores,
    shares_to_counts,
    soft_mask,
    spend_rest,
)
from p3b.core.schedule import Schedule
from p3b.vit.cost import block_params, dense_params, prefix_cost
from p3b.vit.layout import DEFAULT_DIMS, BlockLayout, ModelLayout, read_layout
from thinning import thinned
from tiny import VARIANTS, tiny_vit


def test_worked_numbers_are_reproduced(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "soft_mask.json").read_text())
    assert cases
    for case in cases:
        assert case["tau_min"] == 0
        plan = Schedule(0, case["step_sparse"], case["step_final"], 1, case["tau_max"])
        mask = soft_mask(torch.tensor(case["importance"]), case["num_pruned"], plan.tau(case["step"]))
        torch.testing.assert_close(mask, torch.tensor(case["mask"]), rtol=0, atol=1e-5)


# --- soft masks


@pytest.mark.parametrize("tau", [0.1, 0.01, 1e-6, 0.0])
@pytest.mark.parametrize("size", [1, 2, 25, 64])
def test_exactly_the_asked_number_of_elements_falls_below_one_half(size: int, tau: float) -> None:
    scores = torch.randn(size, generator=torch.Generator().manual_seed(size))
    for count in range(size + 1):
        mask = soft_mask(scores, count + 0.5, tau)
        assert int((mask < 0.5).sum()) == count
        assert set(scores[mask < 0.5].tolist()) == set(scores.sort().values[:count].tolist())
        assert mask.dtype == torch.float32
        assert ((mask >= 0) & (mask <= 1)).all()


def test_with_a_whole_number_the_element_at_the_edge_is_exactly_one_half() -> None:
    scores = torch.arange(10.0)
    assert soft_mask(scores, 4, 0.1)[3] == 0.5
    assert int((soft_mask(scores, 4, 0.1) < 0.5).sum()) == 3


def test_a_mask_rises_with_the_score_and_its_slope_is_that_of_tau() -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    mask = soft_mask(scores, 20, 0.1)
    assert (mask[torch.argsort(scores)].diff() > 0).sum() >= 40
    assert (mask[torch.argsort(scores)].diff() >= 0).all()
    ascending = soft_mask(torch.arange(50.0), 20, 0.1)  # n * tau = 5 positions from the edge
    assert ascending[14].item() == pytest.approx(0.1, abs=1e-6)
    assert ascending[24].item() == pytest.approx(0.9, abs=1e-6)


def test_at_tau_zero_a_mask_is_hard() -> None:
    assert soft_mask(torch.tensor([3.0, 1.0, 2.0, 4.0]), 2.5, 0.0).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_only_the_order_of_scores_counts_and_equal_ones_keep_theirs() -> None:
    scores = torch.tensor([0.2, 0.1, 0.7, 0.4])
    assert torch.equal(soft_mask(scores, 2, 0.1), soft_mask(1e6 * scores.exp(), 2, 0.1))
    assert soft_mask(torch.zeros(5), 2.5, 0.0).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_ranks_run_from_one_over_n_to_one() -> None:
    assert rank_scores(torch.tensor([5.0, -1.0, 5.0, 0.0])).tolist() == [0.75, 0.25, 1.0, 0.5]


def test_hard_masks_keep_what_counts_as_kept() -> None:
    hard = hard_masks({"a": torch.tensor([0.49999, 0.5, 0.9, 0.0])})
    assert hard["a"].tolist() == [0.0, 1.0, 1.0, 0.0]


# --- orders of real blocks


def _orders(blocks: tuple[BlockLayout, ...], seed: int, ties: bool = False) -> list[BlockOrder]:
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for block in blocks:
        scores = [torch.rand(block.dims[dim], generator=generator) for dim in _ranked(block)]
        if ties:
            scores = [(3 * s).round() for s in scores]
        orders.append(order_elements(scores, [GATE_FACTORS[dim] for dim in _ranked(block)]))
    return orders


def _ranked(block: BlockLayout) -> tuple[str, ...]:
    """All dimensions but whole heads, which take no part in the order of a block."""
    return tuple(dim for dim in block.dims if dim != "heads")


def _remaining_by_hand(block: BlockLayout, order: BlockOrder) -> list[int]:
    """Parameters left after the t lowest elements are gone, element by element."""
    gate_of = [dim for dim, size in block.dims.items() for _ in range(size)]
    kept = dict(block.dims)
    remaining = [dense_params(block)]
    for element in sorted(range(len(gate_of)), key=lambda e: order.positions[e].item()):
        kept[gate_of[element]] -= 1
        remaining.append(int(block_params(block, {dim: torch.tensor(count) for dim, count in kept.items()})))
    return remaining


def test_elements_of_all_gates_are_sorted_together_by_rank_times_factor() -> None:
    order = order_elements([torch.tensor([0.3, 0.1]), torch.tensor([9.0, 8.0, 7.0, 6.0])], [1.0, 0.75])
    assert order.sizes == (2, 4)
    assert order.positions.tolist() == [6, 3, 5, 4, 2, 1]  # by merits of 1, 0.5 and 0.75, 0.5625, 0.375, 0.1875
    assert order.kept.tolist() == [[2, 4], [2, 3], [2, 2], [1, 2], [1, 1], [1, 0], [0, 0]]


def _plain_positions(gate_scores: list[Tensor], factors: list[float]) -> Tensor:
    """The definition: the rank of every element within its gate times the gate's factor, all of a block sorted together."""
    merit: list[float] = []
    for scores, factor in zip(gate_scores, factors, strict=True):
        ranks = torch.empty(len(scores), dtype=torch.float64)
        ranks[torch.argsort(scores, stable=True)] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
        merit += (factor * (ranks / len(scores))).tolist()
    positions = torch.empty(len(merit), dtype=torch.float64)
    positions[torch.argsort(torch.tensor(merit, dtype=torch.float64), stable=True)] = torch.arange(
        1, len(merit) + 1, dtype=torch.float64
    )
    return positions


@pytest.mark.parametrize("sizes", [(24, 8, 24), (24, 96, 24), (384, 1536, 384), (1, 1, 1), (6, 4)])
@pytest.mark.parametrize("levels", [0, 3, 10**6])
@pytest.mark.parametrize("tau", [0.1, 0.0])
def test_blocks_together_get_bit_for_bit_the_masks_of_the_plain_definition(
    sizes: tuple[int, ...], levels: int, tau: float
) -> None:
    """Also with ties within a gate, and with gates of one size whose factors are equal, so that merits are."""
    generator = torch.Generator().manual_seed(levels)
    blocks, factors = 5, [1.0, 0.75, 1.5][: len(sizes)] if levels else [1.0] * len(sizes)
    scores = [(levels * torch.rand(blocks, size, generator=generator)).floor() for size in sizes]
    counts = torch.randint(sum(sizes) + 1, (blocks, 1), generator=generator)
    together = block_masks(order_elements(scores, factors), counts, tau)
    for b in range(blocks):
        positions = _plain_positions([gate[b] for gate in scores], factors)
        n, t = sum(sizes), int(counts[b])
        mask = torch.sigmoid(math.log(9) * (positions - (t + 0.5)) / (n * tau + 1e-8)).float()
        mask = torch.where(positions < t + 0.5, mask.clamp(max=0.5 - 2.0**-25), mask)
        assert torch.equal(torch.cat([gate[b] for gate in together]), mask)


def test_output_channels_go_later_and_hidden_ones_earlier() -> None:
    assert GATE_FACTORS == {"in": 1.0, "heads": 1.0, "head": 1.0, "hidden": 0.75, "out": 1.5}
    same = torch.arange(100.0)
    kept = order_elements([same, same, same], [GATE_FACTORS[dim] for dim in ("in", "hidden", "out")]).kept[150]
    assert kept[1] < kept[0] < kept[2]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_remaining_parameters_never_rise_and_equal_counting_element_by_element(variant: str, ties: bool) -> None:
    layout = read_layout(tiny_vit(**VARIANTS[variant]))
    for block, order in zip(layout.blocks[:2], _orders(layout.blocks, seed=3, ties=ties), strict=False):
        remaining = prefix_cost(block)(order.kept)
        assert remaining.tolist() == _remaining_by_hand(block, order)
        assert (remaining.diff() <= 0).all()
        assert remaining[0] == dense_params(block)
        assert remaining[-1] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_block_meets_any_share_to_one_element(seed: int) -> None:
    for block in read_layout(tiny_vit()).blocks[:2]:
        (order,) = _orders((block,), seed)
        remaining = prefix_cost(block)(order.kept).double()
        params = dense_params(block)
        for share in [0.0, 0.5, params / 3, params - 0.5, params, *torch.linspace(0, params, 97).tolist()]:
            count = count_to_prune(remaining, share)
            # against brute force: no count comes nearer
            assert abs(remaining[count] - share) == min(abs(remaining - share))
            for surplus in (-1e9, -3.0, 3.0, 1e9):
                _assert_within_one_element(remaining, count_to_prune(remaining, share, surplus), share)


def _assert_within_one_element(remaining: Tensor, count: int, share: float) -> None:
    """The share lies between what remains now and what would remain with one element more or less."""
    one_more = remaining[min(count + 1, len(remaining) - 1)]
    one_less = remaining[max(count - 1, 0)]
    assert one_more <= share <= one_less


@pytest.mark.parametrize("seed", range(25))
def test_all_blocks_together_miss_the_budget_by_less_than_one_element(seed: int) -> None:
    blocks = read_layout(tiny_vit(depth=3)).blocks
    orders, costs = _orders(blocks, seed), [prefix_cost(block) for block in blocks]
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.rand(len(blocks), generator=generator, dtype=torch.float64).tolist()
    ratios[seed % len(ratios)] = float(seed % 2)
    shares = [ratio * dense_params(block) for ratio, block in zip(ratios, blocks, strict=True)]
    counts = shares_to_counts([cost(order.kept).double() for cost, order in zip(costs, orders, strict=True)], shares)
    largest_element, total = 0.0, 0.0
    for order, cost, share, count in zip(orders, costs, shares, counts, strict=True):
        remaining = cost(order.kept).double()
        _assert_within_one_element(remaining, count, share)
        largest_element = max(largest_element, float(-remaining.diff().min()))
        total += float(remaining[count])
    assert abs(total - sum(shares)) <= largest_element / 2


def test_misses_of_earlier_blocks_are_made_up_for() -> None:
    remaining = torch.tensor([10.0, 6.0, 2.0, 0.0])
    assert count_to_prune(remaining, 4.5) == 1
    assert count_to_prune(remaining, 4.5, surplus=2.0) == 2
    assert count_to_prune(remaining, 6.0, surplus=100.0) == 1  # met exactly: nothing to choose
    assert count_to_prune(remaining, 10.0) == 0
    assert count_to_prune(remaining, 0.0) == 3


@pytest.mark.parametrize("tau", [0.1, 0.03, 0.0])
def test_the_masks_of_a_block_give_up_exactly_the_counted_elements(tau: float) -> None:
    block = read_layout(tiny_vit()).blocks[0]
    (order,) = _orders((block,), seed=5)
    for earlier, count in pairwise(range(0, sum(order.sizes) + 1, 7)):
        masks = block_masks(order, count, tau)
        assert [len(mask) for mask in masks] == list(block.dims.values())
        assert [int((mask >= 0.5).sum()) for mask in masks] == order.kept[count].tolist()
        for mask, before in zip(masks, block_masks(order, earlier, tau), strict=True):
            assert (mask <= before).all()  # nobody returns when more have to go


# --- aligned widths

NETWORKS: dict[str, tuple[str, dict[str, int]]] = {
    "DeiT-Tiny": ("deit_tiny_patch16_224", {}),
    "DeiT-Small": ("deit_small_patch16_224", {}),
    "animals": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4},
    ),
    "odd heads": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 91, "depth": 12, "num_heads": 7},
    ),
}


@cache
def _layout_of(name: str, dims: tuple[str, ...]) -> ModelLayout:
    kind, shape = NETWORKS[name]
    with torch.device("meta"):
        model = timm.create_model(kind, weight_init="skip", **shape)
    return read_layout(model, dims)


def _unevenly_cut(layout: ModelLayout, orders: list[BlockOrder], prune_ratio: float) -> list[int]:
    """Elements to go in every block, for shares that are drawn at random around what the ratio leaves."""
    uneven = torch.rand(len(orders), generator=torch.Generator().manual_seed(1)).tolist()
    shares = [
        (1 - prune_ratio) * (0.5 + ratio) * dense_params(block) for ratio, block in zip(uneven, layout.blocks, strict=True)
    ]
    remaining = [
        prefix_cost(block, _ranked(block))(order.kept).double() for block, order in zip(layout.blocks, orders, strict=True)
    ]
    return shares_to_counts(remaining, shares)


@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("name", ["DeiT-Tiny", "DeiT-Small", "animals"])
def test_aligned_counts_are_multiples_and_meet_the_budget(name: str, prune_ratio: float, multiple: int) -> None:
    """To 0.1 percentage points of all parameters, as an unaligned budget; every gate stays within reach of its own count."""
    layout = _layout_of(name, DEFAULT_DIMS)
    orders = _orders(layout.blocks, seed=multiple)
    costs = [prefix_cost(block) for block in layout.blocks]
    counts = _unevenly_cut(layout, orders, prune_ratio)
    aligned = align_counts(orders, costs, counts, multiple)
    before = sum(int(cost(order.kept[count])) for cost, order, count in zip(costs, orders, counts, strict=True))
    after = sum(int(cost(torch.tensor(kept))) for cost, kept in zip(costs, aligned, strict=True))
    total = layout.other_params + sum(map(dense_params, layout.blocks))
    assert abs(after - before) <= 1e-3 * total
    for order, count, kept in zip(orders, counts, aligned, strict=True):
        for old, new, size in zip(order.kept[count].tolist(), kept, order.sizes, strict=True):
            assert new % multiple == 0 or new == size
            assert abs(new - old) < 3 * multiple
            assert (new == 0) == (old == 0)


def test_aligned_to_one_is_what_it_was() -> None:
    blocks = read_layout(tiny_vit()).blocks
    orders, costs = _orders(blocks, seed=0), [prefix_cost(block) for block in blocks]
    counts = [len(order.positions) // 2 for order in orders]
    expected = [tuple(order.kept[count].tolist()) for order, count in zip(orders, counts, strict=True)]
    assert align_counts(orders, costs, counts, 1) == expected
    for order, count, kept in zip(orders, counts, expected, strict=True):
        for made, other in zip(gate_masks(order, kept), block_masks(order, count, 0.0), strict=True):
            assert torch.equal(made, other)


def test_a_gate_keeps_the_elements_that_would_go_last() -> None:
    order = order_elements([torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 4.0])], [1.0, 1.5])
    assert [mask.tolist() for mask in gate_masks(order, (1, 2))] == [[1.0, 0.0, 0.0], [1.0, 1.0]]
    assert [mask.tolist() for mask in gate_masks(order, (0, 1))] == [[0.0, 0.0, 0.0], [0.0, 1.0]]


# --- whole heads


@pytest.mark.parametrize(("prune_ratio", "multiple"), thinned([0.3, 0.5, 0.75, 0.9], [4, 8, 16], 3))
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_heads_go_where_they_would_be_thin_and_the_budget_is_met(name: str, prune_ratio: float, multiple: int) -> None:
    """The same bounds as without heads that go; the channels inside a block are as many as before, to one head and multiple."""
    layout = _layout_of(name, ("heads", *DEFAULT_DIMS))
    orders, blocks = _orders(layout.blocks, seed=multiple), layout.blocks
    heads = [Heads(_ranked(block).index("head"), block.heads) if block.kind == "attn" else None for block in blocks]
    costs = [
        prefix_cost(block, (*_ranked(block), *(() if own is None else ("heads",))))
        for block, own in zip(blocks, heads, strict=True)
    ]
    counts = _unevenly_cut(layout, orders, prune_ratio)
    aligned = align_counts(orders, costs, counts, multiple, heads)
    before = sum(
        int(prefix_cost(block, _ranked(block))(order.kept[count]))
        for block, order, count in zip(blocks, orders, counts, strict=True)
    )
    after = sum(int(cost(torch.tensor(kept))) for cost, kept in zip(costs, aligned, strict=True))
    assert abs(after - before) <= 1e-3 * (layout.other_params + sum(map(dense_params, blocks)))
    gone = 0
    for order, count, own, kept in zip(orders, counts, heads, aligned, strict=True):
        old = order.kept[count].tolist()
        for gate, (was, now, size) in enumerate(zip(old, kept, order.sizes, strict=False)):
            assert now % multiple == 0 or now == size
            assert (now == 0) == (was == 0)
            assert abs(now - was) < 3 * multiple or (own is not None and gate == own.gate)
        if own is None:
            continue
        width, dense, stay = kept[own.gate], order.sizes[own.gate], kept[-1]
        least = own.least_width(dense, multiple)
        assert len(kept) == len(old) + 1 and 1 <= stay <= own.count
        assert width >= least or stay == 1
        assert stay == own.count or old[own.gate] < least, "heads that are wide enough all stay"
        assert abs(stay * width - own.count * old[own.gate]) < max(width + stay * multiple, 3 * own.count * multiple)
        gone += own.count - stay
    assert gone > 0 or prune_ratio < 0.75


def test_the_least_width_of_a_head_is_the_smallest_aligned_one_of_its_share() -> None:
    for width in range(1, 70):
        for multiple in (1, 2, 3, 8, 16):
            allowed = {*range(multiple, width, multiple), width}
            wide = [each for each in allowed if each >= LEAST_HEAD_SHARE * width]
            assert Heads(0, 4).least_width(width, multiple) == min(wide)


def test_thin_heads_become_fewer_and_wide_enough_with_as_many_channels() -> None:
    """A block of one gate and a cost of one for each channel of a head: the nearest number of channels is found."""
    order = BlockOrder(torch.arange(1, 65), (64,), torch.arange(64, -1, -1)[:, None])

    def kept(width: int, heads: int) -> tuple[int, int]:
        (found,) = align_counts([order], [lambda each: each.prod(-1)], [64 - width], 8, [Heads(0, heads)])
        return found[0], found[1]

    for heads in range(1, 13):
        least = Heads(0, heads).least_width(64, 8)
        for width in range(1, 65):
            wide, stay = kept(width, heads)
            enough = max(1, width * heads // least)  # heads of the least width that there are channels for
            assert abs(wide * stay - width * heads) == min(
                abs(each * some - width * heads)
                for some in ([heads] if width >= least else [enough, min(enough + 1, heads)])
                for each in range(8, 65, 8)
                if each >= least or some == 1
            )
            assert wide >= least or stay == 1
        assert kept(0, heads) == (0, heads), "no head is left that could be slow"
        assert kept(64, heads) == (64, heads)


def test_a_block_without_inputs_or_outputs_keeps_its_heads() -> None:
    """It is a constant or gone: nothing is gained by what happens inside, and the constant is the sum over all heads."""
    sizes, kept = (16, 64, 16), torch.tensor([[16, 64, 16], [0, 9, 16], [16, 9, 0], [16, 9, 16]])
    order = BlockOrder(torch.arange(1, 97), sizes, kept)
    own = Heads(1, 4)

    def cost(counts: Tensor) -> Tensor:
        return counts.prod(-1)

    found = align_counts([order] * 4, [cost] * 4, [0, 1, 2, 3], 8, [own] * 4)
    assert [counts[-1] for counts in found] == [4, 4, 4, 1]
    assert align_counts([order] * 4, [cost] * 4, [0, 1, 2, 3], 1, [own] * 4) == [(*each, 4) for each in kept.tolist()]


@pytest.mark.parametrize("rest", [-130.0, -7.0, 0.0, 3.0, 120.0])
def test_one_gate_takes_up_what_multiples_leave_over(rest: float) -> None:
    costs = [lambda kept: 10 * kept[:, 0] * kept[:, 1], lambda kept: 7 * kept[:, 0] + kept[:, 1], lambda kept: kept.sum(-1)]
    kept, sizes = [(8, 8), (4, 24), (4, 0)], [(16, 16), (8, 64), (4, 64)]
    found = spend_rest(kept, costs, [None, 1, 1], sizes, rest)
    spent = sum(
        int(cost(torch.tensor([after])) - cost(torch.tensor([before])))
        for cost, before, after in zip(costs, kept, found, strict=True)
    )
    if -24 < rest <= 40:
        assert spent == rest and found[0] == kept[0] and found[2] == kept[2]
    else:
        assert found == kept, "it has too few, or would be emptied"
