"""Learned widths: the mask function, the expected share, the Lagrangian term and the counts that meet a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from p3b.core.learned_width import (
    WidthCost,
    counts_at_budget,
    kept_counts,
    lagrangian,
    top_mask,
    top_share_masks,
)


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _cost(sizes: tuple[int, ...] = (3, 24, 96, 24)) -> WidthCost:
    """Two layers of two gates each, as attention and MLP have them, and some parameters of no gate."""
    members = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    return WidthCost(_double(600, 8, 1, 25, 1, 1, 96), members.bool(), torch.tensor(sizes))


# --- masks


def test_the_mask_keeps_the_top_share_and_its_gradients_are_those_of_the_definition() -> None:
    scores = _double(0.3, -1.0, 2.0, 0.1, 0.0).requires_grad_()
    other = _double(1.0, 3.0, 2.0).requires_grad_()
    shares = _double(0.6, 0.3).requires_grad_()
    mask, other_mask = top_share_masks([scores, other], shares)
    assert mask.tolist() == [1, 0, 1, 1, 0]
    assert other_mask.tolist() == [0, 1, 0]
    gradient = _double(0.5, -2.0, 3.0, 7.0, -11.0)
    torch.autograd.backward([mask, other_mask], [gradient, _double(5.0, 6.0, 7.0)])
    assert torch.equal(scores.grad, gradient)
    assert other.grad.tolist() == [5.0, 6.0, 7.0]
    assert shares.grad.tolist() == [(gradient * mask).sum(), 6.0] == [10.5, 6.0]


def test_equal_scores_are_told_apart_by_their_place_every_time() -> None:
    assert [top_mask(torch.zeros(5), count).tolist() for count in (1, 3, 5)] == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [1] * 5]
    assert top_mask(_double(1, 2, 1, 2, 1), 3).tolist() == [0, 1, 0, 1, 1]


def test_counts_are_the_nearest_whole_numbers_and_at_least_one() -> None:
    sizes = torch.tensor([3, 3, 100, 100, 7])
    assert kept_counts(_double(0.0, 0.49, 0.123, 1.0, 0.5), sizes).tolist() == [1, 1, 12, 100, 4]


def test_counts_in_multiples_are_the_nearest_ones_or_all() -> None:
    sizes, multiples = torch.tensor([3, 40, 40, 40, 40, 64]), torch.tensor([1, 16, 16, 16, 16, 16])
    assert kept_counts(_double(0.6, 0.0, 0.59, 0.61, 1.0, 0.5), sizes, multiples).tolist() == [2, 16, 16, 32, 40, 32]
    assert kept_counts(_double(0.85), torch.tensor([40]), torch.tensor([16])).tolist() == [32]


# --- expected share


def test_expected_parameters_are_those_of_whole_numbers_where_shares_are_whole() -> None:
    cost = _cost()
    for counts in ((3, 24, 96, 24), (1, 1, 1, 1), (2, 7, 50, 23)):
        heads, out, hidden, written = counts
        by_hand = 600 * heads + 8 * heads * out + out + 25 * hidden + hidden * written + written + 96
        assert cost.params(torch.tensor(counts)) == by_hand
        assert float(cost.expected_params(_double(*counts) / cost.sizes)) == pytest.approx(by_hand, rel=1e-14)
    together = cost.params(torch.tensor([[3, 24, 96, 24], [1, 1, 1, 1]]))
    assert together.tolist() == [float(cost.params(torch.tensor(counts))) for counts in ((3, 24, 96, 24), (1, 1, 1, 1))]


def test_no_gate_is_expected_to_keep_less_than_one_element() -> None:
    cost, shares = _cost(), _double(1e-9, 1e-9, 1e-9, 1e-9).requires_grad_()
    expected = cost.expected_params(shares)
    assert expected == cost.params(torch.ones(4))
    expected.backward()
    assert shares.grad.tolist() == [0, 0, 0, 0]


def test_the_expected_share_has_the_gradient_of_its_polynomial() -> None:
    cost, shares = _cost(), _double(0.5, 0.7, 0.3, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(cost.expected_params, (shares,))


# --- Lagrangian


def test_the_lagrangian_term_is_one_sided_and_its_multipliers_climb_by_what_is_too_much() -> None:
    lambdas = _double(3.0, 5.0).requires_grad_()
    remaining = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    term = lagrangian(remaining, 0.5, *lambdas)
    assert float(term.detach()) == pytest.approx(3 * 0.2 + 5 * 0.04)
    term.backward()
    assert float(remaining.grad) == pytest.approx(3 + 2 * 5 * 0.2)
    assert lambdas.grad.tolist() == pytest.approx([0.2, 0.04])
    for enough in (0.5, 0.2):
        remaining = torch.tensor(enough, dtype=torch.float64, requires_grad=True)
        lambdas.grad = None
        term = lagrangian(remaining, 0.5, *lambdas)
        term.backward()
        assert float(term.detach()) == 0
        assert lambdas.grad.tolist() == [0, 0]
    assert float(remaining.grad) == 0  # below the target nothing pulls


# --- counts at a budget


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_are_as_near_to_the_budget_as_single_elements_bring_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = _cost()
    thresholds = 3 * torch.randn(4, generator=generator, dtype=torch.float64)
    dense = float(cost.params(cost.sizes))
    for share in (0.95, 0.7, 0.5, 0.3):
        counts, _ = counts_at_budget(cost, thresholds, share * dense)
        missed = abs(float(cost.params(counts)) - share * dense)
        assert missed <= 0.01 * dense
        for gate in range(4):
            for step in (-1, 1):
                moved = counts.clone()
                moved[gate] += step
                if 1 <= moved[gate] <= cost.sizes[gate]:
                    assert abs(float(cost.params(moved)) - share * dense) >= missed


def test_shares_that_meet_the_budget_stay_and_others_keep_their_order() -> None:
    cost, thresholds = _cost(), _double(0.0, 0.5, -1.0, 1.5)
    learned = kept_counts(torch.sigmoid(thresholds), cost.sizes)
    counts, offset = counts_at_budget(cost, thresholds, float(cost.params(learned)))
    assert counts.tolist() == learned.tolist()
    assert abs(offset) < 0.1
    fewer, down = counts_at_budget(cost, thresholds, 0.6 * float(cost.params(learned)))
    more, up = counts_at_budget(cost, thresholds, 1.3 * float(cost.params(learned)))
    assert down < 0 < up
    assert (fewer <= learned).all()
    assert (more >= learned).all()


def test_the_ends_of_what_is_possible_are_reached_exactly() -> None:
    cost, thresholds = _cost(), _double(10.0, 10.0, 10.0, 10.0)
    assert counts_at_budget(cost, thresholds, float(cost.params(cost.sizes)))[0].tolist() == cost.sizes.tolist()
    assert counts_at_budget(cost, thresholds, float(cost.params(torch.ones(4))))[0].tolist() == [1, 1, 1, 1]


def test_counts_in_multiples_stay_so_at_any_budget() -> None:
    cost, multiples = _cost((3, 24, 96, 24)), torch.tensor([1, 16, 16, 16])
    for share in (0.9, 0.6, 0.4):
        counts, _ = counts_at_budget(cost, _double(1, 0, 2, -1), share * float(cost.params(cost.sizes)), multiples)
        for count, size, multiple in zip(counts.tolist(), cost.sizes.tolist(), multiples.tolist(), strict=True):
            assert count == size or (count % multiple == 0 and count > 0)
