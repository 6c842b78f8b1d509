"""The form that a small model trains in is the small model: its function, its parameters, its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3

import p3b
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import DEFAULT_DIMS, read_layout
from p3b.vit.trainable import trainable_form
from tiny import VARIANTS, images, random_masks, tiny_vit


def _small(
    variant: str = "plain", dims: tuple[str, ...] = DEFAULT_DIMS, dtype: torch.dtype = torch.float64
) -> VisionTransformer:
    """With widths that are no multiples of anything, a constant and a half that is gone."""
    model = tiny_vit(depth=3, embed_dim=40, num_heads=2, dtype=dtype, **VARIANTS[variant])
    layout = read_layout(model, dims)
    masks = random_masks(layout, keep=0.55)
    masks["blocks.2.attn.in"].zero_()
    masks["blocks.1.mlp.out"].zero_()
    return apply_cuts(model, plan_cuts(layout, masks))


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_small_model(variant: str) -> None:
    small = _small(variant).train()
    quick = trainable_form(small)
    batch = images(dtype=torch.float64)
    outputs = small(batch), quick(batch)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    for key, a, b in zip(
        small.state_dict(),
        *(torch.autograd.grad(each.square().sum(), list(small.parameters())) for each in outputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=key)


def test_whole_heads_may_be_gone() -> None:
    small = _small(dims=("heads", *DEFAULT_DIMS))
    batch = images(dtype=torch.float64)
    torch.testing.assert_close(trainable_form(small)(batch), small(batch), rtol=0, atol=1e-10)


def test_a_step_on_one_is_a_step_on_the_other_and_what_is_saved_is_the_small_model(tmp_path: Path) -> None:
    small = _small(dtype=torch.float32)
    kinds = [type(module) for module in small.modules()]
    quick = trainable_form(small).train()
    assert list(quick.state_dict()) == list(small.state_dict())
    assert all(a is b for a, b in zip(quick.parameters(), small.parameters(), strict=True))
    average = ModelEmaV3(small, decay=0.5)
    optimizer = torch.optim.AdamW(quick.parameters(), lr=0.01)
    before = small(images())
    quick(images()).square().sum().backward()
    optimizer.step()
    average.update(small)
    assert not torch.allclose(small(images()), before)
    assert [type(module) for module in small.modules()] == kinds
    assert torch.equal(p3b.load(p3b.save(small.eval(), tmp_path / "small"))(images()), small(images()))


def test_stochastic_depth_draws_the_same_numbers() -> None:
    model = tiny_vit(drop_path_rate=0.5, dtype=torch.float64)
    layout = read_layout(model)
    small = apply_cuts(model, plan_cuts(layout, random_masks(layout))).train()
    outputs = []
    for each in (small, trainable_form(small)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append(each(images(8, dtype=torch.float64)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)


def test_dense_models_and_blocks_with_dropout_stay_as_they_are() -> None:
    dense = tiny_vit()
    assert trainable_form(dense) is dense
    model = tiny_vit(proj_drop_rate=0.1)
    layout = read_layout(model)
    small = apply_cuts(model, plan_cuts(layout, random_masks(layout)))
    assert [type(module) for module in trainable_form(small).modules()] == [type(module) for module in small.modules()]
