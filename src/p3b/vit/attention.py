"""Which form of attention is computed: the fused one, but on a CPU under bf16.

There the backward pass of torch's fused attention takes several times as long as that of the plain form, the products and the
softmax that it stands for, and the forward pass longer too; docs/clock.md has figures by number of tokens. In training
the plain form holds the attention weights of every layer until its backward pass, so it is left to short sequences.
"""

from __future__ import annotations

import math

import torch
from timm.layers import Attention, AttentionRope, use_fused_attn
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention

from p3b.vit.families import images_of

KINDS = (Attention, AttentionRope, EvaAttention, BeitAttention, RelPosAttention)
"""Attentions of timm that have both forms."""
MOST_TOKENS = 600
"""Longest sequence whose attention weights are held: 577 tokens are 384 pixels in patches of 16."""


def choose_attention(model: VisionTransformer, device: torch.device, dtype: torch.dtype | None) -> VisionTransformer:
    """Let the model compute its attention in the form that is the quicker one.

    Both forms are the same function; what they give differs by rounding. A model that is saved and loaded is fused again.

    Args:
        model: is changed, and returned.
        device: that it will compute on.
        dtype: that products are computed in: that of autocast, or of the weights; None for float32.
    """
    tokens = math.prod(images_of(model).grid) + getattr(model, "num_prefix_tokens", 0)
    plain = device.type == "cpu" and dtype is torch.bfloat16 and tokens <= MOST_TOKENS
    for module in model.modules():
        if isinstance(module, KINDS):
            module.fused_attn = use_fused_attn() and not plain
    return model
