"""WD-Pruning: learned widths, depth by classifiers, an exact budget at the end."""

from __future__ import annotations

import io
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import p3b
from loops import CE, Loop
from p3b.errors import BudgetError, ConfigError, TrainingError, WeightsError
from p3b.methods import METHOD_DIMS, create_method
from p3b.methods.base import Decision
from p3b.methods.wdpruning import WDPruning, default_lr, width_cost
from p3b.run.method_options import method_options_of
from p3b.run.options import PruneOptions
from p3b.vit.cost import count_parameters, dense_params, kept_params
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout, read_layout
from p3b.vit.shapes import branch_shapes
from runs import CALM, flags, lines, read, run
from tiny import VARIANTS, images, in_ranks, labels, parameters_of, random_masks, tiny_vit

PLAN = p3b.Schedule(start=3, sparse=20, final=40, update_every=10)
DIMS = METHOD_DIMS["wdpruning"]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _layout(model: nn.Module) -> ModelLayout:
    return read_layout(model, DIMS)


def _method(model: Any, prune_ratio: float = 0.5, **options: Any) -> WDPruning:
    method = create_method("wdpruning", model, _layout(model), prune_ratio, _same, options)
    assert isinstance(method, WDPruning)
    return method


class Run(Loop):
    """With an optimizer whose steps grow with the gradients."""

    def __init__(
        self, model: nn.Module, prune_ratio: float = 0.5, plan: p3b.Schedule = PLAN, reduce: Any = _same, **options: Any
    ) -> None:
        pruner = p3b.Pruner(model, prune_ratio, "wdpruning", plan, reduce=reduce, **options)
        super().__init__(pruner, model, torch.optim.SGD(model.parameters(), lr=0.01))

    @property
    def method(self) -> WDPruning:
        assert isinstance(self.pruner._method, WDPruning)
        return self.pruner._method

    def learned(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.method.state_dict().items() if isinstance(value, Tensor)}


# --- the expected share


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_expected_share_of_whole_numbers_is_what_the_small_blocks_count(variant: str) -> None:
    layout = _layout(tiny_vit(**VARIANTS[variant]))
    cost = width_cost(layout.blocks)
    assert float(cost.params(cost.sizes)) == sum(map(dense_params, layout.blocks))
    for seed in range(3):
        masks = random_masks(layout, seed)
        for mask in masks.values():
            mask[0] = 1  # a gate keeps one element at least
        counts = torch.tensor([int(masks[gate].sum()) for gate in layout.gates])
        counted = sum(kept_params(layout, masks).values())
        assert float(cost.params(counts)) == counted
        assert float(cost.expected_params(counts.double() / cost.sizes)) == pytest.approx(counted, rel=1e-12)


def test_all_is_expected_to_stay_at_first() -> None:
    assert _method(tiny_vit()).expected_keep_ratio == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("prune_ratio", [0.3, 0.6])
def test_the_expected_share_comes_to_its_target_and_stays_there(prune_ratio: float) -> None:
    """No gradient of a loss: the Lagrangian term alone moves the thresholds."""
    model = tiny_vit()
    layout = _layout(model)
    method, gates = _method(model, prune_ratio), Gates(layout, model)
    method.attach(gates, p3b.Schedule(start=0, sparse=100, final=300, update_every=100))
    ratios, multipliers = [], []
    for _ in range(300):
        method.train_own(torch.tensor(True), None)
        ratios.append(method.expected_keep_ratio)
        multipliers.append(method.state_dict()["lambdas"].tolist())
    blocks = sum(map(dense_params, layout.blocks))
    target = 1 - prune_ratio * (blocks + layout.other_params) / blocks
    assert all(late <= early + 1e-12 for early, late in pairwise(ratios))
    reached = next(step for step, ratio in enumerate(ratios) if ratio <= target)
    assert reached < 150
    assert target - 0.05 < ratios[-1] <= target
    assert all(a <= b for early, late in pairwise(multipliers) for a, b in zip(early, late, strict=True))
    assert multipliers[reached] == multipliers[-1], "below the target the multipliers stand"
    assert multipliers[0][0] == pytest.approx(10 * (1 - target), rel=1e-2)
    kept = kept_params(layout, gates.masks)
    assert abs(sum(kept.values()) / blocks - ratios[-1]) < 0.05


def test_the_default_rate_is_the_published_one_where_the_phase_is_long_enough() -> None:
    assert [default_lr(steps) for steps in (100_000, 24_000, 2400, 120, 5)] == pytest.approx([0.0025, 0.0025, 0.025, 0.5, 0.5])


# --- learning


def test_nothing_is_masked_in_the_warm_up_and_scores_go_against_their_gradient_after_it() -> None:
    run = Run(tiny_vit())
    dense = tiny_vit().train()
    for _ in range(PLAN.start):
        assert torch.equal(run.model(images()), run.model(images()))
        run.step()
    assert all((value == 0).all() for value in (run.learned()["saliency"], run.learned()["lambdas"]))
    assert all((mask == 1).all() for mask in run.pruner.gates.masks.values())
    dense.load_state_dict(run.model.state_dict())
    assert torch.equal(dense(images()), run.model(images()))

    run.backward()
    gradient = torch.cat(list(run.pruner.gates.gradients().values()))
    run.pruner.step()
    assert gradient.abs().min() > 0
    assert torch.equal(run.learned()["saliency"].sign(), -gradient.double().sign())


def test_masked_elements_go_on_learning() -> None:
    run = Run(tiny_vit()).steps(25)
    masks, before = torch.cat(list(run.pruner.gates.masks.values())), run.learned()["saliency"].clone()
    assert (masks == 0).any()
    run.step()
    assert (run.learned()["saliency"] != before)[masks == 0].all()


def test_masks_are_hard_and_follow_every_step() -> None:
    run = Run(tiny_vit()).steps(12)
    seen = []
    for _ in range(5):
        run.step()
        flat = torch.cat(list(run.pruner.gates.masks.values()))
        assert set(flat.tolist()) <= {0.0, 1.0}
        seen.append(int(flat.sum()))
        assert all(mask.any() for mask in run.pruner.gates.masks.values())
    assert len(set(seen)) > 1


def test_a_decision_shows_the_masks_of_now_and_what_the_budget_would_leave() -> None:
    run = Run(tiny_vit()).steps(PLAN.start + 10)
    decision = run.decisions[-1]
    assert all(torch.equal(decision.masks[gate], mask) for gate, mask in run.pruner.gates.masks.items())
    assert {block.name: block.kept_params for block in decision.blocks} == run.pruner.kept_params_by_block()
    goal = sum(block.keep_ratio_goal * block.params for block in decision.blocks)
    layout = run.pruner.layout
    assert abs(goal + layout.other_params - 0.5 * parameters_of(run.model)) < 0.001 * parameters_of(run.model)


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_a_scaled_loss_teaches_the_same(scale: float) -> None:
    plain, scaled = (Run(tiny_vit(dtype=torch.float64), classifiers=[1]) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for _ in range(8):
        plain.step()
        scaled.backward(scale=float(scaler.scale(torch.ones(()))))
        scaler.unscale_(scaled.optimizer)
        scaled.pruner.step(scaler)
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.optimizer.zero_grad()
    for key, value in plain.learned().items():
        torch.testing.assert_close(scaled.learned()[key], value, rtol=1e-4, atol=1e-6)
    tails = plain.method.state_dict()["classifiers"]
    for key, value in scaled.method.state_dict()["classifiers"].items():
        torch.testing.assert_close(value, tails[key], rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_teaches_nothing() -> None:
    run = Run(tiny_vit(), classifiers=[1]).steps(8)
    before, tails = run.learned(), {k: v.clone() for k, v in run.method.state_dict()["classifiers"].items()}
    before = {key: value.clone() for key, value in before.items()}
    run.backward(scale=float("inf"))
    run.pruner.step()
    assert all(torch.equal(value, before[key]) for key, value in run.learned().items())
    assert all(torch.equal(value, tails[key]) for key, value in run.method.state_dict()["classifiers"].items())
    run.optimizer.zero_grad()
    run.step()
    assert not torch.equal(run.learned()["saliency"], before["saliency"])


def test_masks_may_be_due_before_a_gradient_was_finite() -> None:
    run = Run(tiny_vit(), plan=p3b.Schedule(start=0, sparse=3, final=6, update_every=1))
    run.backward(scale=float("inf"))
    decision = run.pruner.step()
    assert decision is not None and all(mask.all() for mask in decision.masks.values())
    run.optimizer.zero_grad()
    assert abs(count_parameters(run.to_the_end()) / count_parameters(tiny_vit()) - 0.5) < 1e-3


# --- the budget, and the small model


@pytest.mark.parametrize("prune_ratio", [0.2, 0.5, 0.65])
@pytest.mark.parametrize("shape", [{}, {"depth": 4, "embed_dim": 32, "num_heads": 4}, {"embed_dim": 48, "mlp_ratio": 2.5}])
def test_the_budget_is_met_within_a_tenth_of_a_point(shape: dict[str, Any], prune_ratio: float) -> None:
    model = tiny_vit(**shape)
    dense = parameters_of(model)
    run = Run(model, prune_ratio, p3b.Schedule(0, 5, 12, 4))
    small = run.to_the_end()
    assert abs(1 - parameters_of(small) / dense - prune_ratio) < 0.001
    assert torch.isfinite(small(images())).all()


def test_a_ratio_of_zero_keeps_everything_and_the_largest_one_keeps_one_element_of_every_gate() -> None:
    model = tiny_vit()
    dense = parameters_of(model)
    assert parameters_of(Run(model, 0.0, p3b.Schedule(0, 2, 4, 2)).to_the_end()) == dense
    with pytest.raises(BudgetError, match="keeps one element of every gate") as refused:
        _method(tiny_vit(), 0.95, blocks_only=True)
    largest = float(str(refused.value).split()[-1].rstrip("."))
    run = Run(tiny_vit(), largest, p3b.Schedule(0, 2, 4, 2), blocks_only=True)
    run.steps(4).pruner.decide_last()
    assert all(mask.sum() >= 1 for mask in run.pruner.gates.masks.values())


@pytest.mark.parametrize("variant", ["plain", "layer scale", "distilled", "no class token", "registers", "no bias"])
@pytest.mark.parametrize("depth", [None, 2])
def test_the_small_model_computes_what_the_masked_one_did(variant: str, depth: int | None) -> None:
    model = tiny_vit(depth=3, dtype=torch.float64, **VARIANTS[variant])
    dense, batch = parameters_of(model), images(dtype=torch.float64)
    options = {} if depth is None else {"classifiers": [1, 2], "classifier_choose": depth}
    run = Run(model, 0.5, p3b.Schedule(1, 4, 10, 3), **options).steps(10)
    run.pruner.decide_last()
    model.eval()
    masked = model(batch)
    if depth is not None:
        assert run.method._classifiers is not None
        run.method._classifiers.tails.eval()
        masked = run.method._classifiers.logits()[1]
    masks, predicted = dict(run.pruner.gates.masks), run.pruner.kept_params()
    small = run.pruner.shrink()
    torch.testing.assert_close(small(batch), masked, rtol=0, atol=1e-10)
    assert small is model
    assert parameters_of(small) == predicted
    assert abs(1 - predicted / dense - 0.5) < 0.001
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    forms = [shape.form for shape in branch_shapes(small)]
    assert "gone" not in forms[: None if depth is None else 2 * depth]
    if depth is not None:
        assert forms[2 * depth :] == ["gone"] * 2
        assert all((masks[gate] == 0).all() for gate in masks if gate.startswith(f"blocks.{depth}."))


def test_a_network_cut_in_depth_is_saved_and_loaded_and_trains_on(tmp_path: Path) -> None:
    model = tiny_vit(depth=3)
    small = Run(model, 0.6, classifiers=[1, 2], classifier_choose=2).to_the_end().eval()
    loaded = p3b.load(p3b.save(small, tmp_path / "small"))
    assert torch.equal(loaded(images()), small(images()))
    assert isinstance(loaded.blocks[2], nn.Identity)
    loaded.train()
    CE(loaded(images()), labels()).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_classifiers_that_none_is_chosen_of_help_in_training_alone() -> None:
    model = tiny_vit(depth=3)
    run = Run(model, 0.4, classifiers=[1, 2])
    before = {key: value.clone() for key, value in run.method.state_dict()["classifiers"].items()}
    run.steps(2)
    assert any(not torch.equal(value, before[key]) for key, value in run.method.state_dict()["classifiers"].items())
    head = [weight.detach().clone() for weight in model.head.parameters()]
    while not run.pruner.done:
        run.step()
    head = [weight.detach().clone() for weight in model.head.parameters()]
    small = run.pruner.finalize()
    assert all(torch.equal(a, b) for a, b in zip(head, small.head.parameters(), strict=True))
    assert "gone" not in [shape.form for shape in branch_shapes(small)]


def test_the_loss_is_the_sum_over_all_classifiers() -> None:
    run = Run(tiny_vit(depth=3, dtype=torch.float64), classifiers=[1, 2])
    batch, targets = images(4, dtype=torch.float64), labels(4)
    run.model(batch)
    assert run.method._classifiers is not None
    by_hand = [CE(logits, targets) for logits in run.method._classifiers.logits()]
    run.model(batch)
    torch.testing.assert_close(run.pruner.loss(CE, targets), by_hand[0] + by_hand[1])
    with pytest.raises(TrainingError, match="No forward pass has been recorded"):
        run.pruner.loss(CE, targets)


def test_rounding_gives_multiples_and_says_what_it_costs() -> None:
    def last(round_to: int) -> tuple[Decision, Run]:
        run = Run(tiny_vit(embed_dim=48, num_heads=4), 0.5, p3b.Schedule(0, 4, 12, 4), round_to=round_to).steps(12)
        return run.pruner.decide_last(), run

    (exact, _), (rounded, run) = last(1), last(16)
    assert exact.note is None
    for gate, mask in rounded.masks.items():
        kept = int(mask.sum())
        assert kept % 16 == 0 or len(mask) < 16, gate
    kept = [sum(block.kept_params for block in decision.blocks) for decision in (exact, rounded)]
    cost = 100 * (kept[1] - kept[0]) / parameters_of(run.model)
    assert rounded.note is not None
    assert f"it costs {cost:+.2f} percentage points of the budget" in rounded.note
    assert f"widths in multiples of 16 keep {kept[1]:,} parameters in the blocks, {kept[0]:,} without rounding" in rounded.note


# --- stopping and going on


def _to_be_stopped(chosen: int | None, seed: int = 0) -> Run:
    """A run with the classifier of that number, or with none."""
    options = {} if chosen is None else {"classifiers": [chosen], "classifier_choose": chosen}
    return Run(tiny_vit(seed=seed), 0.6, p3b.Schedule(start=3, sparse=12, final=22, update_every=4), **options)


@cache
def _never_stopped(chosen: int | None) -> tuple[Run, nn.Module]:
    """The run and the small model at its end, only to be read."""
    run = _to_be_stopped(chosen)
    return run, run.to_the_end()


@pytest.mark.parametrize("chosen", [None, 1])
@pytest.mark.parametrize("stop", [2, 3, 4, 17])
def test_a_run_that_stops_and_goes_on_is_the_one_that_never_stopped(stop: int, chosen: int | None) -> None:
    before = _to_be_stopped(chosen).steps(stop)
    buffer = io.BytesIO()
    torch.save([before.model.state_dict(), before.optimizer.state_dict(), before.pruner.state_dict()], buffer)
    buffer.seek(0)
    model_state, optimizer_state, pruner_state = torch.load(buffer, weights_only=True)
    after = _to_be_stopped(chosen, seed=5)
    after.model.load_state_dict(model_state)
    after.optimizer.load_state_dict(optimizer_state)
    after.pruner.load_state_dict(pruner_state)
    (straight, straight_small), small = _never_stopped(chosen), after.to_the_end()
    for ours, theirs in zip([*before.decisions, *after.decisions], straight.decisions, strict=True):
        assert ours.blocks == theirs.blocks
        assert all(torch.equal(ours.masks[gate], theirs.masks[gate]) for gate in theirs.masks)
    assert all(torch.equal(value, after.learned()[key]) for key, value in straight.learned().items())
    assert list(small.state_dict()) == list(straight_small.state_dict())
    for key, value in straight_small.state_dict().items():
        assert torch.equal(value, small.state_dict()[key]), key


def test_a_state_with_other_classifiers_is_refused() -> None:
    taken = Run(tiny_vit(depth=3), classifiers=[1]).steps(5).pruner.state_dict()
    for options in ({}, {"classifiers": [2]}):
        with pytest.raises(WeightsError, match="another model, method or version"):
            Run(tiny_vit(depth=3), **options).pruner.load_state_dict(taken)


def test_nothing_is_decided_before_anything_is_learned() -> None:
    with pytest.raises(TrainingError, match="Nothing has been measured"):
        Run(tiny_vit()).steps(2).pruner.decide_last()


# --- many processes


def test_two_ranks_learn_what_one_process_learns() -> None:
    """Each rank sees half of the batch; what the data wrapper does for the model's gradients is done by hand."""
    models = [tiny_vit(dtype=torch.float64) for _ in range(2)]

    def train(rank: int, mean: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        run = Run(models[rank], 0.5, reduce=mean, classifiers=[1])
        for _ in range(15):
            run.backward(slice(rank, None, 2))
            for parameter in run.model.parameters():
                parameter.grad = mean(parameter.grad)
            run.pruner.step()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.pruner.decide_last()
        return run.learned(), {**run.pruner.gates.masks, **run.method.state_dict()["classifiers"]}

    (first, masks), (second, other_masks) = in_ranks(2, train)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(masks[key], other_masks[key]) for key in masks)
    alone = Run(tiny_vit(dtype=torch.float64), 0.5, classifiers=[1]).steps(15)
    alone.pruner.decide_last()
    for key, value in alone.learned().items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(masks[gate], mask) for gate, mask in alone.pruner.gates.masks.items())


# --- what is refused, and the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifiers": [2]}, "after the blocks 2 .* do not fit a model of 2; expected rising numbers from 1 to 1"),
        ({"classifiers": [0]}, "expected rising numbers"),
        ({"classifiers": [1, 1]}, "expected rising numbers"),
        ({"classifier_choose": 1}, r"no classifier after block 1 .*; those given are none \(give --wd-classifiers\)"),
        ({"classifiers": [1], "classifier_choose": 2}, "no classifier after block 2 .*; those given are 1"),
        ({"classifier_lr": 1e-3}, "needs classifiers: give --wd-classifiers"),
        ({"classifiers": [1], "classifier_lr": 0.0}, "classifier_lr must be above 0, got 0.0"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"lambda_lr": 0.0}, "lambda_lr must be above 0"),
        ({"round_to": 0}, "round_to must be 1 or more, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _method(tiny_vit(), **options)


def test_a_cut_that_takes_more_than_the_ratio_is_refused() -> None:
    model = tiny_vit()
    layout = _layout(model)
    cut = sum(dense_params(block) for block in layout.blocks if block.depth == 1) / parameters_of(model)
    with pytest.raises(BudgetError, match=f"after block 1 alone takes {cut:.4f} of the parameters. Choose a later block"):
        _method(model, 0.3, classifiers=[1], classifier_choose=1)


def test_the_command_knows_the_options_by_both_names(data: Path, tmp_path: Path) -> None:
    assert method_options_of(PruneOptions(prune_method="wdpruning", wd_classifiers=(8, 10)), seed=0) == {
        "blocks_only": False, "round_to": 1, "classifiers": (8, 10), "lambda_lr": 10.0,
    }  # fmt: skip
    short = ("--epochs", "2", "--prune-start-epoch", "0", "--finetune-epochs", "1", *CALM, "--prune-method", "wdpruning")
    published = ("--classifiers", "1", "--classifier_choose", "1", "--wd-round-to", "16", "--prune-ratio", "0.55")
    assert run("prune", *flags(data, tmp_path, *short, *published)) == 0
    assert read(tmp_path / "prune" / "config.json")["prune"]["wd_classifiers"] == [1]
    last = lines(tmp_path / "prune" / "blocks.jsonl")[-1]
    assert "the network is cut after block 1" in last["note"]
    assert "percentage points of the budget" in last["note"]
    assert last["note"] in (tmp_path / "prune" / "log.txt").read_text().replace("\n", " ")
    assert [block["kept_params"] for block in last["blocks"][2:]] == [0, 0]
    assert parameters_of(p3b.load(tmp_path / "pruned")) == last["kept_params"]


def test_the_command_meets_the_budget(data: Path, tmp_path: Path) -> None:
    short = ("--epochs", "2", "--prune-start-epoch", "0", "--finetune-epochs", "1", *CALM, "--prune-method", "wdpruning")
    assert run("prune", *flags(data, tmp_path, *short)) == 0
    assert abs(read(tmp_path / "prune" / "summary.json")["reached_prune_ratio"] - 0.5) < 0.001
    assert "note" not in lines(tmp_path / "prune" / "blocks.jsonl")[-1]
