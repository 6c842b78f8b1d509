"""The methods that P3B is compared with: uniform, random, magnitude, taylor."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import p3b
from loops import CE, Loop, prune_in_mixed_precision
from p3b.errors import BudgetError, ConfigError, TrainingError, WeightsError
from p3b.methods import METHODS, create_method, method_options
from p3b.methods.base import Decision, overall_keep_ratio
from p3b.methods.global_score import GlobalRanking, find_cut, normalised_by_gate
from p3b.methods.uniform import EqualShares
from p3b.run.method_options import METHOD_OPTIONS, method_options_of
from p3b.run.options import PruneOptions
from p3b.scoring.criteria import by_gate
from p3b.scoring.scores import MagnitudeScores, RandomScores
from p3b.vit.cost import block_params, dense_params, kept_params
from p3b.vit.layout import BlockLayout, ModelLayout, read_layout
from runs import CALM, flags, lines, read, run
from thinning import thinned
from tiny import VARIANTS, images, labels, parameters_of, tiny_vit

PLAN = p3b.Schedule(start=3, sparse=9, final=14, update_every=2)
REFERENCES = ("uniform", "random", "magnitude", "taylor")
GLOBAL = ("magnitude", "taylor")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _give_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def _decided(name: str, model: Any, prune_ratio: float, reduce: Any = _same, **options: Any) -> Decision:
    """The last decision after one step with the gradients that the model holds."""
    method = create_method(name, model, read_layout(model), prune_ratio, reduce, options)
    method.collect(torch.tensor(True))
    return method.last({})


def _with_gradients(seed: int = 0, **changed: Any) -> Any:
    model = tiny_vit(**changed)
    _give_gradients(model, seed)
    return model


def _kept(decision: Decision) -> dict[str, list[bool]]:
    return {gate: (mask >= 0.5).tolist() for gate, mask in decision.masks.items()}


def _dearest_element(blocks: tuple[BlockLayout, ...]) -> int:
    """Parameters that the dearest element of any dense block carries."""
    found = []
    for block in blocks:
        for dim in block.dims:
            one_less = {name: torch.tensor(size - (name == dim)) for name, size in block.dims.items()}
            found.append(dense_params(block) - int(block_params(block, one_less)))
    return max(found)


class Run(Loop):
    """Steps of two micro-batches."""

    def __init__(self, model: nn.Module, method: str, prune_ratio: float = 0.5, **options: Any) -> None:
        pruner = p3b.Pruner(model, prune_ratio, method, PLAN, **options)
        super().__init__(pruner, model, torch.optim.AdamW(model.parameters(), lr=1e-3), accumulate=2)


# --- the budget


@pytest.mark.parametrize(
    ("variant", "asked"),
    thinned(
        ["plain", "layer scale", "distilled", "no class token", "no bias", "norm without affine"],
        [(0.3, False), (0.5, False), (0.7, False), (0.3, True), (0.75, True), (0.9, True)],
        2,
    ),
)
@pytest.mark.parametrize("name", REFERENCES)
def test_the_budget_is_met_to_half_an_element(name: str, variant: str, asked: tuple[float, bool]) -> None:
    prune_ratio, blocks_only = asked
    model = _with_gradients(**VARIANTS[variant])
    layout = read_layout(model)
    decision = _decided(name, model, prune_ratio, blocks_only=blocks_only)
    other = 0 if blocks_only else layout.other_params
    dense = sum(map(dense_params, layout.blocks)) + other
    kept = sum(block.kept_params for block in decision.blocks) + other
    assert abs(kept - (1 - prune_ratio) * dense) <= _dearest_element(layout.blocks) / 2
    assert {block.name: block.kept_params for block in decision.blocks} == kept_params(layout, decision.masks)
    assert all(((mask == 0) | (mask == 1)).all() for mask in decision.masks.values())


@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("model_name", ["deit_tiny_patch16_224", "deit_small_patch16_224"])
@pytest.mark.parametrize("rule", [EqualShares, GlobalRanking])
def test_at_full_size_the_budget_is_met_to_a_tenth_of_a_point(rule: Any, model_name: str, prune_ratio: float) -> None:
    """Also where whole gates lie close together in the ranking, so that blocks vanish one after the other."""
    with torch.device("meta"):
        model = timm.create_model(model_name, num_classes=100, weight_init="skip")
    layout = read_layout(model)
    dense = parameters_of(model)
    gates = [size for block in layout.blocks for size in block.dims.values()]
    for seed, apart in enumerate((0.0, 1.0, 1.0, 10.0, 10.0)):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.cat([apart * torch.rand(1, generator=generator) + torch.rand(n, generator=generator) for n in gates])
        decision = rule(layout, prune_ratio, False).decide(scores, 1.0, 0.0)
        kept = layout.other_params + sum(block.kept_params for block in decision.blocks)
        assert abs(1 - kept / dense - prune_ratio) < 1e-3


@pytest.mark.parametrize("name", REFERENCES)
def test_a_budget_that_cannot_be_met_is_told_before_training(name: str) -> None:
    model = tiny_vit()
    layout = read_layout(model)
    with pytest.raises(BudgetError, match="largest ratio"):
        create_method(name, model, layout, 0.9, _same, {})
    create_method(name, model, layout, 0.9, _same, {"blocks_only": True})
    with pytest.raises(BudgetError, match=r"\[0, 1\)"):
        create_method(name, model, layout, 1.0, _same, {"blocks_only": True})
    assert overall_keep_ratio(layout, 0.0, blocks_only=False) == 1.0


@pytest.mark.parametrize("name", REFERENCES)
def test_pruning_nothing_keeps_everything(name: str) -> None:
    decision = _decided(name, _with_gradients(), 0.0)
    assert all((mask == 1).all() for mask in decision.masks.values())
    assert [block.keep_ratio for block in decision.blocks] == [1.0] * 4


# --- the whole way


@pytest.mark.parametrize(
    ("name", "variant"), thinned(REFERENCES, ["plain", "layer scale", "registers", "no bias, sigmoid"], 2, whole=0)
)
def test_the_small_network_is_the_masked_one(name: str, variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant], dtype=torch.float64)
    dense, run = parameters_of(model), Run(model, name)
    run.steps(PLAN.final)
    assert [decision.progress for decision in run.decisions] == pytest.approx([2 / 6, 4 / 6, 1, 1, 1])
    for decision in run.decisions:
        wanted = dense - decision.progress * 0.5 * dense
        kept = run.pruner.layout.other_params + sum(block.kept_params for block in decision.blocks)
        assert abs(kept - wanted) <= _dearest_element(run.pruner.layout.blocks) / 2
        assert any(((mask > 0) & (mask < 1)).any() for mask in decision.masks.values()), "masks are soft until the end"
        for block in decision.blocks:
            assert (block.benefit_cls, block.benefit_patch, block.importance) == (None, None, None)
            assert 0 <= block.keep_ratio_goal <= block.keep_ratio + 1e-9
    run.pruner.decide_last()
    model.eval()
    with torch.no_grad():
        masked = model(images(dtype=torch.float64))
        predicted = run.pruner.kept_params()
        small = run.pruner.shrink()
        torch.testing.assert_close(small(images(dtype=torch.float64)), masked, rtol=1e-9, atol=1e-9)
    assert parameters_of(small) == predicted
    assert abs(predicted - 0.5 * dense) <= _dearest_element(read_layout(tiny_vit(**VARIANTS[variant])).blocks) / 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())


def _stopped(run: Run) -> io.BytesIO:
    """The states of a run, as they lie in a file."""
    file = io.BytesIO()
    torch.save([run.model.state_dict(), run.optimizer.state_dict(), run.pruner.state_dict()], file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", REFERENCES)
def test_stopping_and_resuming_equals_never_stopping_bit_for_bit(name: str) -> None:
    options = {"seed": 3} if name == "random" else {}
    straight = Run(tiny_vit(), name, **options)
    small = straight.to_the_end()
    before = Run(tiny_vit(), name, **options)  # a second run: taking its states must not change what comes after them
    for stop in (1, 5, 12) if name in ("uniform", "taylor") else (4, 9, 14):
        before.steps(stop - before.pruner.steps_done)
        model_state, optimizer_state, pruner_state = torch.load(_stopped(before), weights_only=True)
        after = Run(tiny_vit(seed=5), name)  # another seed of the method as well: what was drawn is part of the state
        after.model.load_state_dict(model_state)
        after.optimizer.load_state_dict(optimizer_state)
        after.pruner.load_state_dict(pruner_state)
        resumed = after.to_the_end().state_dict()
        for ours, theirs in zip([*before.decisions, *after.decisions], straight.decisions, strict=True):
            assert ours.blocks == theirs.blocks
            assert all(torch.equal(ours.masks[gate], theirs.masks[gate]) for gate in theirs.masks)
        for key, value in small.state_dict().items():
            assert torch.equal(value, resumed[key]), (stop, key)


def test_the_state_of_another_method_or_model_is_refused() -> None:
    taken = {name: Run(tiny_vit(), name, prune_ratio=0.4).steps(4).pruner.state_dict() for name in METHODS}
    for name in METHODS:
        for other, state in taken.items():
            pruner = p3b.Pruner(tiny_vit(), 0.4, name, PLAN)
            if other == name:
                pruner.load_state_dict(state)
                assert pruner.steps_done == 4
            else:
                with pytest.raises(WeightsError, match="another model, method or version"):
                    pruner.load_state_dict(state)
        with pytest.raises(WeightsError, match="another model, method or version"):
            p3b.Pruner(tiny_vit(embed_dim=48), 0.4, name, PLAN).load_state_dict(taken[name])
    taken = Run(tiny_vit(), "random").pruner.state_dict()
    with pytest.raises(WeightsError, match="random scores for"):
        Run(tiny_vit(embed_dim=48), "random").pruner.load_state_dict(taken)


@pytest.mark.parametrize("name", REFERENCES)
def test_mixed_precision_goes_along(name: str) -> None:
    model = tiny_vit().train()
    dense, pruner = parameters_of(model), p3b.Pruner(model, 0.4, name, PLAN)
    small = prune_in_mixed_precision(model, pruner, torch.amp.GradScaler("cpu", init_scale=16.0))
    assert abs(1 - parameters_of(small) / dense - 0.4) < 0.01


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_is_paid_for_probes(name: str) -> None:
    model = tiny_vit()
    pruner = p3b.Pruner(model, 0.5, name, PLAN)
    hooked = {key for key, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks}
    assert hooked == {f"blocks.{d}.{layer}" for d in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    loss = pruner.loss(CE, labels())
    assert loss.item() == 0
    assert not loss.requires_grad
    pruner.shrink()


def test_a_decision_without_a_measurement_is_refused_where_one_is_needed() -> None:
    for name in REFERENCES:
        model = tiny_vit()
        method = create_method(name, model, read_layout(model), 0.5, _same, {})
        if name in ("uniform", "taylor"):
            with pytest.raises(TrainingError, match="Nothing has been measured"):
                method.renew({}, 1.0, 0.1)
        else:
            assert len(method.renew({}, 1.0, 0.1).blocks) == 4


@pytest.mark.parametrize("name", ["uniform", "taylor"])
def test_scores_are_means_over_the_interval_and_over_the_last_two_at_the_end(name: str) -> None:
    model = tiny_vit()
    layout = read_layout(model)

    def after(*steps: tuple[int, bool] | None, last: bool = False) -> dict[str, list[bool]]:
        """Steps with gradients of a seed, which are finite or not; None is a mask update."""
        method = create_method(name, model, layout, 0.5, _same, {})
        for step in steps:
            if step is None:
                method.renew({}, 1.0, 0.1)
                continue
            _give_gradients(model, step[0])
            if not step[1]:
                model.blocks[0].mlp.fc1.weight.grad[0, 0] = float("nan")
            method.collect(torch.tensor(step[1]))
        return _kept(method.last({}) if last else method.renew({}, 1.0, 0.0))

    assert after((0, True)) == after((1, True), None, (0, True)) != after((1, True))
    assert after((0, True), (1, True)) == after((0, True), None, (1, True), last=True) != after((0, True))
    assert after((0, True), (1, False)) == after((0, True))


# --- uniform and random


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_every_block_keeps_the_same_share(name: str) -> None:
    model = _with_gradients(depth=3)
    decision = _decided(name, model, 0.45)
    layout = read_layout(model)
    goal = overall_keep_ratio(layout, 0.45, blocks_only=False)
    for block in decision.blocks:
        assert block.keep_ratio_goal == goal == pytest.approx(block.keep_ratio)
        assert abs(block.kept_params - goal * block.params) <= _dearest_element(layout.blocks)


def test_random_draws_once_by_seed_and_by_nothing_else() -> None:
    kept = []
    for model, options, reduce in (
        (_with_gradients(seed=1), {"seed": 7}, _same),
        (_with_gradients(seed=2), {"seed": 7}, lambda tensor: 1 / 0),  # another rank: nothing is asked of the others
        (_with_gradients(seed=1), {"seed": 8}, _same),
    ):
        torch.manual_seed(len(kept))
        state = torch.get_rng_state()
        kept.append(_kept(_decided("random", model, 0.5, reduce, **options)))
        assert torch.equal(torch.get_rng_state(), state)
    assert kept[0] == kept[1] != kept[2]
    counts = [{gate: sum(elements) for gate, elements in k.items()} for k in kept]
    assert counts[0] == counts[2], "which elements go is drawn, not how many of each gate"


def test_random_elements_that_were_given_up_do_not_come_back() -> None:
    run = Run(tiny_vit(), "random")
    run.steps(PLAN.final)
    kept = [torch.cat(list(decision.masks.values())) >= 0.5 for decision in [*run.decisions, run.pruner.decide_last()]]
    for before, after in pairwise(kept):
        assert not (after & ~before).any()
    assert kept[-1].sum() < kept[0].sum()


# --- rankings over the whole network


def _norms_by_hand(model: Any) -> dict[str, Tensor]:
    norms = {}
    for depth, block in enumerate(model.blocks):
        heads, name = block.attn.num_heads, f"blocks.{depth}"
        width = block.attn.qkv.in_features
        qkv = block.attn.qkv.weight.detach().view(3, heads, width // heads, width)
        proj = block.attn.proj.weight.detach().view(width, heads, width // heads)
        fc1, fc2 = block.mlp.fc1.weight.detach(), block.mlp.fc2.weight.detach()
        norms |= {
            f"{name}.attn.in": torch.stack([qkv[..., i].norm() for i in range(width)]),
            f"{name}.attn.head": torch.stack(
                [torch.cat([qkv[:, :, k].flatten(), proj[:, :, k].flatten()]).norm() for k in range(width // heads)]
            ),
            f"{name}.attn.out": torch.stack([proj[i].norm() for i in range(width)]),
            f"{name}.mlp.in": fc1.norm(dim=0),
            f"{name}.mlp.hidden": torch.stack([torch.cat([fc1[i], fc2[:, i]]).norm() for i in range(len(fc1))]),
            f"{name}.mlp.out": fc2.norm(dim=1),
        }
    return norms


def _drop_lowest(layout: ModelLayout, scores: dict[str, Tensor], budget: float) -> dict[str, list[bool]]:
    """One after the other the lowest element of the network goes, until the blocks meet the budget or one step before it; the
    last of a gate is passed over where it would cross the budget.
    """
    kept = {gate: [True] * len(values) for gate, values in scores.items()}

    def params() -> int:
        counts = ({dim: torch.tensor(sum(kept[block.gate(dim)])) for dim in block.dims} for block in layout.blocks)
        return sum(int(block_params(block, count)) for block, count in zip(layout.blocks, counts, strict=True))

    elements = [(value, gate, i) for gate, values in scores.items() for i, value in enumerate(values.tolist())]
    before = params()
    for _, gate, i in sorted(elements, key=lambda element: element[0]):
        kept[gate][i] = False
        now = params()
        if now < budget and not any(kept[gate]):
            kept[gate][i] = True
            continue
        if now <= budget:
            if budget - now > before - budget:
                kept[gate][i] = True
            break
        before = now
    return kept


@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("variant", ["plain", "layer scale", "no bias"])
def test_magnitude_is_its_definition(variant: str, prune_ratio: float) -> None:
    model = tiny_vit(**VARIANTS[variant])
    layout = read_layout(model)
    budget = (1 - prune_ratio) * parameters_of(model) - layout.other_params
    norms = _norms_by_hand(model)
    scores = by_gate(layout, MagnitudeScores(layout, model, _same).of_interval())
    assert scores.keys() == norms.keys()
    for gate, norm in norms.items():
        torch.testing.assert_close(scores[gate], norm)
    assert _kept(_decided("magnitude", model, prune_ratio)) == _drop_lowest(layout, norms, budget)


@pytest.mark.parametrize("seed", range(3))
def test_taylor_is_its_definition(seed: int) -> None:
    model = _with_gradients(seed)
    layout = read_layout(model)
    scores = {}
    for depth, block in enumerate(model.blocks):  # of the hidden channels by hand; the criterion has its own tests
        first_order = (block.mlp.fc2.weight * block.mlp.fc2.weight.grad).sum(0).detach()
        scores[f"blocks.{depth}.mlp.hidden"] = first_order**2 / (first_order**2).norm()
    method = create_method("taylor", model, layout, 0.5, _same, {})
    method.collect(torch.tensor(True))
    flat = method.state_dict()["scores"]["intervals"][-1]["scores"][0]
    comparable = by_gate(layout, normalised_by_gate(layout, flat))
    for gate, values in scores.items():
        torch.testing.assert_close(comparable[gate].float(), values)
    budget = 0.5 * parameters_of(model) - layout.other_params
    assert _kept(method.last({})) == _drop_lowest(layout, comparable, budget)


def test_taylor_does_not_look_at_the_scale_of_a_gate() -> None:
    layout = read_layout(tiny_vit())
    elements = sum(size for block in layout.blocks for size in block.dims.values())
    scores = torch.rand(elements, generator=torch.Generator().manual_seed(0))
    scaled = by_gate(layout, scores.clone())
    scaled["blocks.0.mlp.hidden"] *= 1024
    scaled["blocks.1.attn.in"] /= 2**20
    ours, theirs = (normalised_by_gate(layout, s) for s in (scores, torch.cat(list(scaled.values()))))
    assert torch.equal(ours, theirs)
    for gate in by_gate(layout, ours).values():
        assert gate.norm().item() == pytest.approx(1)
    assert torch.equal(normalised_by_gate(layout, torch.zeros(elements)), torch.zeros(elements, dtype=torch.float64))
    largest = normalised_by_gate(layout, torch.full((elements,), torch.finfo(torch.float32).max))
    assert largest.isfinite().all()


def _permuted(model: Any, order: Tensor) -> Any:
    """The same network with the hidden channels of its first MLP in another order, gradients and all."""
    other = _with_gradients()
    for key, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        mine, theirs = (m.blocks[0].mlp.get_parameter(key) for m in (model, other))
        theirs.data = mine.detach().index_select(axis, order)
        theirs.grad = mine.grad.index_select(axis, order)
    return other


@pytest.mark.parametrize("name", ["uniform", "magnitude", "taylor"])
def test_elements_in_another_order_get_the_same_masks_in_that_order(name: str) -> None:
    model, order = _with_gradients(), torch.randperm(96, generator=torch.Generator().manual_seed(4))
    before, after = (dict(_decided(name, m, 0.5).masks) for m in (model, _permuted(model, order)))
    hidden = before.pop("blocks.0.mlp.hidden"), after.pop("blocks.0.mlp.hidden")
    assert torch.equal(hidden[0][order], hidden[1])
    assert 0 < hidden[0].sum() < 96
    assert all(torch.equal(before[gate], after[gate]) for gate in before)


@pytest.mark.parametrize("name", GLOBAL)
def test_blocks_in_another_order_get_the_same_masks_in_that_order(name: str) -> None:
    model, other = _with_gradients(), _with_gradients()
    other.blocks = nn.Sequential(*reversed(list(other.blocks)))
    before, after = _decided(name, model, 0.5).masks, _decided(name, other, 0.5).masks
    for gate, mask in before.items():
        depth = int(gate.split(".")[1])
        assert torch.equal(mask, after[gate.replace(f"blocks.{depth}", f"blocks.{1 - depth}")])


def test_the_walk_equals_removing_element_by_element() -> None:
    layout = read_layout(tiny_vit())
    elements = sum(size for block in layout.blocks for size in block.dims.values())
    dense = sum(map(dense_params, layout.blocks))
    for seed in range(3):
        scores = torch.rand(elements, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scores[: 24 * seed] /= 10  # gates that end early
        for share in (0.9, 0.6, 0.35, 0.1):
            cut = find_cut(layout.blocks, scores, share * dense)
            by_hand = _drop_lowest(layout, by_gate(layout, cut.ranking), share * dense)
            masks = by_gate(layout, cut.masks(tau=0.0))
            assert {gate: (mask >= 0.5).tolist() for gate, mask in masks.items()} == by_hand
            assert int((cut.masks(tau=0.1) < 0.5).sum()) == cut.num_pruned


def test_whole_blocks_vanish_where_the_ranking_says_so() -> None:
    model = _with_gradients()
    with torch.no_grad():
        for parameter in model.blocks[0].parameters():
            parameter.mul_(1e-3)
        model.blocks[1].attn.proj.weight.mul_(10)  # its rows are the shortest otherwise
    run = Run(model, "magnitude", prune_ratio=0.6)
    last = run.steps(PLAN.final).pruner.decide_last()
    assert [block.kept_params for block in last.blocks[:2]] == [0, 0]
    assert all(block.kept_params > 0 for block in last.blocks[2:])
    small = run.pruner.shrink().eval()
    assert torch.isfinite(small(images())).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_a_network_may_be_emptied(name: str) -> None:
    model = tiny_vit()
    other = read_layout(model).other_params
    run = Run(model, name, prune_ratio=0.9999, blocks_only=True)
    small = run.to_the_end().eval()
    assert parameters_of(small) - other < 30
    assert torch.isfinite(small(images())).all()


def test_the_last_element_of_a_gate_stays_where_it_would_take_the_budget_with_it() -> None:
    """The input channels of the first MLP are the lowest of all: the last of them carries what is left of the block."""
    layout = read_layout(tiny_vit(depth=4))
    scores = {block.gate(dim): 1 + torch.rand(n) for block in layout.blocks for dim, n in block.dims.items()}
    scores["blocks.0.mlp.in"] -= 10
    flat = torch.cat(list(scores.values()))
    mlp, dense = dense_params(layout.blocks[1]), sum(map(dense_params, layout.blocks))
    with_one = int(block_params(layout.blocks[1], {k: torch.tensor(v) for k, v in {**layout.blocks[1].dims, "in": 1}.items()}))
    assert mlp > with_one > 2000  # so much hangs on the last one

    inside = dense - mlp + with_one - 1000
    cut = find_cut(layout.blocks, flat, inside)
    masks = by_gate(layout, cut.masks(tau=0.0))
    assert masks["blocks.0.mlp.in"].sum() == 1
    assert masks["blocks.0.mlp.in"][scores["blocks.0.mlp.in"].argmax()] == 1
    assert abs(sum(kept_params(layout, masks).values()) - inside) <= _dearest_element(layout.blocks) / 2

    beyond = find_cut(layout.blocks, flat, dense - mlp - 200)  # where it fits it goes like any other
    assert by_gate(layout, beyond.masks(tau=0.0))["blocks.0.mlp.in"].sum() == 0


# --- many processes


@pytest.mark.parametrize("name", REFERENCES)
def test_ties_are_broken_the_same_way_on_every_rank_and_every_time(name: str) -> None:
    def masks() -> dict[str, list[bool]]:
        model = tiny_vit()
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
            parameter.grad = torch.zeros_like(parameter)
        return _kept(_decided(name, model, 0.5, reduce=torch.clone))

    first = masks()
    assert first == masks()
    if name == "taylor":  # with nothing to tell them apart elements go in the network's order
        flat = [kept for elements in first.values() for kept in elements]
        assert flat == sorted(flat)


@pytest.mark.parametrize("name", ["uniform", "magnitude", "taylor"])
def test_ranks_that_measure_otherwise_decide_alike(name: str) -> None:
    """Only the mean over all ranks counts, and it is asked for once a decision."""
    models = [_with_gradients(seed) if name != "magnitude" else tiny_vit(seed=seed) for seed in (1, 2)]
    measured: list[list[Tensor]] = [[], []]
    alone = []
    for number, model in enumerate(models):

        def note(tensor: Tensor, seen: list[Tensor] = measured[number]) -> Tensor:
            seen.append(tensor)
            return tensor

        alone.append(_kept(_decided(name, model, 0.5, note)))
    assert [len(seen) for seen in measured] == [1, 1]
    assert alone[0] != alone[1]
    mean = (measured[0][0] + measured[1][0]) / 2
    together = [_kept(_decided(name, model, 0.5, lambda _tensor: mean)) for model in models]
    assert together[0] == together[1]


# --- names, options and the command


def test_every_method_takes_what_all_take_and_nothing_that_it_does_not_know() -> None:
    for name in METHODS:
        assert "blocks_only" in method_options(name)
    assert method_options("random") == ["blocks_only", "align", "stream", "seed"]
    assert method_options("block_pr") == method_options("block_benefit")
    model = tiny_vit()
    with pytest.raises(ConfigError, match=r"option of uniform 'block_only'. Did you mean 'blocks_only'"):
        create_method("uniform", model, read_layout(model), 0.5, _same, {"block_only": True})
    with pytest.raises(ConfigError, match=r"option of taylor 'alpha'. Known: blocks_only"):
        create_method("taylor", model, read_layout(model), 0.5, _same, {"alpha": 0.5})
    with pytest.raises(
        ConfigError, match=r"'zzz'. Known: block_benefit, block_pr, magnitude, random, savit, taylor, uniform, wdpruning"
    ):
        create_method("zzz", model, read_layout(model), 0.5, _same, {})


def _options(**changed: Any) -> dict[str, Any]:
    return method_options_of(PruneOptions(**changed), seed=0)


def test_the_command_hands_a_method_what_it_takes_and_refuses_what_it_would_ignore() -> None:
    assert _options() == {
        "blocks_only": False, "keep_ratios": None, "alpha": 0.5, "gamma": 0.2, "benefit_scale": 10.0,
        "align": 1, "stream": 0.0, "probe_lr": 5e-4, "spare": None,
    }  # fmt: skip
    assert _options(prune_keep_ratios=(0.5, 1.0), prune_alpha=0.1)["keep_ratios"] == (0.5, 1.0)
    for name in REFERENCES:
        widths = {"align": 1, "stream": 0.0}
        own = {"random": {"seed": 0, **widths}, "uniform": widths}.get(name, {})
        assert _options(prune_method=name, prune_blocks_only=True) == {"blocks_only": True, **own}
        assert _options(prune_method=name, prune_alpha=0.5) == {"blocks_only": False, **own}
        for setting, value in (
            ("prune_alpha", 0.3), ("prune_gamma", 1.0), ("prune_benefit_scale", 1.0), ("probe_lr", 1e-3),
            ("prune_keep_ratios", (0.5,) * 4), ("prune_benefit", "ridge"), ("spare", ("head",)),
        ):  # fmt: skip
            flag = "--" + setting.replace("_", "-")
            with pytest.raises(ConfigError, match=f"{flag} .* means nothing to --prune-method {name}, only to block_benefit"):
                _options(prune_method=name, **{setting: value})
    of_the_library_alone = {"probe_weight_decay", "probe_seed", "probe_outputs"}
    assert set(METHOD_OPTIONS.values()) | of_the_library_alone | {"seed"} == {
        option for name in METHODS for option in method_options(name)
    }


def test_a_flag_for_another_method_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("prune", *flags(data, out, "--prune-method", "uniform", "--prune-alpha", "0.3")) == 2
    assert "--prune-alpha 0.3 means nothing to --prune-method uniform, only to block_benefit" in capsys.readouterr().err
    assert not out.exists()


def test_help_says_what_each_method_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--help-all") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"{name}: " in said for name in METHODS)
    assert "Molchanov et al., CVPR 2019" in said


def test_the_page_has_a_section_for_every_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert [line[4:-1] for line in page.splitlines() if line.startswith("## `")] == list(METHODS)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_command_prunes_by_every_method(data: Path, tmp_path: Path, name: str) -> None:
    short = ("--epochs", "2", "--prune-start-epoch", "0", "--finetune-epochs", "1", *CALM)
    assert run("prune", *flags(data, tmp_path, *short, "--prune-method", name, "--seed", "5"), figures=name == "uniform") == 0
    assert abs(read(tmp_path / "prune" / "summary.json")["reached_prune_ratio"] - 0.5) < 0.01
    updates = lines(tmp_path / "prune" / "blocks.jsonl")
    assert updates[-1]["phase"] == "finalize"
    assert all(block["benefit_cls"] is None and block["importance"] is None for line in updates for block in line["blocks"])
    assert not (tmp_path / "prune" / "benefit.png").exists(), "there is no benefit to draw"
    assert (tmp_path / "prune" / "keep_ratio.png").exists() == (name == "uniform"), "a figure is drawn here once"
    pruned = sum(parameter.numel() for parameter in p3b.load(tmp_path / "pruned").parameters())
    assert pruned == updates[-1]["kept_params"]


def test_the_seed_of_a_run_is_the_seed_of_the_draw() -> None:
    layout = read_layout(tiny_vit())
    drawn = [RandomScores(layout, seed).of_interval() for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert method_options_of(PruneOptions(prune_method="random"), seed=5)["seed"] == 5
