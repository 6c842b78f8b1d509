"""Which form of attention training computes: the fused one, but on a CPU under bf16.

There the backward pass of torch's fused attention takes several times as long as that of the plain form, the products and the
softmax that it stands for; docs/clock.md has figures by number of tokens. The plain form holds the attention weights of every
layer until its backward pass, so it is left to short sequences.
"""

from __future__ import annotations

import torch
from timm.layers import Attention, use_fused_attn
from timm.models.vision_transformer import VisionTransformer

from p3b.train.optim import Precision

MOST_TOKENS = 600
"""Longest sequence whose attention weights are held: 577 tokens are 384 pixels in patches of 16."""


def choose_attention(model: VisionTransformer, precision: Precision) -> VisionTransformer:
    """Let the model compute its attention in the form that is the quicker one to train.

    Both forms are the same function; what they give differs by rounding. A model that is saved and loaded is fused again.

    Args:
        model: is changed, and returned.
        precision: of the steps.
    """
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    plain = precision.device.type == "cpu" and precision.dtype is torch.bfloat16 and tokens <= MOST_TOKENS
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = use_fused_attn() and not plain  # type: ignore[misc]  # final for TorchScript
    return model
