"""What makes patches of images: timm's PatchEmbed, and in front of it the ResNet of a hybrid, which stays whole.

A ResNet is told by the numbers of blocks in its stages: [3, 4, 9] is that of R50 with a third stage of nine; [] is its first
convolution and pooling alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import HybridEmbed, PatchEmbed, StdConv2dSame
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from torch import nn

from p3b.errors import ModelError
from p3b.vit.families.family import Images, Rule, is_whole

_MOST_STAGES, _MOST_BLOCKS = 4, 64
_CONVOLUTION = partial(StdConv2dSame, eps=1e-8)
_IS_COUNT = is_whole(1, _MOST_BLOCKS)

RESNET: Rule = (
    lambda value: value is None or (isinstance(value, list) and len(value) <= _MOST_STAGES and all(map(_IS_COUNT, value))),
    f"null, or a list of at most {_MOST_STAGES} numbers of blocks from 1 to {_MOST_BLOCKS}",
)


def require_patch_embed(embed: nn.Module, name: str = "patch_embed", *, hybrid: bool = False) -> None:
    """ModelError for another patch embedding than a convolution, with a ResNet in front of it where `hybrid` allows one."""
    if hybrid and type(embed) is HybridEmbed:
        if type(embed.backbone) is not ResNetV2 and type(embed.backbone) is not nn.Sequential:
            raise ModelError(
                f"{name}.backbone: {type(embed.backbone).__name__} is not covered; of timm's stems for hybrids its ResNetV2 is."
            )
    elif type(embed) is not PatchEmbed:
        raise ModelError(f"{name}: {type(embed).__name__} is not covered, only timm's PatchEmbed is.")
    if type(embed.proj) is not nn.Conv2d:
        raise ModelError(f"{name}.proj: {type(embed.proj).__name__} is not covered, only torch.nn.Conv2d is.")


def images_of_stem(embed: nn.Module) -> Images:
    """The images that timm's PatchEmbed or HybridEmbed is made for."""
    (height, width), (rows, columns), (high, wide) = embed.img_size, embed.grid_size, embed.patch_size
    if not isinstance(embed, HybridEmbed):
        return Images(embed.proj.in_channels, (height, width), (high, wide), (rows, columns))
    down, right = embed.feature_ratio
    return Images(embed.in_chans, (height, width), (high * down, wide * right), (rows, columns))


def describe_resnet(embed: nn.Module) -> list[int] | None:
    """Blocks of the stages of a hybrid's ResNet; None where there is none."""
    if not isinstance(embed, HybridEmbed):
        return None
    return [len(stage.blocks) for stage in getattr(embed.backbone, "stages", ())]


def embed_arguments(resnet: list[int] | None, in_chans: int) -> Mapping[str, Any]:
    """Arguments of timm's VisionTransformer that give it a ResNet in front."""
    if resnet is None:
        return {}
    how: dict[str, Any] = {"stem_type": "same", "preact": False, "conv_layer": _CONVOLUTION}
    backbone = (
        ResNetV2(layers=tuple(resnet), num_classes=0, global_pool="", in_chans=in_chans, **how)
        if resnet
        else create_resnetv2_stem(in_chans, **how)
    )
    return {"embed_layer": partial(HybridEmbed, backbone=backbone)}
