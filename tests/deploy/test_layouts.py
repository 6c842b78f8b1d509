"""A layout changes how a small model is carried out, never what it computes nor what is saved of it."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from layouts import OnnxModel
from p3b.deploy.layouts import GATHER_COST, LAYOUTS, ROWS, BranchPlan, apply_layout, plan_layout
from p3b.deploy.sides import GatherNorm, GatherWrite, SliceNorm, SliceWrite
from p3b.errors import ConfigError, ModelError
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.deployment import compact_of, layout_of
from p3b.vit.layout import ModelLayout, read_layout
from p3b.vit.shapes import branch_shapes
from thinning import thinned
from tiny import VARIANTS, images, random_masks, tiny_vit

FORMS = ("whole", "small", "constant", "gone")


def _small(variant: str = "plain", *, seed: int = 0, keep: float = 0.6, depth: int = 4, **changed: object) -> VisionTransformer:
    """Six blocks: two small ones, a whole one, a constant, and a timm block that is gone; fewer of a lower depth."""
    dense = tiny_vit(depth=depth, dtype=torch.float64, seed=seed, **{**VARIANTS[variant], **changed})
    layout = read_layout(dense)
    masks = random_masks(layout, seed, keep)
    for name, mask in masks.items():
        if name.startswith("blocks.1.mlp"):
            mask.fill_(1)
        if name.startswith("blocks.2.attn.in"):
            mask.fill_(0)
        if name.startswith("blocks.3") and name.endswith("out"):
            mask.fill_(0)
        mask[0] = 1 if name.endswith(("head", "hidden")) else mask[0]
    return apply_cuts(dense, plan_cuts(layout, masks))


def _outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images(3, dtype=torch.float64))


def _laid_out(model: VisionTransformer, name: str) -> VisionTransformer:
    return apply_layout(model, plan_layout(model, name))


@pytest.mark.parametrize(("variant", "layout"), thinned(VARIANTS, LAYOUTS, 3))
def test_every_layout_computes_what_the_compact_model_computes(variant: str, layout: str) -> None:
    small = _small(variant, seed=len(layout) % 3)
    forms = {shape.form for shape in branch_shapes(small)}
    assert {"whole", "small", "gone"} <= forms <= set(FORMS)
    assert ("constant" in forms) == ("no bias" not in variant)
    laid = _laid_out(small, layout)
    expected, got = _outputs(small), _outputs(laid)
    assert layout_of(laid) == layout
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (laid is small) == (layout == "index")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forms_that_masks_seldom_make_are_exact_too(layout: str) -> None:
    """One channel of each, all channels on one side, neighbours alone, and a head that is padded."""
    for keep in ("one", "inputs", "outputs", "first half"):
        dense = tiny_vit(dtype=torch.float64, init_values=0.3, embed_dim=48)
        masks = random_masks(read_layout(dense), seed=3, keep=0.8)
        for name, mask in masks.items():
            if keep == "one":
                mask.copy_(torch.eye(len(mask))[len(mask) // 2])
            elif keep == "first half":
                mask.copy_((torch.arange(len(mask)) < len(mask) // 2).float())
            elif name.endswith("in" if keep == "inputs" else "out"):
                mask.fill_(1)
        small = apply_cuts(dense, plan_cuts(read_layout(dense), masks))
        expected, got = _outputs(small), _outputs(_laid_out(small, layout))
        assert (got - expected).abs().max() <= 1e-12 * expected.abs().max(), keep


@pytest.mark.parametrize(("first", "second"), thinned(LAYOUTS, LAYOUTS, 3, whole=0))
def test_a_layout_of_a_layout_is_made_of_the_compact_model(first: str, second: str) -> None:
    small = _small("layer scale")
    again, once = _laid_out(_laid_out(small, first), second), _laid_out(small, second)
    assert layout_of(again) == second
    assert compact_of(again) is small
    assert torch.equal(_outputs(again), _outputs(once))


def test_making_a_layout_changes_nothing_in_the_compact_model() -> None:
    small = _small()
    state, modules = deepcopy(small.state_dict()), [id(module) for module in small.modules()]
    for layout in LAYOUTS:
        _laid_out(small, layout)
    assert [id(module) for module in small.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "index"])
def test_a_laid_out_model_cannot_be_trained(layout: str) -> None:
    laid = _laid_out(_small(), layout)
    with pytest.raises(ModelError, match=f"'{layout}' is for inference alone.*p3b.with_layout"):
        laid.train()
    assert not any(parameter.requires_grad for parameter in laid.parameters())
    assert not laid.eval().training
    compact_of(laid).train()


def test_the_compact_model_follows_to_another_dtype() -> None:
    laid = _laid_out(_small(), "balanced").to(torch.float32)
    compact = compact_of(laid)
    assert {parameter.dtype for parameter in compact.parameters()} == {torch.float32}
    assert layout_of(compact) == "index"


def test_a_dense_model_has_nothing_to_lay_out_but_its_channels() -> None:
    dense = tiny_vit(dtype=torch.float64)
    for layout in LAYOUTS:
        laid = _laid_out(dense, layout)
        torch.testing.assert_close(_outputs(laid), _outputs(dense), rtol=1e-12, atol=1e-12)
        assert (laid is dense) == (layout != "reordered")


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="balanced"):
        plan_layout(_small(), "balansed")


def test_reordering_is_refused_where_pooling_is_attention() -> None:
    dense = tiny_vit(class_token=False, global_pool="map")
    small = apply_cuts(dense, plan_cuts(read_layout(dense), random_masks(read_layout(dense))))
    with pytest.raises(ModelError, match=r"attn_pool.*'balanced'"):
        plan_layout(small, "reordered")
    expected = small(images())
    torch.testing.assert_close(_laid_out(small, "balanced")(images()), expected)


# --- what the plans say


def _plans(layout: str, **changed: object) -> tuple[list[BranchPlan], VisionTransformer]:
    small = _small(**changed)  # type: ignore[arg-type]
    return [plan for plan in plan_layout(small, layout).branches if plan.touched], small


def test_aligned_layouts_pad_rows_to_the_unit_and_heads_by_little() -> None:
    for layout in ("gathered", "zeros", "balanced", "reordered"):
        laid = _laid_out(_small(embed_dim=48, num_heads=2), layout)
        for block, shape in zip(laid.blocks[:2], branch_shapes(compact_of(laid))[1:4:2], strict=True):
            if shape.form == "small":
                assert block.mlp.fc1.out_features % ROWS == 0
                assert 0 <= block.mlp.fc1.out_features - shape.inner < ROWS
                assert block.mlp.fc2.out_features % ROWS == 0
    heads = {}
    for kept in range(1, 25):
        dense = tiny_vit(embed_dim=48, num_heads=2, dtype=torch.float64)
        masks = random_masks(read_layout(dense), keep=1.1)
        masks["blocks.0.attn.head"] = (torch.arange(24) < kept).float()
        small = apply_cuts(dense, plan_cuts(read_layout(dense), masks))
        heads[kept] = _laid_out(small, "balanced").blocks[0].attn.head_dim
    assert heads[13] == heads[16] == 16
    assert heads[17] == 17
    assert heads[21] == heads[24] == 24
    assert all(0 <= padded - kept <= 3 for kept, padded in heads.items())


def test_gathered_gathers_everywhere_zeros_nowhere_and_balanced_by_the_rule() -> None:
    plans, _ = _plans("gathered")
    assert {side for plan in plans if plan.inner for side in (plan.read, plan.write)} == {"gather"}
    plans, _ = _plans("zeros")
    assert {side for plan in plans if plan.inner for side in (plan.read, plan.write)} == {"zeros"}
    dense = tiny_vit(dtype=torch.float64)
    for missing in range(1, 20):
        masks = random_masks(read_layout(dense), keep=1.1)
        masks["blocks.0.mlp.in"][:missing] = 0
        small = apply_cuts(deepcopy(dense), plan_cuts(read_layout(dense), masks))
        plan = plan_layout(small, "balanced").branches[1]
        assert plan.write == "zeros"
        assert plan.read == ("gather" if 96 * missing > GATHER_COST * (24 - missing) else "zeros")


def test_reordering_makes_slices_of_two_selections_at_least() -> None:
    small = _small(keep=0.3, embed_dim=48)
    laid = _laid_out(small, "reordered")
    order = plan_layout(small, "reordered").order
    assert order is not None
    assert sorted(order) == list(range(48))
    kinds = [type(module) for module in laid.modules()]
    assert sum(kind in (SliceNorm, SliceWrite) for kind in kinds) >= 2
    assert any(kind in (GatherNorm, GatherWrite) for kind in kinds), "and most others are gathers still"


def test_nested_selections_all_become_slices() -> None:
    dense = tiny_vit(embed_dim=48, dtype=torch.float64)
    layout: ModelLayout = read_layout(dense)
    ranks = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    masks = random_masks(layout, keep=1.1)
    sizes = iter((40, 33, 28, 21, 17, 12, 9, 5))
    for name, mask in masks.items():
        if name.endswith((".in", ".out")):
            mask.copy_((ranks < next(sizes)).float())
    small = apply_cuts(dense, plan_cuts(layout, masks))
    plan = plan_layout(small, "reordered")
    order = {channel: position for position, channel in enumerate(plan.order or ())}
    for shape in branch_shapes(small):
        for channels in (shape.inputs, shape.outputs):
            places = sorted(order[channel] for channel in channels)
            assert all(after == before + 1 for before, after in pairwise(places))
    assert (_outputs(_laid_out(small, "reordered")) - _outputs(small)).abs().max() <= 1e-12


def test_a_laid_out_model_is_exported_and_autocast() -> None:
    small = _small(depth=2).float()
    for layout in LAYOUTS:
        laid = _laid_out(small, layout)
        traced = torch.export.export(laid, (images(),)).module()
        torch.testing.assert_close(traced(images()), small(images()))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(laid(images()), small(images()), rtol=0.05, atol=0.1)
        half = deepcopy(laid).to(torch.bfloat16)
        assert half(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.usefixtures("onnx_is_listed_once")
@pytest.mark.parametrize("layout", ["index", "gathered"])
def test_an_exported_model_gathers_by_element_at_every_batch_size(layout: str, tmp_path: Path) -> None:
    """ONNX Runtime's Gather along the last axis takes several times as long as its GatherElements."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, file = _small(depth=1).float(), tmp_path / "small.onnx"
    exported = OnnxModel(_laid_out(small, layout), images(2), file)
    nodes = onnx.load(file).graph.node
    gathers = sum(shape.form == "small" for shape in branch_shapes(small)) * (2 if layout == "gathered" else 1)
    assert sum(node.op_type == "GatherElements" for node in nodes) == gathers > 0
    for count in (1, 3):
        got = exported(images(count))
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), small(images(count)), rtol=0, atol=1e-5)
