"""What makes patches of images: timm's PatchEmbed, and in front of it the convolutions of a hybrid, which stay whole.

A ResNet is told by the numbers of blocks in its stages: [3, 4, 9] is that of R50 with a third stage of nine; [] is its first
convolution and pooling alone. ViTamin's stages and MobileCLIP's stem give as many channels as the residual stream has, with
no projection after them: what is told of these are the channels, blocks and strides before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.layers import HybridEmbed, PatchEmbed, StdConv2dSame
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import MbConvStages, VitCfg
from torch import nn

from p3b.errors import ModelError
from p3b.vit.families import allowed
from p3b.vit.families.family import Images

_MOST_STAGES, _MOST_BLOCKS = 4, 64
_CONVOLUTION = partial(StdConv2dSame, eps=1e-8)
_IS_COUNT, _IS_WIDTH = allowed.is_whole(1, _MOST_BLOCKS), allowed.is_whole(1, allowed.MOST_CHANNELS)
_BACKBONES = (ResNetV2, MbConvStages, ConvStem, nn.Sequential)  # the last one is a ResNet's first convolution and pooling


def _is_list(value: Any, fits: Callable[[Any], bool], most: int, least: int = 0) -> bool:
    return isinstance(value, list) and least <= len(value) <= most and all(map(fits, value))


def _is_mbconv(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"stem_width", "widths", "depths"}
        and _IS_WIDTH(value["stem_width"])
        and _is_list(value["widths"], _IS_WIDTH, 2, 2)
        and _is_list(value["depths"], _IS_COUNT, 2, 2)
    )


def _is_conv_stem(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"widths", "strides"}
        and _is_list(value["widths"], _IS_WIDTH, 7)
        and _is_list(value["strides"], _IS_COUNT, 8)
        and len(value["strides"]) == len(value["widths"]) + 1
    )


STEMS: Mapping[str, tuple[allowed.Rule, Any]] = {
    "resnet": (
        (
            lambda value: value is None or _is_list(value, _IS_COUNT, _MOST_STAGES),
            f"null, or a list of at most {_MOST_STAGES} numbers of blocks from 1 to {_MOST_BLOCKS}",
        ),
        None,
    ),
    "mbconv": ((_is_mbconv, "null, or stem_width, two widths and two depths"), None),
    "conv_stem": ((_is_conv_stem, "null, or widths, and one stride more"), None),
}
"""Arguments that tell the convolutions in front; all are null where there are none."""


def require_patch_embed(embed: nn.Module, name: str = "patch_embed", *, hybrid: bool = False) -> None:
    """ModelError for another patch embedding than a convolution, with other ones in front of it where `hybrid` allows these."""
    if hybrid and type(embed) is HybridEmbed:
        if type(embed.backbone) not in _BACKBONES:
            known = ", ".join(kind.__name__ for kind in _BACKBONES[:-1])
            raise ModelError(
                f"{name}.backbone: {type(embed.backbone).__name__} is not covered; of timm's stems for hybrids {known} are."
            )
        if type(embed.proj) is nn.Identity and type(embed.backbone) in (MbConvStages, ConvStem):
            return
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


def describe_patches(embed: nn.Module) -> dict[str, Any]:
    """Arguments of a model that say which images its PatchEmbed or HybridEmbed is made for."""
    sizes = {"img_size": list(embed.img_size), "patch_size": list(embed.patch_size)}
    return sizes | {"in_chans": images_of_stem(embed).channels}


def last_convolution(embed: nn.Module) -> str:
    """Name of the convolution that writes the residual stream, as it stands in the patch embedding."""
    if not isinstance(embed.proj, nn.Identity):
        return "proj"
    return "backbone.pool.proj" if isinstance(embed.backbone, MbConvStages) else f"backbone.{len(embed.backbone) - 1}.conv"


def describe_stem(embed: nn.Module) -> dict[str, Any]:
    """What tells the convolutions in front; nulls where there are none."""
    stem = dict.fromkeys(STEMS)
    if not isinstance(embed, HybridEmbed):
        return stem
    backbone: Any = embed.backbone
    if isinstance(backbone, MbConvStages):
        stages = list(backbone.stages)
        widths, depths = [stage[0].out_chs for stage in stages], [len(stage) for stage in stages]
        return stem | {"mbconv": {"stem_width": backbone.stem.out_chs, "widths": widths, "depths": depths}}
    if isinstance(backbone, ConvStem):
        convolutions = [layer.conv for layer in backbone]
        widths = [conv.out_channels for conv in convolutions[:-1]]
        return stem | {"conv_stem": {"widths": widths, "strides": [conv.stride[0] for conv in convolutions]}}
    return stem | {"resnet": [len(stage.blocks) for stage in getattr(backbone, "stages", ())]}


def embed_arguments(stem: Mapping[str, Any], in_chans: int, embed_dim: int) -> Mapping[str, Any]:
    """Arguments of timm's VisionTransformer that give it the convolutions in front.

    Args:
        stem: what `describe_stem` tells.
        in_chans: of an image.
        embed_dim: channels of the residual stream.
    """
    if (resnet := stem["resnet"]) is not None:
        return {"embed_layer": partial(HybridEmbed, backbone=_resnet(resnet, in_chans))}
    if (mbconv := stem["mbconv"]) is not None:
        config = VitCfg(
            embed_dim=(*mbconv["widths"], embed_dim), depths=tuple(mbconv["depths"]), stem_width=mbconv["stem_width"]
        )
        return {"embed_layer": partial(HybridEmbed, backbone=MbConvStages(config, in_chans=in_chans), proj=False)}
    if (told := stem["conv_stem"]) is not None:
        strides = tuple(told["strides"])
        backbone = ConvStem(
            in_chans,
            depth=len(strides),
            channels=(*told["widths"], embed_dim),
            kernel_size=strides,
            stride=strides,
            padding=0,
            act_layer=nn.GELU,
        )
        return {"embed_layer": partial(HybridEmbed, backbone=backbone, proj=False)}
    return {}


def _resnet(blocks: list[int], in_chans: int) -> nn.Module:
    """The ResNet of a hybrid; where it has no blocks, its first convolution and pooling."""
    how: dict[str, Any] = {"stem_type": "same", "preact": False, "conv_layer": _CONVOLUTION}
    if not blocks:
        return create_resnetv2_stem(in_chans, **how)
    return ResNetV2(layers=tuple(blocks), num_classes=0, global_pool="", in_chans=in_chans, **how)
