"""Benefit by removal: the derivative by a factor on all that a block adds, from gradients that are there anyway."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import p3b
from kinds import ARCHITECTURES, FAMILIES, dense_of
from loops import Loop
from p3b.errors import ConfigError, ModelError, TrainingError
from p3b.methods import own_in_warm_up
from p3b.scoring.removal import _writers, by_gates, by_weights
from p3b.vit.cost import count_parameters
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, ModelLayout, read_layout
from thinning import thinned
from tiny import images, labels, soft_random_masks, tiny_vit

PLAN = p3b.Schedule(start=1, sparse=4, final=8, update_every=2)
KINDS = (*ARCHITECTURES, *FAMILIES)


def by_factors(model: nn.Module, layout: ModelLayout, photos: Tensor) -> Tensor:
    """(B,) the same by autograd: the output of the layer that writes for a block times a factor of one."""
    factors = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in layout.blocks]
    with ExitStack() as hooks:
        for block, factor in zip(layout.blocks, factors, strict=True):
            (writer,) = {key.rpartition(".")[0] for key in _writers(block)}
            layer = model.get_submodule(writer)
            hooks.enter_context(layer.register_forward_hook(lambda _layer, _args, output, s=factor: output * s))
        loss_of(model, photos).backward()
    return torch.stack([factor.grad for factor in factors if factor.grad is not None])


def loss_of(model: nn.Module, photos: Tensor) -> Tensor:
    answers = model(photos)
    return F.cross_entropy(answers[0] if isinstance(answers, tuple) else answers, labels(len(photos)))


@pytest.mark.parametrize(("kind", "stream"), thinned(KINDS, [False, True], 4, whole=4))
def test_it_is_the_derivative_by_a_factor_on_the_block(kind: str, stream: bool) -> None:
    model = dense_of(kind).double().eval()
    try:
        layout = read_layout(model, ("head", "hidden", "stream") if stream else DEFAULT_DIMS)
    except ModelError:
        assert stream, f"{kind} cannot be pruned at all"
        return
    gates = Gates(layout, model)
    gates.attach(model)
    masks = soft_random_masks(layout)
    gates.set({gate: masks.get(gate, torch.linspace(0.2, 1, size)) for gate, size in layout.gates.items()})
    photos = images(3, dtype=torch.float64)
    expected = by_factors(model, layout, photos)
    model.zero_grad()
    loss_of(model, photos).backward()
    found = by_weights(layout, dict(model.named_parameters()))
    assert expected.abs().min() > 0
    assert found.double().numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-7)


def test_a_factor_of_zero_is_a_block_that_is_gone() -> None:
    """What it is a derivative by does remove the block: x + s f(x) at s = 0."""
    model = tiny_vit(init_values=0.3, depth=1)
    for block in read_layout(model).blocks:
        (writer,) = {key.rpartition(".")[0] for key in _writers(block)}
        model.get_submodule(writer).register_forward_hook(lambda _layer, _args, output: 0 * output)
    x = torch.randn(2, 5, model.embed_dim)
    assert torch.equal(model.blocks[0](x), x)


def loop(prune_ratio: float = 0.5, **options: Any) -> Loop:
    model = tiny_vit(embed_dim=24, num_heads=3, depth=2).double()
    pruner = p3b.Pruner(model, prune_ratio, schedule=PLAN, estimator="removal", **options)
    return Loop(pruner, model, torch.optim.SGD(model.parameters(), lr=0.01))


def test_a_benefit_is_the_root_of_the_mean_square_over_the_interval() -> None:
    training, squares = loop(), []
    names = dict(training.model.named_parameters())

    def look(_model: nn.Module) -> None:
        squares.append(by_weights(training.pruner.layout, names).square())

    while not training.decisions:
        training.step(look)
    in_interval = squares[PLAN.start : PLAN.start + PLAN.update_every]
    expected = torch.stack(in_interval).mean(0).sqrt()
    (first,) = training.decisions
    assert [block.benefit_cls for block in first.blocks] == pytest.approx(expected.tolist(), rel=1e-6)
    assert [block.benefit_patch for block in first.blocks] == [block.benefit_cls for block in first.blocks]
    assert len({block.keep_ratio_goal for block in first.blocks}) > 1, "shares differ by it"


@pytest.mark.parametrize("stream", [0.0, 0.25])
def test_the_budget_is_met_and_the_small_network_equals_the_masked_one(stream: float) -> None:
    training = loop(0.6, stream=stream, align=4).steps(PLAN.final)
    dense = count_parameters(training.model.eval())
    training.pruner.decide_last()
    photos = images(dtype=torch.float64)
    with torch.no_grad():
        masked = training.model(photos)
        small = training.pruner.shrink()
        assert (small(photos) - masked).abs().max() < 1e-10
    assert count_parameters(small) == pytest.approx(0.4 * dense, abs=2 * 3 * 24 + 2 * 24)


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    whole, half, again = loop().steps(6), loop().steps(3), loop()
    again.model.load_state_dict(half.model.state_dict())
    again.pruner.load_state_dict(half.pruner.state_dict())
    again.steps(3)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    assert again.decisions[-1].blocks == whole.decisions[-1].blocks


def test_gates_tell_what_weights_tell() -> None:
    model = tiny_vit(depth=2).double()
    layout = read_layout(model)
    gates = Gates(layout, model)
    gates.attach(model)
    gates.set(soft_random_masks(layout))
    gates.collect_gradients()
    loss_of(model, images(dtype=torch.float64)).backward()
    found = by_gates(layout, gates, gates.gradients())
    assert found.tolist() == pytest.approx(by_weights(layout, dict(model.named_parameters())).tolist(), rel=1e-5)


def test_with_frozen_layers_blocks_have_a_benefit_all_the_same() -> None:
    training = loop()
    training.model.blocks[0].requires_grad_(False)
    training.steps(PLAN.final)
    assert all(block.benefit_cls for block in training.decisions[-1].blocks)


def test_frozen_layers_and_a_narrower_stream_are_refused_with_what_mends_it() -> None:
    training = loop(stream=0.25)
    training.model.blocks[0].requires_grad_(False)
    with pytest.raises(TrainingError, match=r"frozen\. With a narrower stream .*--prune-stream 0.*--prune-benefit linear"):
        training.steps(PLAN.final)


def test_a_model_without_head_and_any_loss_will_do() -> None:
    model = tiny_vit(num_classes=0, depth=2)
    pruner = p3b.Pruner(model, 0.5, schedule=PLAN, estimator="removal", blocks_only=True)
    while not pruner.done:
        loss = model(images()).square().mean()
        (loss + pruner.loss(F.cross_entropy, labels())).backward()
        pruner.step()
    assert count_parameters(pruner.finalize()) < count_parameters(tiny_vit(num_classes=0, depth=2))


def test_it_has_nothing_to_learn_in_the_warm_up() -> None:
    assert own_in_warm_up("block_benefit", {"estimator": "removal"}) == {}
    assert own_in_warm_up("block_benefit", {"estimator": "linear"})


def test_one_shot_takes_it() -> None:
    model = tiny_vit(depth=2)
    pruner = p3b.Pruner(model, 0.5, estimator="removal")
    pruner.calibrate([(images(4), labels(4))] * 2, F.cross_entropy)
    assert count_parameters(pruner.finalize()) < count_parameters(tiny_vit(depth=2))


def test_an_unknown_estimator_is_told_of_it() -> None:
    with pytest.raises(ConfigError, match="removal"):
        p3b.Pruner(tiny_vit(), 0.5, schedule=PLAN, estimator="remval")
