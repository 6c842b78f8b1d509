"""Aligned widths and whole heads: thin heads become fewer and wider ones in the last decision, and nothing changes before."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import p3b
from loops import Loop
from p3b.core.masks import Heads
from p3b.deploy.layouts import LAYOUTS, apply_layout, plan_layout
from p3b.errors import ConfigError, WeightsError
from p3b.methods import METHODS, create_method, effective_options, method_dims
from p3b.methods.base import Decision
from p3b.storage.artifact import read_config
from p3b.vit.anatomy.shape import CONSTANT, GONE, SMALL
from p3b.vit.cost import kept_params
from p3b.vit.layout import DEFAULT_DIMS, ModelLayout, read_layout
from p3b.vit.shapes import branch_shapes
from tiny import VARIANTS, images, parameters_of, tiny_vit

PLAN = p3b.Schedule(start=1, sparse=3, final=5, update_every=1)
ALIGN = 2
UNEVEN = (0.1, 0.5, 0.004, 0.3, 0.5, 0.0, 0.0, 0.6)
"""Keep ratios of four blocks: thin heads, a constant, wide heads, an attention and an MLP that are gone."""


class Run(Loop):
    """Pruned by the default method, and looked at before anything is cut."""

    def __init__(self, model: VisionTransformer, **options: Any) -> None:
        super().__init__(p3b.Pruner(model, schedule=PLAN, **options), model, torch.optim.SGD(model.parameters(), lr=0.01))

    def decided(self) -> Decision:
        """The last decision; masks are set, nothing is cut yet."""
        return self.steps(PLAN.final - self.pruner.steps_done).pruner.decide_last()


def _uneven(**changed: Any) -> Run:
    return Run(tiny_vit(**{"depth": 4, **changed}), keep_ratios=UNEVEN, align=ALIGN)


def _heads_of(decision: Decision, block: str) -> int:
    return int(decision.masks[f"{block}.heads"].sum())


def _scores(model: VisionTransformer, seed: int, **options: Any) -> tuple[ModelLayout, Any, dict[str, Tensor]]:
    """A method that has measured scores drawn by seed, and these scores by gate."""
    layout = read_layout(model, method_dims("block_benefit", options))
    method = create_method("block_benefit", model, layout, 0.5, lambda tensor: tensor, options)
    generator = torch.Generator().manual_seed(seed)
    scores = {gate: torch.rand(size, generator=generator) for gate, size in layout.gates.items()}
    method._meter.add("scores", torch.cat(list(scores.values())), torch.tensor(True))
    return layout, method, scores


# --- what is asked for


def test_whole_heads_are_a_dimension_where_counts_are_aligned_and_nowhere_else() -> None:
    for method in METHODS:
        takes_it = "align" in effective_options(method, {})
        assert "heads" not in method_dims(method, {}) or not takes_it
        if takes_it:
            assert method_dims(method, {"align": 1}) == DEFAULT_DIMS
            assert set(method_dims(method, {"align": 2})) == {"heads", *DEFAULT_DIMS}
    with pytest.raises(ConfigError, match="prune method 'block_bp'"):
        method_dims("block_bp", {})
    plain, aligned = (p3b.Pruner(tiny_vit(), 0.4, schedule=PLAN, align=align) for align in (1, 2))
    assert plain.layout == read_layout(tiny_vit())
    assert aligned.gates.masks.keys() - plain.gates.masks.keys() == {"blocks.0.attn.heads", "blocks.1.attn.heads"}


@pytest.mark.parametrize("options", [{"prune_ratio": 0.4}, {"keep_ratios": UNEVEN[:4]}])
def test_until_the_last_decision_masks_are_bit_for_bit_those_without_alignment(options: dict[str, Any]) -> None:
    plain, aligned = (Run(tiny_vit(), align=align, **options).steps(PLAN.final) for align in (1, ALIGN))
    assert len(plain.decisions) == len(aligned.decisions) >= 3
    for before, after in zip(plain.decisions, aligned.decisions, strict=True):
        for gate, mask in after.masks.items():
            assert torch.equal(mask, before.masks[gate] if gate in before.masks else torch.ones(3))
        assert before.blocks == after.blocks
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), aligned.model.parameters(), strict=True))


# --- the last decision


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.4, 0.8])
def test_no_head_stays_thin_beside_another_and_the_lowest_go(ratio: float, seed: int) -> None:
    """A head narrower than the least width is the only one of its block; all counts are multiples or whole."""
    layout, method, scores = _scores(tiny_vit(embed_dim=48, num_heads=4), seed, keep_ratios=[ratio] * 4, align=ALIGN)
    decision = method.last({})
    masks, decided = decision.masks, decision.blocks
    for block in layout.blocks:
        for dim, size in block.dims.items():
            mask = masks[block.gate(dim)]
            count = int(mask.sum())
            assert set(mask.tolist()) <= {0.0, 1.0}
            assert dim == "heads" or count % ALIGN == 0 or count == size
            lowest = scores[block.gate(dim)].sort().values[: size - count]
            assert set(scores[block.gate(dim)][mask == 0].tolist()) == set(lowest.tolist())
        if block.kind == "attn":
            heads, width = (int(masks[block.gate(dim)].sum()) for dim in ("heads", "head"))
            least = Heads(1, 4).least_width(12, ALIGN)
            assert 1 <= heads <= 4
            assert width >= least or heads == 1
    assert {block.name: block.kept_params for block in decided} == kept_params(layout, masks)
    step = max(4 * 12 * 48 * ALIGN, 3 * 48 * 12)  # parameters of one multiple of the dearest gate
    total = sum(block.kept_params for block in decided)
    assert abs(total - sum(block.keep_ratio * block.params for block in decided)) <= step / 2


def test_fewer_heads_go_the_less_there_is_to_spare() -> None:
    found = []
    for ratio in (0.05, 0.1, 0.2, 0.4, 0.8):
        _, method, _ = _scores(tiny_vit(embed_dim=48, num_heads=4), 0, keep_ratios=[ratio] * 4, align=ALIGN)
        masks = method.last({}).masks
        found.append(sum(int(mask.sum()) for gate, mask in masks.items() if gate.endswith("heads")))
    assert found == sorted(found) and found[0] < found[-1]


# --- what comes out


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "norm without affine"])
def test_the_small_model_computes_what_the_masked_one_did(variant: str) -> None:
    """In every layout, with fewer heads, wide heads, an attention that is a constant, and blocks that are gone."""
    run = _uneven(dtype=torch.float64, **VARIANTS[variant])
    decision = run.decided()
    assert _heads_of(decision, "blocks.0.attn") < _heads_of(decision, "blocks.2.attn")
    batch, expected_params = images(dtype=torch.float64), run.pruner.kept_params()
    with torch.no_grad():
        masked = run.model.eval()(batch)
        small = run.pruner.shrink().eval()
        torch.testing.assert_close(small(batch), masked, rtol=0, atol=1e-10)
        assert parameters_of(small) == expected_params
        shapes = {shape.name: shape for shape in branch_shapes(small)}
        assert shapes["blocks.0.attn"].form == shapes["blocks.2.attn"].form == SMALL
        assert shapes["blocks.0.attn"].heads == small.blocks[0].attn.num_heads == _heads_of(decision, "blocks.0.attn")
        assert shapes["blocks.1.attn"].form == CONSTANT or "bias" in variant
        assert shapes["blocks.3.attn"].form == shapes["blocks.2.mlp"].form == GONE
        for name in LAYOUTS:
            again = apply_layout(small, plan_layout(small, name))
            torch.testing.assert_close(again(batch), small(batch), rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("norm without affine", "unfused")])
def test_a_saved_model_comes_back_with_its_heads(variant: str, tmp_path: Path) -> None:
    run = _uneven(**VARIANTS[variant])
    run.decided()
    small = run.pruner.shrink().eval()
    folder = p3b.save(small, tmp_path)
    assert read_config(folder)["schema"] == 4
    loaded = p3b.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(images()), small(images()))
    assert branch_shapes(loaded) == branch_shapes(small)


def test_what_went_and_came_back_is_counted_with_its_heads() -> None:
    run = _uneven()
    run.steps(PLAN.final)
    before = {gate: mask < 0.5 for gate, mask in run.pruner.gates.masks.items()}
    decision = run.pruner.decide_last()
    for block, decided in zip(run.pruner.layout.blocks, decision.blocks, strict=True):
        now = {block.gate(dim): decision.masks[block.gate(dim)] < 0.5 for dim in block.dims}
        assert decided.pruned == sum(int(gone.sum()) for gone in now.values())
        assert decided.returned == sum(int((before[gate] & ~gone).sum()) for gate, gone in now.items())
    assert decision.blocks[0].returned > 0, "the heads that stay are wider than before"


@pytest.mark.parametrize("stop", [1, 3, PLAN.final])
def test_stopping_and_resuming_equals_never_stopping(stop: int) -> None:
    options: dict[str, Any] = {"keep_ratios": UNEVEN[:4], "align": ALIGN}
    whole = Run(tiny_vit(), **options)
    decision = whole.decided()
    first = Run(tiny_vit(), **options).steps(stop)
    first.pruner.gates.detach()
    second = Run(deepcopy(first.model), **options)
    second.pruner.load_state_dict(first.pruner.state_dict())
    again = second.decided()
    assert all(torch.equal(mask, again.masks[gate]) for gate, mask in decision.masks.items())
    assert decision.blocks == again.blocks
    unaligned = Run(tiny_vit(), keep_ratios=UNEVEN[:4])
    if stop > PLAN.start:
        with pytest.raises(WeightsError, match="another model, method or version"):
            unaligned.pruner.load_state_dict(first.pruner.state_dict())
