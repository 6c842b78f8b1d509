"""SAViT: interactions by Hessian-vector products, and one cut that meets the budget."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import p3b
from p3b.core.collaboration import CostSurface
from p3b.errors import BudgetError, ConfigError, ModelError, TrainingError, WeightsError
from p3b.methods.savit import Savit, cost_surface
from p3b.scoring.criteria import taylor_of_stream
from p3b.scoring.interactions import KINDS, draw_layers, interaction_matrix, kind_weights
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.cost import block_params, count_parameters, other_params
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout, read_layout
from runs import CALM, colour_folders, flags, lines, read, run
from thinning import thinned
from tiny import VARIANTS, images, labels, tiny_vit

CE = nn.functional.cross_entropy
PLAN = p3b.Schedule(start=1, sparse=3, final=6, update_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("colours"))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _pruned(model: Any, prune_ratio: float, seed: int = 0, **options: Any) -> tuple[p3b.Pruner, Any]:
    """The pruner after its schedule, all on the CPU and without an optimizer: what is measured is the same at every step."""
    pruner = p3b.Pruner(model.train(), prune_ratio, "savit", PLAN, every=1, images=2, **options)
    for step in range(PLAN.final):
        batch, targets = images(2, seed=seed + step, dtype=next(model.parameters()).dtype), labels(2, seed=seed + step)
        model.zero_grad()
        (CE(model(batch), targets) + pruner.loss(CE, targets)).backward()
        pruner.step()
    return pruner, model


def _loss_at(model: Any, layout: ModelLayout, factors: dict[str, float], batch: Tensor, targets: Tensor) -> Tensor:
    """The loss with each of some gates, as they act, set to one number."""
    gated = copy.deepcopy(model)
    gates = Gates(layout, gated)
    gates.attach(gated)
    gates.set({name: torch.full((size,), factors.get(name, 1.0)) for name, size in layout.gates.items()})
    with torch.no_grad():
        return CE(gated(batch), targets)


@pytest.mark.parametrize("seed", range(3))
def test_interactions_are_second_differences_of_the_loss(seed: int) -> None:
    model = tiny_vit(depth=3, dtype=torch.float64, seed=seed)
    layout, batch, targets = read_layout(model, KINDS), images(3, dtype=torch.float64), labels(3)
    layers = draw_layers(layout, torch.Generator().manual_seed(seed))

    found = interaction_matrix(model, layout, batch, lambda outputs: CE(outputs, targets), layers)

    step, expected = 2.0**-10, torch.zeros(3, 3, dtype=torch.float64)  # masks are float32: 1 plus or minus it is exact
    for i, (layer, below) in enumerate(layers):
        for j, other in enumerate(below):
            first, second = (
                {"heads": f"blocks.{depth}.attn.heads", "hidden": f"blocks.{depth}.mlp.hidden", STREAM: STREAM}[kind]
                for kind, depth in ((KINDS[i], layer), (KINDS[j], other))
            )
            for a in (-step, step):
                for b in (-step, step):
                    factors = {first: 1 + a} | ({second: 1 + b} if second != first else {first: 1 + a + b})
                    sign = 1 if a == b else -1
                    expected[i, j] += sign * _loss_at(model, layout, factors, batch, targets) / (4 * step**2)
    weights = kind_weights(layout)
    torch.testing.assert_close(found * weights.outer(weights), expected, rtol=2e-4, atol=2e-5)
    assert expected[2, 2].abs() > 0.01, "a factor on the whole stream, which its norms take out, is felt where it is read"


def test_measuring_interactions_leaves_model_gradients_and_mode_as_they_were() -> None:
    model = tiny_vit(drop_rate=0.5).train()
    CE(model(images()), labels()).backward()
    before = {key: (value.clone(), value.grad.clone()) for key, value in model.named_parameters()}
    layout = read_layout(model, KINDS)
    layers = draw_layers(layout, torch.Generator().manual_seed(0))
    first, again = (interaction_matrix(model, layout, images(), lambda out: CE(out, labels()), layers) for _ in range(2))
    assert torch.equal(first, again)  # dropout is off
    assert model.training
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key][0]) and torch.equal(value.grad, before[key][1])


def test_the_second_layer_drawn_is_never_above_the_first() -> None:
    layout = read_layout(tiny_vit(depth=4), KINDS)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_layers(layout, generator) for _ in range(200)]
    assert all(other <= layer for rows in drawn for layer, below in rows[:2] for other in below)
    assert (
        {layer for rows in drawn for layer, _ in rows}
        == {other for rows in drawn for _, b in rows for other in b}
        == set(range(4))
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_the_stream_are_squared_gradients_of_its_scale(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant], dtype=torch.float64)
    layout = read_layout(model, KINDS)
    assert layout.stream is not None
    CE(model(images(dtype=torch.float64)), labels()).backward()
    found = taylor_of_stream(layout.stream, dict(model.named_parameters()))
    by_hand = torch.zeros(layout.width, dtype=torch.float64)
    step = 1e-5
    writers = {weight.key: {axis for axis, _ in weight.gated} for weight in layout.stream.weights if weight.gated}
    for channel in range(0, layout.width, 7):
        losses = []
        for factor in (1 + step, 1 - step):
            scaled = copy.deepcopy(model)
            with torch.no_grad():
                for key, axes in writers.items():
                    for axis in axes:
                        scaled.get_parameter(key).select(axis, channel).mul_(factor)
                losses.append(float(CE(scaled(images(dtype=torch.float64)), labels())))
        by_hand[channel] = ((losses[0] - losses[1]) / (2 * step)) ** 2
        assert float(found[channel]) == pytest.approx(float(by_hand[channel]), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("blocks_only", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_surface_costs_what_a_cut_model_has(variant: str, blocks_only: bool) -> None:
    layout = read_layout(tiny_vit(**VARIANTS[variant]), KINDS)
    surface: CostSurface = cost_surface(layout, blocks_only)
    kept = {"heads": 2, "hidden": 40, STREAM: 16}
    shares = [1 - kept[kind] / size for kind, size in zip(KINDS, (3, 96, 24), strict=True)]
    counts = {kind: torch.tensor(count) for kind, count in kept.items()}
    expected = sum(
        int(block_params(block, {STREAM: counts[STREAM]} | {d: counts[d] for d in ("heads", "hidden") if d in block.dims}))
        for block in layout.blocks
    )
    expected += 0 if blocks_only else int(other_params(layout, kept[STREAM]))
    assert surface.at(shares) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("variant", "prune_ratio"),
    thinned(["plain", "layer scale", "distilled", "no class token", "no bias"], [0.3, 0.5, 0.75, 0.9], 4),
)
def test_the_budget_is_met_and_the_small_model_is_what_was_masked(variant: str, prune_ratio: float) -> None:
    model = tiny_vit(**VARIANTS[variant], depth=3, embed_dim=48, dtype=torch.float64)
    dense = count_parameters(model)
    pruner, model = _pruned(model, prune_ratio)
    pruner.decide_last()
    model.eval()
    batch = images(dtype=torch.float64)
    with torch.no_grad():
        masked = model(batch)
        small = pruner.shrink()
        torch.testing.assert_close(small(batch), masked, rtol=1e-10, atol=1e-10)
    assert abs(count_parameters(small) / dense - (1 - prune_ratio)) < 1e-3
    assert count_parameters(small) == pruner.kept_params()


def test_nothing_goes_before_the_end() -> None:
    pruner, model = _pruned(tiny_vit(), 0.5)
    assert pruner.kept_params() == count_parameters(model)
    assert all((mask == 1).all() for mask in pruner.gates.masks.values())


def test_the_lowest_scores_of_a_kind_go_whatever_the_layer() -> None:
    model = tiny_vit(depth=3)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1e-4)  # what hardly reaches the output has hardly a gradient times weight
    pruner, _ = _pruned(model, 0.4)
    decision = pruner.decide_last()
    hidden = [float(decision.masks[f"blocks.{depth}.mlp.hidden"].mean()) for depth in range(3)]
    assert hidden[1] == 0 or hidden[1] < min(hidden[0], hidden[2])


def test_a_run_that_is_resumed_comes_to_the_same_masks() -> None:
    whole, _ = _pruned(tiny_vit(), 0.5)
    model = tiny_vit().train()
    pruner = p3b.Pruner(model, 0.5, "savit", PLAN, every=1, images=2)
    for step in range(PLAN.final):
        if step == 4:
            kept = io.BytesIO()
            torch.save({"pruner": pruner.state_dict(), "model": model.state_dict()}, kept)
            kept.seek(0)
            saved = torch.load(kept, weights_only=True)
            model = tiny_vit(seed=7).train()
            model.load_state_dict(saved["model"])
            pruner = p3b.Pruner(model, 0.5, "savit", PLAN, every=1, images=2)
            pruner.load_state_dict(saved["pruner"])
        model.zero_grad()
        (CE(model(images(seed=step)), labels(seed=step)) + pruner.loss(CE, labels(seed=step))).backward()
        pruner.step()
    expected, found = whole.decide_last(), pruner.decide_last()
    assert found.note == expected.note
    assert all(torch.equal(found.masks[gate], mask) for gate, mask in expected.masks.items())


def test_a_class_token_keeps_a_head_that_tells_it_of_the_image() -> None:
    model = tiny_vit(depth=3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.mul_(1e-4)  # heads hardly count, so they would all go
    pruner, model = _pruned(model, 0.9)
    decision = pruner.decide_last()
    assert sum(float(decision.masks[f"blocks.{depth}.attn.heads"].sum()) for depth in range(3)) >= 1
    small = pruner.finalize().eval()
    assert not torch.equal(small(images(1, seed=1)), small(images(1, seed=2)))


def test_what_was_found_is_said() -> None:
    pruner, _ = _pruned(tiny_vit(), 0.5)
    note = pruner.decide_last().note
    assert note is not None and "% of heads" in note and "interactions" in note


def test_without_a_measurement_there_is_no_decision() -> None:
    model = tiny_vit()
    method = Savit(model, read_layout(model, KINDS), 0.5, _same)
    with pytest.raises(TrainingError, match=r"pruner\.loss"):
        method.last({})


@pytest.mark.parametrize("final", range(2, 14))
def test_however_the_last_interval_is_cut_short_interactions_are_measured_in_the_last_two(final: int) -> None:
    model = tiny_vit().train()
    pruner = p3b.Pruner(model, 0.5, "savit", p3b.Schedule(start=1, sparse=2, final=final, update_every=3), every=10, images=1)
    while not pruner.done:
        model.zero_grad()
        (CE(model(images()), labels()) + pruner.loss(CE, labels())).backward()
        pruner.step()
    assert abs(count_parameters(pruner.finalize()) / count_parameters(tiny_vit()) - 0.5) < 1e-3


def test_where_a_step_is_not_finite_the_next_one_measures_the_interactions() -> None:
    model = tiny_vit().train()
    plan = p3b.Schedule(start=0, sparse=3, final=6, update_every=3)
    pruner = p3b.Pruner(model, 0.5, "savit", plan, every=10, images=2)
    for step in range(plan.final):
        model.zero_grad()
        (CE(model(images()), labels()) + pruner.loss(CE, labels())).backward()
        pruner.step(gradients_finite=torch.tensor(step > 1))
    note = pruner.decide_last().note
    assert note is not None and "interactions 0, 0, 0" not in note


def test_a_run_without_a_finite_step_says_so() -> None:
    model = tiny_vit().train()
    pruner = p3b.Pruner(model, 0.5, "savit", PLAN, every=1, images=2)
    for _ in range(PLAN.final):
        (CE(model(images()), labels()) + pruner.loss(CE, labels())).backward()
        pruner.step(gradients_finite=torch.tensor(False))
    with pytest.raises(TrainingError, match="finite"):
        pruner.decide_last()


def test_a_copy_of_the_model_carries_no_copy_of_the_method_along() -> None:
    model = tiny_vit()
    p3b.Pruner(model, 0.5, "savit", PLAN)
    assert all(hook in model._forward_pre_hooks.values() for hook in copy.deepcopy(model)._forward_pre_hooks.values())


def test_a_small_network_still_looks_at_its_images() -> None:
    pruner, model = _pruned(tiny_vit(class_token=False, global_pool="avg", seed=1), 0.95)
    pruner.finalize()
    answers = model.eval()(images())
    assert model.embed_dim == 3
    assert not torch.allclose(answers[0], answers[1], atol=1e-6)


@pytest.mark.parametrize("options", [{"every": 0}, {"images": 0}])
def test_options_outside_their_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        p3b.Pruner(tiny_vit(), 0.5, "savit", PLAN, **options)


@pytest.mark.parametrize("prune_ratio", [-0.1, 1.0, 0.9999])
def test_a_budget_out_of_reach_is_refused_before_training(prune_ratio: float) -> None:
    with pytest.raises(BudgetError):
        p3b.Pruner(tiny_vit(), prune_ratio, "savit", PLAN)


def test_the_state_of_another_method_is_refused() -> None:
    taylor = p3b.Pruner(tiny_vit(), 0.5, "taylor", PLAN)
    savit = p3b.Pruner(tiny_vit(), 0.5, "savit", PLAN)
    with pytest.raises(WeightsError):
        savit.load_state_dict(taylor.state_dict())


def test_attention_pooling_has_no_stream_to_prune() -> None:
    with pytest.raises(ModelError, match="attn_pool"):
        p3b.Pruner(tiny_vit(class_token=False, global_pool="map"), 0.5, "savit", PLAN)


def test_gates_of_the_stream_close_in_the_masked_model() -> None:
    model = tiny_vit(dtype=torch.float64)
    layout = read_layout(model, KINDS)
    gates = Gates(layout, model)
    gates.attach(model)
    masks = {gate: torch.ones(size) for gate, size in layout.gates.items()}
    before = model(images(dtype=torch.float64))
    masks[STREAM][::2] = 0
    gates.set(masks)
    assert not torch.allclose(model(images(dtype=torch.float64)), before)


def test_the_command_prunes_by_it(data: Path, tmp_path: Path) -> None:
    short = ("--epochs", "2", "--prune-start-epoch", "0", "--finetune-epochs", "1", "--savit-every", "1", *CALM)
    assert run("prune", *flags(data, tmp_path, *short, "--prune-method", "savit")) == 0
    assert abs(read(tmp_path / "prune" / "summary.json")["reached_prune_ratio"] - 0.5) < 0.01
    updates = lines(tmp_path / "prune" / "blocks.jsonl")
    assert "% of heads" in updates[-1]["note"]
    small = p3b.load(tmp_path / "pruned")
    assert count_parameters(small) == updates[-1]["kept_params"] < updates[0]["kept_params"]
    assert not any(type(module).__module__.startswith("p3b") for module in small.modules()), "it is a plain timm model"
