"""The map covers every parameter of a block once, and refuses by name what the method's arithmetic does not cover."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from timm.layers import GatedMlp, LayerNorm, SimpleNorm
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.weights import expand_along, split_axis
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import dense_params
from p3b.vit.layout import read_layout
from tiny import VARIANTS, parameters_of, random_masks, tiny_vit


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_a_block_is_mapped_once_with_its_shape(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    layout = read_layout(model)
    keys = [weight.key for block in layout.blocks for weight in block.weights]
    assert sorted(keys) == sorted(key for key, _ in model.named_parameters() if key.startswith("blocks."))
    for block in layout.blocks:
        for weight in block.weights:
            sizes = [[block.dims.get(f, f) if isinstance(f, str) else f for f in axis] for axis in weight.axes]
            assert tuple(math.prod(axis) for axis in sizes) == model.get_parameter(weight.key).shape
    assert sum(map(dense_params, layout.blocks)) + layout.other_params == parameters_of(model)


def test_blocks_come_in_network_order_with_their_dimensions() -> None:
    layout = read_layout(tiny_vit(depth=3))
    assert [block.name for block in layout.blocks] == [f"blocks.{d}.{kind}" for d in range(3) for kind in ("attn", "mlp")]
    assert layout.blocks[0].dims == {"in": 24, "head": 8, "out": 24}
    assert layout.blocks[1].dims == {"in": 24, "hidden": 96, "out": 24}
    assert (layout.blocks[0].heads, layout.blocks[1].heads) == (3, 1)
    assert (layout.blocks[0].inner, layout.blocks[1].inner) == ((3, "head"), ("hidden",))
    assert layout.blocks[3].gate("hidden") == "blocks.1.mlp.hidden"


@pytest.mark.parametrize(
    ("variant", "prefix", "cls", "tokens"),
    [("plain", 1, True, 17), ("distilled", 2, True, 18), ("no class token", 0, False, 16), ("registers", 3, True, 19)],
)
def test_tokens_before_the_patches_are_told_apart(variant: str, prefix: int, cls: bool, tokens: int) -> None:
    layout = read_layout(tiny_vit(**VARIANTS[variant]))
    assert (layout.prefix_tokens, layout.has_class_token, layout.tokens, layout.grid) == (prefix, cls, tokens, (4, 4))
    assert (layout.width, layout.num_classes) == (24, 5)


def test_every_gate_multiplies_its_dimension() -> None:
    for block in read_layout(tiny_vit()).blocks:
        gated = {dim for weight in block.weights for _axis, dim in weight.gated}
        assert gated == set(block.dims)


def test_a_vector_along_an_axis_and_the_axis_in_factors_agree() -> None:
    vector = torch.arange(4.0)
    along = expand_along(vector, (3, 2, "head"), "head", {"head": 4})
    assert torch.equal(split_axis(along, 0, (3, 2, "head"), {"head": 4}), vector.expand(3, 2, 4))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"block_fn": ParallelScalingBlock}, "blocks.0: ParallelScalingBlock"),
        ({"block_fn": ResPostBlock}, "blocks.0: ResPostBlock"),
        ({"mlp_layer": GatedMlp}, "blocks.0.mlp: GatedMlp"),
        ({"attn_layer": "diff"}, "blocks.0.attn: DiffAttention"),
        ({"norm_layer": SimpleNorm}, "blocks.0.norm1: SimpleNorm"),
    ],
)
def test_a_block_of_another_kind_is_refused_by_its_name(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_layout(tiny_vit(**changed))


def test_a_single_foreign_part_in_a_later_block_is_found() -> None:
    model = tiny_vit(depth=3)
    model.blocks[2].norm2 = nn.BatchNorm1d(24)
    with pytest.raises(ModelError, match=r"blocks\.2\.norm2: BatchNorm1d"):
        read_layout(model)


def test_plain_torch_norms_are_covered() -> None:
    model = tiny_vit()
    model.blocks[0].norm1 = nn.LayerNorm(24)
    assert type(model.blocks[0].norm2) is LayerNorm
    assert read_layout(model).blocks[0].dims["in"] == 24


def test_other_networks_are_refused_with_an_example_of_what_is_covered() -> None:
    for network in (timm.create_model("resnet18"), nn.Linear(2, 2)):
        with pytest.raises(ModelError, match=r"Only timm VisionTransformer models can be pruned.*deit_small"):
            read_layout(network)


def test_a_convolutional_patch_embedding_is_refused() -> None:
    model = tiny_vit()
    model.patch_embed = nn.Conv2d(3, 24, 8, 8)
    with pytest.raises(ModelError, match="patch_embed: Conv2d"):
        read_layout(model)


@pytest.mark.parametrize("gate", ["attn.in", "attn.head", "attn.out", "mlp.in", "mlp.hidden", "mlp.out", ""])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_pruned_model_is_not_taken_for_a_dense_one(gate: str, keep: float) -> None:
    model = tiny_vit()
    layout = read_layout(model)
    masks = random_masks(layout, keep=keep, only=gate)
    small = apply_cuts(model, plan_cuts(layout, masks))
    assert parameters_of(small) < parameters_of(tiny_vit())
    for pruned in (small, deepcopy(small)):
        with pytest.raises(ModelError, match=r"blocks\.0.*pruned already"):
            read_layout(pruned)


def test_a_model_of_which_nothing_was_cut_is_still_dense() -> None:
    model = tiny_vit()
    layout = read_layout(model)
    assert read_layout(apply_cuts(model, plan_cuts(layout, random_masks(layout, keep=1.1)))) == layout
