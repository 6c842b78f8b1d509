"""timm's NaFlexVit, given images: its blocks are those of timm's VisionTransformer, its positions are fitted to any image size.

Pre-cut patches of mixed sizes, the other thing that it takes, run through the same blocks; probes read images alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import LayerNorm, LayerScale, to_2tuple
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.attention import SelfAttention
from p3b.vit.anatomy.half import PreNorm
from p3b.vit.anatomy.mlp import PlainMlp
from p3b.vit.families import allowed
from p3b.vit.families.activations import ACTIVATIONS, activation_name
from p3b.vit.families.family import Block, Images, Outside, ratio_of
from p3b.vit.families.norms import require_describable
from p3b.vit.families.stream import read_outside
from p3b.vit.families.usual import BlocksAlike, describe_whole, require_blocks

HALVES = (
    PreNorm("attn", SelfAttention(), norm="norm1", layer_scale="ls1", drop_path="drop_path1"),
    PreNorm("mlp", PlainMlp(), norm="norm2", layer_scale="ls2", drop_path="drop_path2"),
)
_SIZE = "p3b_img_size"
"""Attribute of a model that was built from a description: timm's keeps no image size."""
_OF_POSITIONS = ("interp_mode", "ar_preserving", "antialias", "align_corners")


class NaFlexFamily(BlocksAlike):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"NaFlexVit": NaFlexVit}
    rules: Mapping[str, allowed.Rule] = {
        **dict.fromkeys(("img_size", "patch_size", "pos_embed_grid_size"), allowed.PAIR),
        **dict.fromkeys(("in_chans", "embed_dim", "num_heads", "attn_pool_num_heads"), allowed.SIZE),
        "num_classes": allowed.CLASSES,
        "reg_tokens": allowed.COUNT,
        "depth": allowed.DEPTH,
        **dict.fromkeys(("mlp_ratio", "attn_pool_mlp_ratio"), allowed.NUMBER),
        "init_values": allowed.NUMBER_OR_NULL,
        **dict.fromkeys(
            (
                *("class_token", "qkv_bias", "proj_bias", "qk_norm", "pre_norm", "final_norm", "fc_norm"),
                *("pool_include_prefix", "dynamic_img_pad", "patchify_channels_last"),
                *("pos_embed_ar_preserving", "pos_embed_antialias", "pos_embed_align_corners"),
            ),
            allowed.FLAG,
        ),
        "pos_embed": allowed.one_of(("none", "learned", "factorized")),
        "pos_embed_interp_mode": allowed.one_of(("bicubic", "bilinear", "nearest")),
        "embed_proj_type": allowed.one_of(("conv", "linear")),
        "global_pool": allowed.one_of(("", "avg", "avgmax", "max", "token", "map"), "a pooling of timm"),
        "act_layer": allowed.one_of(ACTIVATIONS),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {}

    def blocks(self, model: NaFlexVit) -> Sequence[Block]:
        return [Block(f"blocks.{depth}", module, HALVES, model.embed_dim) for depth, module in enumerate(model.blocks)]

    def patch_embed(self, model: NaFlexVit) -> nn.Module:
        return model.embeds

    def images(self, model: NaFlexVit) -> Images:
        high, wide = model.embeds.patch_size
        rows, columns = model.embeds.pos_embed_grid_size or (14, 14)
        asked = (getattr(model, "_model_args", None) or {}).get("img_size")
        said = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (0, rows * high, columns * wide)
        height, width = model.__dict__.get(_SIZE, said[1:] if asked is None else to_2tuple(asked))
        return Images(model.in_chans, (height, width), (high, wide), (height // high, width // wide))

    def require_covered(self, model: NaFlexVit, purpose: str) -> None:
        if model.rope is not None or model.embeds.enable_patch_interpolator or model.embeds.pos_embed_use_grid_sample:
            raise ModelError(
                "NaFlexVit is not covered with rotary positions, an interpolator of patches or positions that are sampled from "
                "a grid; with timm's other settings it is."
            )

    def require_blocks_covered(self, model: NaFlexVit) -> None:
        require_blocks(self.blocks(model), TimmBlock, "of NaFlexVit's blocks timm's Block is")
        for depth, block in enumerate(model.blocks):
            for norm in (block.norm1, block.norm2):
                if type(norm) is not LayerNorm or norm.eps != 1e-6:
                    raise ModelError(f"blocks.{depth}: {norm} is not covered; of NaFlexVit's norms its usual LayerNorm is.")

    def outside(self, model: NaFlexVit) -> Outside:
        return read_outside(
            model,
            tokens=[f"embeds.{name}" for name in ("cls_token", "reg_token", "pos_embed_y", "pos_embed_x")],
            norms=("embeds.norm", "norm_pre", "norm", "fc_norm"),
            heads=("head",),
            writers={"embeds.proj.weight": 0, "embeds.proj.bias": 0, "embeds.pos_embed": 3},
        )

    def describe_outside(self, model: NaFlexVit) -> dict[str, Any]:
        embeds, pool = model.embeds, model.attn_pool
        require_describable(model, ("norm_pre", "norm", "fc_norm"))
        if not isinstance(embeds.norm, nn.Identity):
            raise ModelError("embeds.norm: a norm in the embedding of NaFlexVit is not covered.")
        final_norm = model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm
        return {
            "img_size": list(self.images(model).size),
            "patch_size": list(embeds.patch_size),
            "in_chans": model.in_chans,
            **describe_whole(model),
            "class_token": embeds.cls_token is not None,
            "reg_tokens": 0 if embeds.reg_token is None else embeds.reg_token.shape[1],
            "pos_embed": embeds.pos_embed_type,
            "pos_embed_grid_size": list(embeds.pos_embed_grid_size or (14, 14)),
            **{f"pos_embed_{name}": getattr(embeds, f"pos_embed_{name}") for name in _OF_POSITIONS},
            "embed_proj_type": "linear" if embeds.is_linear else "conv",
            "dynamic_img_pad": embeds.dynamic_img_pad,
            "patchify_channels_last": embeds.channels_last,
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "final_norm": not isinstance(final_norm, nn.Identity),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": model.pool_include_prefix,
            "attn_pool_num_heads": 1 if pool is None else pool.num_heads,
            "attn_pool_mlp_ratio": 1.0 if pool is None else ratio_of(pool.mlp.fc1, model.embed_dim),
        }

    def describe_blocks(self, model: NaFlexVit) -> dict[str, Any]:
        block: TimmBlock = model.blocks[0]
        return {
            "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio_of(block.mlp.fc1, model.embed_dim),
            "qkv_bias": block.attn.qkv.bias is not None,
            "proj_bias": block.attn.proj.bias is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
            "act_layer": activation_name(block.mlp.act),
            "embed_dim": model.embed_dim,
        }

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        width = arguments["embed_dim"]
        for name in ("num_heads", "attn_pool_num_heads"):
            if width % arguments[name]:
                raise ModelError(f"{width} channels cannot be shared among {arguments[name]} heads ({name})")
        if arguments["global_pool"] == "token" and not arguments["class_token"]:
            raise ModelError("there is no class token to be pooled")

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        model = kind(**given)
        model.__dict__[_SIZE] = given["img_size"]
        return model


NAFLEX = NaFlexFamily()
