"""Fresh weights for a small model: its shape is kept, its values are those that training from nothing begins with."""

from __future__ import annotations

import math

import torch
from timm.layers import LayerScale, trunc_normal_
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import nn

from p3b.vit.anatomy.norms import has_shift, is_norm
from p3b.vit.parts import ConstantBranch, ReadChannels, WriteChannels

_LAYER_SCALE = 1e-5
"""timm's LayerScale begins with what it was given, which weights do not tell; this is the value of its own models."""

_CONVOLUTIONS = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)

_POSITIONS_AND_TOKENS = (
    *("pos_embed", "pos_embed_win", "pos_embed_y", "pos_embed_x", "cls_token", "reg_token"),
    *("relative_position_bias_table", "rel_pos_h", "rel_pos_w"),
)


def initialise(model: VisionTransformer) -> VisionTransformer:
    """Initialise a dense or small model in place, as timm initialises a dense one; returns it.

    A norm begins as the identity, a block that only adds a constant with nothing.
    """
    if isinstance(model, VisionTransformer):
        _reset_convolutions(getattr(model.patch_embed, "backbone", nn.Identity()))
        model.init_weights()  # positions and tokens; layers as timm was told when the model was built, which is not at all
    else:
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] in _POSITIONS_AND_TOKENS:
                trunc_normal_(parameter, std=0.02)
        _reset_convolutions(model)
    for name, parameter in model.named_parameters():
        if name.endswith((".gamma_1", ".gamma_2")):
            nn.init.constant_(parameter, _LAYER_SCALE)
        elif name.endswith((".q_bias", ".v_bias")):
            nn.init.zeros_(parameter)
        elif name.endswith(".logit_scale"):
            nn.init.constant_(parameter, math.log(10))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_weights_vit_timm(module)
        elif is_norm(module) or isinstance(module, ReadChannels):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            if has_shift(module):
                nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale | WriteChannels):
            if module.gamma is not None:
                nn.init.constant_(module.gamma, _LAYER_SCALE)
        elif isinstance(module, ConstantBranch):
            nn.init.zeros_(module.value)
    return model


def _reset_convolutions(network: nn.Module) -> None:
    """Convolutions and the norms between them as torch makes them."""
    for module in network.modules():
        if isinstance(module, _CONVOLUTIONS):
            module.reset_parameters()


def fill_buffers(model: nn.Module) -> None:
    """Compute what no file holds since it follows from the architecture, such as the angles of rotary positions.

    Args:
        model: built on the meta device; its buffers there get memory and values, in place. Parameters are left alone.
    """
    for module in model.modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if empty:
            module.init_non_persistent_buffers()
