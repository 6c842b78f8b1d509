"""SAViT's minimiser: the minimum of a quadratic form where a cost meets a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p3b.core.collaboration import HEADS, HIDDEN, STREAM, CostSurface, cheapest_shares
from p3b.errors import BudgetError

WHOLE = (1.0, 1.0, 1.0)


def surface_of(width: int = 64, depth: int = 6, classes: int = 10) -> CostSurface:
    """Parameters of a Vision Transformer of this size, with biases and norms."""
    return CostSurface(
        {
            (False, False, False): float(classes),
            (False, False, True): float(width * (classes + 60) + 6 * depth * width),
            (True, False, False): 3.0 * depth * width,
            (True, False, True): 4.0 * depth * width**2,
            (False, True, False): 4.0 * depth * width,
            (False, True, True): 8.0 * depth * width**2,
        }
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(8, 400),
    kept=st.floats(0.02, 0.98),
    positive=st.booleans(),
    most=st.tuples(*[st.floats(0.3, 1.0)] * 3),
    scale=st.floats(-8, 8),
)
def test_no_point_of_a_fine_grid_is_better(
    seed: int, width: int, kept: float, positive: bool, most: tuple[float, float, float], scale: float
) -> None:
    draw = np.random.default_rng(seed).normal(size=(3, 3))
    form = (draw @ draw.T if positive else draw) * 10**scale
    surface = surface_of(width)
    least, dense = surface.at(np.array(most)), surface.at(np.zeros(3))
    budget = least + kept * (dense - least)

    found = cheapest_shares(form, surface, budget, most)

    u, v, w = surface.line(budget)
    c = np.linspace(0, most[STREAM], 201)
    a = np.linspace(0, most[HEADS], 201)[:, None]
    b = (w(c) - u(c) * a) / v(c)
    grid = np.stack(np.broadcast_arrays(a, b, c), -1)
    values = np.einsum("...i,ij,...j", grid, form, grid)
    values[(b < 0) | (b > most[HIDDEN])] = np.inf
    assert surface.at(found) == pytest.approx(budget, rel=1e-8)
    assert np.all(found >= 0) and np.all(found <= np.array(most))
    assert found @ form @ found <= values.min() + 1e-12 * np.abs(form).max()


@pytest.mark.parametrize("kind", [HEADS, HIDDEN, STREAM])
def test_a_kind_that_costs_the_loss_far_more_is_left_alone(kind: int) -> None:
    form = np.diag([1.0, 1.0, 1.0])
    form[kind, kind] = 1e9
    surface = surface_of()
    shares = cheapest_shares(form, surface, 0.7 * surface.at(np.zeros(3)))
    assert shares[kind] < 1e-6 < shares.sum()


def test_an_interaction_between_two_kinds_keeps_them_from_going_together() -> None:
    surface = surface_of()
    budget = 0.5 * surface.at(np.zeros(3))
    apart = np.eye(3)
    together = apart + 5 * np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    free, bound = (cheapest_shares(form, surface, budget) for form in (apart, together))
    assert bound[HEADS] * bound[HIDDEN] < free[HEADS] * free[HIDDEN]


@pytest.mark.parametrize("width", [8, 384])
def test_only_the_symmetric_part_counts(width: int) -> None:
    draw = np.random.default_rng(3).normal(size=(3, 3))
    surface = surface_of(width)
    budget = 0.4 * surface.at(np.zeros(3))
    np.testing.assert_allclose(
        cheapest_shares(draw, surface, budget), cheapest_shares((draw + draw.T) / 2, surface, budget), atol=1e-12
    )


@pytest.mark.parametrize("share", [0.0, 0.2, 1.01])
def test_a_budget_out_of_reach_is_refused(share: float) -> None:
    surface = surface_of()
    with pytest.raises(BudgetError, match=r"can leave .* parameters"):
        cheapest_shares(np.eye(3), surface, share * surface.at(np.zeros(3)), (0.5, 0.5, 0.5))


def test_nothing_to_prune_is_no_pruning() -> None:
    surface = surface_of()
    np.testing.assert_allclose(cheapest_shares(np.eye(3), surface, surface.at(np.zeros(3)), WHOLE), np.zeros(3), atol=1e-9)
