"""Fused attention, or the plain form where that is the quicker one to train."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention

from p3b.train.attention import MOST_TOKENS, choose_attention
from p3b.train.optim import Precision
from tiny import tiny_vit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def fused(model: torch.nn.Module) -> set[bool]:
    return {module.fused_attn for module in model.modules() if isinstance(module, Attention)}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (Precision(CPU, torch.bfloat16), False),
        (Precision(CPU, None), True),
        (Precision(CUDA, torch.bfloat16), True),
        (Precision(CUDA, torch.float16), True),
    ],
)
def test_attention_is_plain_on_a_cpu_under_bf16_alone(precision: Precision, expected: bool) -> None:
    assert fused(choose_attention(tiny_vit(), precision)) == {expected}


def test_long_sequences_stay_fused() -> None:
    side = int(MOST_TOKENS**0.5) + 1
    long = tiny_vit(img_size=8 * side, depth=1)
    assert fused(choose_attention(long, Precision(CPU, torch.bfloat16))) == {True}


def test_a_model_that_was_plain_is_fused_again_for_another_precision() -> None:
    model = choose_attention(tiny_vit(), Precision(CPU, torch.bfloat16))
    assert fused(choose_attention(model, Precision(CPU, None))) == {True}


def test_both_forms_are_the_same_function() -> None:
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    outputs = []
    for precision in (Precision(CPU, None), Precision(CPU, torch.bfloat16)):
        model = choose_attention(tiny_vit(dtype=torch.float64), precision)
        outputs.append(model(images))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-12
