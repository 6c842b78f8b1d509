"""A pruned model of every kind, masked and small: for tests of what happens to it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import timm
import torch
from timm.models.vitamin import VitCfg
from torch import Tensor, nn

from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, ModelLayout, read_layout
from tiny import ANATOMIES, CLASSES, VARIANTS, tiny_vit

Masks = dict[str, Tensor]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": VARIANTS["distilled"],
    "layer scale": VARIANTS["layer scale"],
    "registers": VARIANTS["registers"],
    "attention pool": {"class_token": False, "global_pool": "map"},
    **ANATOMIES,
}
"""Vision Transformers, as arguments of `tiny_vit`."""
_SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
_STAGES: dict[str, Any] = {"patch_size": 2, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3), "window_size": 4}
POOLED: dict[str, Any] = {
    "img_size": 32,
    "embed_dim": 12,
    "num_heads": 2,
    "stages": (1, 2, 1),
    "q_pool": 2,
    "mask_unit_size": (4, 4),
    "mask_unit_attn": (True, True, False),
}
"""Of a tiny Hiera."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BEiT": ("beit_base_patch16_224", _SHAPE),
    "BEiT, gated": ("beitv2_base_patch16_224", {**_SHAPE, "swiglu_mlp": True, "scale_mlp": True}),
    "positions by a network": ("vit_relpos_base_patch16_224", _SHAPE),
    "positions from a table": ("vit_relpos_medium_patch16_cls_224", {**_SHAPE, "rel_pos_type": "bias"}),
    "shared positions": ("vit_srelpos_medium_patch16_224", _SHAPE),
    "NaFlex": ("naflexvit_base_patch16_gap", {**_SHAPE, "pos_embed_grid_size": (4, 4)}),
    "hybrid": ("vit_tiny_r_s16_p8_224", _SHAPE),
    "ViTamin": ("vitamin_small_224", {**_SHAPE, "patch_size": 1, "embed_cfg": VitCfg((8, 12, 24), (1, 2), 8)}),
    "SAM": ("samvit_base_patch16", {**_SHAPE, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8}),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": 32, **_STAGES}),
    "Swin v2": ("swinv2_tiny_window8_256", {"img_size": 32, **_STAGES}),
    "Hiera": ("hiera_tiny_224", POOLED),
    "Hiera, positions in windows": ("hiera_small_abswin_256", {**POOLED, "global_pos_size": (3, 3)}),
}
"""Models of other classes of timm's, as its names and arguments."""
CUTS: dict[str, Callable[[ModelLayout], Masks]] = {
    "vanished block": lambda layout: _without(_drawn(layout), "blocks.0", "out"),
    "constant block": lambda layout: _without(_drawn(layout), "blocks.0", ".in"),
    "residual-pruned": lambda layout: _drawn(layout, only="stream"),
    "thin heads": lambda layout: _drawn(layout, only=".head"),
}
"""What can be cut of a plain model, as its masks."""
KINDS = (*ARCHITECTURES, *FAMILIES, *CUTS)


def masked_and_small(kind: str) -> tuple[nn.Module, nn.Module]:
    """The same pruned model twice, for (3, 32, 32) images: dense behind hard masks, and cut."""
    model = dense_of(kind)
    layout = read_layout(
        model, ("stream", "heads", *DEFAULT_DIMS) if kind in ("residual-pruned", "thin heads") else DEFAULT_DIMS
    )
    masks = CUTS[kind](layout) if kind in CUTS else _drawn(layout)
    masked = deepcopy(model)
    gates = Gates(layout, masked)
    gates.attach(masked)
    gates.set(masks)
    return masked, apply_cuts(model, plan_cuts(layout, masks))


def dense_of(kind: str) -> nn.Module:
    """A tiny dense model of a kind."""
    if kind not in FAMILIES:
        return tiny_vit(**ARCHITECTURES.get(kind, {}))
    name, arguments = FAMILIES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, num_classes=CLASSES, **arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def _drawn(layout: ModelLayout, only: str = "") -> Masks:
    """Masks that keep about 0.6 of the gates whose name ends so, the first channel of each at least."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for gate, size in layout.gates.items():
        masks[gate] = (torch.rand(size, generator=generator) < 0.6).float() if gate.endswith(only) else torch.ones(size)
        masks[gate][0] = 1
    return masks


def _without(masks: Masks, start: str, end: str) -> Masks:
    return {gate: mask.zero_() if gate.startswith(start) and gate.endswith(end) else mask for gate, mask in masks.items()}
