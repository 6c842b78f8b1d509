"""Section 4 of the method: benefits become importances, importances share one budget, exactly."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p3b.core import allocation
from p3b.errors import BudgetError


def test_worked_numbers_are_reproduced(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "allocation.json").read_text())
    assert cases
    for case in cases:
        smoothed: dict[str, Tensor | None] = {"cls": None, "patch": None}
        for r in case["rounds"]:
            kept = torch.tensor(r["kept_params_per_block"], dtype=torch.float64)
            for kind in smoothed:
                benefit = torch.tensor(r[f"mean_benefit_{kind}"], dtype=torch.float64)
                smoothed[kind] = allocation.update_importance(
                    smoothed[kind], benefit, kept, case["gamma"], case["benefit_scale"]
                )
                torch.testing.assert_close(smoothed[kind], _like(r[f"smoothed_importance_{kind}"]), rtol=1e-5, atol=1e-5)
            importance = allocation.mix_importance(smoothed["cls"], smoothed["patch"], case["alpha"])
            ratios = allocation.keep_ratios(
                importance, _like(case["params_per_block"]), case["params_outside_blocks"], case["prune_ratio"]
            )
            torch.testing.assert_close(ratios, _like(r["keep_ratio"]), rtol=0, atol=1e-5)


# --- importance


@pytest.mark.parametrize("seed", range(20))
def test_importance_is_positive_with_mean_one_and_follows_its_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    benefit = torch.randn(8, generator=generator, dtype=torch.float64)
    benefit[0] = benefit[0].abs() + 0.1
    kept = torch.randint(1, 10**6, (8,), generator=generator)
    scale = 1 + 19 * random.Random(seed).random()
    importance = allocation.block_importance(benefit, kept, scale)
    largest = max(benefit.tolist())
    naive = []
    for u, params in zip(benefit.tolist(), kept.tolist(), strict=True):
        x = 1.4 * scale * u / largest
        naive.append((math.log1p(math.exp(x)) - math.log1p(math.exp(x - scale))) / (params + 1e-6))
    expected = _like(naive) / (sum(naive) / len(naive))
    torch.testing.assert_close(importance, expected, rtol=1e-6, atol=1e-9)
    assert importance.mean().item() == pytest.approx(1, abs=1e-12)
    assert (importance >= 0).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 7.0, 1e20])
def test_importance_does_not_depend_on_the_unit_of_the_loss(factor: float) -> None:
    benefit, kept = _like([0.3, -0.2, 1.1, 0.0]), _like([10.0, 20.0, 30.0, 40.0])
    torch.testing.assert_close(allocation.block_importance(benefit * factor, kept), allocation.block_importance(benefit, kept))


def test_a_larger_benefit_or_fewer_parameters_never_lower_the_importance() -> None:
    kept = torch.full((4,), 100.0)
    importance = allocation.block_importance(_like([-1.0, 0.1, 0.5, 1.0]), kept)
    assert (importance.diff() > 0).all()
    importance = allocation.block_importance(torch.ones(4), _like([400.0, 300.0, 200.0, 100.0]))
    assert (importance.diff() > 0).all()


@pytest.mark.parametrize("benefit", [[0.0, 0.0, 0.0], [-1.0, -0.5, -2.0], [0.0, -3.0, -1.0]])
def test_where_no_block_helps_the_last_importance_stands(benefit: list[float]) -> None:
    kept, last = _like([10.0, 20.0, 30.0]), _like([0.5, 2.0, 0.5])
    assert allocation.block_importance(_like(benefit), kept).tolist() == [1.0, 1.0, 1.0]
    assert allocation.update_importance(None, _like(benefit), kept).tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(allocation.update_importance(last, _like(benefit), kept), last)


def test_tied_benefits_with_equal_parameters_are_equally_important() -> None:
    assert allocation.block_importance(torch.full((6,), 0.3), torch.full((6,), 50.0)).tolist() == pytest.approx([1.0] * 6)


def test_a_vanished_block_keeps_the_importance_finite() -> None:
    assert torch.isfinite(allocation.block_importance(_like([1.0, 0.5]), _like([0.0, 100.0]))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_benefit_that_is_not_finite_is_refused(bad: float) -> None:
    for compute in (allocation.block_importance, lambda u, k: allocation.update_importance(torch.ones(2), u, k)):
        with pytest.raises(ValueError, match="finite"):
            compute(_like([0.1, bad]), _like([1.0, 1.0]))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        allocation.block_importance(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("gamma", [0.05, 0.2, 1.0])
def test_smoothing_takes_the_first_interval_as_it_is(gamma: float) -> None:
    kept = _like([10.0, 20.0, 30.0])
    first, second = _like([1.0, 0.5, 0.2]), _like([0.1, 0.5, 0.9])
    r1 = allocation.update_importance(None, first, kept, gamma)
    assert torch.equal(r1, allocation.block_importance(first, kept))
    r2 = allocation.update_importance(r1, second, kept, gamma)
    torch.testing.assert_close(r2, gamma * allocation.block_importance(second, kept) + (1 - gamma) * r1)


def test_mixing_weighs_the_class_token_by_alpha() -> None:
    cls, patch = _like([1.0, 0.0]), _like([0.0, 1.0])
    assert allocation.mix_importance(cls, patch, 0.25).tolist() == [0.25, 0.75]
    assert torch.equal(allocation.mix_importance(cls, patch, 1.0), cls)
    assert torch.equal(allocation.mix_importance(cls, patch, 0.0), patch)


# --- water-filling


def _random_case(seed: int) -> tuple[Tensor, Tensor, int, float]:
    """Importances with zeros, ties and scales from tiny to huge; parameters from one to millions; any ratio that can be met."""
    draw = random.Random(seed)
    blocks = draw.randint(1, 40)
    scale = 10.0 ** draw.choice([-250, -30, -6, 0, 6, 30, 250])
    spread = draw.choice([0.0, 1.0, 5.0, 20.0])
    importance = [scale * math.exp(spread * draw.gauss(0, 1)) for _ in range(blocks)]
    for b in range(blocks):
        if draw.random() < draw.choice([0.0, 0.3, 0.9]):
            importance[b] = draw.choice([0.0, importance[0]])
    params = [draw.randint(1, 10 ** draw.randint(1, 7)) for _ in range(blocks)]
    other = draw.choice([0, draw.randint(0, sum(params)), draw.randint(0, 20 * sum(params))])
    largest = sum(params) / (sum(params) + other)
    return _like(importance), torch.tensor(params), other, draw.choice([0.0, 0.5, 0.999, draw.random()]) * largest


@pytest.mark.parametrize("start", range(0, 400, 40))
def test_the_budget_is_met_and_the_ratios_are_those_of_water_filling(start: int) -> None:
    for seed in range(start, start + 40):
        importance, params, other, prune_ratio = _random_case(seed)
        ratios = allocation.keep_ratios(importance, params, other, prune_ratio)
        budget = (1 - prune_ratio) * (int(params.sum()) + other) - other
        spent = float((ratios * params).sum())
        assert abs(spent - budget) <= 1e-9 * float(params.sum()), seed
        assert ((ratios >= 0) & (ratios <= 1)).all(), seed
        _assert_water_filling(importance, ratios, seed)


def _assert_water_filling(importance: Tensor, ratios: Tensor, seed: int) -> None:
    """Open blocks stand in the ratio of their importances, full ones asked for more; useless ones wait for the rest."""
    useful = importance > 0
    if not useful.any():
        assert ratios.max() - ratios.min() <= 1e-12, seed
        return
    weight = importance / importance.max()
    opened = useful & (ratios < 1 - 1e-9) & (ratios > 0)
    if opened.any():
        level = ratios[opened] / weight[opened]
        assert (level.max() / level.min()) < 1 + 1e-9, seed
        full = useful & (ratios == 1)
        assert (level.min() * weight[full] >= 1 - 1e-6).all(), seed
    if (ratios[~useful] > 1e-9).any():
        assert (ratios[useful] >= 1 - 1e-9).all(), seed
        assert ratios[~useful].max() - ratios[~useful].min() <= 1e-12, seed


@pytest.mark.parametrize("seed", range(30))
def test_renaming_blocks_only_renames_the_answer(seed: int) -> None:
    importance, params, other, prune_ratio = _random_case(seed)
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(seed))
    renamed = allocation.keep_ratios(importance[order], params[order], other, prune_ratio)
    torch.testing.assert_close(
        renamed, allocation.keep_ratios(importance, params, other, prune_ratio)[order], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("factor", [1e-200, 1e-9, 3.0, 1e200])
def test_the_scale_of_importances_is_free(factor: float) -> None:
    importance, params = _like([0.4, 1.3, 0.0, 0.9, 2.0]), torch.tensor([500, 20, 300, 1000, 7])
    expected = allocation.keep_ratios(importance, params, 200, 0.4)
    torch.testing.assert_close(allocation.keep_ratios(importance * factor, params, 200, 0.4), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_a_more_important_block_never_keeps_a_smaller_share(seed: int) -> None:
    importance, params, other, prune_ratio = _random_case(seed)
    ratios = allocation.keep_ratios(importance, params, other, prune_ratio)
    ascending = ratios[torch.argsort(importance)]
    assert (ascending.diff() >= -1e-12).all()
    risen = importance.clone()
    block = seed % len(importance)
    risen[block] = 2 * risen[block]
    assert allocation.keep_ratios(risen, params, other, prune_ratio)[block] >= ratios[block] - 1e-12


def test_equal_importances_keep_equal_shares() -> None:
    params = torch.tensor([100, 2000, 30])
    for value in (0.0, 1e-300, 1.0):
        ratios = allocation.keep_ratios(torch.full((3,), value, dtype=torch.float64), params, 70, 0.5)
        torch.testing.assert_close(ratios, torch.full((3,), (0.5 * 2200 - 70) / 2130, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(20))
def test_pruning_nothing_keeps_everything(seed: int) -> None:
    importance, params, other, _ = _random_case(seed)
    torch.testing.assert_close(
        allocation.keep_ratios(importance, params, other, 0.0), torch.ones(len(params), dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_the_largest_ratio_that_can_be_met_is_named_and_can_be_met() -> None:
    params, other = torch.tensor([1000, 3000]), 1234
    with pytest.raises(BudgetError, match="largest ratio") as caught:
        allocation.keep_ratios(torch.ones(2), params, other, 0.9)
    named = re.search(r"largest ratio that can be met is (\d\.\d+)", str(caught.value))
    assert named
    largest = float(named[1])
    ratios = allocation.keep_ratios(torch.ones(2), params, other, largest)
    assert float((ratios * params).sum()) == pytest.approx((1 - largest) * 5234 - other)
    with pytest.raises(BudgetError):
        allocation.keep_ratios(torch.ones(2), params, other, largest + 1e-4)
    assert "1,234" in str(caught.value)


@pytest.mark.parametrize("prune_ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_prune_ratio_outside_its_range_is_refused(prune_ratio: float) -> None:
    with pytest.raises(BudgetError, match=r"\[0, 1\)"):
        allocation.keep_ratios(torch.ones(2), torch.ones(2), 0, prune_ratio)
    with pytest.raises(BudgetError, match=r"\[0, 1\)"):
        allocation.block_budget(10, 0, prune_ratio)


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_importances_below_zero_or_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="importance must be"):
        allocation.keep_ratios(_like([1.0, bad]), torch.ones(2), 0, 0.5)


def test_ratios_given_by_hand_are_checked() -> None:
    assert allocation.given_keep_ratios([0.5, 1, 0, 0.25], 4).tolist() == [0.5, 1, 0, 0.25]
    with pytest.raises(BudgetError, match="3 keep ratios for 4 blocks"):
        allocation.given_keep_ratios([0.5] * 3, 4)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(BudgetError, match=r"\[0, 1\]"):
            allocation.given_keep_ratios([0.5, bad], 2)


def _like(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
