"""P3B's decisions: from what was measured to masks, through the names and options that a user gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from p3b.core.allocation import keep_ratios, mix_importance, update_importance
from p3b.core.masks import GATE_FACTORS, block_masks, order_elements
from p3b.errors import BudgetError, ConfigError, TrainingError
from p3b.methods import METHODS, PUBLISHED_NAMES, create_method, effective_options
from p3b.methods.block_benefit import BlockBenefit
from p3b.vit.cost import dense_params, kept_params, prefix_cost
from p3b.vit.layout import read_layout
from tiny import masks_of, tiny_vit


def _method(name: str = "block_benefit", prune_ratio: float = 0.5, reduce: Any = lambda tensor: tensor, **options: Any) -> Any:
    model = tiny_vit()
    return create_method(name, model, read_layout(model), prune_ratio, reduce, options)


def test_the_published_name_builds_the_same_method() -> None:
    assert isinstance(_method("block_pr"), BlockBenefit)
    assert isinstance(_method("block_benefit"), BlockBenefit)
    assert set(PUBLISHED_NAMES.values()) <= set(METHODS)


def test_the_published_name_means_the_published_probes_where_nothing_else_is_said() -> None:
    def probe_params(name: str, **options: Any) -> int:
        state = _method(name, **options).state_dict()["probes"]
        return sum(value.numel() for value in state.values())

    assert probe_params("block_pr") == probe_params("block_benefit", estimator="paper")
    assert probe_params("block_benefit") == probe_params("block_pr", estimator="low_rank") < probe_params("block_pr")
    assert effective_options("block_pr", {"alpha": 0.1})["estimator"] == "paper"


def test_unknown_names_and_options_are_refused_with_their_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"prune method 'block_benefits'.*block_benefit"):
        _method("block_benefits")
    with pytest.raises(ConfigError, match=r"option of block_benefit 'alhpa'.*'alpha'"):
        _method(alhpa=0.5)
    with pytest.raises(ConfigError, match="option of block_benefit 'layout'"):
        _method(layout=None)


@pytest.mark.parametrize(
    ("option", "bad", "good"),
    [
        ("alpha", [-0.1, 1.1, float("nan")], [0, 1]),
        ("gamma", [0, 1.1, -1], [1, 0.01]),
        ("benefit_scale", [0, -2], [0.1, 30]),
        ("probe_lr", [0, -1e-3], [1e-6]),
        ("probe_weight_decay", [-0.1], [0, 0.5]),
    ],
)
def test_options_outside_their_range_are_refused(option: str, bad: list[float], good: list[float]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=f"{option} must lie in"):
            _method(**{option: value})
    for value in good:
        _method(**{option: value})


def test_a_budget_that_cannot_be_met_is_told_before_training() -> None:
    layout = read_layout(tiny_vit())
    blocks = sum(map(dense_params, layout.blocks))
    largest = blocks / (blocks + layout.other_params)
    with pytest.raises(BudgetError, match="largest ratio"):
        _method(prune_ratio=largest + 1e-3)
    _method(prune_ratio=largest - 1e-3)
    _method(prune_ratio=largest + 1e-3, blocks_only=True)
    with pytest.raises(BudgetError, match="3 keep ratios for 4 blocks"):
        _method(keep_ratios=[0.5] * 3)


def test_building_draws_nothing_from_the_global_generator_and_probes_are_the_same_every_time() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second, third = _method(), _method(), _method(probe_seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (method.state_dict()["probes"] for method in (first, second, third))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["rows.cls_weight"], c["rows.cls_weight"])


def test_probes_decay_in_their_weights_alone() -> None:
    groups = _method(estimator="paper", probe_lr=1e-3, probe_weight_decay=0.1).state_dict()["probe_optimizer"]["param_groups"]
    assert {group["weight_decay"]: len(group["params"]) for group in groups} == {
        0.1: 4 + 4 * 3,  # class-token probes; two convolutions and a linear layer in each patch probe
        0.0: 4 + 4 * (2 * 2 + 1),  # biases, and batch norm's weight and bias
    }
    assert {group["lr"] for group in groups} == {1e-3}


def _measured(method: Any, benefits: Tensor, scores_seed: int = 0, finite: bool = True) -> None:
    """Let a method measure given benefits, and scores from random gradients."""
    generator = torch.Generator().manual_seed(scores_seed)
    for weight in method._first_order._weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    method._pending_benefits.append(benefits)
    method.collect(torch.tensor(finite))


def _dense() -> dict[str, int]:
    return {block.name: dense_params(block) for block in read_layout(tiny_vit()).blocks}


def test_a_decision_follows_the_equations() -> None:
    method = _method(prune_ratio=0.4, alpha=0.3, gamma=0.5, benefit_scale=5.0)
    layout, params = read_layout(tiny_vit()), torch.tensor(list(_dense().values()), dtype=torch.float64)
    rounds = [torch.randn(2, 4, generator=torch.Generator().manual_seed(s)).abs() for s in (1, 2)]
    cls = patch = None
    kept = dict(_dense())
    for number, benefits in enumerate(rounds):
        _measured(method, benefits, number)
        decision = method.renew(kept, progress=0.6, tau=0.1)
        now = torch.tensor(list(kept.values()), dtype=torch.float64)
        cls = update_importance(cls, benefits[0], now, 0.5, 5.0)
        patch = update_importance(patch, benefits[1], now, 0.5, 5.0)
        goals = keep_ratios(mix_importance(cls, patch, 0.3), params, layout.other_params, 0.4)
        for b, block in enumerate(decision.blocks):
            assert block.benefit_cls == pytest.approx(benefits[0, b].item())
            assert block.benefit_patch == pytest.approx(benefits[1, b].item())
            assert block.keep_ratio_goal == pytest.approx(goals[b].item())
            assert block.keep_ratio == pytest.approx(1 - 0.6 * (1 - goals[b].item()))
            assert block.params == _dense()[block.name]
        total = sum(block.kept_params for block in decision.blocks)
        wanted = sum(block.keep_ratio * block.params for block in decision.blocks)
        assert abs(total - wanted) < 100
        kept = {block.name: block.kept_params for block in decision.blocks}
    assert (decision.progress, decision.tau) == (0.6, 0.1)


def test_blocks_that_are_worked_out_together_get_the_masks_that_each_would_get_alone() -> None:
    model = tiny_vit(depth=3)
    layout = read_layout(model)
    method = BlockBenefit(model, layout, 0.4, lambda tensor: tensor)
    _measured(method, torch.randn(2, 6, generator=torch.Generator().manual_seed(1)))
    gates = {block.gate(dim): size for block in layout.blocks for dim, size in block.dims.items()}
    scores = dict(zip(gates, method._meter._intervals[-1]["scores"][0].split(list(gates.values())), strict=True))
    decision = method.renew({block.name: dense_params(block) for block in layout.blocks}, progress=0.7, tau=0.1)
    assert list(decision.masks) == list(gates)
    for block, decided in zip(layout.blocks, decision.blocks, strict=True):
        order = order_elements([scores[block.gate(dim)] for dim in block.dims], [GATE_FACTORS[dim] for dim in block.dims])
        count = sum(int((decision.masks[block.gate(dim)] < 0.5).sum()) for dim in block.dims)
        assert (
            int(prefix_cost(block)(order.kept)[count]) == decided.kept_params == kept_params(layout, decision.masks)[block.name]
        )
        for dim, mask in zip(block.dims, block_masks(order, count, tau=0.1), strict=True):
            assert torch.equal(decision.masks[block.gate(dim)], mask)


def test_where_no_block_ever_helped_the_budget_is_shared_evenly() -> None:
    method = _method(prune_ratio=0.3)
    _measured(method, -torch.ones(2, 4))
    goals = [block.keep_ratio_goal for block in method.renew(_dense(), 1.0, 0.1).blocks]
    assert goals == pytest.approx([goals[0]] * 4)


def test_a_block_that_vanished_for_one_interval_does_not_take_the_whole_mean_with_it() -> None:
    method = _method(prune_ratio=0.4, gamma=1.0)
    benefits = torch.tensor([[0.1, 1.0, 1.0, 1.0]] * 2)
    _measured(method, benefits)
    vanished = {**_dense(), "blocks.0.attn": 0}
    decision = method.renew(vanished, 1.0, 0.1)
    least = {**_dense(), "blocks.0.attn": _dense()["blocks.0.attn"] // 100}
    other = _method(prune_ratio=0.4, gamma=1.0)
    _measured(other, benefits)
    assert [b.importance for b in decision.blocks] == pytest.approx(
        [b.importance for b in other.renew(least, 1.0, 0.1).blocks], rel=0.02
    )
    assert all(b.importance > 1e-4 for b in decision.blocks)


def test_ratios_given_by_hand_need_no_probes() -> None:
    method = _method(keep_ratios=[1, 0.5, 0, 0.25])
    assert set(method.state_dict()) == {"meter", "importance"}
    assert method.loss(torch.nn.functional.cross_entropy, None).item() == 0
    for weight in method._first_order._weights.values():
        weight.grad = torch.ones_like(weight)
    method.collect(torch.tensor(True))
    decision = method.renew(_dense(), 1.0, 0.1)
    assert [block.keep_ratio for block in decision.blocks] == [1, 0.5, 0, 0.25]
    assert [block.importance for block in decision.blocks] == [None] * 4
    assert decision.blocks[0].kept_params == decision.blocks[0].params
    assert decision.blocks[2].kept_params == 0


def test_the_last_decision_takes_two_intervals_together_and_is_hard() -> None:
    method = _method(prune_ratio=0.4, gamma=1.0)
    first, second = torch.tensor([[4.0, 0.1, 0.1, 0.1]] * 2), torch.tensor([[0.1, 0.1, 0.1, 2.0]] * 2)
    _measured(method, first)
    method.renew(_dense(), 0.5, 0.1)
    _measured(method, second)
    last = method.last(_dense())
    assert [block.benefit_cls for block in last.blocks] == pytest.approx([2.05, 0.1, 0.1, 1.05])
    assert (last.progress, last.tau) == (1.0, 0.0)
    assert all(((mask == 0) | (mask == 1)).all() for mask in last.masks.values())


def test_a_decision_without_a_measurement_is_refused() -> None:
    method = _method()
    for decide in (lambda: method.renew(_dense(), 1.0, 0.1), lambda: method.last(_dense())):
        with pytest.raises(TrainingError, match="Nothing has been measured"):
            decide()
    with pytest.raises(TrainingError, match="No forward pass has been recorded"):
        method.loss(torch.nn.functional.cross_entropy, torch.zeros(2))


def test_what_is_not_finite_counts_for_nothing() -> None:
    clean, dirty = _method(prune_ratio=0.4), _method(prune_ratio=0.4)
    benefits = torch.tensor([[4.0, 0.1, 0.1, 0.1]] * 2)
    _measured(clean, benefits)
    _measured(dirty, torch.full((2, 4), float("nan")), scores_seed=5, finite=False)
    _measured(dirty, benefits)
    _measured(dirty, 7 * benefits.flip(1), scores_seed=9, finite=False)
    a, b = clean.renew(_dense(), 1.0, 0.1), dirty.renew(_dense(), 1.0, 0.1)
    assert a.blocks == b.blocks
    assert all(torch.equal(a.masks[gate], b.masks[gate]) for gate in a.masks)


def test_micro_batches_are_averaged_and_measurements_pass_through_the_reduction() -> None:
    seen: list[Tensor] = []

    def twice(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return 2 * tensor

    method = _method(prune_ratio=0.4, reduce=twice)
    method._pending_benefits.append(torch.full((2, 4), 1.0))
    _measured(method, torch.full((2, 4), 3.0))
    decision = method.renew(_dense(), 1.0, 0.1)
    assert [block.benefit_patch for block in decision.blocks] == pytest.approx([4.0] * 4)
    assert [tuple(tensor.shape) for tensor in seen] == [(2, 4), (4 * (24 + 24) + 2 * (8 + 96),)]  # the scores all at once


def _mean_with(other: Tensor) -> Any:
    """The reduction of a process beside another one that hands in `other` where benefits are due, and the same elsewhere."""
    return lambda tensor: (tensor + other) / 2 if tensor.shape == other.shape else tensor.clone()


def test_benefits_that_are_not_finite_on_one_rank_count_on_none() -> None:
    good, bad = torch.tensor([[4.0, 0.1, 0.1, 0.1]] * 2), torch.full((2, 4), float("nan"))
    for mine, other in ((good, bad), (bad, good)):
        method = _method(prune_ratio=0.4, reduce=_mean_with(other))
        _measured(method, mine)
        assert method.renew(_dense(), 1.0, 0.1).blocks[0].benefit_cls == 0


def test_the_sums_that_a_checkpoint_keeps_are_over_all_ranks() -> None:
    mine, other = torch.full((2, 4), 1.0), torch.full((2, 4), 3.0)
    states = []
    for first, second in ((mine, other), (other, mine)):
        method = _method(prune_ratio=0.4, reduce=_mean_with(second))
        _measured(method, first)
        states.append(method.state_dict()["meter"]["intervals"][-1]["benefits"])
    assert torch.equal(states[0][0], states[1][0])
    assert (states[0][0] == 2).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_probes_rest_where_a_gradient_is_not_finite_be_it_theirs_or_the_models(scaled: bool) -> None:
    for gradients_finite, gradient, moves in ((True, 1.0, True), (False, 1.0, False), (True, float("inf"), False)):
        method = _method()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
        model = torch.nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([model])
        for step_gradient, finite in ((1.0, True), (gradient, gradients_finite)):  # momentum must not move them either
            before = {key: value.clone() for key, value in method._estimator.probes.state_dict().items()}
            for parameter in method._estimator.probes.parameters():
                parameter.grad = torch.full_like(parameter, step_gradient)
            scaler.scale(1.0 * model).backward()
            scaler.unscale_(optimizer)
            method.train_own(torch.tensor(finite), scaler)
            scaler.update()
            assert all(parameter.grad is None for parameter in method._estimator.probes.parameters())
        after = method._estimator.probes.state_dict()
        assert any(not torch.equal(after[key], before[key]) for key in after) == moves


def test_spared_blocks_keep_all_and_the_budget_is_met_all_the_same() -> None:
    model = tiny_vit()
    layout = read_layout(model)
    dense = {block.name: dense_params(block) for block in layout.blocks}
    total = layout.other_params + sum(dense.values())
    for spare in (("blocks.0.attn",), ("blocks.1", "head")):
        method = _method(prune_ratio=0.3, spare=spare)
        scores = {gate: torch.rand(len(mask)) for gate, mask in masks_of(layout, lambda _gate, size: torch.ones(size)).items()}
        importance = torch.tensor([0.1, 3.0, 1.0, 0.5][: len(dense)], dtype=torch.float64)
        goals = method._goals(importance)
        decision = method._shares.decide(goals, scores, progress=1.0, tau=0.0)
        kept = {block.name: block.kept_params for block in decision.blocks}
        spared = [name for name in dense if name in spare or name.rpartition(".")[0] in spare]
        assert spared and all(kept[name] == dense[name] for name in spared)
        assert layout.other_params + sum(kept.values()) == pytest.approx(0.7 * total, abs=60)


def test_what_cannot_be_spared_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown block to spare 'blocks.00'.*'blocks.0'"):
        _method(spare=("blocks.00",))
    with pytest.raises(ConfigError, match="nothing to prune"):
        _method(spare=("blocks.0", "blocks.1"))
    with pytest.raises(ConfigError, match="spare cannot be combined with align"):
        _method(spare=("blocks.0",), align=8)
    with pytest.raises(BudgetError):
        _method(spare=("blocks.0",), prune_ratio=0.8)
    with pytest.raises(ConfigError, match=r"option of uniform 'spare'"):
        _method("uniform", spare=("blocks.0",))
