"""A model's architecture as plain values: read off the module itself, so that no caller has to remember how it was built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, LayerNormFp32, LayerScale, get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from p3b.errors import ModelError

BLOCK_ARGUMENTS = "p3b_block_arguments"
"""Attribute of a small model that keeps what it was built with where it does not tell: cut blocks, and a narrower stream."""

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


MOST_BLOCKS, MOST_CHANNELS = 1024, 1 << 16
"""Far above any Vision Transformer. A description is read from files, and building what it asks for must stay cheap."""


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 <= value <= MOST_CHANNELS


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole(1, MOST_CHANNELS), value))


def _is_one_of(known: Iterable[Any]) -> Callable[[Any], bool]:
    choices = tuple(known)
    return lambda value: type(value) in map(type, choices) and value in choices


_ARGUMENTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("img_size", "patch_size"), (_is_pair, f"two whole numbers from 1 to {MOST_CHANNELS}")),
    **dict.fromkeys(
        ("in_chans", "embed_dim", "num_heads"), (_is_whole(1, MOST_CHANNELS), f"a whole number from 1 to {MOST_CHANNELS}")
    ),
    "num_classes": (_is_whole(0, 1 << 24), "a whole number from 0 to 16777216"),
    "reg_tokens": (_is_whole(0, MOST_CHANNELS), f"a whole number from 0 to {MOST_CHANNELS}"),
    "depth": (_is_whole(1, MOST_BLOCKS), f"a whole number from 1 to {MOST_BLOCKS}"),
    **dict.fromkeys(("mlp_ratio", "norm_eps"), (_is_number, f"a number from 0 to {MOST_CHANNELS}")),
    "init_values": (lambda value: value is None or _is_number(value), "a number or null"),
    **dict.fromkeys(
        (
            *("class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "pool_include_prefix", "dynamic_img_size"),
            *("qkv_bias", "proj_bias"),
        ),
        (lambda value: type(value) is bool, "true or false"),
    ),
    "global_pool": (_is_one_of(("", "avg", "avgmax", "max", "token", "map", "prr")), "a pooling of timm"),
    "pos_embed": (_is_one_of(("learn", "none")), "learn or none"),
    "act_layer": (_is_one_of(_ACTIVATIONS), f"one of {', '.join(_ACTIVATIONS)}"),
    "norm_layer": (_is_one_of(_NORMS), f"one of {', '.join(_NORMS)}"),
}
"""The arguments of a description, all of which it has: what each may be, as a question and in words."""


def check_description(architecture: object) -> None:
    """See that a description, from whatever file, is one that `describe_dense` could have given, before anything is built.

    Raises:
        ModelError: it lacks something, or an argument is of another type or out of its range.
    """
    kind, arguments = (architecture.get(key) if isinstance(architecture, dict) else None for key in ("class", "arguments"))
    if not isinstance(arguments, dict) or not _is_one_of(_CLASSES)(kind):
        raise ModelError(f"the architecture is not a class ({', '.join(_CLASSES)}) with its arguments")
    if arguments.keys() != _ARGUMENTS.keys():
        odd = ", ".join(sorted(map(str, arguments.keys() ^ _ARGUMENTS.keys()))[:5])
        raise ModelError(f"the architecture lacks arguments or has others than are known ({odd[:200]})")
    for name, (fits, expected) in _ARGUMENTS.items():
        if not fits(arguments[name]):
            raise ModelError(f"the architecture's {name} is {str(arguments[name])[:80]}; expected {expected}")
    if arguments["embed_dim"] % arguments["num_heads"]:
        raise ModelError(f"{arguments['embed_dim']} channels cannot be shared among {arguments['num_heads']} heads")


def describe_dense(vit: VisionTransformer) -> dict[str, Any]:
    """Class and constructor arguments of the dense model that this one is or was cut from, read off the module.

    Raises:
        ModelError: a part that the arguments cannot express, or a size that `check_description` would refuse.
    """
    kind = type(vit).__name__
    if kind not in _CLASSES or type(vit) is not _CLASSES[kind]:
        raise ModelError(f"A {kind} cannot be described in config.json; covered are {', '.join(_CLASSES)}.")
    patch, conv = vit.patch_embed, vit.patch_embed.proj
    if not isinstance(patch.norm, nn.Identity):
        raise ModelError("patch_embed.norm: a norm in the patch embedding is not covered.")
    for name in ("norm_pre", "norm", "fc_norm"):
        if type(part := vit.get_submodule(name)) not in (nn.Identity, nn.LayerNorm, *_NORMS.values()):
            raise ModelError(f"{name}: {type(part).__name__} cannot be described in config.json; put timm's own layer back.")
    final_norm = vit.norm if not isinstance(vit.norm, nn.Identity) else vit.fc_norm
    arguments = {
        "img_size": list(patch.img_size),
        "patch_size": list(patch.patch_size),
        "in_chans": conv.in_channels,
        "num_classes": classes_of(vit),
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
    description = {"class": kind, "arguments": {**arguments, **describe_blocks(vit)}}
    check_description(description)
    return description


def classes_of(vit: VisionTransformer) -> int:
    """Outputs of the head as it is: a head that was replaced by another layer leaves `vit.num_classes` behind."""
    return vit.head.out_features if isinstance(vit.head, nn.Linear) else vit.num_classes


def describe_blocks(vit: VisionTransformer) -> dict[str, Any]:
    """What the dense blocks, and the stream between them, were built with: kept on a small model from before it was cut, else
    read off the first block.

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
        "act_layer": activation_name(block.mlp.act),
        "norm_layer": norms[0],
        "norm_eps": block.norm1.eps,
        "embed_dim": vit.embed_dim,
    }


def build_dense(architecture: Mapping[str, Any]) -> VisionTransformer:
    """The dense model of a description, freshly initialised.

    Raises:
        ModelError: the description is not one of `describe_dense`.
    """
    return _build(architecture)


def build_skeleton(architecture: Mapping[str, Any]) -> VisionTransformer:
    """The dense model of a description on the meta device: shapes without memory.

    Raises:
        ModelError: the description is not one of `describe_dense`.
    """
    with torch.device("meta"):
        return _build(architecture, weight_init="skip")  # drawing values that nobody holds takes most of the time


def _build(architecture: Mapping[str, Any], **more: Any) -> VisionTransformer:
    check_description(architecture)
    arguments = dict(architecture["arguments"])
    norm = partial(_NORMS[arguments.pop("norm_layer")], eps=arguments.pop("norm_eps"))
    return _CLASSES[architecture["class"]](**arguments, norm_layer=norm, **more)


def activation_name(activation: nn.Module) -> str:
    """timm's name of an activation. Its default is torch's own GELU, its named ones are classes of its own.

    Raises:
        ModelError: it has no name here, or other settings (a slope) than the one of that name.
    """
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    for name in _ACTIVATIONS:
        if type(known := get_act_layer(name)()) is type(activation) and _settings(known) == _settings(activation):
            return name
    raise ModelError(f"mlp.act: {activation} cannot be described in config.json; covered are {', '.join(_ACTIVATIONS)}.")


def _settings(activation: nn.Module) -> dict[str, object]:
    """What an activation was built with; whether it works in place makes no difference."""
    return {
        key: value for key, value in vars(activation).items() if not key.startswith("_") and key not in ("training", "inplace")
    }
