"""The Taylor score is read off the weights' gradients, and is what autograd through explicit gates says."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from p3b.scoring.criteria import taylor
from p3b.vit.gates import Gates
from p3b.vit.layout import read_layout
from tiny import VARIANTS, images, labels, multiply_activations, random_masks, soft_random_masks, tiny_vit


def _scores(model: nn.Module) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    return {gate: score for block in read_layout(model).blocks for gate, score in taylor(block, weights).items()}


@pytest.mark.parametrize("make", [soft_random_masks, random_masks])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_the_squared_gate_times_its_gradient(variant: str, make: type) -> None:
    gated = tiny_vit(dtype=torch.float64, **VARIANTS[variant])
    reference, masks = deepcopy(gated), make(read_layout(gated), seed=2)
    gates = Gates(read_layout(gated), gated)
    gates.attach(gated)
    gates.set(masks)
    explicit = {name: mask.double().requires_grad_() for name, mask in masks.items()}
    multiply_activations(reference, explicit)
    for micro_batch in range(3):
        for model in (gated, reference):
            logits = model(images(4, seed=micro_batch, dtype=torch.float64))
            (nn.functional.cross_entropy(logits, labels(4, seed=micro_batch)) / 3).backward()
    scores = _scores(gated)
    assert scores.keys() == masks.keys()
    for name, mask in explicit.items():
        assert mask.grad is not None
        expected = (mask.detach() * mask.grad).square()
        assert expected.max() > 0
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-3, atol=1e-6 * expected.max().item(), msg=name)


def test_a_gate_that_is_shut_has_no_score_and_an_almost_shut_one_has() -> None:
    model = tiny_vit()
    gates = Gates(read_layout(model), model)
    gates.attach(model)
    masks = dict(gates.masks)
    masks["blocks.0.mlp.hidden"] = torch.ones(96)
    masks["blocks.0.mlp.hidden"][:2] = torch.tensor([0.0, 0.01])
    gates.set(masks)
    nn.functional.cross_entropy(model(images()), labels()).backward()
    score = _scores(model)["blocks.0.mlp.hidden"]
    assert score[0] == 0
    assert (score[1:] > 0).all()


def test_by_weights_alone_frozen_ones_count_as_zero() -> None:
    model = tiny_vit()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].attn.qkv.requires_grad_(False)
    nn.functional.cross_entropy(model(images()), labels()).backward()
    scores = _scores(model)
    assert all((scores[gate] == 0).all() for gate in scores if gate.startswith("blocks.0."))
    assert (scores["blocks.1.attn.in"] == 0).all()
    assert (scores["blocks.1.attn.out"] > 0).any()


def test_reading_scores_moves_nothing() -> None:
    model = tiny_vit()
    nn.functional.cross_entropy(model(images()), labels()).backward()
    before = [(p.clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    first = _scores(model)
    second = _scores(model)
    assert all(torch.equal(first[gate], second[gate]) for gate in first)
    after = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(before, after, strict=True))
    assert not any(score.requires_grad for score in first.values())
