"""Which of timm's families are covered, on their real shapes; nothing is allocated."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from p3b.errors import ModelError
from p3b.storage.artifact import model_config
from p3b.vit.architecture import build_dense
from p3b.vit.families import family_of
from p3b.vit.layout import read_layout
from p3b.vit.valueless import without_values

COVERED = (
    "deit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_224",
    "vit_small_patch8_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_gap_240",
    "vit_giant_patch14_dinov2",
    "aimv2_large_patch14_224",
    "test_vit4",
    "vit_small_patch16_dinov3",
    "eva02_base_patch14_224",
    "vit_pe_core_small_patch16_384",
    "vit_small_patch16_rope_mixed_224",
    "qwen3_vit_88m",
    "vitamin_small_224",
    "vit_base_mci_224",
)
REFUSED = {
    "vit_small_patch16_18x2_224": "blocks.0: ParallelThingsBlock",
    "vit_pwee_patch16_reg1_gap_256": "blocks.0: ParallelScalingBlock",
    "vit_base_resnet26d_224": "patch_embed.backbone: FeatureListNet",
    "eva02_enormous_patch14_clip_224": "blocks.0: EvaBlockPostNorm",
    "cait_xxs24_224": "got Cait",
    "resnet18": "got ResNet",
}


def on_meta(name: str) -> nn.Module:
    with without_values():
        return timm.create_model(name, num_classes=7)


@pytest.mark.parametrize("name", COVERED)
def test_a_covered_model_is_described_well_enough_to_be_built_again(name: str) -> None:
    model = on_meta(name)
    assert len(read_layout(model).blocks) == 2 * len(family_of(model).blocks(model))
    architecture = model_config(model)["architecture"]
    with without_values():
        again = build_dense(architecture)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_is_not_covered_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_layout(on_meta(name))
