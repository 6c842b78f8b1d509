"""The families of models that can be pruned: a file for each.

vision_transformer  timm's VisionTransformer and DeiT's distilled kind
eva                 timm's Eva: EVA, DINOv3, Perception Encoder, RoPE-ViT
beit                timm's Beit
qwen3               timm's Qwen3VitClassifier and Qwen3VitEncoder
relative_positions  timm's VisionTransformerRelPos
naflex              timm's NaFlexVit
sam                 timm's VisionTransformerSAM
swin                timm's SwinTransformer and SwinTransformerV2, hierarchies
hiera               timm's Hiera, a hierarchy
"""

from __future__ import annotations

from typing import Any

from torch import nn

from p3b.vit.families.beit import BEIT
from p3b.vit.families.eva import EVA
from p3b.vit.families.family import Family, Images
from p3b.vit.families.hiera import HIERA
from p3b.vit.families.naflex import NAFLEX
from p3b.vit.families.qwen3 import QWEN3, QWEN3_TOWER
from p3b.vit.families.relative_positions import RELATIVE_POSITIONS
from p3b.vit.families.sam import SAM
from p3b.vit.families.swin import SWIN, SWIN_V2
from p3b.vit.families.vision_transformer import VISION_TRANSFORMER

FAMILIES: tuple[Family, ...] = (
    VISION_TRANSFORMER,
    EVA,
    BEIT,
    RELATIVE_POSITIONS,
    QWEN3,
    QWEN3_TOWER,
    NAFLEX,
    SAM,
    SWIN,
    SWIN_V2,
    HIERA,
)
CLASSES: dict[str, type[nn.Module]] = {name: kind for family in FAMILIES for name, kind in family.classes.items()}
"""All classes that are covered, by name. A subclass may compute something else, and is not."""


def family_of(model: nn.Module) -> Family:
    """The family of a model whose class is covered (`p3b.vit.wrappers` sees to that)."""
    return family_of_class(type(model))


def family_of_class(kind: type[nn.Module]) -> Family:
    """The family that a covered class belongs to."""
    return next(family for family in FAMILIES if kind in family.classes.values())


def patch_embed_of(model: nn.Module) -> Any:
    """The module that makes patches of a model's images (`Family.patch_embed`)."""
    return family_of(model).patch_embed(model)


def images_of(model: nn.Module) -> Images:
    """The images that a model is made for."""
    return family_of(model).images(model)


def width_of(model: nn.Module) -> int:
    """D, channels of a model's residual stream; of a hierarchy's first stage."""
    return family_of(model).blocks(model)[0].width
