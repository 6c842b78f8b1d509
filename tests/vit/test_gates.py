"""Gates multiply channels, cost nothing while they are ones, and leave the model as it was."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from p3b.errors import ModelError, TrainingError
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, read_layout
from tiny import CLASSES, VARIANTS, images, labels, masks_of, multiply_activations, random_masks, soft_random_masks, tiny_vit


def _gated(model: nn.Module) -> Gates:
    gates = Gates(read_layout(model), model)
    gates.attach(model)
    return gates


@pytest.mark.parametrize("explicit", [False, True])
def test_gates_of_ones_change_no_bit(explicit: bool) -> None:
    plain, gated = tiny_vit(), tiny_vit()
    gates = _gated(gated)
    if explicit:
        gates.set(masks_of(read_layout(gated), lambda _gate, size: torch.ones(size)))
    for model in (plain, gated):
        nn.functional.cross_entropy(model(images()), labels()).backward()
    assert torch.equal(plain(images()), gated(images()))
    for (key, a), (_, b) in zip(plain.named_parameters(), gated.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), key


def test_classes_and_keys_stay_and_detaching_restores_every_bit() -> None:
    model = tiny_vit()
    outputs, state = model(images()), {key: value.clone() for key, value in model.state_dict().items()}
    classes, parameters = [type(module) for module in model.modules()], dict(model.named_parameters())
    gates = _gated(model)
    gates.set(random_masks(read_layout(model)))
    assert not torch.allclose(model(images()), outputs)
    for _ in range(2):  # attached, then detached
        assert [type(module) for module in model.modules()] == classes
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
        gates.detach()
    assert torch.equal(model(images()), outputs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("_ungated_parameters" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("make", [soft_random_masks, random_masks])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scaling_weights_equals_multiplying_activations(variant: str, make: type) -> None:
    gated = tiny_vit(dtype=torch.float64, **VARIANTS[variant])
    reference = deepcopy(gated)
    masks = make(read_layout(gated), seed=3)
    _gated(gated).set(masks)
    multiply_activations(reference, {name: mask.double() for name, mask in masks.items()})
    batch = images(dtype=torch.float64)
    torch.testing.assert_close(gated(batch), reference(batch), rtol=0, atol=1e-12)
    for model in (gated, reference):
        model(batch).square().sum().backward()
    for (key, a), (_, b) in zip(gated.named_parameters(), reference.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("gate", ["attn.in", "attn.head", "attn.out", "mlp.in", "mlp.hidden", "mlp.out"])
def test_every_gate_alone_equals_its_definition(gate: str) -> None:
    gated = tiny_vit(dtype=torch.float64)
    reference, dense = deepcopy(gated), deepcopy(gated)
    layout, batch = read_layout(gated), images(dtype=torch.float64)
    masks = random_masks(layout, seed=1, only=f".0.{gate}")
    _gated(gated).set(masks)
    multiply_activations(reference, {name: mask.double() for name, mask in masks.items()})
    torch.testing.assert_close(gated(batch), reference(batch), rtol=0, atol=1e-12)
    assert not torch.allclose(gated(batch), dense(batch))


class _StopError(Exception):
    pass


def _fail_in(layer: nn.Module, model: nn.Module, error: type[BaseException]) -> None:
    def fail(_input: torch.Tensor) -> torch.Tensor:
        raise error

    layer.forward = fail
    with pytest.raises(error):
        model(images())
    del layer.forward


def test_an_exception_inside_a_forward_pass_leaves_the_weights_in_place() -> None:
    model = tiny_vit()
    parameters, gates = dict(model.named_parameters()), _gated(model)
    gates.set(random_masks(read_layout(model)))
    outputs = model(images())
    _fail_in(model.blocks[1].mlp.fc1, model, _StopError)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert torch.equal(model(images()), outputs)


@pytest.mark.parametrize("then", ["go on", "detach"])
def test_after_a_keyboard_interrupt_the_weights_come_back(then: str) -> None:
    """torch calls no hook after a KeyboardInterrupt: a notebook's stop button once left the product in the weight's place."""
    model = tiny_vit()
    parameters, gates = dict(model.named_parameters()), _gated(model)
    dense = model(images())
    gates.set(random_masks(read_layout(model)))
    outputs = model(images())
    _fail_in(model.blocks[1].mlp.fc1, model, KeyboardInterrupt)
    if then == "detach":
        gates.detach()
    assert torch.equal(model(images()), dense if then == "detach" else outputs)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())


def test_a_copy_of_the_model_is_gated_by_the_same_masks() -> None:
    model = tiny_vit()
    gates = _gated(model)
    copy = deepcopy(model)
    gates.set(random_masks(read_layout(model), seed=1))
    assert torch.equal(copy(images()), model(images()))
    gates.set(random_masks(read_layout(model), seed=2))
    assert torch.equal(copy(images()), model(images()))
    with torch.no_grad():
        copy.blocks[0].mlp.fc2.weight.mul_(2)
    assert not torch.equal(copy(images()), model(images()))
    assert all(a is not b for a, b in zip(copy.parameters(), model.parameters(), strict=True))


def test_gates_are_not_trained() -> None:
    model = tiny_vit()
    gates = _gated(model)
    gates.set(soft_random_masks(read_layout(model)))
    model(images()).sum().backward()
    assert not any(mask.requires_grad for mask in gates.masks.values())
    assert len(list(model.parameters())) == len(list(tiny_vit().parameters()))


def test_mixed_precision_computes_with_gated_weights() -> None:
    model = tiny_vit()
    gates = _gated(model)
    gates.set(random_masks(read_layout(model)))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(images()), rtol=0.1, atol=0.1)
    assert low.shape == (2, CLASSES)


def _large_products_freed(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and how many bytes of products autograd keeps between the passes."""
    gates = _gated(model)
    gates.set(soft_random_masks(read_layout(model)))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(images()), labels())
    square = [tensor.untyped_storage() for tensor in saved if tensor.ndim == 2 and min(tensor.shape) >= 24]
    kept = sum(memory.nbytes() for memory in square if memory.data_ptr() not in own)
    saved.clear()
    loss.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    gates.detach()
    return loss.detach(), gradients, kept


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva_giant_patch14_224"])
def test_large_products_are_not_kept_and_gradients_are_the_same_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, gradients, kept = _large_products_freed(tiny_vit(name))
    monkeypatch.setattr("p3b.vit.products.FREED_FROM", 24 * 24)
    again, same, kept_then = _large_products_freed(tiny_vit(name))
    assert torch.equal(loss, again) and gradients.keys() == same.keys()
    assert all(torch.equal(gradient, same[key]) for key, gradient in gradients.items())
    assert kept - kept_then > 2 * 11 * 24 * 24 * 4  # of two blocks, all but what is narrower


def test_freed_products_go_with_checkpointing_two_passes_and_a_graph_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p3b.vit.products.FREED_FROM", 24 * 24)
    found = []
    for checkpointing in (False, True):
        model = tiny_vit()
        model.set_grad_checkpointing(checkpointing)
        gates = _gated(model)
        gates.set(soft_random_masks(read_layout(model)))
        loss = sum(nn.functional.cross_entropy(model(images(seed=seed)), labels()) for seed in (1, 2))
        loss.backward(retain_graph=True)
        once = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        loss.backward()
        twice = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch.testing.assert_close(twice, [2 * gradient for gradient in once])
        found.append(once)
    torch.testing.assert_close(*found)


def test_a_weight_that_moves_between_the_passes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p3b.vit.products.FREED_FROM", 24 * 24)
    model = tiny_vit()
    gates = _gated(model)
    gates.set(soft_random_masks(read_layout(model)))
    loss = model(images()).sum()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(TrainingError, match="changed between the forward pass"):
        loss.backward()


def test_masks_of_another_model_are_refused() -> None:
    gates = _gated(tiny_vit())
    for other in (tiny_vit(depth=3), tiny_vit(embed_dim=48)):
        with pytest.raises(ModelError, match="do not fit"):
            gates.set(random_masks(read_layout(other)))
    assert all((mask == 1).all() for mask in gates.masks.values())


@pytest.mark.parametrize("dims", [DEFAULT_DIMS, ("heads", "hidden", "out")])
def test_collected_gradients_are_those_of_multiplied_activations_also_of_masked_elements(dims: tuple[str, ...]) -> None:
    gated = tiny_vit(dtype=torch.float64)
    reference = deepcopy(gated)
    layout = read_layout(gated, dims)
    gates = Gates(layout, gated)
    gates.attach(gated)
    gates.collect_gradients()
    hard = {gate: mask.double() for gate, mask in random_masks(layout, seed=2).items()}
    gates.set(hard)
    leaves = {gate: mask.clone().requires_grad_() for gate, mask in hard.items()}
    whole = masks_of(read_layout(gated), lambda _gate, size: torch.ones(size, dtype=torch.float64))
    multiply_activations(reference, {**whole, **{gate: mask for gate, mask in leaves.items() if not gate.endswith("heads")}})
    if "heads" in dims:
        for depth, block in enumerate(reference.blocks):
            mask = leaves[f"blocks.{depth}.attn.heads"]
            block.attn.proj.register_forward_pre_hook(lambda _m, args, mask=mask: args[0] * mask.repeat_interleave(8))
    for seed in (1, 2):  # micro-batches add up
        batch = images(seed=seed, dtype=torch.float64)
        gated(batch).square().sum().backward()
        reference(batch).square().sum().backward()
    found = gates.gradients()
    assert any((found[gate][hard[gate] == 0] != 0).any() for gate in found)
    for gate, leaf in leaves.items():
        torch.testing.assert_close(found[gate].double(), leaf.grad, rtol=1e-4, atol=1e-6, msg=gate)
    assert not any(mask.requires_grad for mask in gates.masks.values())
    gates.set(hard)
    assert all((gradient == 0).all() for gradient in gates.gradients().values())


def test_collecting_gradients_changes_no_output_and_no_other_gradient() -> None:
    plain, collecting = tiny_vit(dtype=torch.float64), tiny_vit(dtype=torch.float64)
    masks = random_masks(read_layout(plain), seed=3)
    _gated(plain).set(masks)
    gates = _gated(collecting)
    gates.collect_gradients()
    gates.set(masks)
    batch = images(dtype=torch.float64)
    for model in (plain, collecting):
        model(batch).square().sum().backward()
    assert torch.equal(plain(batch), collecting(batch))
    for (key, a), (_, b) in zip(plain.named_parameters(), collecting.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14, msg=key)
