"""The front door: in anybody's loop, through warm-up, mask updates, a stop and a resume, to an ordinary small module."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

import p3b
from loops import CE, Loop, prune_in_mixed_precision
from p3b.errors import BudgetError, ConfigError, ModelError, TrainingError, WeightsError
from p3b.methods.base import Decision
from p3b.vit.layout import read_layout
from p3b.vit.shapes import branch_shapes
from thinning import thinned
from tiny import VARIANTS, images, labels, parameters_of, tiny_vit

PLAN = p3b.Schedule(start=3, sparse=9, final=14, update_every=2)


class Run(Loop):
    """As users are most likely to have it."""

    def __init__(self, model: nn.Module, accumulate: int = 1, schedule: p3b.Schedule = PLAN, **options: Any) -> None:
        pruner = p3b.Pruner(model, schedule=schedule, **{"prune_ratio": 0.4, **options})
        super().__init__(pruner, model, torch.optim.AdamW(model.parameters(), lr=1e-3), accumulate)


def _same_bits(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


# --- elements that come back

OFTEN = p3b.Schedule(start=1, sparse=6, final=16, update_every=1)


def _counted(run: Run) -> list[list[tuple[int, int]]]:
    """(pruned, returned) of every block at every update and at the last decision, counted from the masks; the decisions must
    say the same.
    """
    found: list[list[tuple[int, int]]] = []
    before = {gate: torch.zeros(size, dtype=torch.bool) for gate, size in run.pruner.layout.gates.items()}
    for _ in range(run.pruner.schedule.final + 1):
        decision = run.pruner.decide_last() if run.pruner.done else run.step()
        if decision is not None:
            now = {gate: mask < 0.5 for gate, mask in run.pruner.gates.masks.items()}
            gates = [[block.gate(dim) for dim in block.dims] for block in run.pruner.layout.blocks]
            found.append([(_sum(now[g] for g in own), _sum(before[g] & ~now[g] for g in own)) for own in gates])
            assert [(block.pruned, block.returned) for block in decision.blocks] == found[-1]
            before = now
    return found


def _sum(chosen: Iterable[Tensor]) -> int:
    return sum(int(each.sum()) for each in chosen)


def test_elements_that_come_back_are_counted() -> None:
    found = _counted(Run(tiny_vit(), schedule=OFTEN, method="uniform", prune_ratio=0.6))
    assert sum(returned for blocks in found for _, returned in blocks) > 0
    assert len(found) == 15 and all(pruned > 0 for pruned, _ in found[-1])


def test_in_an_order_that_is_drawn_once_nothing_comes_back() -> None:
    found = _counted(Run(tiny_vit(), schedule=OFTEN, method="random", prune_ratio=0.6))
    assert all(returned == 0 for blocks in found for _, returned in blocks)
    assert [pruned for pruned, _ in found[0]] < [pruned for pruned, _ in found[-1]]


def test_with_hard_masks_a_pruned_element_gets_no_score_and_masks_are_0_or_1() -> None:
    hard = Run(tiny_vit(), schedule=replace(OFTEN, tau_max=0.0), method="uniform", prune_ratio=0.6)
    soft = Run(tiny_vit(), schedule=OFTEN, method="uniform", prune_ratio=0.6)
    for run in (hard, soft):
        run.steps(8)
    values = {run: torch.cat(list(run.pruner.gates.masks.values())) for run in (hard, soft)}
    assert set(values[hard].tolist()) == {0.0, 1.0}
    assert ((values[soft] > 0) & (values[soft] < 1)).any()
    returned = [sum(block.returned for decision in run.decisions for block in decision.blocks) for run in (hard, soft)]
    assert returned[0] == 0 < returned[1]


# --- a whole run


def test_a_plain_loop_ends_in_a_small_ordinary_module() -> None:
    model = tiny_vit()
    run, dense, kind = Run(model, accumulate=2), parameters_of(model), type(model)
    phases = []
    while not run.pruner.done:
        phases.append(run.pruner.phase)
        run.step()
    assert phases == ["warm-up"] * 3 + ["sparsify"] * 6 + ["sharpen"] * 5
    assert run.pruner.phase == "done"
    assert [decision.progress for decision in run.decisions] == pytest.approx([2 / 6, 4 / 6, 1, 1, 1])
    assert [decision.tau for decision in run.decisions] == pytest.approx([0.1, 0.1, 0.1, 0.1 * 4 / 5, 0.1 * 2 / 5])

    last = run.pruner.decide_last()
    model.eval()
    with torch.no_grad():
        masked = model(images())
    predicted = run.pruner.kept_params()
    small = run.pruner.shrink()
    assert small is model
    assert type(small) is kind
    assert predicted == parameters_of(small) == sum(b.kept_params for b in last.blocks) + read_layout(tiny_vit()).other_params
    assert abs(1 - predicted / dense - 0.4) < 0.01
    torch.testing.assert_close(small(images()), masked, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    small.train()
    CE(small(images()), labels()).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.parametrize("variant", ["layer scale", "distilled", "no class token", "registers", "no bias", "unfused"])
def test_every_kind_of_model_goes_the_whole_way(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    dense = parameters_of(model)
    small = Run(model).to_the_end()
    assert abs(1 - parameters_of(small) / dense - 0.4) < 0.01
    assert torch.isfinite(small(images())).all()


def test_finalizing_decides_and_shrinks() -> None:
    a, b = Run(tiny_vit()), Run(tiny_vit())
    small = a.to_the_end()
    b.steps(PLAN.final)
    b.pruner.decide_last()
    _same_bits(small, b.pruner.shrink())


def test_the_same_run_twice_is_the_same_bit_for_bit() -> None:
    _same_bits(Run(tiny_vit()).to_the_end(), Run(tiny_vit()).to_the_end())


def test_the_warm_up_trains_like_a_plain_loop_bit_for_bit() -> None:
    run, plain = Run(tiny_vit(drop_path_rate=0.3)), tiny_vit(drop_path_rate=0.3).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    torch.manual_seed(0)
    run.steps(PLAN.start)
    torch.manual_seed(0)
    for step in range(PLAN.start):
        CE(plain(images(4, seed=step)), labels(4, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    _same_bits(run.model, plain)
    assert run.pruner.kept_params() == parameters_of(plain)
    assert run.decisions == []
    assert all((mask == 1).all() for mask in run.pruner.gates.masks.values())


def test_decisions_come_when_they_are_due_and_report_what_is_kept() -> None:
    run = Run(tiny_vit())
    for step in range(PLAN.final):
        decision = run.step()
        assert (decision is not None) == PLAN.update_due(step)
        if decision is not None:
            kept = run.pruner.kept_params_by_block()
            assert kept == {block.name: block.kept_params for block in decision.blocks}
            assert asdict(decision.blocks[0]).keys() >= {"benefit_cls", "benefit_patch", "importance", "keep_ratio"}
            goal = sum(block.keep_ratio_goal * block.params for block in decision.blocks)
            dense = parameters_of(tiny_vit())
            assert goal == pytest.approx(0.6 * dense - read_layout(tiny_vit()).other_params)


@pytest.mark.parametrize("depth", [2, 3])
def test_ratios_given_by_hand_are_reached_block_by_block(depth: int) -> None:
    ratios = [1.0, 0.5, 0.25, 0.0, 0.75, 0.1][: 2 * depth]
    model = tiny_vit(depth=depth)
    run = Run(model, keep_ratios=ratios)
    params = {block.name: block.params for block in run.steps(5).decisions[0].blocks}
    run.steps(PLAN.final - 5)
    last = run.pruner.decide_last()
    for block, ratio in zip(last.blocks, ratios, strict=True):
        assert abs(block.kept_params - ratio * params[block.name]) < 150  # one element
        assert block.importance is None
    assert last.blocks[0].kept_params == params["blocks.0.attn"]
    assert last.blocks[3].kept_params == 0
    assert parameters_of(run.pruner.shrink()) < parameters_of(tiny_vit(depth=depth))


def test_blocks_only_counts_the_budget_over_the_blocks() -> None:
    model = tiny_vit()
    in_blocks = parameters_of(model.blocks)
    small = Run(model, blocks_only=True, prune_ratio=0.7).to_the_end()
    assert abs(1 - parameters_of(small.blocks) / in_blocks - 0.7) < 0.01


def test_pruning_nothing_changes_no_size() -> None:
    model = tiny_vit()
    assert parameters_of(Run(model, prune_ratio=0.0).to_the_end()) == parameters_of(tiny_vit())


# --- what was given up can come back


class _Dictated:
    """A loss that is told its values, called in the probes' order: kind, block, before and after; benefits are differences."""

    def __init__(self, benefits: list[float]) -> None:
        self.values = [value for _ in ("cls", "patch") for benefit in benefits for value in (benefit, 0.0)]

    def __call__(self, logits: Tensor, _targets: Tensor) -> Tensor:
        return 0 * logits.sum() + self.values.pop(0)


def test_a_block_gets_parameters_back_when_its_benefit_rises() -> None:
    """The deeper a block lies, the later it starts to help: what it lost by then must not be lost for good."""
    phases = p3b.Schedule(start=0, sparse=2, final=8, update_every=2)
    run = Run(tiny_vit(), estimator="paper", gamma=1.0, prune_ratio=0.5, schedule=phases)  # asks for one loss after the other
    kept, masks = [], []
    for benefits in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]):
        for _ in range(2):
            decision = run.step(criterion=_Dictated(benefits))
        assert decision is not None
        assert [block.benefit_cls for block in decision.blocks] == pytest.approx(benefits)
        kept.append(run.pruner.kept_params_by_block())
        masks.append(run.pruner.gates.masks)
    for block in ("blocks.1.attn", "blocks.1.mlp"):
        assert kept[0][block] < kept[1][block]
    assert kept[0]["blocks.0.mlp"] > kept[1]["blocks.0.mlp"]
    returned = (masks[0]["blocks.1.mlp.hidden"] < 0.5) & (masks[1]["blocks.1.mlp.hidden"] >= 0.5)
    assert returned.sum() > 5


def test_an_element_that_was_given_up_returns_when_its_score_rises() -> None:
    run = Run(tiny_vit(), keep_ratios=[0.5] * 4, schedule=p3b.Schedule(start=0, sparse=2, final=8, update_every=2))

    def favour(first_half: bool) -> Callable[[nn.Module], None]:
        def change(model: nn.Module) -> None:
            weight = model.blocks[0].mlp.fc2.weight
            factor = torch.full((96,), 1e-3)
            factor[:48] = 1.0 if first_half else 1e-3
            factor[48:] = 1e-3 if first_half else 1.0
            weight.grad = factor / weight.detach()

        return change

    kept = []
    for first_half in (True, False):
        run.step(favour(first_half))
        run.step(favour(first_half))
        kept.append(run.pruner.gates.masks["blocks.0.mlp.hidden"] >= 0.5)
    assert kept[0][:48].sum() > kept[0][48:].sum()
    assert kept[1][:48].sum() < kept[1][48:].sum()
    assert (kept[1] & ~kept[0]).sum() > 5


# --- steps that do not count


def _decision_of_step_4(schedule: p3b.Schedule, spoiled_step: int | None) -> Decision:
    model = tiny_vit().train()
    pruner = p3b.Pruner(model, 0.4, schedule=schedule)
    for step in range(5):
        batch, targets = images(4, seed=step), labels(4, seed=step)
        (CE(model(batch), targets) + pruner.loss(CE, targets)).backward()
        if step == spoiled_step:
            model.blocks[1].mlp.fc1.weight.grad[0, 0] = float("inf")
        decision = pruner.step()
        model.zero_grad()
    assert decision is not None
    return decision


def test_a_step_with_gradients_that_are_not_finite_counts_for_nothing() -> None:
    """Scores and benefits are left out, as if the interval had begun a step later; in the warm-up the probes rest as well."""
    two_steps = p3b.Schedule(start=3, sparse=11, final=20, update_every=2)
    one_step = p3b.Schedule(start=4, sparse=8, final=20, update_every=1)  # the same progress at step 4
    spoiled, later = (_decision_of_step_4(schedule, spoiled_step=3) for schedule in (two_steps, one_step))
    assert spoiled.progress == later.progress
    assert spoiled.blocks == later.blocks
    assert all(torch.equal(spoiled.masks[gate], later.masks[gate]) for gate in later.masks)
    assert _decision_of_step_4(two_steps, spoiled_step=None).blocks != later.blocks


def test_one_bad_batch_does_not_spoil_the_probes_for_good() -> None:
    """Without a GradScaler the probes once took a NaN step and had no benefit to tell ever after."""
    run = Run(tiny_vit())
    run.steps(PLAN.start)
    model, pruner = run.model, run.pruner
    bad = images(4).fill_(float("nan"))
    (CE(model(bad), labels(4)) + pruner.loss(CE, labels(4))).backward()
    pruner.step()
    run.optimizer.zero_grad()  # as a careful loop does with such a step
    decision = run.step()
    assert decision is not None
    assert all(block.benefit_cls != 0 and block.benefit_patch != 0 for block in decision.blocks)
    assert all(torch.isfinite(mask).all() for mask in decision.masks.values())
    run.to_the_end()


def _moved(optimizer: dict[str, Any]) -> str:
    """What an optimizer remembers, but for zeros: a fused one lays them out at a step that it leaves out."""
    return str(
        {
            number: {name: value for name, value in state.items() if torch.as_tensor(value).any()}
            for number, state in optimizer["state"].items()
            if any(torch.as_tensor(value).any() for value in state.values())
        }
    )


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("step", [0, 4])
def test_a_step_that_a_scaler_leaves_out_leaves_the_method_as_it_was(step: int, enabled: bool) -> None:
    """In the warm-up and later: scores, benefits and probes know nothing of it; the step is counted."""
    run = Run(tiny_vit()).steps(step)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=enabled)
    scaler.scale(CE(run.model(images(4)), labels(4)) + run.pruner.loss(CE, labels(4))).backward()
    run.model.blocks[0].attn.proj.weight.grad[1, 2] = float("inf")
    scaler.unscale_(run.optimizer)
    before = deepcopy(run.pruner.state_dict())
    run.pruner.step(scaler)
    scaler.step(run.optimizer)
    scaler.update()
    after = run.pruner.state_dict()
    assert after["steps_done"] == before["steps_done"] + 1
    assert _moved(after["method"]["probe_optimizer"]) == _moved(before["method"]["probe_optimizer"])
    probes = after["method"]["probes"]
    assert all(torch.equal(probes[key], before["method"]["probes"][key]) for key in probes)
    sums, sums_before = (state["method"]["meter"]["intervals"][-1] for state in (after, before))
    for name, (total, count) in sums.items():
        total_before, count_before = sums_before.get(name, (torch.zeros_like(total), torch.zeros(())))
        assert torch.equal(total, total_before)
        assert count == count_before
    assert scaler.get_scale() == (8.0 if enabled else 1.0)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_scaler_goes_along(enabled: bool) -> None:
    model = tiny_vit().train()
    pruner = p3b.Pruner(model, 0.4, schedule=PLAN)
    small = prune_in_mixed_precision(model, pruner, torch.amp.GradScaler("cpu", init_scale=16.0, enabled=enabled))
    assert abs(1 - parameters_of(small) / parameters_of(tiny_vit()) - 0.4) < 0.01


# --- stop and resume


@cache
def _never_stopped(keep_ratios: tuple[float, ...] | None) -> tuple[Run, nn.Module]:
    """A run and the small model at its end, only to be read."""
    run = Run(tiny_vit(), keep_ratios=keep_ratios)
    return run, run.to_the_end()


@pytest.mark.parametrize(("keep_ratios", "stop"), thinned([None, (0.5, 0.25, 0.75, 0.5)], [1, 3, 4, 5, 8, 9, 12, 14], 3))
def test_stopping_and_resuming_equals_never_stopping_bit_for_bit(stop: int, keep_ratios: tuple[float, ...] | None) -> None:
    """Stops in the warm-up, in the middle of an interval, right after a mask update, in the sharpen phase and at the end."""
    before = Run(tiny_vit(), keep_ratios=keep_ratios).steps(stop)
    buffer = io.BytesIO()
    torch.save([before.model.state_dict(), before.optimizer.state_dict(), before.pruner.state_dict()], buffer)
    buffer.seek(0)
    model_state, optimizer_state, pruner_state = torch.load(buffer, weights_only=True)

    after = Run(tiny_vit(seed=5), keep_ratios=keep_ratios)
    after.model.load_state_dict(model_state)
    after.optimizer.load_state_dict(optimizer_state)
    after.pruner.load_state_dict(pruner_state)
    assert after.pruner.steps_done == stop
    assert after.pruner.kept_params() == before.pruner.kept_params()

    (straight, straight_small), small = _never_stopped(keep_ratios), after.to_the_end()
    assert before.decisions + after.decisions != []
    for ours, theirs in zip([*before.decisions, *after.decisions], straight.decisions, strict=True):
        assert ours.blocks == theirs.blocks
        assert all(torch.equal(ours.masks[gate], theirs.masks[gate]) for gate in theirs.masks)
    _same_bits(straight_small, small)


def test_a_state_is_a_snapshot_of_decisions() -> None:
    run = Run(tiny_vit()).steps(6)
    state = deepcopy(run.pruner.state_dict())
    shallow = run.pruner.state_dict()
    run.steps(4)
    assert shallow["steps_done"] == 6
    assert all(torch.equal(shallow["masks"][gate], state["masks"][gate]) for gate in state["masks"])


@pytest.mark.parametrize("options", [{}, {"keep_ratios": [0.5] * 4}])
def test_the_state_of_another_model_or_method_is_refused(options: dict[str, Any]) -> None:
    state = Run(tiny_vit(embed_dim=48), **options).steps(6).pruner.state_dict()
    with pytest.raises(WeightsError, match="another model, method or version"):
        Run(tiny_vit(), **options).pruner.load_state_dict(state)
    with pytest.raises(WeightsError, match="another model, method or version"):
        Run(tiny_vit()).pruner.load_state_dict(Run(tiny_vit(), keep_ratios=[0.5] * 4).steps(6).pruner.state_dict())
    with pytest.raises(WeightsError, match="another model, method or version"):
        Run(tiny_vit()).pruner.load_state_dict({})


# --- what is refused, and how


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: timm.create_model("resnet18"), "Only timm VisionTransformer"),
        (lambda: tiny_vit(attn_layer="diff"), r"blocks\.0\.attn: DiffAttention"),
        (lambda: tiny_vit(mlp_layer=timm.layers.GatedMlp), r"blocks\.0\.mlp: GatedMlp"),
        (lambda: tiny_vit(block_fn=ParallelScalingBlock), r"blocks\.0: ParallelScalingBlock"),
        (lambda: Run(tiny_vit()).to_the_end(), r"blocks\.0.*pruned already"),
    ],
)
def test_models_that_are_not_covered_are_refused(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        p3b.Pruner(build(), schedule=PLAN)


def test_a_refused_model_is_left_as_it_was() -> None:
    model = tiny_vit()
    for options in ({"prune_ratio": 0.99}, {"method": "nonsense"}, {"alhpa": 1}, {"alpha": 7}):
        with pytest.raises((BudgetError, ConfigError)):
            p3b.Pruner(model, schedule=PLAN, **options)  # type: ignore[arg-type]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_settings_are_refused_before_the_first_batch() -> None:
    with pytest.raises(ConfigError, match=r"prune method 'block_bp'.*block_"):
        p3b.Pruner(tiny_vit(), method="block_bp", schedule=PLAN)
    with pytest.raises(ConfigError, match=r"option of block_benefit 'keep_ratio'.*'keep_ratios'"):
        p3b.Pruner(tiny_vit(), schedule=PLAN, keep_ratio=[1])
    p3b.Pruner(tiny_vit(), method="block_pr", schedule=PLAN)


def test_a_loop_that_forgets_a_call_is_told() -> None:
    model = tiny_vit()
    pruner = p3b.Pruner(model, schedule=PLAN, prune_ratio=0.4)
    with pytest.raises(TrainingError, match="No forward pass"):
        pruner.loss(CE, labels())
    for _ in range(4):
        CE(model(images()), labels()).backward()
        pruner.step()
    with pytest.raises(TrainingError, match="Nothing has been measured"):
        pruner.step()
    with pytest.raises(TrainingError, match="Nothing has been measured"):
        p3b.Pruner(tiny_vit(), schedule=PLAN, prune_ratio=0.4).finalize()


@pytest.mark.parametrize("variant", ["plain", "layer scale", "no bias"])
def test_aligned_widths_come_with_the_last_masks_and_keep_the_budget(variant: str) -> None:
    shape = {"embed_dim": 48, "num_heads": 3, **VARIANTS[variant]}
    plain, aligned = (Run(tiny_vit(**shape), align=align, prune_ratio=0.4) for align in (1, 4))
    models = [run.to_the_end() for run in (plain, aligned)]
    for before, after in zip(plain.decisions, aligned.decisions, strict=True):
        assert all(torch.equal(mask, after.masks[name]) for name, mask in before.masks.items()), (
            "masks before the last are as ever"
        )
    for shape_of in branch_shapes(models[1]):
        assert shape_of.inner % 4 == len(shape_of.inputs) % 4 == len(shape_of.outputs) % 4 == 0
    assert abs(parameters_of(models[1]) - parameters_of(models[0])) <= 0.005 * parameters_of(tiny_vit(**shape))


def test_a_wrong_alignment_is_refused() -> None:
    with pytest.raises(ConfigError, match="align must lie in"):
        p3b.Pruner(tiny_vit(), schedule=PLAN, align=0)
