"""Tiny Vision Transformers, images and masks: everything that a law can be proved on in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.vit.layout import ModelLayout

CLASSES = 5
VIT, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.1},
    "distilled": {"name": DISTILLED},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "no qkv bias": {"qkv_bias": False},
    "no projection bias": {"proj_bias": False},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "no bias, sigmoid": {"qkv_bias": False, "proj_bias": False, "act_layer": "sigmoid"},
    "norm without affine": {
        "norm_layer": lambda width, **kwargs: nn.LayerNorm(width, eps=1e-6, elementwise_affine=False, **kwargs)
    },
    "unfused": {"fused": False},
}
"""Every kind of model that the method has to treat alike, as arguments of `tiny_vit`."""

_TWO_HEADS = {"embed_dim": 32, "num_heads": 2}
ANATOMIES: dict[str, dict[str, Any]] = {
    "gated MLP, packed": {"mlp_layer": SwiGLUPacked, "init_values": 0.1},
    "gated MLP, gate last": {"mlp_layer": GluMlp},
    "gated MLP, apart": {"mlp_layer": SwiGLU, "scale_mlp_norm": True},
    "norms of queries and keys": {"qk_norm": True},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "RMSNorm": {
        "norm_layer": "rmsnorm",
        "embed_norm_layer": "rmsnorm",
        "mlp_layer": SwiGLU,
        "qkv_bias": False,
        "proj_bias": False,
        "class_token": False,
        "global_pool": "avg",
    },
    "RMSNorm inside": {"norm_layer": "rmsnorm", "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "DINOv3": {"name": "vit_small_patch16_dinov3", **_TWO_HEADS},
    "EVA": {"name": "eva_giant_patch14_224", "embed_dim": 33},
    "EVA-02": {"name": "eva02_tiny_patch14_224", **_TWO_HEADS},
    "EVA-02, apart": {"name": "eva02_base_patch16_clip_224", **_TWO_HEADS},
    "RoPE": {"name": "vit_small_patch16_rope_224", "embed_dim": 48},
    "RoPE, mixed": {"name": "vit_small_patch16_rope_mixed_ape_224", "embed_dim": 48},
    "Perception Encoder": {"name": "vit_pe_core_tiny_patch16_384", **_TWO_HEADS, "attn_pool_num_heads": 2},
    "Qwen3": {"name": "qwen3_vit_88m_merge", **_TWO_HEADS, "pos_embed_grid_size": 3, "out_features": 6},
    "grouped keys": {
        "name": "vit_small_patch16_rope_224",
        "embed_dim": 32,
        "num_heads": 4,
        "num_kv_heads": (2, 4),
        "qkv_fused": False,
        "qk_norm": True,
        "rope_rotate_half": True,
        "swiglu_mlp": True,
        "swiglu_align_to": 8,
        "dynamic_img_size": True,
    },
}
"""Models whose blocks consist of other parts than timm's plain Block, as arguments of `tiny_vit`."""


def tiny_vit(
    name: str = VIT, *, seed: int = 0, dtype: torch.dtype = torch.float32, fused: bool = True, **changed: Any
) -> VisionTransformer:
    """A two-block ViT in evaluation mode, all of whose parameters are away from the values they are initialised with."""
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": CLASSES,
        **changed,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    if not fused:
        for block in model.blocks:
            block.attn.fused_attn = False
    return model.eval().to(dtype)


def images(count: int = 2, *, size: int = 32, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(count: int = 2, *, seed: int = 1) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def masks_of(layout: ModelLayout, values: Callable[[str, int], Tensor]) -> dict[str, Tensor]:
    """A mask for every gate, from its name and size."""
    return {block.gate(dim): values(block.gate(dim), size) for block in layout.blocks for dim, size in block.dims.items()}


def random_masks(layout: ModelLayout, seed: int = 0, keep: float = 0.5, *, only: str = "") -> dict[str, Tensor]:
    """Hard masks that keep about a share of the elements; with `only`, of the gates whose name ends so, the others whole."""
    generator = torch.Generator().manual_seed(seed)
    return masks_of(
        layout,
        lambda gate, size: (torch.rand(size, generator=generator) < keep).float() if gate.endswith(only) else torch.ones(size),
    )


def soft_random_masks(layout: ModelLayout, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return masks_of(layout, lambda _gate, size: torch.rand(size, generator=generator))


def kept_counts(layout: ModelLayout, masks: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """Channels that each dimension keeps, by block name, counted without the code under test."""
    return {block.name: {dim: int((masks[block.gate(dim)] >= 0.5).sum()) for dim in block.dims} for block in layout.blocks}


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_activations(model: VisionTransformer, masks: dict[str, Tensor]) -> None:
    """The definition of the gates, carried out on activations: what scaling weights has to equal. Masks may need a gradient."""

    def scale(mask: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _inputs, output: output * mask

    def scale_heads(heads: int, mask: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _inputs, output: (output.unflatten(-1, (3, heads, len(mask))) * mask).flatten(-3)

    for depth, block in enumerate(model.blocks):
        attn, mlp = f"blocks.{depth}.attn", f"blocks.{depth}.mlp"
        block.norm1.register_forward_hook(scale(masks[f"{attn}.in"]))
        block.attn.qkv.register_forward_hook(scale_heads(block.attn.num_heads, masks[f"{attn}.head"]))
        block.attn.proj.register_forward_hook(scale(masks[f"{attn}.out"]))
        block.norm2.register_forward_hook(scale(masks[f"{mlp}.in"]))
        block.mlp.act.register_forward_hook(scale(masks[f"{mlp}.hidden"]))
        block.mlp.fc2.register_forward_hook(scale(masks[f"{mlp}.out"]))


def in_ranks(count: int, act: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """What each of so many ranks makes of `act(rank, mean over all ranks)`; they are threads that wait for each other."""
    barrier, handed_in, results = threading.Barrier(count, timeout=10), [None] * count, [None] * count

    def rank_of(rank: int) -> None:
        def mean(tensor: Tensor) -> Tensor:
            handed_in[rank] = tensor
            barrier.wait()
            total = torch.stack(handed_in).mean(0)
            barrier.wait()
            return total

        try:
            results[rank] = act(rank, mean)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
