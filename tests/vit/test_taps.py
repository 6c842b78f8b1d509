"""Taps see the residual stream of section 2, and nothing is changed by looking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from p3b.vit.taps import Taps
from tiny import VARIANTS, images, tiny_vit


@pytest.mark.parametrize("variant", ["plain", "layer scale", "distilled", "no class token", "registers"])
def test_features_are_the_stream_before_and_after_every_block(variant: str) -> None:
    model = tiny_vit(depth=3, **VARIANTS[variant])
    plain = model(images())
    taps = Taps()
    taps.attach(model)
    assert torch.equal(model(images()), plain)
    stream = taps.take()
    assert len(stream) == 2 * 3 + 1
    x: Tensor = stream[0]
    for depth, block in enumerate(model.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        torch.testing.assert_close(stream[2 * depth + 1], x)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        torch.testing.assert_close(stream[2 * depth + 2], x)
    torch.testing.assert_close(model.forward_features(images()), model.norm(stream[-1]))
    assert not any(feature.requires_grad for feature in stream)


def test_features_are_handed_over_once_and_only_those_of_the_last_pass() -> None:
    model, taps = tiny_vit(), Taps()
    taps.attach(model)
    assert taps.take() == []
    model(images(seed=1))
    model(images(seed=2))
    stream = taps.take()
    assert len(stream) == 5
    model(images(seed=2))
    assert torch.equal(taps.take()[0], stream[0])
    assert taps.take() == []


def test_an_evaluation_is_not_recorded() -> None:
    model, taps = tiny_vit(), Taps()
    taps.attach(model)
    with torch.no_grad():
        model(images())
    assert taps.take() == []


def test_a_detached_tap_leaves_no_hook() -> None:
    model, taps = tiny_vit(), Taps()
    taps.attach(model)
    model(images())
    taps.detach()
    assert taps.take() == []
    model(images())
    assert taps.take() == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
