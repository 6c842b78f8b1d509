"""Whole heads and the residual stream as dimensions: exact as the others, and nothing changes where nobody asks for them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b
from hostile import of_schema, sealed
from p3b import methods
from p3b.deploy.layouts import LAYOUTS, apply_layout, plan_layout
from p3b.errors import ConfigError, ModelError, WeightsError
from p3b.methods.base import BlockDecision, Decision, ScoreMethod
from p3b.scoring.criteria import magnitude, taylor
from p3b.scoring.scores import RandomScores
from p3b.storage.artifact import CONFIG_FILE, read_config, save_checkpoint
from p3b.storage.models import build_model
from p3b.vit.architecture import describe_dense
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import (
    block_params,
    count_macs,
    count_parameters,
    dense_params,
    kept_channels,
    kept_other_params,
    kept_params,
    model_macs,
    other_macs,
    other_params,
    prefix_cost,
)
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, DIMS, ModelLayout, read_layout
from p3b.vit.parts import ConstantBranch, NoBranch, ReadChannels, WriteChannels
from p3b.vit.shapes import branch_shapes
from thinning import thinned
from tiny import DISTILLED, VARIANTS, images, labels, parameters_of, tiny_vit

Masks = dict[str, Tensor]

FAMILIES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "distilled, layer scale": {"name": DISTILLED, "init_values": 0.1},
    "norm before the blocks": {"pre_norm": True},
    "average and maximum": {"class_token": False, "global_pool": "avgmax"},
    "average without a norm": {"global_pool": "avg", "fc_norm": False, "final_norm": False},
    "norm behind the pooling": {"global_pool": "token", "fc_norm": True},
    "positions without the class token": {"no_embed_class": True, "reg_tokens": 1},
    "no positions": {"pos_embed": "none"},
    "odd sizes": {"embed_dim": 21, "num_heads": 7, "mlp_ratio": 1.7, "img_size": (32, 24)},
    "images of any size": {"dynamic_img_size": True},
}
SETS: dict[str, tuple[str, ...]] = {
    "heads": ("heads",),
    "stream": ("stream",),
    "all": DIMS,
    "heads, hidden, stream": ("heads", "hidden", "stream"),
    "heads, hidden, out": ("heads", "hidden", "out"),
    "in, stream": ("in", "stream"),
}


def _masks(layout: ModelLayout, seed: int = 0, keep: float = 0.6) -> Masks:
    """Hard masks of every gate; of the stream one channel stays at least."""
    generator = torch.Generator().manual_seed(seed)
    masks = {gate: (torch.rand(size, generator=generator) < keep).float() for gate, size in layout.gates.items()}
    if "stream" in masks:
        masks["stream"][seed % layout.width] = 1
    return masks


def _ones(layout: ModelLayout) -> Masks:
    return {gate: torch.ones(size) for gate, size in layout.gates.items()}


def _gated(model: nn.Module, layout: ModelLayout, masks: Masks) -> Gates:
    gates = Gates(layout, model)
    gates.attach(model)
    gates.set(masks)
    return gates


def _small(dims: tuple[str, ...] = DIMS, seed: int = 0, keep: float = 0.6, **changed: Any) -> VisionTransformer:
    model = tiny_vit(**{"dtype": torch.float64, **changed})
    layout = read_layout(model, dims)
    return apply_cuts(model, plan_cuts(layout, _masks(layout, seed, keep)))


def _batch(model: VisionTransformer, count: int = 2) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=generator, dtype=torch.float64).to(dtype)


def _assert_exact(dense: VisionTransformer, layout: ModelLayout, masks: Masks) -> VisionTransformer:
    """The small model equals the masked one, and its parameters and MACs are those that were predicted."""
    masked, small = deepcopy(dense), deepcopy(dense)
    _gated(masked, layout, masks)
    plan = plan_cuts(layout, masks)
    small = apply_cuts(small, plan)
    batch = _batch(dense)
    with torch.no_grad():
        torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)
    assert plan.params == count_parameters(small) == parameters_of(small)
    assert plan.params == kept_other_params(layout, masks) + sum(kept_params(layout, masks).values())
    if layout.stream is not None:
        channels = int(masks["stream"].sum())
        kept = {block.name: {dim: int(n) for dim, n in kept_channels(block, masks).items()} for block in layout.blocks}
        assert model_macs(layout, kept, other_macs(layout, channels)) == count_macs(small, dense.patch_embed.img_size)
        assert small.embed_dim == channels
        assert small.patch_embed.proj.weight.shape[0] == channels
    return small


# --- what is cut computes what was masked


@pytest.mark.parametrize(("family", "dims"), thinned(FAMILIES, SETS, 3))
def test_small_equals_masked(family: str, dims: str) -> None:
    dense = tiny_vit(dtype=torch.float64, **FAMILIES[family])
    layout = read_layout(dense, SETS[dims])
    small = _assert_exact(dense, layout, _masks(layout, seed=1))
    assert parameters_of(small) < parameters_of(dense)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    dims=st.sets(st.sampled_from(DIMS), min_size=1),
    seed=st.integers(0, 10_000),
    keep=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
)
def test_small_equals_masked_for_any_dimensions_and_masks(family: str, dims: set[str], seed: int, keep: float) -> None:
    dense = tiny_vit(dtype=torch.float64, depth=1 + seed % 3, seed=seed, **FAMILIES[family])
    layout = read_layout(dense, dims)
    _assert_exact(dense, layout, _masks(layout, seed, keep))


def test_one_channel_of_the_stream_and_one_head_are_enough() -> None:
    dense = tiny_vit(dtype=torch.float64)
    layout = read_layout(dense, DIMS)
    masks = {gate: torch.eye(size)[size // 2] for gate, size in layout.gates.items()}
    small = _assert_exact(dense, layout, masks)
    assert small.embed_dim == small.blocks[0].attn.num_heads == 1


def test_without_a_head_an_attention_is_a_constant_or_gone() -> None:
    for bias, form in ((True, ConstantBranch), (False, NoBranch)):
        dense = tiny_vit(dtype=torch.float64, proj_bias=bias)
        layout = read_layout(dense, ("heads",))
        small = _assert_exact(dense, layout, _ones(layout) | {"blocks.0.attn.heads": torch.zeros(3)})
        assert isinstance(small.blocks[0].attn, form)


def test_a_block_whose_inputs_lie_outside_of_the_stream_reads_nothing() -> None:
    dense = tiny_vit(dtype=torch.float64)
    layout = read_layout(dense, DIMS)
    half = (torch.arange(24) < 12).float()
    inside = _ones(layout) | {"stream": half, "blocks.0.attn.in": 1 - half, "blocks.1.mlp.out": 1 - half}
    small = _assert_exact(dense, layout, inside)
    assert isinstance(small.blocks[0].attn, ConstantBranch)
    assert isinstance(small.blocks[1].mlp, NoBranch)


def test_channels_are_counted_within_the_narrower_stream() -> None:
    dense = tiny_vit()
    layout = read_layout(dense, ("in", "stream"))
    masks = _ones(layout) | {
        "stream": (torch.arange(24) % 2).float(),
        "blocks.0.attn.in": (torch.arange(24) >= 20).float(),
    }
    shapes = {shape.name: shape for shape in branch_shapes(apply_cuts(dense, plan_cuts(layout, masks)))}
    assert shapes["blocks.0.attn"].inputs == (10, 11)
    assert shapes["blocks.0.attn"].outputs == tuple(range(12))
    assert shapes["blocks.0.mlp"].form == "whole"


def test_a_narrower_stream_needs_no_index_at_all() -> None:
    small = _small(("heads", "hidden", "stream"), keep=0.7)
    kinds = {type(module) for module in small.modules()}
    assert not kinds & {ReadChannels, WriteChannels}
    assert list(dict(small.named_buffers())) == []
    assert kinds <= {type(module) for module in tiny_vit().modules()} | {ConstantBranch, NoBranch}
    for module in small.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == (small.embed_dim,)


def test_queries_are_scaled_for_narrower_heads_and_not_for_fewer() -> None:
    dense = tiny_vit()
    layout = read_layout(dense, ("heads",))
    weight = dense.blocks[0].attn.qkv.weight.detach().clone().unflatten(0, (3, 3, 8))
    small = apply_cuts(dense, plan_cuts(layout, _ones(layout) | {"blocks.0.attn.heads": torch.tensor([1.0, 0, 1])}))
    assert torch.equal(small.blocks[0].attn.qkv.weight.unflatten(0, (3, 2, 8)), weight[:, [0, 2]])
    assert small.blocks[0].attn.scale == 8**-0.5


def test_an_empty_stream_is_refused() -> None:
    dense = tiny_vit()
    layout = read_layout(dense, ("stream", "hidden"))
    masks = _ones(layout) | {"stream": torch.zeros(24)}
    with pytest.raises(ModelError, match="no channel of the residual stream"):
        plan_cuts(layout, masks)
    with pytest.raises(ModelError, match="no channel of the residual stream"):
        Gates(layout, dense).set(masks)


def test_masks_of_ones_change_no_bit() -> None:
    plain, gated = tiny_vit(init_values=0.3, pre_norm=True), tiny_vit(init_values=0.3, pre_norm=True)
    layout = read_layout(gated, DIMS)
    _gated(gated, layout, _ones(layout))
    for model in (plain, gated):
        nn.functional.cross_entropy(model(images()), labels()).backward()
    assert torch.equal(plain(images()), gated(images()))
    for (key, a), b in zip(plain.named_parameters(), gated.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), key
    before = parameters_of(gated)
    cut = apply_cuts(deepcopy(plain), plan_cuts(layout, _ones(layout)))
    assert parameters_of(cut) == before
    assert torch.equal(cut(images()), plain(images()))


def test_a_distilled_model_in_training_gives_both_heads() -> None:
    dense = tiny_vit(DISTILLED, dtype=torch.float64).train()
    dense.set_distilled_training(True)
    layout = read_layout(dense, DIMS)
    masks = _masks(layout)
    masked = deepcopy(dense)
    _gated(masked, layout, masks)
    small = apply_cuts(dense, plan_cuts(layout, masks))
    for a, b in zip(masked(_batch(dense)), small(_batch(dense)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# --- what gates mean


def _multiply_activations(model: VisionTransformer, masks: Masks) -> None:
    """Heads and stream on activations: what a head puts out times its mask, and the stream times its mask at every place."""

    def scale(mask: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _inputs, output: output * mask

    def scale_heads(mask: Tensor) -> Callable[[nn.Module, Any], tuple[Tensor]]:
        return lambda _module, inputs: ((inputs[0].unflatten(-1, (len(mask), -1)) * mask[:, None]).flatten(-2),)

    def normalise(norm: Any, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
        x, mask = inputs[0], masks["stream"]
        mean = (mask * x).sum(-1, keepdim=True) / mask.sum()
        variance = (mask * (x - mean) ** 2).sum(-1, keepdim=True) / mask.sum()
        return mask * ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)

    model.norm_pre.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * masks["stream"],))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(normalise)
    for depth, block in enumerate(model.blocks):
        block.attn.proj.register_forward_pre_hook(scale_heads(masks[f"blocks.{depth}.attn.heads"]))
        for part in (block.ls1, block.ls2):
            part.register_forward_hook(scale(masks["stream"]))


SOFT = ["plain", "layer scale", "distilled", "no class token", "norm before the blocks", "registers"]


@pytest.mark.parametrize("family", SOFT)
def test_soft_masks_equal_their_definition_on_activations(family: str) -> None:
    gated = tiny_vit(dtype=torch.float64, **FAMILIES[family])
    reference = deepcopy(gated)
    layout = read_layout(gated, ("heads", "stream"))
    generator = torch.Generator().manual_seed(2)
    masks = {gate: torch.rand(size, generator=generator) for gate, size in layout.gates.items()}
    _gated(gated, layout, masks)
    _multiply_activations(reference, {gate: mask.double() for gate, mask in masks.items()})
    batch = _batch(gated)
    torch.testing.assert_close(gated(batch), reference(batch), rtol=0, atol=1e-12)
    for model in (gated, reference):
        model(batch).square().sum().backward()
    for (key, a), b in zip(gated.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("family", SOFT)
def test_the_gradient_of_a_gate_at_one_equals_finite_differences(family: str) -> None:
    model = tiny_vit(dtype=torch.float64, **FAMILIES[family])
    layout, batch = read_layout(model, ("heads", "stream")), _batch(model)
    masks = {gate: mask.requires_grad_() for gate, mask in _ones(layout).items()}
    gates = _gated(model, layout, masks)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(batch), labels())

    loss().backward()
    once = {gate: mask.grad.clone() for gate, mask in masks.items() if mask.grad is not None}
    loss().backward()  # without a new `set`
    for gate, mask in masks.items():
        assert mask.grad is not None
        torch.testing.assert_close(mask.grad, 2 * once[gate])
    assert not any(mask.requires_grad for mask in gates.masks.values())
    step = 2.0**-9  # masks are float32: this one they hold exactly
    for gate, element in (("stream", 0), ("stream", 17), ("blocks.0.attn.heads", 1), ("blocks.1.attn.heads", 2)):
        around = []
        for sign in (1, -1):
            moved = {name: mask.detach().clone() for name, mask in masks.items()}
            moved[gate][element] += sign * step
            gates.set(moved)
            with torch.no_grad():
                around.append(loss())
        difference = (around[0] - around[1]).item() / (2 * step)
        assert once[gate][element].item() == pytest.approx(difference, rel=1e-3, abs=2e-6)
        assert difference != 0


def test_the_taylor_score_of_a_head_is_its_gates_gradient() -> None:
    model = tiny_vit(dtype=torch.float64)
    layout = read_layout(model, ("heads", "hidden", "stream"))
    masks = {gate: mask.requires_grad_() for gate, mask in _ones(layout).items()}
    _gated(model, layout, masks)
    nn.functional.cross_entropy(model(_batch(model)), labels()).backward()
    for block in layout.blocks:
        scores = taylor(block, dict(model.named_parameters()))
        assert list(scores) == [block.gate(dim) for dim in block.dims]
        for gate, score in scores.items():
            gradient = masks[gate].grad
            assert gradient is not None
            torch.testing.assert_close(score, gradient.square(), rtol=1e-3, atol=1e-10)


def test_the_magnitude_of_a_head_is_that_of_all_its_weights() -> None:
    model = tiny_vit()
    block = read_layout(model, ("heads",)).blocks[0]
    qkv, proj = model.blocks[0].attn.qkv.weight.unflatten(0, (3, 3, 8)), model.blocks[0].attn.proj.weight.unflatten(1, (3, 8))
    expected = [(qkv[:, head].square().sum() + proj[:, head].square().sum()).sqrt() for head in range(3)]
    torch.testing.assert_close(magnitude(block, dict(model.named_parameters()))["blocks.0.attn.heads"], torch.stack(expected))


def test_detaching_restores_every_bit_and_copies_share_the_masks() -> None:
    model = tiny_vit(pre_norm=True)
    layout = read_layout(model, DIMS)
    parameters, outputs = dict(model.named_parameters()), model(images())
    gates = Gates(layout, model)
    gates.attach(model)
    copy = deepcopy(model)
    gates.set(_masks(layout))
    assert torch.equal(copy(images()), model(images()))
    assert not torch.allclose(model(images()), outputs)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    gates.detach()
    assert torch.equal(model(images()), outputs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_mixed_precision_agrees_with_the_small_model() -> None:
    dense = tiny_vit()
    layout, masked = read_layout(dense, DIMS), deepcopy(dense)
    masks = _masks(layout, keep=0.8)
    _gated(masked, layout, masks)
    small = apply_cuts(dense, plan_cuts(layout, masks))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(small(images()), masked(images()), rtol=0.05, atol=0.05)


# --- the map


def test_dimensions_come_in_a_fixed_order_and_axes_name_the_prunable_ones() -> None:
    model = tiny_vit()
    attention, mlp = read_layout(model, reversed_of(DIMS)).blocks[:2]
    assert list(attention.dims.items()) == [("in", 24), ("heads", 3), ("head", 8), ("out", 24)]
    assert list(mlp.dims.items()) == [("in", 24), ("hidden", 96), ("out", 24)]
    rows = {
        ("heads",): ((3, "heads", 8), (24,)),
        ("heads", "head"): ((3, "heads", "head"), (24,)),
        DEFAULT_DIMS: ((3, 3, "head"), ("in",)),
        ("stream",): ((3, 3, 8), ("stream",)),
        ("in", "stream"): ((3, 3, 8), ("in",)),
    }
    for dims, axes in rows.items():
        assert {weight.key: weight.axes for weight in read_layout(model, dims).blocks[0].weights}[
            "blocks.0.attn.qkv.weight"
        ] == axes
    layout = read_layout(model, ("stream", "heads"))
    assert list(layout.gates.items()) == [("blocks.0.attn.heads", 3), ("blocks.1.attn.heads", 3), ("stream", 24)]
    assert layout.blocks[1].dims == {}
    assert read_layout(model).stream is None
    assert read_layout(model) == read_layout(model, DEFAULT_DIMS)


def reversed_of(dims: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(reversed(dims))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_stream_is_mapped_and_written_once(family: str) -> None:
    model = tiny_vit(**FAMILIES[family])
    stream, width = read_layout(model, ("stream",)).stream, model.embed_dim
    assert stream is not None
    keys = [weight.key for weight in stream.weights]
    assert len(set(keys)) == len(keys)
    for weight in (*stream.weights, *stream.outside):
        sizes = [math.prod(width if factor == "stream" else int(factor) for factor in axis) for axis in weight.axes]
        assert tuple(sizes) == model.get_parameter(weight.key).shape
    without = {key for key, parameter in model.named_parameters()} - set(keys)
    assert all(key.endswith((".qkv.bias", ".fc1.bias", "head.bias", "head_dist.bias")) for key in without)
    gated = {weight.key for weight in stream.weights if weight.gated}
    assert not any(key.endswith(".gamma") or "norm" in key for key in gated)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert set(stream.norms) == norms


def test_costs_follow_the_stream() -> None:
    model = tiny_vit()
    layout = read_layout(model, ("heads", "stream"))
    assert other_params(layout, 24) == layout.other_params == other_params(read_layout(model), 24)
    counts = other_params(layout, torch.arange(25))
    assert counts[0] == 5  # the bias of the head
    assert counts[24] == layout.other_params
    assert other_macs(layout, 12) * 2 == other_macs(layout, 24) == 24 * 3 * 8 * 8 * 16 + 24 * 5
    attention = layout.blocks[0]
    whole = {"heads": torch.tensor(3), "stream": torch.arange(25)}
    assert block_params(attention, whole).tolist() == [
        int(block_params(attention, {"heads": torch.tensor(3), "stream": torch.tensor(channels)})) for channels in range(25)
    ]
    assert prefix_cost(attention)(torch.tensor([[3]])).tolist() == [dense_params(attention)]
    with pytest.raises(ModelError, match='the dimension "stream"'):
        other_macs(read_layout(model), 12)


def test_dimensions_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"Unknown prunable dimension 'strem'. Did you mean 'stream'"):
        read_layout(tiny_vit(), ("heads", "strem"))
    with pytest.raises(ConfigError, match="nothing to prune"):
        read_layout(tiny_vit(), ())


@pytest.mark.parametrize("pooling", ["map", "prr"])
def test_attention_pooling_is_refused_where_the_stream_is_asked_for(pooling: str) -> None:
    model = tiny_vit(global_pool=pooling)
    with pytest.raises(ModelError, match=r"attn_pool.*residual stream.*global_pool=avg"):
        read_layout(model, ("stream",))
    assert read_layout(model, ("heads",)).stream is None


def test_other_parts_outside_the_blocks_are_refused_by_name() -> None:
    model = tiny_vit()
    model.register_parameter("prompt", nn.Parameter(torch.zeros(1, 24)))
    with pytest.raises(ModelError, match=r"prompt: this parameter"):
        read_layout(model, ("stream",))
    for name, part in (("head", nn.Sequential(nn.Linear(24, 5))), ("norm", nn.BatchNorm1d(24))):
        model = tiny_vit()
        setattr(model, name, part)
        with pytest.raises(ModelError, match=f"{name}: {type(part).__name__}"):
            read_layout(model, ("stream",))


@pytest.mark.parametrize("dims", [("heads",), ("stream",)])
def test_a_pruned_model_is_not_taken_for_a_dense_one(dims: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="pruned already"):
        read_layout(_small(dims))


# --- what a small model goes through


@pytest.mark.parametrize(
    ("family", "dims"),
    thinned(
        [name for name in FAMILIES if name not in ("norm without affine", "unfused", "images of any size")],
        ["heads", "stream", "all"],
        3,
    ),
)
def test_a_saved_model_comes_back_bit_for_bit(family: str, dims: str, tmp_path: Path) -> None:
    small = _small(SETS[dims], **FAMILIES[family])
    dense = tiny_vit(**FAMILIES[family])
    assert describe_dense(small) == describe_dense(dense)
    for path in (p3b.save(small, tmp_path / "folder"), save_checkpoint(small, tmp_path / "model.pth")):
        loaded = p3b.load(path)
        assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
        with torch.no_grad():
            assert torch.equal(loaded(_batch(small)), small(_batch(small)))
        assert branch_shapes(loaded) == branch_shapes(small)
        assert loaded.embed_dim == loaded.num_features == small.embed_dim
    assert read_config(tmp_path / "folder")["schema"] == 4


def test_heads_and_stream_are_always_told(tmp_path: Path) -> None:
    for name, dims in (("default", DEFAULT_DIMS), ("heads that all stay", ("heads", "hidden")), ("heads", ("heads",))):
        dense = tiny_vit()
        layout = read_layout(dense, dims)
        masks = _masks(layout)
        if name == "heads that all stay":
            masks |= {gate: mask for gate, mask in _ones(layout).items() if gate.endswith("heads")}
        small = apply_cuts(dense, plan_cuts(layout, masks))
        config = read_config(p3b.save(small, tmp_path / name))
        assert config["stream"] == 24
        assert [block["heads"] for block in config["blocks"]] == [shape.heads for shape in branch_shapes(small)]
        assert branch_shapes(p3b.load(tmp_path / name)) == branch_shapes(small)


def test_a_folder_that_schema_2_was_written_in_loads(tmp_path: Path) -> None:
    """As versions before wrote it: entries of blocks without heads, no stream; made of text that no code of ours has seen."""
    dense = tiny_vit(depth=1)
    layout = read_layout(dense)
    small = apply_cuts(dense, plan_cuts(layout, _ones(layout) | {"blocks.0.attn.head": (torch.arange(8) < 5).float()}))
    config = json.loads((p3b.save(small, tmp_path) / CONFIG_FILE).read_text())
    everything = list(range(24))
    config["blocks"] = [
        {"name": "blocks.0.attn", "form": "small", "inputs": everything, "inner": 5, "outputs": everything},
        {"name": "blocks.0.mlp", "form": "whole", "inputs": [], "inner": 0, "outputs": []},
    ]
    config = of_schema(config, 2)
    (tmp_path / CONFIG_FILE).write_text(sealed(config))
    loaded = p3b.load(tmp_path)
    assert torch.equal(loaded(images()), small(images()))
    assert loaded.blocks[0].attn.num_heads == 3


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "no stream": lambda config: config.pop("stream"),
    "a stream of nothing": lambda config: config.update(stream=0),
    "a stream wider than the dense model's": lambda config: config.update(stream=25),
    "a stream of another width": lambda config: config.update(stream=config["stream"] - 1),
    "a stream that is a truth": lambda config: config.update(stream=True),
    "a stream that is a word": lambda config: config.update(stream="12"),
    "a huge stream": lambda config: config.update(stream=1 << 40),
    "no heads": lambda config: config["blocks"][0].pop("heads"),
    "an attention of no heads": lambda config: config["blocks"][0].update(heads=0),
    "an attention of more heads than the dense one": lambda config: config["blocks"][0].update(heads=4),
    "another number of heads": lambda config: config["blocks"][0].update(heads=3 - config["blocks"][0]["heads"]),
    "heads that are a truth": lambda config: config["blocks"][0].update(heads=True),
    "heads that are a word": lambda config: config["blocks"][0].update(heads="2"),
    "heads of an MLP": lambda config: config["blocks"][1].update(heads=1),
    "schema 2 with a stream": lambda config: config.update(of_schema(config, 3), schema=2),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_config_that_was_edited_is_refused(spoil: str, tmp_path: Path) -> None:
    dense = tiny_vit()
    layout = read_layout(dense, DIMS)
    masks = _masks(layout, keep=0.8) | {"blocks.0.attn.heads": torch.tensor([1.0, 0, 1])}
    folder = p3b.save(apply_cuts(dense, plan_cuts(layout, masks)), tmp_path)
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (config["blocks"][0]["heads"], config["blocks"][1]["heads"]) == (2, 0)
    SPOILT[spoil](config)
    (folder / CONFIG_FILE).write_text(sealed(config))
    with pytest.raises(WeightsError, match=str(folder)) as caught:
        p3b.load(folder)
    assert "digest" not in str(caught.value)


@pytest.mark.parametrize(("family", "dims"), thinned(["plain", "layer scale", "distilled", "no class token"], SETS, 3))
def test_every_layout_computes_the_same(family: str, dims: str) -> None:
    small = _small(SETS[dims], depth=3, **FAMILIES[family])
    with torch.no_grad():
        expected = small(_batch(small))
        for name in LAYOUTS:
            torch.testing.assert_close(
                apply_layout(small, plan_layout(small, name))(_batch(small)), expected, rtol=1e-12, atol=1e-12, msg=name
            )


@pytest.mark.usefixtures("onnx_is_listed_once")
def test_onnx_runtime_agrees(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, file = _small(dtype=torch.float32), tmp_path / "small.onnx"
    torch.onnx.export(small, (images(),), str(file), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), small(images()), rtol=0, atol=1e-4)


def test_a_small_model_trains_is_copied_and_gets_a_new_head(tmp_path: Path) -> None:
    small = _small(keep=0.8, dtype=torch.float32, init_values=0.3, reg_tokens=1).train()
    nn.functional.cross_entropy(small(images(8)), labels(8)).backward()
    for key, parameter in small.named_parameters():
        assert parameter.is_leaf
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
    assert any(isinstance(module, (LayerScale, WriteChannels)) for module in small.modules())
    assert torch.equal(deepcopy(small)(images()), small(images()))
    p3b.save(small, tmp_path)
    again, report = build_model("vit_tiny_patch16_224", num_classes=7, weights=tmp_path)
    assert again(images()).shape == (2, 7)
    assert report is not None
    assert again.embed_dim == small.embed_dim


# --- the front door


def _by_chance(model: VisionTransformer, layout: ModelLayout, prune_ratio: float, reduce: Any, *, seed: int = 0) -> ScoreMethod:
    """A method that prunes every gate alike, at random."""

    def decide(scores_N: Tensor, progress: float, tau: float, last: bool) -> Decision:
        scores = dict(zip(layout.gates, scores_N.split(list(layout.gates.values())), strict=True))
        masks = {gate: (score >= progress * prune_ratio).float() for gate, score in scores.items()}
        kept = kept_params(layout, masks)
        blocks = [
            BlockDecision(b.name, b.kind, None, None, None, 1.0, 1.0, kept[b.name], dense_params(b)) for b in layout.blocks
        ]
        return Decision(masks, tuple(blocks), progress, tau)

    scores = RandomScores(layout, seed)
    scores._scores_N = torch.rand(sum(layout.gates.values()), generator=torch.Generator().manual_seed(seed))
    return ScoreMethod("by_chance", model, scores, decide)


def _trained(pruner: p3b.Pruner, model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(images(4, seed=step)), labels(4, seed=step))
        (loss + pruner.loss(nn.functional.cross_entropy, labels(4, seed=step))).backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()


def test_a_method_gets_the_dimensions_that_it_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "by_chance": _by_chance})
    monkeypatch.setattr(
        methods, "METHOD_DIMS", {"by_chance": ("heads", "hidden", "stream"), "uniform": ("heads", "hidden", "out")}
    )
    plan = p3b.Schedule(start=1, sparse=5, final=7, update_every=2)
    for method, gates in (
        ("by_chance", {"attn.heads", "mlp.hidden", "stream"}),
        ("uniform", {"attn.heads", "attn.out", "mlp.hidden", "mlp.out"}),
    ):
        model = tiny_vit().train()
        dense = parameters_of(model)
        pruner = p3b.Pruner(model, 0.4, method, plan)
        assert {gate.split(".", 2)[-1] for gate in pruner.gates.masks} == gates
        assert pruner.kept_params() == dense
        _trained(pruner, model, plan.final)
        state = pruner.state_dict()
        resumed = p3b.Pruner(deepcopy_without_gates(model, pruner), 0.4, method, plan)
        resumed.load_state_dict(state)
        assert resumed.kept_params() == pruner.kept_params() < dense
        pruner.decide_last()
        with torch.no_grad():
            masked = model.eval()(images())
            small = pruner.shrink()
            torch.testing.assert_close(small(images()), masked, rtol=0, atol=1e-4)
        assert pruner.kept_params() == parameters_of(small)
        assert torch.equal(p3b.load(p3b.save(small, tmp_path / method))(images()), small(images()))


def deepcopy_without_gates(model: nn.Module, pruner: p3b.Pruner) -> nn.Module:
    pruner.gates.detach()
    copy = deepcopy(model)
    pruner.gates.attach(model)
    return copy


def test_all_methods_of_before_keep_their_dimensions() -> None:
    assert methods.METHOD_DIMS.keys().isdisjoint(("block_benefit", "uniform", "random", "magnitude", "taylor"))
    for method in ("block_pr", "block_benefit", "uniform"):
        assert methods.method_dims(method, {}) == DEFAULT_DIMS
