"""A model of Hugging Face's transformers, in memory, becomes timm's `VisionTransformer` with the same outputs.

The library itself is not needed: a model is known by `config.model_type`, its class's name, and its state dict, which is read
by the names of `p3b.storage.naming`. Source: transformers.models.*.modeling_* of 4.57 and 5.24.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.errors import ModelError, unknown_name
from p3b.storage.arithmetic import is_known_activation
from p3b.storage.families import foreign_family
from p3b.storage.hub_folder import Facts, facts_of_preprocessor, facts_of_transformers
from p3b.storage.load_report import first
from p3b.storage.naming import to_timm_names
from p3b.storage.preparation import decide_preparation
from p3b.vit.valueless import without_values

_ENCODERS = {
    "vit": ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
    "deit": (
        "DeiTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "DeiTForMaskedImageModeling",
    ),
    "vit_mae": ("ViTMAEModel", "ViTMAEForPreTraining"),
    "dinov2": ("Dinov2Model",),
    "dinov2_with_registers": ("Dinov2WithRegistersModel",),
    "siglip": ("SiglipModel",),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionTransformer"),
    "clip": ("CLIPModel",),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPVisionTransformer"),
}
"""Classes whose answer timm's model gives, by model_type."""
_INNER = {
    "Dinov2ForImageClassification": "dinov2",
    "Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
    "CLIPForImageClassification": "vision_model",
    "SiglipForImageClassification": "vision_model",
}
"""Classifiers that read what no pooling of timm gives; the tower inside is one that can be taken."""
_NOT_COMPUTED = re.compile(r"mask_token|pooler\..*|.*position_ids")
"""Tensors of a tower that its features do not depend on."""


@dataclass(frozen=True)
class _Plan:
    """What to build, and which tensors of the source have another name there."""

    kind: type[VisionTransformer]
    arguments: dict[str, Any]
    renames: dict[str, str]


def from_transformers(model: nn.Module, image_processor: Any = None) -> VisionTransformer:
    """timm's model of a Vision Transformer of transformers, ready for `p3b.Pruner`.

    A classifier comes along, and the model answers as the source's `logits`. Without one `num_classes` is 0, and the model
    answers with the normalised class token (ViT, ViTMAE on all patches, DINOv2, CLIP's `pooler_output`, the mean of DeiT's two
    tokens) or SigLIP's `pooler_output`; `model.reset_classifier(10)` gives it a head. What only reads these features stays
    behind: poolers, decoders, projections into the space shared with text, text towers.

    Args:
        model: ViT, DeiT, ViTMAE, DINOv2 (with registers or without), or the image tower of SigLIP or CLIP. It is not changed,
            and no weight is shared with it.
        image_processor: of transformers; what it says of images becomes the model's `pretrained_cfg`, which
            `timm.data.resolve_model_data_config` reads.

    Returns:
        In the mode, dtype and place of the source.

    Raises:
        ModelError: it is a model of another class, or has a part that timm's does not compute.
    """
    config = _config(model)
    facts = facts_of_transformers(config)
    renamed = to_timm_names(model.state_dict())
    family = foreign_family(renamed.state, list(model.state_dict()), facts, "")
    if family is not None:
        raise ModelError(f"{type(model).__name__} cannot be taken: its weights are {family}.")
    if facts.activation is None or not is_known_activation(facts.activation):
        raise ModelError(f"{type(model).__name__} has the activation '{facts.activation}', which timm does not know.")
    plan = _plan(type(model).__name__, config, facts, renamed.state)
    state = {plan.renames.get(key, key): tensor for key, tensor in renamed.state.items()}
    with without_values():
        built = plan.kind(**plan.arguments, weight_init="skip")
    _require_same_parts(type(model).__name__, state, built)
    own = {key: state[key].detach().clone(memory_format=torch.contiguous_format) for key in built.state_dict()}
    built.load_state_dict(own, assign=True)
    for parameter in built.parameters():
        parameter.requires_grad_(True)
    if image_processor is not None:
        vars(built)["pretrained_cfg"] = _data_config(built, image_processor)
    return built.train(model.training)


def _config(model: nn.Module) -> dict[str, Any]:
    """The config of a model that can be taken, as plain values."""
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not isinstance(kind := getattr(config, "model_type", None), str):
        raise ModelError(
            f"from_transformers takes a model of the transformers library, got {name}. A model of timm is pruned as it is; "
            "weights in a file are opened by p3b.storage.models.build_model(name, weights=path, ...)."
        )
    if name in _INNER:
        raise ModelError(
            f"{name}: its classifier reads something else than timm's models pool. Hand in the tower inside, "
            f"model.{_INNER[name]}, and give the result a head with reset_classifier(classes)."
        )
    if kind not in _ENCODERS:
        raise ModelError(f"{name}: {unknown_name('model_type', kind, _ENCODERS)}")
    if name not in _ENCODERS[kind]:
        raise ModelError(f"{name} cannot be taken; of '{kind}' these can: {', '.join(_ENCODERS[kind])}.")
    plain: dict[str, Any] = config.to_dict()
    if plain.get("use_swiglu_ffn"):
        raise ModelError(f"{name} has a gated MLP (use_swiglu_ffn, as DINOv2's giant), which cannot be pruned.")
    return plain


def _plan(name: str, config: Mapping[str, Any], facts: Facts, state: Mapping[str, Tensor]) -> _Plan:
    vision = config.get("vision_config") or config
    width = vision["hidden_size"]
    head, pooled = state.get("head.weight"), any(key.startswith("attn_pool.") for key in state)
    is_siglip = facts.kind in ("siglip", "siglip_vision_model")
    arguments: dict[str, Any] = {
        "img_size": _size(vision["image_size"]),
        "patch_size": _size(vision["patch_size"]),
        "in_chans": vision["num_channels"],
        "embed_dim": width,
        "depth": vision["num_hidden_layers"],
        "num_heads": facts.num_heads,
        # timm truncates the product to the width of the MLP: the half keeps it where it is, whatever is rounded.
        "mlp_ratio": (state["blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "pre_norm": "norm_pre.weight" in state,
        "act_layer": facts.activation,
        "norm_layer": partial(LayerNorm, eps=vision["layer_norm_eps"]),
        "num_classes": 0 if head is None else head.shape[0],
        "class_token": not is_siglip,
        "global_pool": ("map" if pooled else "avg") if is_siglip else "token",
    }
    if is_siglip and not pooled:
        arguments["fc_norm"] = False
    if "reg_token" in state:
        arguments |= {"reg_tokens": state["reg_token"].shape[1], "no_embed_class": True}
    if "dist_token" not in state:
        return _Plan(VisionTransformer, arguments, {})
    if name == "DeiTForImageClassification":  # it reads the class token alone, as timm does where the other is a register
        return _Plan(VisionTransformer, {**arguments, "reg_tokens": 1}, {"dist_token": "reg_token"})
    return _Plan(VisionTransformerDistilled, arguments, {})


def _require_same_parts(name: str, state: Mapping[str, Tensor], built: VisionTransformer) -> None:
    """ModelError unless the tensors are those of timm's model, and what is left over is of no matter."""
    target = built.state_dict()
    lost = [key for key in target if key not in state]
    inside = re.compile(r"(blocks|patch_embed|norm_pre|norm|fc_norm|attn_pool|head|head_dist)\.|\w+_token$|pos_embed$")
    surplus = [key for key in state if key not in target and inside.match(key) and not _NOT_COMPUTED.fullmatch(key)]
    misshapen = [key for key in target if key in state and state[key].shape != target[key].shape]
    problems = [
        f"{words} {first(keys)}"
        for words, keys in (
            ("lacks", lost),
            ("has parts that timm's model has no place for:", surplus),
            ("has another shape than its config says in", misshapen),
        )
        if keys
    ]
    if problems:
        raise ModelError(
            f"{name} {' and '.join(problems)}. Hand in the model as its class builds it: adapters merged, nothing replaced."
        )


def _data_config(model: VisionTransformer, image_processor: Any) -> dict[str, Any]:
    """What an image processor says, as timm's config."""
    channels = model.patch_embed.proj.in_channels
    facts = facts_of_preprocessor(image_processor.to_dict())
    said = decide_preparation(channels=channels, facts=facts)
    return {
        "input_size": (channels, *model.patch_embed.img_size),
        "mean": said.mean,
        "std": said.std,
        "crop_pct": said.crop_pct,
        "interpolation": said.interpolation,
        "num_classes": model.num_classes,
    }


def _size(value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns
