"""Classifiers behind a block in the middle do what the model does behind its last one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from p3b.vit.tails import MiddleClassifiers
from tiny import VARIANTS, images, tiny_vit


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tail_answers_as_a_model_that_ends_there(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    shorter = deepcopy(model)
    shorter.blocks = shorter.blocks[:1]
    classifiers = MiddleClassifiers(model, [1, 2])
    outputs = model(images())
    first, second = classifiers.logits()
    torch.testing.assert_close(first, shorter(images()))
    torch.testing.assert_close(second, outputs)
    assert classifiers.logits() == []  # handed over once


def test_tails_are_copies_that_train_the_blocks_before_them() -> None:
    model = tiny_vit()
    keys, parameters = list(model.state_dict()), {id(parameter) for parameter in model.parameters()}
    classifiers = MiddleClassifiers(model, [1])
    assert list(model.state_dict()) == keys
    assert not parameters & {id(parameter) for parameter in classifiers.tails.parameters()}
    model(images())
    classifiers.logits()[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in classifiers.tails.parameters())
    assert all(parameter.grad is not None for parameter in model.blocks[0].parameters())
    assert all(parameter.grad is None for parameter in [*model.blocks[1].parameters(), *model.head.parameters()])


def test_passes_without_a_graph_and_copies_of_the_model_leave_nothing_behind() -> None:
    model = tiny_vit()
    classifiers = MiddleClassifiers(model, [1])
    with torch.no_grad():
        model(images())
    assert classifiers.logits() == []
    copy = deepcopy(model)
    model(images())
    with torch.no_grad():
        copy(images(seed=2))
    assert len(classifiers.logits()) == 1
    classifiers.detach()
    model(images())
    assert classifiers.logits() == []
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("variant", ["plain", "distilled", "no class token"])
def test_installing_puts_a_tail_in_the_place_of_the_head(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    classifiers = MiddleClassifiers(model, [1])
    with torch.no_grad():
        for parameter in classifiers.tails.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = model(images())
    answer = classifiers.logits()[0]
    classifiers.install(model, 1)
    model.blocks = model.blocks[:1]
    torch.testing.assert_close(model(images()), answer)
    assert not torch.allclose(answer, before)
