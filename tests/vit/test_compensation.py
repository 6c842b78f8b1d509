"""Compensation of a cut: exact where the cut takes nothing, masked equals small, and nothing that is closed opens."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor

from p3b.errors import ModelError
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.compensation import compensate
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, ModelLayout, read_layout
from tiny import VARIANTS, images, masks_of, random_masks, tiny_vit

SHAPES = {"default": DEFAULT_DIMS, "whole heads": ("heads", "hidden", "out")}
KINDS = {**VARIANTS, "gated in two layers": {"mlp_layer": SwiGLU}, "gated in one layer": {"mlp_layer": GluMlp}}


def _same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("variant", KINDS)
def test_small_equals_masked_after_compensation(variant: str, dims: str) -> None:
    model, batch = tiny_vit(dtype=torch.float64, **KINDS[variant]), images(6, dtype=torch.float64)
    layout = read_layout(model, SHAPES[dims])
    masks = random_masks(layout, seed=2)
    compensate(model, layout, masks, [batch[:3], batch[3:]], _same)
    small = apply_cuts(deepcopy(model), plan_cuts(layout, masks))
    closed = model(batch)
    assert torch.allclose(small(batch), closed, rtol=0, atol=1e-9)
    gates = Gates(layout, model)  # nothing is left that they could close
    gates.attach(model)
    gates.set(masks)
    assert torch.allclose(model(batch), closed, rtol=0, atol=1e-9)


NARROW = ("heads", "head", "hidden", "stream")


def _narrow_masks(layout: ModelLayout, keep: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {gate: (torch.rand(size, generator=generator) < keep).float() for gate, size in layout.gates.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_equals_masked_where_the_stream_is_cut(variant: str) -> None:
    model, batch = tiny_vit(dtype=torch.float64, **VARIANTS[variant]), images(6, dtype=torch.float64)
    layout = read_layout(model, NARROW)
    masks = _narrow_masks(layout, 0.6)
    compensate(model, layout, masks, [batch[:3], batch[3:]], _same)
    small = apply_cuts(deepcopy(model), plan_cuts(layout, masks))
    gates = Gates(layout, model)
    gates.attach(model)
    gates.set(masks)
    assert torch.allclose(small(batch), model(batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", ["plain", "distilled", "layer scale"])
def test_a_cut_of_the_stream_is_compensated_up_to_the_heads(variant: str) -> None:
    model, fresh = tiny_vit(**VARIANTS[variant]).eval(), images(32, seed=9)
    layout = read_layout(model, NARROW)
    masks = _narrow_masks(layout, 0.8, seed=1)
    dense, plain = model(fresh), apply_cuts(deepcopy(model), plan_cuts(layout, masks))(fresh)
    frozen = deepcopy(model)
    frozen.head.requires_grad_(False)
    misses = []
    for each in (model, frozen):
        compensate(each, layout, masks, images(128).split(32), _same)
        misses.append((apply_cuts(each, plan_cuts(layout, masks))(fresh) - dense).square().mean())
    assert misses[0] < 0.3 * (plain - dense).square().mean()
    assert misses[0] < misses[1], "the head has a share in it"
    kept = masks["stream"] > 0
    before = tiny_vit(**VARIANTS[variant]).head.weight[:, kept]
    assert torch.equal(frozen.head.weight, before)


def test_what_is_constant_is_compensated_exactly() -> None:
    model, batch = tiny_vit(dtype=torch.float64), images(4, dtype=torch.float64)
    layout = read_layout(model)
    masks = masks_of(layout, lambda _gate, size: torch.ones(size))
    with torch.no_grad():
        for block in model.blocks:  # channel 1 of what each layer is given says nothing but a constant
            for norm in (block.norm1, block.norm2):
                norm.weight[1] = 0
            block.mlp.fc1.weight[1] = 0
            block.attn.qkv.weight.unflatten(0, (3, 3, 8))[2, :, 1] = 0
            block.attn.qkv.weight.unflatten(0, (3, 3, 8))[1, :, 1] = 0  # the same key everywhere moves no softmax
    for block in layout.blocks:
        for dim in block.dims.keys() - {"out"}:
            masks[block.gate(dim)][1] = 0
    before = model(batch)
    cut = apply_cuts(deepcopy(model), plan_cuts(layout, masks))
    assert not torch.allclose(cut(batch), before, atol=1e-2)
    compensate(model, layout, masks, [batch], _same)
    assert torch.allclose(model(batch), before, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dims", [DEFAULT_DIMS, NARROW])
def test_a_cut_of_nothing_moves_nothing(dims: tuple[str, ...]) -> None:
    model, batch = tiny_vit(), images(4)
    weights = deepcopy(model.state_dict())
    layout = read_layout(model, dims)
    compensate(model, layout, {gate: torch.ones(size) for gate, size in layout.gates.items()}, [batch], _same)
    assert all(torch.allclose(value, weights[key], atol=1e-5) for key, value in model.state_dict().items())


def test_compensation_brings_the_cut_model_nearer_to_the_dense_one() -> None:
    model, fresh = tiny_vit(), images(32, seed=9)
    layout = read_layout(model)
    masks = random_masks(layout, seed=3, keep=0.7)
    dense, plain = model(fresh), apply_cuts(deepcopy(model), plan_cuts(layout, masks))(fresh)
    compensate(model, layout, masks, images(64).split(16), _same)
    assert (model(fresh) - dense).square().mean() < 0.5 * (plain - dense).square().mean()


def test_frozen_layers_are_closed_and_not_fitted() -> None:
    model = tiny_vit()
    layout = read_layout(model)
    masks, frozen = random_masks(layout), model.blocks[0].mlp.fc2
    frozen.requires_grad_(False)
    before = frozen.weight.clone()
    compensate(model, layout, masks, [images(4)], _same)
    kept = frozen.weight != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(frozen.weight[kept], before[kept])


def test_what_cannot_be_compensated_is_refused_and_left_alone() -> None:
    model = tiny_vit()
    weights = deepcopy(model.state_dict())
    layout = read_layout(model)
    with pytest.raises(ModelError, match="no images"):
        compensate(model, layout, random_masks(layout), [], _same)
    normed = tiny_vit(qk_norm=True)
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.q_norm: a norm over what is cut"):
        compensate(normed, read_layout(normed), {}, [images()], _same)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_images_that_are_not_finite_leave_what_stays_as_it_was() -> None:
    model = tiny_vit()
    layout = read_layout(model)
    masks = random_masks(layout)
    cut = apply_cuts(deepcopy(model), plan_cuts(layout, masks))
    compensate(model, layout, masks, [images(2) * torch.nan], _same)
    fitted = apply_cuts(model, plan_cuts(layout, masks)).state_dict()
    assert all(torch.equal(value, fitted[key]) for key, value in cut.state_dict().items())
