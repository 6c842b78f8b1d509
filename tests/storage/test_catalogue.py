"""What is said of timm's models is what the pruner finds when it is given one."""

from __future__ import annotations

import pytest
import timm
import torch

from p3b.core.allocation import keep_ratios, largest_prune_ratio
from p3b.errors import BudgetError, ModelError
from p3b.storage.catalogue import entry, family_of, matching, may_be_covered, summary
from p3b.storage.outline import outline
from p3b.vit.cost import count_parameters, dense_params
from p3b.vit.layout import read_layout


def test_an_entry_says_what_the_model_with_that_head_is() -> None:
    found = entry("vit_tiny_patch16_224", num_classes=7)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    assert found.params == count_parameters(model)
    assert found.prunable_params == sum(map(dense_params, read_layout(model).blocks))
    assert "augreg_in21k" in found.weights and found.prunable and found.kind == "VisionTransformer"


@pytest.mark.parametrize("params", [(100, 3), (5_338_368, 190_000), (1, 0)])
def test_the_largest_ratio_can_be_met_and_a_larger_one_cannot(params: tuple[int, int]) -> None:
    inside, outside = params
    largest = largest_prune_ratio(inside, outside)
    blocks = torch.tensor([float(inside)])
    if largest < 1:
        keep_ratios(torch.ones(1), blocks, outside, largest)
        with pytest.raises(BudgetError, match=f"{largest:.4f}"):
            keep_ratios(torch.ones(1), blocks, outside, largest + 1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cait_xxs24_224", "built as Cait"),
        ("eva02_enormous_patch14_clip_224", "blocks.0: EvaBlockPostNorm is not covered"),
        ("vit_base_resnet26d_224", "patch_embed.backbone: FeatureListNet"),
        ("resnet18", "built as ResNet"),
    ],
)
def test_a_refusal_is_told_in_a_few_words(name: str, reason: str) -> None:
    found = entry(name)
    assert reason in found.refusal and not found.prunable and found.largest_ratio is None
    assert found.has_attention == (name != "resnet18")


def test_what_is_not_built_is_no_model_that_can_be_pruned() -> None:
    assert may_be_covered("deit_tiny_patch16_224") and not may_be_covered("resnet18")
    assert not entry("resnet18", built=False).prunable


def test_an_outline_is_the_model_without_values() -> None:
    sketch, model = (
        outline("deit_tiny_distilled_patch16_224", depth=1),
        timm.create_model("deit_tiny_distilled_patch16_224", depth=1),
    )
    assert all(parameter.is_meta for parameter in sketch.parameters())
    shapes, expected = ({key: value.shape for key, value in each.state_dict().items()} for each in (sketch, model))
    assert shapes == expected
    assert [p.requires_grad for p in sketch.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_pattern_is_of_a_name_of_its_tag_or_a_part() -> None:
    assert matching("vit_small_patch1?_dinov3") == ["vit_small_patch16_dinov3"]
    assert "vit_small_patch16_224" in matching("vit_small*.dino")
    assert matching("vit_small_patch16_dinov3_q") == ["vit_small_patch16_dinov3_qkvb"]
    assert len(matching("")) == len(timm.list_models())
    with pytest.raises(ModelError, match="Did you mean"):
        matching("vit_tinny_patch16_224")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("vit_small_patch14_reg4_dinov2", "vit dinov2"),
        ("vit_base_patch16_224", "vit"),
        ("deit3_huge_patch14_224", "deit3"),
        ("vit_so400m_patch14_siglip_gap_378", "vit siglip"),
        ("vit_base_patch16_clip_quickgelu_224", "vit clip quickgelu"),
    ],
)
def test_a_family_is_a_name_without_its_sizes(name: str, family: str) -> None:
    assert family_of(name) == family


def test_a_summary_counts_entries_and_weights() -> None:
    entries = [entry("vit_small_patch14_dinov2"), entry("vit_small_patch16_18x2_224")]
    assert summary(entries) == "1 of 2 entries, 1 of 1 pretrained weights can be pruned"
