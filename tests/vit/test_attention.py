"""Fused attention, or the plain form where that is the quicker one."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention

import p3b
from p3b.vit.attention import MOST_TOKENS, choose_attention
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import random_masks, tiny_vit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def fused(model: torch.nn.Module) -> set[bool]:
    return {module.fused_attn for module in model.modules() if isinstance(module, Attention)}


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, torch.bfloat16, False),
        (CPU, None, True),
        (CPU, torch.float64, True),
        (CUDA, torch.bfloat16, True),
        (CUDA, torch.float16, True),
    ],
)
def test_attention_is_plain_on_a_cpu_under_bf16_alone(device: torch.device, dtype: torch.dtype, expected: bool) -> None:
    assert fused(choose_attention(tiny_vit(), device, dtype)) == {expected}


def test_long_sequences_stay_fused() -> None:
    side = int(MOST_TOKENS**0.5) + 1
    long = tiny_vit(img_size=8 * side, depth=1)
    assert fused(choose_attention(long, CPU, torch.bfloat16)) == {True}


def test_a_model_that_was_plain_is_fused_again_for_another_precision() -> None:
    model = choose_attention(tiny_vit(), CPU, torch.bfloat16)
    assert fused(choose_attention(model, CPU, None)) == {True}


def test_both_forms_are_the_same_function() -> None:
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    fused_out, plain_out = (
        choose_attention(tiny_vit(dtype=torch.float64), CPU, dtype)(images) for dtype in (None, torch.bfloat16)
    )
    assert (fused_out - plain_out).abs().max() < 1e-12


def test_a_layout_is_made_for_the_number_format_in_force_and_the_compact_model_stays_as_it_is() -> None:
    dense = tiny_vit()
    small = apply_cuts(dense, plan_cuts(read_layout(dense), random_masks(read_layout(dense))))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(p3b.with_layout(small, "balanced")) == {False}
        assert p3b.with_layout(small, "index") is small
    assert fused(p3b.with_layout(small.bfloat16(), "zeros")) == {False}
    assert fused(p3b.with_layout(small.float(), "zeros")) == {True}
    assert fused(small) == {True}
