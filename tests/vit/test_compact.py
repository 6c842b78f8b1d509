"""The small network computes what the hard-masked one computed, is an ordinary module, and has the size that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from p3b import load, save
from p3b.core.allocation import keep_ratios
from p3b.core.masks import GATE_FACTORS, block_masks, hard_masks, order_elements, shares_to_counts
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import block_params, dense_params, kept_channels, prefix_cost
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout, read_layout
from p3b.vit.parts import ConstantBranch, NoBranch, ReadChannels, WriteChannels
from p3b.vit.shapes import branch_shapes
from thinning import thinned
from tiny import VARIANTS, images, labels, masks_of, parameters_of, random_masks, soft_random_masks, tiny_vit

Masks = dict[str, Tensor]


def _masked_and_small(dense: nn.Module, masks: Masks) -> tuple[nn.Module, nn.Module]:
    masked, small = deepcopy(dense), deepcopy(dense)
    gates = Gates(read_layout(masked), masked)
    gates.attach(masked)
    gates.set(hard_masks(masks))
    return masked, apply_cuts(small, plan_cuts(read_layout(small), masks))


def _assert_same(masked: nn.Module, small: nn.Module, batch: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=tolerance)


def _set(masks: Masks, gate: str, value: float) -> Masks:
    assert gate in masks
    return {name: torch.full_like(mask, value) if name == gate else mask for name, mask in masks.items()}


KINDS: dict[str, Callable[[ModelLayout], Masks]] = {
    **{
        f"only {gate}": lambda layout, gate=gate: random_masks(layout, seed=1, only=gate)  # type: ignore[misc]
        for gate in ("attn.in", "attn.head", "attn.out", "mlp.in", "mlp.hidden", "mlp.out")
    },
    "all": lambda layout: random_masks(layout, seed=2),
    "all, soft": lambda layout: soft_random_masks(layout, seed=2),
    "most": lambda layout: random_masks(layout, seed=3, keep=0.9),
    "few": lambda layout: random_masks(layout, seed=4, keep=0.15),
    "none": lambda layout: random_masks(layout, keep=1.1),
    "attention without input": lambda layout: _set(random_masks(layout, seed=5), "blocks.0.attn.in", 0),
    "attention without heads": lambda layout: _set(random_masks(layout, seed=5), "blocks.1.attn.head", 0),
    "mlp without input": lambda layout: _set(random_masks(layout, seed=5), "blocks.1.mlp.in", 0),
    "mlp without hidden": lambda layout: _set(random_masks(layout, seed=5), "blocks.0.mlp.hidden", 0),
    "attention without input, else whole": lambda layout: _set(random_masks(layout, keep=1.1), "blocks.0.attn.in", 0),
    "mlp without input, else whole": lambda layout: _set(random_masks(layout, keep=1.1), "blocks.0.mlp.in", 0),
    "neither input nor inner": lambda layout: _set(
        _set(random_masks(layout, seed=6), "blocks.0.mlp.in", 0), "blocks.0.mlp.hidden", 0
    ),
    "attention gone": lambda layout: _set(random_masks(layout, seed=7), "blocks.0.attn.out", 0),
    "mlp gone": lambda layout: _set(random_masks(layout, seed=7), "blocks.1.mlp.out", 0),
    "a timm block gone": lambda layout: _set(_set(random_masks(layout, seed=8), "blocks.0.attn.out", 0), "blocks.0.mlp.out", 0),
    "everything gone": lambda layout: masks_of(layout, lambda _gate, size: torch.zeros(size)),
    "one channel of each": lambda layout: masks_of(layout, lambda _gate, size: torch.eye(size)[size // 2]),
}


@pytest.mark.parametrize(("variant", "kind"), thinned(VARIANTS, KINDS, 4))
def test_small_equals_masked(variant: str, kind: str) -> None:
    dense = tiny_vit(dtype=torch.float64, **VARIANTS[variant])
    masks = KINDS[kind](read_layout(dense))
    masked, small = _masked_and_small(dense, masks)
    batch = images(dtype=torch.float64)
    _assert_same(masked, small, batch, tolerance=1e-10)
    assert (parameters_of(small) == parameters_of(dense)) == (kind == "none")
    if kind != "none":
        assert not torch.allclose(small(batch), dense(batch))


@pytest.mark.parametrize("seed", range(20))
def test_small_equals_masked_for_any_number_of_channels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    variant = list(VARIANTS)[seed % len(VARIANTS)]
    dense = tiny_vit(dtype=torch.float64, depth=3, seed=seed, **VARIANTS[variant])
    masks = masks_of(
        read_layout(dense),
        lambda _gate, size: torch.rand(size, generator=generator) * torch.randint(4, (), generator=generator),
    )
    _assert_same(*_masked_and_small(dense, masks), images(dtype=torch.float64), tolerance=1e-10)


def test_small_equals_masked_in_training_mode_with_two_heads_of_a_distilled_model() -> None:
    dense = tiny_vit(dtype=torch.float64, **VARIANTS["distilled"]).train()
    dense.set_distilled_training(True)
    masked, small = _masked_and_small(dense, random_masks(read_layout(dense)))
    for a, b in zip(masked(images(dtype=torch.float64)), small(images(dtype=torch.float64)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_layer_norm_still_takes_its_moments_over_all_channels() -> None:
    norm = nn.LayerNorm(6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    reader = ReadChannels([1, 4], 6, norm, norm.weight)
    with torch.no_grad():
        reader.weight.copy_(norm.weight[[1, 4]])
        reader.bias.copy_(norm.bias[[1, 4]])
    x = torch.randn(3, 6)
    torch.testing.assert_close(reader(x), norm(x)[:, [1, 4]])


def test_blocks_that_cannot_compute_become_constants_or_disappear() -> None:
    dense = tiny_vit(depth=3)
    layout = read_layout(dense)
    masks = random_masks(layout, seed=1)
    for gate in ("blocks.0.attn.in", "blocks.1.attn.out", "blocks.1.mlp.out", "blocks.2.mlp.out"):
        masks = _set(masks, gate, 0)
    small = apply_cuts(dense, plan_cuts(layout, masks))
    assert isinstance(small.blocks[0].attn, ConstantBranch)
    assert parameters_of(small.blocks[0].attn) == int(masks["blocks.0.attn.out"].sum())
    assert isinstance(small.blocks[1], nn.Identity)
    assert isinstance(small.blocks[2].mlp, NoBranch)
    assert [shape.form for shape in branch_shapes(small)] == ["constant", "small", "gone", "gone", "small", "gone"]
    assert small.blocks[0].attn.index.tolist() == masks["blocks.0.attn.out"].nonzero().flatten().tolist()


def test_without_any_bias_a_block_without_input_is_gone() -> None:
    dense = tiny_vit(**VARIANTS["no bias"])
    layout = read_layout(dense)
    masks = _set(random_masks(layout, keep=1.1), "blocks.0.attn.in", 0)
    masks = _set(masks, "blocks.0.mlp.in", 0)
    small = apply_cuts(dense, plan_cuts(layout, masks))
    assert isinstance(small.blocks[0], nn.Identity)


def test_what_is_left_whole_keeps_its_modules_and_parameters() -> None:
    dense = tiny_vit()
    layout = read_layout(dense)
    parameters = dict(dense.named_parameters())
    masks = random_masks(layout, seed=1, only="blocks.1.mlp.in")
    plan = plan_cuts(layout, masks)
    assert [cut.form for cut in plan.cuts] == ["whole", "whole", "whole", "small"]
    small = apply_cuts(dense, plan)
    assert all(p is parameters[key] for key, p in small.named_parameters() if key.startswith("blocks.0."))
    assert isinstance(small.blocks[1].norm2, ReadChannels)
    assert isinstance(small.blocks[1].ls2, nn.Identity)


def test_planning_changes_nothing_and_cutting_follows_the_plan() -> None:
    dense = tiny_vit()
    state, outputs = deepcopy(dense.state_dict()), dense(images())
    classes = [type(module) for module in dense.modules()]
    layout, masks = read_layout(dense), random_masks(read_layout(dense))
    copies = {name: mask.clone() for name, mask in masks.items()}
    plan = plan_cuts(layout, masks)
    assert plan == plan_cuts(layout, masks)
    assert [type(module) for module in dense.modules()] == classes
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())
    assert all(torch.equal(mask, copies[name]) for name, mask in masks.items())
    assert torch.equal(dense(images()), outputs)
    assert apply_cuts(dense, plan) is dense
    assert parameters_of(dense) == plan.params
    for cut in plan.cuts:
        for indices in cut.kept.values():
            assert list(indices) == sorted(set(indices))


@pytest.mark.parametrize("kind", ["all", "attention without input", "mlp without hidden", "a timm block gone"])
@pytest.mark.parametrize("variant", ["plain", "layer scale", "no bias, sigmoid"])
def test_a_small_model_trains(variant: str, kind: str) -> None:
    dense = tiny_vit(**VARIANTS[variant])
    small = apply_cuts(dense, plan_cuts(read_layout(dense), KINDS[kind](read_layout(dense)))).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.005)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(small(images(8)), labels(8))
        loss.backward()
        for key, parameter in small.named_parameters():
            assert parameter.is_leaf
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_small_model_is_an_ordinary_module() -> None:
    dense = tiny_vit(drop_path_rate=0.2)
    small = apply_cuts(dense, plan_cuts(read_layout(dense), random_masks(read_layout(dense))))
    assert type(small) is type(tiny_vit())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert not [key for key in small.state_dict() if key.endswith("index")]
    copy = deepcopy(small)
    assert torch.equal(copy(images()), small(images()))
    assert all(type(block) is type(other) for block, other in zip(small.blocks, tiny_vit().blocks, strict=True))
    traced = torch.export.export(small, (images(),)).module()
    torch.testing.assert_close(traced(images()), small(images()))


def test_mixed_precision_agrees_with_the_masked_model() -> None:
    masked, small = _masked_and_small(tiny_vit(init_values=0.5), KINDS["mlp without hidden"](read_layout(tiny_vit())))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(small(images()), masked(images()), rtol=0.05, atol=0.05)


def test_channels_are_written_where_they_belong() -> None:
    writer = WriteChannels([1, 3], 5, torch.zeros(1), scaled=True)
    with torch.no_grad():
        writer.gamma.copy_(torch.tensor([2.0, 10.0]))
    assert writer(torch.tensor([[1.0, 1.0]])).tolist() == [[0.0, 2.0, 0.0, 10.0, 0.0]]


# --- at the sizes of the published networks


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_tiny_patch16_224", {"init_values": 0.5}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_a_deit_tiny_equals_its_masked_self_in_float32(name: str, arguments: dict[str, Any]) -> None:
    dense = tiny_vit(name, img_size=224, patch_size=16, embed_dim=192, depth=12, num_classes=100, **arguments)
    layout = read_layout(dense)
    masks = random_masks(layout, seed=1)
    masks = _set(_set(masks, "blocks.3.attn.in", 0), "blocks.7.mlp.out", 0)
    masked, small = _masked_and_small(dense, masks)
    batch = images(2, size=224)
    with torch.no_grad():
        spread = masked(batch).std().item()
    assert spread > 0.1
    _assert_same(masked, small, batch, tolerance=1e-4)


@pytest.mark.parametrize(
    ("name", "prune_ratio"), thinned(["deit_tiny_patch16_224", "deit_small_patch16_224"], [0.3, 0.5, 0.75, 0.9], 2)
)
def test_asked_against_reached_on_the_published_shapes(name: str, prune_ratio: float, tmp_path: Path) -> None:
    """sum(p.numel()) of the saved and reloaded model, within 0.1 percentage points; every block within one element."""
    model = timm.create_model(name, num_classes=100)
    dense_total, layout = parameters_of(model), read_layout(model)
    generator = torch.Generator().manual_seed(int(100 * prune_ratio))
    importance = torch.rand(len(layout.blocks), generator=generator, dtype=torch.float64).pow(2)
    params = torch.tensor([dense_params(block) for block in layout.blocks])
    ratios = keep_ratios(importance, params, layout.other_params, prune_ratio)
    shares = (ratios * params).tolist()
    orders = [
        order_elements(
            [torch.rand(size, generator=generator) for size in block.dims.values()], [GATE_FACTORS[dim] for dim in block.dims]
        )
        for block in layout.blocks
    ]
    costs = [prefix_cost(block) for block in layout.blocks]
    masks: Masks = {}
    remaining_by_block = [cost(order.kept).double() for cost, order in zip(costs, orders, strict=True)]
    for block, order, count in zip(layout.blocks, orders, shares_to_counts(remaining_by_block, shares), strict=True):
        masks |= zip((block.gate(dim) for dim in block.dims), block_masks(order, count, tau=0.0), strict=True)

    for block, remaining, share in zip(layout.blocks, remaining_by_block, shares, strict=True):
        now = int(block_params(block, kept_channels(block, masks)))
        position = int((remaining > now).sum())
        assert remaining[position] == now
        assert remaining[min(position + 1, len(remaining) - 1)] <= share + 1e-6
        assert remaining[max(position - 1, 0)] >= share - 1e-6

    small = apply_cuts(model, plan_cuts(layout, masks))
    reached = 1 - parameters_of(load(save(small, tmp_path / "small"))) / dense_total
    assert abs(reached - prune_ratio) <= 1e-3
