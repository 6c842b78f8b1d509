"""timm's VisionTransformer: ViT, DeiT (distilled too), DINOv2, CLIP, SigLIP; pre-norm blocks of an attention and an MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import GluMlp, HybridEmbed, LayerScale, Mlp, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import nn

from p3b.vit.anatomy.attention import SelfAttention
from p3b.vit.anatomy.half import NormTwice, PreNorm
from p3b.vit.anatomy.mlp import mlp_of
from p3b.vit.anatomy.norms import NORMS
from p3b.vit.families import allowed
from p3b.vit.families.activations import ACTIVATIONS, activation_name
from p3b.vit.families.family import Block, Outside, ratio_of
from p3b.vit.families.norms import describe_norm, require_describable, take_norm
from p3b.vit.families.stems import (
    STEMS,
    describe_patches,
    describe_stem,
    embed_arguments,
    last_convolution,
    require_patch_embed,
)
from p3b.vit.families.stream import read_outside
from p3b.vit.families.usual import BlocksAlike, PatchesFirst, describe_whole, require_blocks

MLP_LAYERS = {"Mlp": Mlp, "GluMlp": GluMlp, "SwiGLUPacked": SwiGLUPacked, "SwiGLU": SwiGLU, "GeGluMlp": GeGluMlp}
"""MLPs by the name that a description has for them. SwiGLUPacked is a GluMlp whose gate comes first."""


class VisionTransformerFamily(PatchesFirst, BlocksAlike):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {
        "VisionTransformer": VisionTransformer,
        "VisionTransformerDistilled": VisionTransformerDistilled,
    }
    rules: Mapping[str, allowed.Rule] = {
        **allowed.OF_SHAPE,
        "reg_tokens": allowed.COUNT,
        "init_values": allowed.NUMBER_OR_NULL,
        **dict.fromkeys(
            (
                *("class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "pool_include_prefix"),
                *("dynamic_img_size", "qkv_bias", "proj_bias"),
            ),
            allowed.FLAG,
        ),
        "global_pool": allowed.one_of(("", "avg", "avgmax", "max", "token", "map", "prr"), "a pooling of timm"),
        "pos_embed": allowed.one_of(("learn", "none"), "learn or none"),
        "act_layer": allowed.one_of(ACTIVATIONS),
        "norm_layer": allowed.one_of(tuple(NORMS)),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {
        **dict.fromkeys(("qk_norm", "scale_attn_norm", "scale_mlp_norm"), (allowed.FLAG, False)),
        "mlp_layer": (allowed.one_of(tuple(MLP_LAYERS)), "Mlp"),
        "embed_norm": (allowed.FLAG, False),
        **STEMS,
    }

    def blocks(self, model: VisionTransformer) -> Sequence[Block]:
        attn = PreNorm("attn", SelfAttention(), norm="norm1", layer_scale="ls1", drop_path="drop_path1")
        return [
            Block(f"blocks.{depth}", block, (attn, _mlp_half(getattr(block, "mlp", None))), model.embed_dim)
            for depth, block in enumerate(model.blocks)
        ]

    def require_covered(self, model: VisionTransformer, purpose: str) -> None:
        require_patch_embed(model.patch_embed, hybrid=True)

    def require_blocks_covered(self, model: VisionTransformer) -> None:
        require_blocks(self.blocks(model), TimmBlock, "only timm's standard Block (attention, then MLP) is")

    def outside(self, model: VisionTransformer) -> Outside:
        return read_outside(
            model,
            tokens=("cls_token", "reg_token", "dist_token", "pos_embed"),
            norms=_norms(model),
            heads=("head", "head_dist"),
            others=[key for key, _ in model.named_parameters() if key.startswith("patch_embed.backbone.")],
            writers={f"patch_embed.{last_convolution(model.patch_embed)}.{key}": 0 for key in ("weight", "bias")},
        )

    def describe_outside(self, model: VisionTransformer) -> dict[str, Any]:
        patch = model.patch_embed
        require_describable(model, _norms(model))
        final_norm = model.norm if not isinstance(model.norm, nn.Identity) else model.fc_norm
        return {
            **describe_patches(patch),
            **describe_whole(model),
            "class_token": model.cls_token is not None,
            "pos_embed": "none" if model.pos_embed is None else "learn",
            "no_embed_class": model.no_embed_class,
            "reg_tokens": model.num_reg_tokens,
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "final_norm": not isinstance(final_norm, nn.Identity),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": model.pool_include_prefix,
            "dynamic_img_size": model.dynamic_img_size,
            "embed_norm": not isinstance(getattr(patch, "norm", nn.Identity()), nn.Identity),
            **describe_stem(patch),
        }

    def describe_blocks(self, model: VisionTransformer) -> dict[str, Any]:
        block: TimmBlock = model.blocks[0]
        return {
            "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio_of(mlp_of(block.mlp).first(block.mlp), model.embed_dim),
            "qkv_bias": block.attn.qkv.bias is not None,
            "proj_bias": block.attn.proj.bias is not None,
            "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
            "act_layer": activation_name(block.mlp.act),
            **describe_norm("blocks.0.norm1", block.norm1),
            "embed_dim": model.embed_dim,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
            "scale_mlp_norm": not isinstance(mlp_of(block.mlp).norm(block.mlp), nn.Identity),
            "mlp_layer": _mlp_name(block.mlp),
        }

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = dict(arguments)
        norm = take_norm(given)
        given["mlp_layer"] = MLP_LAYERS[given["mlp_layer"]]
        given |= embed_arguments({name: given.pop(name) for name in STEMS}, given["in_chans"], given["embed_dim"])
        given["embed_norm_layer"] = norm if given.pop("embed_norm") else None
        return kind(**given, norm_layer=norm, **({} if values else {"weight_init": "skip"}))


def _mlp_half(mlp: nn.Module | None) -> PreNorm:
    """The half that an MLP is; ViTamin's begins with a norm of its own."""
    half = NormTwice if isinstance(mlp, GeGluMlp) else PreNorm
    return half("mlp", mlp_of(mlp), norm="norm2", layer_scale="ls2", drop_path="drop_path2")


def _norms(model: VisionTransformer) -> tuple[str, ...]:
    """Names of the norms over the stream outside of the blocks."""
    names = ("norm_pre", "norm", "fc_norm")
    return names if isinstance(model.patch_embed, HybridEmbed) else ("patch_embed.norm", *names)


def _mlp_name(mlp: nn.Module) -> str:
    if isinstance(mlp, GluMlp):
        return "GluMlp" if mlp.gate_last else "SwiGLUPacked"
    return type(mlp).__name__


VISION_TRANSFORMER = VisionTransformerFamily()
