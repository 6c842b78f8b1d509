"""Predicted parameters and MACs equal those of the networks that are really made."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch

from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import block_macs, block_params, count_macs, count_parameters, dense_params, kept_channels, model_macs
from p3b.vit.layout import ModelLayout, read_layout
from tiny import VARIANTS, kept_counts, masks_of, parameters_of, random_masks, tiny_vit


def _random_counts(layout: ModelLayout, seed: int) -> dict[str, torch.Tensor]:
    """Masks with any number of kept channels in each gate, none and all of them included."""
    generator = torch.Generator().manual_seed(seed)

    def some(_gate: str, size: int) -> torch.Tensor:
        kept = [0, 1, size, int(torch.randint(size + 1, (), generator=generator))][
            int(torch.randint(4, (), generator=generator))
        ]
        mask = torch.zeros(size)
        mask[torch.randperm(size, generator=generator)[:kept]] = 1
        return mask

    return masks_of(layout, some)


@pytest.mark.parametrize("variant", VARIANTS)
def test_predicted_parameters_are_those_of_the_shrunk_model(variant: str) -> None:
    dense = tiny_vit(**VARIANTS[variant])
    layout = read_layout(dense)
    forms = set()
    for seed in range(12):
        masks = _random_counts(layout, seed)
        plan = plan_cuts(layout, masks)
        small = apply_cuts(deepcopy(dense), plan)
        forms |= {cut.form for cut in plan.cuts}
        assert plan.params == parameters_of(small) == count_parameters(small)
        for cut in plan.cuts:
            kept = {dim: torch.tensor(count) for dim, count in kept_counts(layout, masks)[cut.block.name].items()}
            assert int(block_params(cut.block, kept)) == cut.params
            assert {dim: len(index) for dim, index in cut.kept.items()} == {dim: int(n) for dim, n in kept.items()}
            assert kept_channels(cut.block, masks) == kept
            assert sum(p.numel() for p in _modules_of(small, cut.block.name)) == cut.params
    assert {"small", "gone"} <= forms
    if variant != "no bias":
        assert "constant" in forms


def _modules_of(model: torch.nn.Module, block: str) -> list[torch.nn.Parameter]:
    """Parameters of one half of a timm block, its norm and LayerScale included."""
    _, depth, kind = block.split(".")
    halves = ("norm1", "attn", "ls1") if kind == "attn" else ("norm2", "mlp", "ls2")
    prefixes = tuple(f"blocks.{depth}.{half}." for half in halves)
    return [parameter for key, parameter in model.named_parameters() if key.startswith(prefixes)]


def test_many_candidates_are_counted_at_once() -> None:
    block = read_layout(tiny_vit()).blocks[0]
    kept = {dim: torch.arange(size + 1)[-9:] for dim, size in block.dims.items()}
    many = block_params(block, kept)
    one_by_one = [int(block_params(block, {dim: counts[i] for dim, counts in kept.items()})) for i in range(9)]
    assert many.tolist() == one_by_one
    assert many[-1] == dense_params(block)


@pytest.mark.parametrize("variant", ["plain", "layer scale", "no class token", "registers", "no qkv bias", "unfused"])
def test_predicted_macs_are_those_counted_by_running(variant: str) -> None:
    dense = tiny_vit(**VARIANTS[variant])
    layout = read_layout(dense)
    whole = {block.name: dict(block.dims) for block in layout.blocks}
    other = 24 * 3 * 8 * 8 * 16 + 24 * 5  # patch embedding and head
    assert model_macs(layout, whole, other) == count_macs(dense, 32)
    for seed in range(6):
        masks = _random_counts(layout, seed)
        small = apply_cuts(deepcopy(dense), plan_cuts(layout, masks))
        assert model_macs(layout, kept_counts(layout, masks), other) == count_macs(small, 32)


def test_a_block_without_any_of_a_dimension_computes_nothing() -> None:
    for block in read_layout(tiny_vit()).blocks:
        for dim in block.dims:
            assert block_macs(block, {**block.dims, dim: 0}, tokens=17) == 0
        assert block_macs(block, block.dims, tokens=17) > 0


def test_counting_macs_changes_nothing() -> None:
    model = tiny_vit().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert count_macs(model, (32, 32)) > 0
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_deit_tiny_has_its_known_size() -> None:
    """1.3 GMACs (1.26 without what is not counted) and 5.7 M parameters, as published."""
    model = timm.create_model("deit_tiny_patch16_224")
    assert count_parameters(model) == 5_717_416
    assert 1.2e9 < count_macs(model, 224) < 1.3e9
    small = apply_cuts(model, plan_cuts(read_layout(model), random_masks(read_layout(model))))
    assert count_macs(small, 224) < 0.6e9
