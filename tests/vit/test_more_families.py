"""BEiT, relative positions, Qwen3, NaFlexVit, hybrids, Swin and Hiera: the laws of pruning on a tiny model of each."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import VitCfg
from torch import Tensor, nn

from kinds import POOLED as HIERA
from loops import CE
from p3b import Pruner, Schedule, load, save
from p3b.deploy.choice import with_layout
from p3b.errors import ModelError
from p3b.storage.artifact import model_config
from p3b.storage.models import build_model
from p3b.storage.outline import outline
from p3b.storage.weights import load_weights
from p3b.vit.architecture import build_skeleton, check_description, describe_dense
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import count_macs, count_parameters, kept_channels, model_macs
from p3b.vit.families import images_of
from p3b.vit.fresh import initialise
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, DIMS, ModelLayout, read_layout
from p3b.vit.parts import NoBlock
from p3b.vit.taps import Taps
from thinning import thinned
from tiny import CLASSES, parameters_of

Masks = dict[str, Tensor]

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 3),
    "window_size": 4,
}


def _with_convolutions(**arguments: Any) -> HybridEmbed:
    """The patch embedding of MobileCLIP."""
    stem = ConvStem(channels=(8, 8, 24), stride=(2, 2, 2), kernel_size=(2, 2, 2), padding=0, act_layer=nn.GELU)
    return HybridEmbed(stem, proj=False, **arguments)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BEiT": ("beit_base_patch16_224", VIT),
    "BEiT, no biases": ("beit_base_patch16_224", {**VIT, "use_rel_pos_bias": False, "qkv_bias": False, "init_values": None}),
    "BEiT, gated": ("beitv2_base_patch16_224", {**VIT, "swiglu_mlp": True, "scale_mlp": True}),
    "positions by a network": ("vit_relpos_base_patch16_224", {**VIT, "qk_norm": True}),
    "positions from a table": ("vit_relpos_medium_patch16_cls_224", {**VIT, "rel_pos_type": "bias"}),
    "shared positions": ("vit_srelpos_medium_patch16_224", VIT),
    "Qwen3": ("qwen3_vit_88m", {**VIT, "pos_embed_grid_size": 4}),
    "Qwen3, merged": ("qwen3_vit_88m_merge", {**VIT, "pos_embed_grid_size": 4}),
    "NaFlex": ("naflexvit_base_patch16_gap", {**VIT, "pos_embed_grid_size": (4, 4)}),
    "NaFlex, two tables": ("naflexvit_base_patch16_parfac_gap", {**VIT, "pos_embed_grid_size": (3, 3), "class_token": True}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {**VIT, "img_size": 64}),
    "ViTamin": ("vitamin_small_224", {**VIT, "img_size": 64, "patch_size": 1, "embed_cfg": VitCfg((8, 12, 24), (1, 2), 8)}),
    "convolutions in front": ("vit_tiny_patch16_224", {**VIT, "patch_size": 1, "embed_layer": _with_convolutions}),
    "SAM": (
        "samvit_base_patch16",
        {**VIT, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8, "global_pool": "avg"},
    ),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
    "Swin v2": ("swinv2_tiny_window8_256", SWIN),
    "Swin v2, no biases": ("swinv2_base_window12to24_192to384", {**SWIN, "qkv_bias": False}),
    "Swin v2, a window wider than the last map": (
        "swinv2_tiny_window16_256",
        {**SWIN, "img_size": 32, "depths": (2, 2), "window_size": 16},
    ),
    "Hiera": ("hiera_tiny_224", HIERA),
    "Hiera, positions in windows": ("hiera_small_abswin_256", {**HIERA, "global_pos_size": (3, 3)}),
    "Hiera, a stage that is not pooled": ("hiera_tiny_224", {**HIERA, "q_pool": 1, "mask_unit_attn": (True, False, False)}),
}
WITHOUT_STREAM = {
    "shared positions": "whole heads cannot be pruned",
    "Qwen3, merged": "encoder.merger",
    "SAM": "the convolutions behind the blocks",
    **dict.fromkeys((kind for kind in MODELS if kind.startswith(("Swin", "Hiera"))), "a residual stream of its own width"),
}
LARGER = {
    "BEiT": 48,
    "positions by a network": 48,
    "positions from a table": 48,
    "Qwen3": 48,
    "NaFlex": 48,
    "ViTamin": 96,
    "SAM": 48,
    "Swin": 36,
    "Swin v2": 36,
}
"""Another image size, where the model takes one."""


def _tiny(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    name, arguments = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=CLASSES, **arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().to(dtype)


def _images(model: nn.Module, count: int = 2, *, side: int | None = None, seed: int = 1) -> Tensor:
    channels, height, width = images_of(model).shape
    shape = (count, channels, side or height, side or width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)


def _masks(layout: ModelLayout, keep: float, *gone: str) -> Masks:
    generator = torch.Generator().manual_seed(int(100 * keep))
    masks = {
        gate: (torch.rand(size, generator=generator) < keep).double() * (not gate.endswith(gone) if gone else 1)
        for gate, size in layout.gates.items()
    }
    return masks | ({"stream": masks["stream"].index_fill(0, torch.tensor(0), 1)} if "stream" in masks else {})


def _gated(model: nn.Module, layout: ModelLayout, masks: Masks) -> nn.Module:
    gated = deepcopy(model)
    gates = Gates(layout, gated)
    gates.attach(gated)
    gates.set(masks)
    return gated


def _small(kind: str) -> nn.Module:
    model = _tiny(kind)
    layout = read_layout(model)
    return apply_cuts(model, plan_cuts(layout, _masks(layout, 0.5, "1.mlp.out")))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_gates_of_ones_change_no_bit_and_come_off(kind: str) -> None:
    model = _tiny(kind)
    layout, batch = read_layout(model), _images(model)
    before = model(batch)
    gates = Gates(layout, model)
    gates.attach(model)
    gates.set({gate: torch.ones(size) for gate, size in layout.gates.items()})
    assert torch.equal(model(batch), before)
    gates.set(_masks(layout, 0.5))
    assert not torch.allclose(model(batch), before)
    gates.detach()
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_small_equals_masked_and_is_as_large_as_planned(kind: str) -> None:
    model = _tiny(kind)
    layout, batch = read_layout(model), _images(model)
    everything_gone = [f"{block.name}.out" for block in layout.blocks[:2]]
    for keep, gone in ((0.5, ()), (0.6, ("0.attn.in", "0.mlp.in", "1.attn.head")), (0.7, ("1.mlp.hidden", *everything_gone))):
        masks = _masks(layout, keep, *gone)
        plan = plan_cuts(layout, masks)
        masked, small = _gated(model, layout, masks), apply_cuts(deepcopy(model), plan)  # type: ignore[arg-type]
        torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)
        torch.testing.assert_close(small.forward_features(batch), masked.forward_features(batch), rtol=0, atol=1e-10)
        assert plan.params == parameters_of(small)
    assert any(isinstance(module, NoBlock) for module in small.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_multiplications_are_those_that_are_counted(kind: str) -> None:
    model = _tiny(kind)
    layout, size = read_layout(model), images_of(model).size
    masks = _masks(layout, 0.5)
    kept = {block.name: {dim: int(n) for dim, n in kept_channels(block, masks).items()} for block in layout.blocks}
    dense = {block.name: {} for block in layout.blocks}
    small = apply_cuts(deepcopy(model), plan_cuts(layout, masks))  # type: ignore[arg-type]
    assert model_macs(layout, dense, 0) - model_macs(layout, kept, 0) == count_macs(model, size) - count_macs(small, size)


@pytest.mark.parametrize("dims", [DIMS, ("heads", "hidden", "stream")])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in WITHOUT_STREAM])
@torch.no_grad()
def test_whole_heads_and_the_stream_are_exact_too(kind: str, dims: tuple[str, ...]) -> None:
    model = _tiny(kind)
    layout, batch = read_layout(model, dims), _images(model)
    masks = _masks(layout, 0.6)
    plan = plan_cuts(layout, masks)
    masked, small = _gated(model, layout, masks), apply_cuts(model, plan)  # type: ignore[arg-type]
    torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)
    assert plan.params == parameters_of(small)


@pytest.mark.parametrize(("kind", "reason"), WITHOUT_STREAM.items())
def test_where_the_stream_cannot_be_pruned_it_is_said(kind: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_layout(_tiny(kind), DIMS)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_saved_model_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    small = _small(kind)
    again = load(save(small, tmp_path))
    batch = _images(small)
    assert torch.equal(again(batch), small(batch))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in small.state_dict().items()
    }


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # where it resizes a table of positions
@pytest.mark.parametrize(
    ("kind", "gone"),
    thinned(LARGER, [(), ("0.attn.out", "0.mlp.out", "1.attn.in"), ("1.attn.out", "1.mlp.out", "0.attn.in")], 3),
)
@torch.no_grad()
def test_another_image_size(kind: str, gone: tuple[str, ...], tmp_path: Path) -> None:
    model = _tiny(kind)
    layout = read_layout(model)
    masks = _masks(layout, 0.5, *gone)
    small = apply_cuts(deepcopy(model), plan_cuts(layout, masks))  # type: ignore[arg-type]
    side = LARGER[kind]
    masked, batch = model, _images(model, side=side)
    for each in (masked, small):
        if hasattr(each, "set_input_size"):
            each.set_input_size(img_size=(side, side))
    torch.testing.assert_close(small(batch), _gated(masked, layout, masks)(batch), rtol=0, atol=1e-10)
    assert torch.equal(load(save(small, tmp_path))(batch), small(batch))


@pytest.mark.parametrize(
    "kind", ["BEiT", "positions by a network", "Qwen3", "NaFlex", "ViTamin", "SAM", "Swin", "Swin v2", "Hiera"]
)
def test_the_benefit_of_every_block_is_measured(kind: str) -> None:
    model = _tiny(kind, torch.float32).train()
    dense = count_parameters(model)
    taken_along = max(parameters_of(getattr(module, "cpb_mlp", nn.Identity())) for module in model.modules())
    """What the last element of a block of Swin v2 takes along: the network that gives the biases."""
    pruner = Pruner(model, 0.3, schedule=Schedule(start=0, sparse=2, final=2, update_every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    benefits = None
    while not pruner.done:
        batch, targets = _images(model, 4, seed=pruner.steps_done), torch.arange(4)
        (CE(model(batch), targets) + pruner.loss(CE, targets)).backward()
        decision = pruner.step()
        benefits = benefits if decision is None else [block.benefit_patch for block in decision.blocks]
        optimizer.step()
        optimizer.zero_grad()
    assert benefits is not None and len(benefits) == len(read_layout(_tiny(kind)).blocks) and all(benefits)
    assert abs(count_parameters(pruner.finalize()) - 0.7 * dense) < 0.01 * dense + taken_along


def test_a_stage_of_a_hierarchy_has_a_stream_of_its_own() -> None:
    model = _tiny("Swin")
    taps = Taps()
    taps.attach(model)  # type: ignore[arg-type]
    model(_images(model))
    features = taps.take()
    assert [tuple(x_SND.shape) for x_SND in features] == [(2, 196, 12)] * 5 + [(2, 49, 24)] * 3
    assert [(stage.width, stage.grid, len(stage.blocks)) for stage in read_layout(model).stages] == [
        (12, (14, 14), 4),
        (24, (7, 7), 2),
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_heads": [2]}, "num_heads has 1 entries for 2 stages"),
        ({"num_heads": [5, 3]}, "cannot be shared among 5 heads"),
        ({"depths": [2, 1 << 40]}, "expected a list of numbers of blocks"),
        ({"depths": [1000, 1000]}, "more than 1024 blocks"),
    ],
)
def test_a_description_of_a_hierarchy_that_cannot_be_is_refused(changed: dict[str, Any], reason: str) -> None:
    architecture = describe_dense(_tiny("Swin"))
    with pytest.raises(ModelError, match=reason):
        check_description({**architecture, "arguments": {**architecture["arguments"], **changed}})


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("beit_base_patch16_224", {"depth": 1}),
        ("vit_relpos_medium_patch16_cls_224", {"depth": 1}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("swinv2_base_window12to16_192to256", {"depths": (1, 1, 1, 1)}),
        ("qwen3_vit_88m_enc", {"depth": 1}),
        ("samvit_base_patch16", {"depth": 3}),
        ("hiera_base_plus_224", {"stages": (1, 2, 1, 2)}),
        ("hiera_small_abswin_256", {"stages": (1, 2, 1, 2)}),
    ],
)
def test_real_shapes_are_described_well_enough_to_be_built_again(name: str, depth: dict[str, Any]) -> None:
    model = outline(name, **depth)
    again = build_skeleton(model_config(model)["architecture"])
    shapes, found = ({key: value.shape for key, value in each.state_dict().items()} for each in (model, again))
    assert found == shapes
    assert read_layout(model, DEFAULT_DIMS).blocks


@pytest.mark.parametrize(
    "kind", ["BEiT", "Qwen3", "NaFlex", "hybrid", "convolutions in front", "SAM", "Swin", "Swin v2", "Hiera"]
)
def test_the_command_line_builds_it_from_weights(kind: str, tmp_path: Path) -> None:
    (name, arguments), trained = MODELS[kind], _tiny(kind, torch.float32)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    model, report = build_model(name, num_classes=CLASSES, model_kwargs=arguments, seed=1, weights=tmp_path / "trained.pth")
    assert report is not None and not report.missing and not report.replaced
    assert images_of(model).size == (arguments["img_size"],) * 2
    batch = _images(trained)
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), trained(batch))


def test_weights_of_a_stem_with_stages_are_not_taken_for_another_network() -> None:
    source, target = _tiny("ViTamin", torch.float32), _tiny("ViTamin", torch.float32)
    initialise(target)  # type: ignore[arg-type]
    report = load_weights(target, source.state_dict(), "file")
    assert not report.missing and not report.unexpected
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize(
    "kind", ["BEiT", "positions by a network", "Qwen3", "NaFlex", "ViTamin", "SAM", "Swin", "Swin v2", "Hiera"]
)
def test_fresh_weights_leave_no_value_of_the_trained_ones(kind: str) -> None:
    small = _small(kind)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    initialise(small)  # type: ignore[arg-type]
    same = [key for key, value in small.state_dict().items() if value.numel() and torch.equal(value, before[key])]
    assert not same
    assert small(_images(small)).isfinite().all()


@pytest.mark.parametrize("kind", ["Qwen3", "SAM", "Swin", "Hiera"])
def test_the_basis_of_its_heads_stays_in_one_shot(kind: str) -> None:
    """Regression: blocks that do not lie in `model.blocks` ended a run in one shot."""
    model = _tiny(kind, torch.float32)
    batch, targets = _images(model), torch.arange(2)
    pruner = Pruner(model, 0.3, method="taylor")
    pruner.calibrate([(batch, targets)], CE)
    pruner.decide_last()
    with torch.no_grad():
        masked = model.eval()(batch)
        torch.testing.assert_close(pruner.shrink()(batch), masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hybrid", "BEiT", "SAM", "Swin", "Swin v2", "Hiera"])
@pytest.mark.parametrize("layout", ["balanced", "reordered"])
@torch.no_grad()
def test_every_layout_is_exact_or_leaves_the_model_as_it_is(kind: str, layout: str) -> None:
    small = _small(kind)
    batch = _images(small)
    torch.testing.assert_close(with_layout(small, layout)(batch), small(batch), rtol=0, atol=1e-10)
