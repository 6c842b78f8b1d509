"""A model's architecture as plain values: read off the module itself, so that no caller has to remember how it was built."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import LayerNorm, LayerNormFp32, LayerScale, get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from p3b.errors import ModelError

BLOCK_ARGUMENTS = "p3b_block_arguments"
"""Attribute of a small model that keeps what its dense blocks were built with: cut blocks do not tell."""

_CLASSES: Mapping[str, type[VisionTransformer]] = {
    "VisionTransformer": VisionTransformer,
    "VisionTransformerDistilled": VisionTransformerDistilled,
}
_NORMS: Mapping[str, type[nn.LayerNorm]] = {"LayerNorm": LayerNorm, "LayerNormFp32": LayerNormFp32}
_ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu6",
    "silu",
    "mish",
    "hard_swish",
    "elu",
    "celu",
    "selu",
    "tanh",
    "sigmoid",
)


def describe_dense(vit: VisionTransformer) -> dict[str, Any]:
    """Class and constructor arguments of the dense model that this one is or was cut from, read off the module.

    Raises:
        ModelError: a part that the arguments cannot express.
    """
    kind = type(vit).__name__
    if kind not in _CLASSES or type(vit) is not _CLASSES[kind]:
        raise ModelError(f"A {kind} cannot be described in config.json; covered are {', '.join(_CLASSES)}.")
    patch, conv = vit.patch_embed, vit.patch_embed.proj
    if not isinstance(patch.norm, nn.Identity):
        raise ModelError("patch_embed.norm: a norm in the patch embedding is not covered.")
    final_norm = vit.norm if not isinstance(vit.norm, nn.Identity) else vit.fc_norm
    arguments = {
        "img_size": list(patch.img_size),
        "patch_size": list(patch.patch_size),
        "in_chans": conv.in_channels,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "class_token": vit.cls_token is not None,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "no_embed_class": vit.no_embed_class,
        "reg_tokens": vit.num_reg_tokens,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "final_norm": not isinstance(final_norm, nn.Identity),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
        "dynamic_img_size": vit.dynamic_img_size,
    }
    return {"class": kind, "arguments": {**arguments, **describe_blocks(vit)}}


def describe_blocks(vit: VisionTransformer) -> dict[str, Any]:
    """What the dense blocks were built with: kept on a small model from before it was cut, else read off the first block.

    Raises:
        ModelError: an activation or norm that has no name here.
    """
    kept = vit.__dict__.get(BLOCK_ARGUMENTS)
    if kept is not None:
        return dict(kept)
    block: Block = vit.blocks[0]
    norms = [name for name, cls in _NORMS.items() if type(block.norm1) in (cls, nn.LayerNorm)]
    if not norms:
        raise ModelError(f"blocks.0.norm1: {type(block.norm1).__name__} cannot be described in config.json.")
    return {
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "act_layer": _activation_name(block.mlp.act),
        "norm_layer": norms[0],
        "norm_eps": block.norm1.eps,
    }


def build_dense(architecture: Mapping[str, Any]) -> VisionTransformer:
    """The dense model of a description, freshly initialised (or without values, in a meta-device context)."""
    arguments = dict(architecture["arguments"])
    norm = partial(_NORMS[arguments.pop("norm_layer")], eps=arguments.pop("norm_eps"))
    return _CLASSES[architecture["class"]](**arguments, norm_layer=norm)


def _activation_name(activation: nn.Module) -> str:
    """timm's name of an activation. Its default is torch's own GELU, its named ones are classes of its own."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    for name in _ACTIVATIONS:
        if type(get_act_layer(name)()) is type(activation):
            return name
    raise ModelError(
        f"blocks.0.mlp.act: {type(activation).__name__} cannot be described in config.json; covered are "
        f"{', '.join(_ACTIVATIONS)}."
    )
