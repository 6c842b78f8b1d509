"""Hiera: what other hierarchies do not have. Tokens lie unrolled, and a stage begins inside a block, which pools them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.hiera import Hiera
from torch import Tensor, nn

from kinds import POOLED as SHAPE
from loops import CE
from p3b import Pruner, Schedule, load, save
from p3b.errors import ModelError
from p3b.scoring.maps import as_map
from p3b.vit.architecture import check_description, describe_dense
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout, read_layout
from p3b.vit.parts import ConstantBranch, NoBlock, NoBranch
from p3b.vit.tails import MiddleClassifiers
from p3b.vit.taps import Taps
from tiny import CLASSES, images, parameters_of, random_masks, soft_random_masks

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "projected": ("hiera_tiny_224", SHAPE),
    "maximum and mean": ("hiera_small_abswin_256", {**SHAPE, "global_pos_size": (3, 3)}),
}


def _tiny(kind: str = "projected", dtype: torch.dtype = torch.float64, **changed: Any) -> Hiera:
    name, arguments = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **{"num_classes": CLASSES, **arguments, **changed})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().to(dtype)


def _gated(model: nn.Module, layout: ModelLayout, masks: dict[str, Tensor]) -> nn.Module:
    gated = deepcopy(model)
    gates = Gates(layout, gated)
    gates.attach(gated)
    gates.set(masks)
    return gated


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_map_is_what_timm_rolls_up(kind: str) -> None:
    model = _tiny(kind)
    taps = Taps()
    with torch.enable_grad():
        taps.attach(model)  # type: ignore[arg-type]
        model(images(dtype=torch.float64))
    features = iter(taps.take())
    for depth, stage in zip(model.stage_ends, read_layout(model).stages, strict=True):
        for x_SND in [next(features) for _ in range(len(stage.blocks) + 1)]:
            expected_SHWD = model.reroll(x_SND, depth)
            assert torch.equal(as_map(x_SND, stage), expected_SHWD.permute(0, 3, 1, 2))
            assert expected_SHWD.shape[1:3] == stage.grid


def test_a_map_of_pixels_comes_out_in_the_order_of_the_image() -> None:
    model = _tiny()
    rows, columns = model.tokens_spatial_shape
    places_SNC = torch.arange(float(rows * columns)).view(1, -1, 1)
    maps_SCHW = as_map(model.unroll(places_SNC), read_layout(model).stages[0])
    assert torch.equal(maps_SCHW.flatten(), torch.arange(float(rows * columns)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_stage_begins_with_what_its_first_block_has_pooled(kind: str) -> None:
    model, batch, taps = _tiny(kind), images(dtype=torch.float64), Taps()
    before: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _block, inputs: before.append(inputs[0]))
    taps.attach(model)  # type: ignore[arg-type]
    with torch.enable_grad():
        model(batch)
    features = taps.take()
    block = deepcopy(model.blocks[1])
    block.attn.proj.weight.zero_(), block.attn.proj.bias.zero_()
    block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
    assert [x_SND.shape[1:] for x_SND in features] == [(64, 12)] * 3 + [(16, 24)] * 5 + [(4, 48)] * 3
    torch.testing.assert_close(features[3], block(before[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", [("attn.out",), ("attn.in",), ("attn.head", "mlp.in"), ("attn.out", "mlp.out")])
@torch.no_grad()
def test_a_block_that_pools_stays_whatever_its_branches_become(kind: str, gone: tuple[str, ...], tmp_path: Path) -> None:
    model, batch = _tiny(kind), images(dtype=torch.float64)
    layout = read_layout(model)
    masks = random_masks(layout, keep=0.6)
    for gate in masks:
        if gate.startswith(("blocks.1.", "blocks.3.")) and gate.endswith(gone):
            masks[gate].zero_()
    plan = plan_cuts(layout, masks)
    masked, small = _gated(model, layout, masks), apply_cuts(deepcopy(model), plan)  # type: ignore[arg-type]
    torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)
    assert plan.params == parameters_of(small)
    assert isinstance(small.blocks[1].attn, ConstantBranch | NoBranch)
    assert not any(isinstance(block, NoBlock) for block in small.blocks)
    assert torch.equal(load(save(small, tmp_path))(batch), small(batch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", ["in", "head", "heads", "out", "hidden"])
@torch.no_grad()
def test_every_gate_alone_is_exact(kind: str, dim: str) -> None:
    model, batch = _tiny(kind), images(dtype=torch.float64)
    layout = read_layout(model, (dim,))
    masks = random_masks(layout, keep=0.6)
    masked, small = _gated(model, layout, masks), apply_cuts(deepcopy(model), plan_cuts(layout, masks))  # type: ignore[arg-type]
    torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)
    assert not torch.allclose(small(batch), model(batch))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_of_all_stages_are_those_of_the_masked_model(kind: str, tmp_path: Path) -> None:
    model, batch = _tiny(kind, num_classes=0), images(dtype=torch.float64)
    layout = read_layout(model)
    masks = random_masks(layout)
    masked, small = _gated(model, layout, masks), apply_cuts(deepcopy(model), plan_cuts(layout, masks))  # type: ignore[arg-type]
    again = load(save(small, tmp_path))
    for one in (small, again):
        found, expected = (each.forward_intermediates(batch, intermediates_only=True) for each in (one, masked))
        assert [tuple(x.shape[1:]) for x in found] == [(12, 8, 8), (24, 4, 4), (48, 2, 2)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(one(batch), masked(batch), rtol=0, atol=1e-10)


@torch.no_grad()
def test_pooled_queries_are_exact_behind_soft_masks_too() -> None:
    """A gate above zero goes through the maximum: weights that are scaled equal activations that are."""
    model, batch = _tiny(), images(dtype=torch.float64)
    layout = read_layout(model)
    masks = {gate: mask.double() for gate, mask in soft_random_masks(layout).items()}
    by_hand = deepcopy(model)
    for depth, block in enumerate(by_hand.blocks):
        attn, mlp = f"blocks.{depth}.attn", f"blocks.{depth}.mlp"
        heads, head = (3, block.attn.heads), masks[f"{attn}.head"]
        block.attn.register_forward_pre_hook(lambda _m, args, m=masks[f"{attn}.in"]: (args[0] * m,))
        block.attn.qkv.register_forward_hook(
            lambda _m, _i, out, heads=heads, m=head: (out.unflatten(-1, (*heads, len(m))) * m).flatten(-3)
        )
        block.attn.register_forward_hook(lambda _m, _i, out, m=masks[f"{attn}.out"]: out * m)
        block.mlp.register_forward_pre_hook(lambda _m, args, m=masks[f"{mlp}.in"]: (args[0] * m,))
        block.mlp.act.register_forward_hook(lambda _m, _i, out, m=masks[f"{mlp}.hidden"]: out * m)
        block.mlp.register_forward_hook(lambda _m, _i, out, m=masks[f"{mlp}.out"]: out * m)
    torch.testing.assert_close(_gated(model, layout, masks)(batch), by_hand(batch), rtol=0, atol=1e-10)


def test_timm_opens_a_saved_one_and_knows_its_head(tmp_path: Path) -> None:
    model = _tiny(dtype=torch.float32)
    save(apply_cuts(model, plan_cuts(layout := read_layout(model), random_masks(layout))), tmp_path)  # type: ignore[arg-type]
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(opened(images()), load(tmp_path)(images()))
    assert opened.get_submodule(opened.pretrained_cfg["classifier"]) is opened.get_classifier()


@pytest.mark.parametrize("estimator", ["low_rank", "linear", "paper"])
def test_every_estimator_measures_a_block_in_its_stage(estimator: str) -> None:
    model = _tiny(dtype=torch.float32).train()
    pruner = Pruner(model, 0.3, estimator=estimator, schedule=Schedule(start=0, sparse=2, final=2, update_every=1))
    targets, benefits = torch.arange(4), []
    while not pruner.done:
        (CE(model(images(4, seed=pruner.steps_done)), targets) + pruner.loss(CE, targets)).backward()
        decision = pruner.step()
        benefits += [] if decision is None else [[block.benefit_patch for block in decision.blocks]]
    assert len(benefits[0]) == 8 and all(benefits[0])
    pruner.detach()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"q_pool": 3}, "q_pool is 3 for 3 stages"),
        ({"mask_unit_attn": [True]}, "mask_unit_attn has 1 entries for 3 stages"),
        ({"num_heads": 5}, "cannot be shared among 5 heads"),
        ({"dim_mul": 1.0}, "each stage has to be wider"),
        ({"dim_mul": 3.0, "use_expand_proj": False}, "twice as wide"),
        ({"dim_mul": 65536.0}, "65536 channels"),
        ({"stages": [1000, 1000, 1]}, "more than 1024 blocks"),
        ({"img_size": [33, 32]}, "do not go together"),
        ({"mask_unit_size": [3, 4]}, "do not go together"),
        ({"patch_kernel": [900, 7]}, "do not go together"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changed: dict[str, Any], reason: str) -> None:
    architecture = describe_dense(_tiny())
    with pytest.raises(ModelError, match=reason):
        check_description({**architecture, "arguments": {**architecture["arguments"], **changed}})


def test_what_is_not_covered_is_refused_in_words() -> None:
    dropping, video, odd = _tiny(patch_drop_rate=0.5), _tiny(), _tiny()
    video.patch_embed.proj = nn.Conv3d(3, 12, 3)
    odd.unroll.schedule = odd.unroll.schedule[:1]
    for model, reason in ((dropping, "mask units that are dropped"), (video, "with Conv3d"), (odd, "the order of the tokens")):
        with pytest.raises(ModelError, match=reason):
            read_layout(model)
    features = timm.create_model("hiera_tiny_224", features_only=True, out_indices=(0, 1), **SHAPE)
    with pytest.raises(ModelError, match="3 are left of 4"):
        read_layout(features.model)
    with pytest.raises(ModelError, match="Classifiers behind blocks in the middle"):
        MiddleClassifiers(_tiny(), (2,))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_backbone_of_all_its_stages_is_pruned_and_saved(tmp_path: Path) -> None:
    features = timm.create_model("hiera_tiny_224", features_only=True, out_indices=(0, 1, 2), **SHAPE).double().eval()
    layout = read_layout(features.model)
    masks, batch = random_masks(layout), images(dtype=torch.float64)
    masked = deepcopy(features)
    gates = Gates(layout, masked.model)
    gates.attach(masked.model)
    gates.set(masks)
    features.model = apply_cuts(features.model, plan_cuts(layout, masks))
    torch.testing.assert_close(features(batch), masked(batch), rtol=0, atol=1e-10)
    again = load(save(features.model, tmp_path))
    assert torch.equal(again.forward_features(batch), features.model.forward_features(batch))
