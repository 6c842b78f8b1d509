"""What is computed of a masked model: the active elements alone, as exactly as their masks allow."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from p3b.vit.active import EPSILON, MULTIPLE, ActiveWidths, LeftOut
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, read_layout
from tiny import VARIANTS, images, masks_of, tiny_vit

NARROW = ("heads", "head", "hidden", "stream")
DIMS = pytest.mark.parametrize("dims", [DEFAULT_DIMS, NARROW], ids=["blocks", "stream and heads"])


def _active(
    model: nn.Module, least: float = 0.0, seed: int = 0, dims: Sequence[str] = DEFAULT_DIMS
) -> tuple[Gates, ActiveWidths]:
    """A gated model with three masks in ten open, and the others at `least`; of whole heads the last."""
    layout = read_layout(model, dims)
    gates = Gates(layout, model)
    gates.active = active = ActiveWidths(layout, model)
    gates.attach(model)
    generator = torch.Generator().manual_seed(seed)

    def mask(gate: str, size: int) -> Tensor:
        if gate.endswith(".heads"):
            return torch.tensor([least] * (size - 1) + [0.7])
        return torch.where(torch.rand(size, generator=generator) < 0.3, torch.rand(size, generator=generator) + EPSILON, least)

    masks = {gate: mask(gate, size) for gate, size in layout.gates.items()}
    gates.set(masks)
    active.set(masks)
    return gates, active


@DIMS
@pytest.mark.parametrize("variant", VARIANTS)
def test_leaving_out_what_is_masked_changes_neither_outputs_nor_gradients(variant: str, dims: Sequence[str]) -> None:
    model = tiny_vit(dtype=torch.float64, embed_dim=48, num_heads=2, **VARIANTS[variant])
    _, active = _active(model, dims=dims)
    batch = images(dtype=torch.float64)
    narrow = model(batch)
    with active.suspended():
        full = model(batch)
    assert active.computed_N.double().mean() < 0.6
    torch.testing.assert_close(narrow, full, rtol=0, atol=1e-12)
    parameters = dict(model.named_parameters())
    for key, a, b in zip(
        parameters,
        torch.autograd.grad(narrow.square().sum(), parameters.values()),
        torch.autograd.grad(full.square().sum(), parameters.values()),
        strict=True,
    ):
        computed = a != 0  # closed hidden channels have a gradient by their columns at full width: it meets a mask of zero
        torch.testing.assert_close(a[computed], b[computed], rtol=1e-8, atol=1e-10, msg=key)


@DIMS
def test_fewer_products_are_computed(dims: Sequence[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_vit(embed_dim=48, num_heads=2)
    _, active = _active(model, dims=dims)
    with FlopCounterMode(display=False) as narrow:
        model(images())
    with active.suspended(), FlopCounterMode(display=False) as full:
        model(images())
    assert narrow.get_total_flops() < 0.5 * full.get_total_flops()


@DIMS
def test_what_is_left_out_is_small_and_measured_without_a_random_number(dims: Sequence[str]) -> None:
    model = tiny_vit(embed_dim=48, num_heads=2, drop_path_rate=0.5, proj_drop_rate=0.1)
    gates, active = _active(model, least=0.9 * EPSILON, dims=dims)
    left_out = LeftOut(active, model.train())
    assert left_out.measure() is None
    model(images())
    state = torch.get_rng_state()
    found = left_out.measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert found is not None
    assert 0 < found < 0.1
    gates.detach()
    left_out.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_active_elements_are_those_above_epsilon_and_the_next_in_rank() -> None:
    model = tiny_vit()
    layout = read_layout(model)
    active = ActiveWidths(layout, model)
    masks = masks_of(layout, lambda _gate, size: torch.ones(size))
    gate = "blocks.0.mlp.hidden"
    masks[gate] = torch.cat([torch.zeros(80), torch.tensor([0.9 * EPSILON, EPSILON, 0.5]), torch.zeros(13)])
    active.set(masks)
    computed = dict(zip(layout.gates, active.computed_N.split(list(layout.gates.values())), strict=True))
    assert computed[gate].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 80, 81, 82]  # ties keep their order
    assert int(computed[gate].sum()) == MULTIPLE
    assert all(each.all() for name, each in computed.items() if name != gate)
    masks[gate] = torch.ones(96)
    active.set(masks)
    assert active.computed_N.all()


def test_the_score_of_what_is_not_computed_follows_its_mask() -> None:
    model = tiny_vit()
    layout = read_layout(model)
    active = ActiveWidths(layout, model)
    gate, elements = "blocks.1.mlp.hidden", sum(layout.gates.values())
    place = list(layout.gates).index(gate)
    place = sum(list(layout.gates.values())[:place])
    masks = masks_of(layout, lambda _gate, size: torch.ones(size))
    masks[gate] = torch.cat([torch.full((48,), 0.5), torch.ones(48)])
    active.set(masks)
    scores = torch.rand(elements)
    for factor in (0.5, 1.5):
        assert torch.equal(active.complete(factor * scores, torch.tensor(True)), factor * scores)
    active.complete(torch.full((elements,), torch.inf), torch.tensor(False))  # a step that counts for nothing
    masks[gate] = torch.cat([torch.full((48,), 0.02), torch.ones(48)])
    active.set(masks)
    closed = slice(place, place + 48)
    filled = active.complete(torch.zeros(elements), torch.tensor(True))
    torch.testing.assert_close(filled[closed], scores[closed] * (0.02 / 0.5) ** 2)
    assert not filled[place + 48 :].any()
    masks[gate] = torch.cat([torch.full((48,), 0.001), torch.ones(48)])
    active.set(masks)  # not computed in between: what was known still is
    filled = active.complete(torch.zeros(elements), torch.tensor(True))
    torch.testing.assert_close(filled[closed], scores[closed] * (0.001 / 0.5) ** 2)


@DIMS
def test_copies_and_interrupted_passes_compute_the_same(dims: Sequence[str]) -> None:
    model = tiny_vit(embed_dim=48, num_heads=2)
    gates, _ = _active(model, dims=dims)
    outputs, shapes = model(images()), {key: value.shape for key, value in model.named_parameters()}
    assert torch.equal(deepcopy(model)(images()), outputs)

    def interrupt(_layer: nn.Module, _args: object) -> None:
        raise KeyboardInterrupt

    for layer in (model.patch_embed.proj, model.blocks[1].attn.qkv, model.blocks[1].norm2, model.blocks[0].mlp.fc2):
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(images())
        handle.remove()
        assert torch.equal(model(images()), outputs)
    gates.detach()
    assert {key: value.shape for key, value in model.named_parameters()} == shapes
    assert (model.blocks[1].attn.head_dim, model.blocks[1].attn.num_heads) == (24, 2)
    assert model.norm.normalized_shape == (48,)


def test_features_of_a_narrower_stream_have_zeros_where_nothing_was_computed() -> None:
    model = tiny_vit(embed_dim=48, num_heads=2)
    gates, active = _active(model, dims=NARROW)
    kept = gates.masks["stream"] > 0
    features: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _block, _args, output: features.append(output))
    model(images())
    with active.suspended():
        model(images())
    narrow, full = features
    assert narrow.shape[-1] < full.shape[-1] == 48
    whole = active.whole_stream(narrow)
    torch.testing.assert_close(whole[..., kept], full[..., kept])
    assert not whole[..., ~kept].any()
    assert active.whole_stream(full) is full


def test_parts_of_a_model_that_are_called_by_themselves_compute_all_channels() -> None:
    model = tiny_vit(dtype=torch.float64, embed_dim=48, num_heads=2)
    gates, active = _active(model, dims=NARROW)
    hard = {gate: (mask > 0).to(mask) for gate, mask in gates.masks.items()}
    gates.set(hard)
    active.set(hard)
    answers = model(images(dtype=torch.float64))
    features = model.forward_features(images(dtype=torch.float64))
    assert features.shape[-1] == 48
    torch.testing.assert_close(model.forward_head(features), answers)  # what was added to closed channels nobody reads
    assert not features[..., hard["stream"] == 0].any()
    torch.testing.assert_close(model(images(dtype=torch.float64)), answers)


def test_where_a_block_has_norms_inside_all_of_the_stream_is_computed() -> None:
    model = tiny_vit(embed_dim=48, num_heads=2, qk_norm=True)
    gates, active = _active(model, dims=NARROW)
    assert active.computed_N[-len(gates.masks["stream"]) :].all()
    assert not active.computed_N.all()  # the MLPs are narrowed all the same


@DIMS
def test_gradient_checkpointing_computes_the_same_gradients(dims: Sequence[str]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vit(embed_dim=48, num_heads=2).train()
        model.set_grad_checkpointing(checkpointing)
        _active(model, dims=dims)
        model(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
