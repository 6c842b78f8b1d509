"""The ViT authors' archives (`.npz`, of JAX): by way of a model of the archive's own shape they get timm's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.untrusted import READ_ERRORS, first_line
from p3b.vit.families.allowed import MOST_BLOCKS
from p3b.vit.valueless import without_values


def convert_npz(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, Tensor]:
    """Give the ViT authors' archive timm's names, with timm's reader, by way of a model of the archive's own shape.

    So a model of another grid or head meets it like any other state dict, and everything adapted is reported the same way.
    """
    prefix = next((p for p in ("", "opt/target/", "params/img/", "params/") if f"{p}embedding/kernel" in arrays), None)
    if prefix is None or f"{prefix}conv_root/kernel" in arrays:
        raise WeightsError(
            f"'{path}' is not in the layout of the ViT authors' archives (embedding/kernel, Transformer/encoderblock_0/...): "
            f"its first names are {', '.join(list(arrays)[:5])}. Give a .pth or .safetensors file instead."
        )
    try:
        arguments = _npz_arguments(arrays, prefix)
        _require_room(arguments, arrays)
        with torch.random.fork_rng(devices=[]):  # its first values are all overwritten: they should cost no random numbers
            model = VisionTransformer(**arguments)
        model.load_pretrained(str(path), prefix=prefix)
    except READ_ERRORS as error:
        raise WeightsError(
            f"'{path}' begins like an archive of the ViT authors, but is not complete ({first_line(error)}). Fetch it "
            "again, or give a .pth or .safetensors file instead."
        ) from error
    return model.state_dict()


def _require_room(arguments: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError where the shapes of a few arrays speak of a model that is larger than all of them."""
    if not 1 <= arguments["depth"] <= MOST_BLOCKS:
        raise ValueError(f"it speaks of {arguments['depth']} blocks")
    with without_values():
        wanted = sum(parameter.numel() for parameter in VisionTransformer(**arguments, weight_init="skip").parameters())
    held = sum(array.size for array in arrays.values())
    if wanted > held:
        raise ValueError(f"its shapes are of a model of {wanted} parameters, it holds {held}")


def _npz_arguments(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Arguments of the `VisionTransformer` whose weights an archive holds."""
    names = {key.removeprefix(prefix): array.shape for key, array in arrays.items() if key.startswith(prefix)}
    stacked = names.get("Transformer/encoderblock/LayerNorm_0/scale")  # big_vision: all blocks in one array, index first
    depth = stacked[0] if stacked else len({key.split("/")[1] for key in names if "/encoderblock_" in key})
    block = "Transformer/encoderblock/" if stacked else "Transformer/encoderblock_0/"
    inside = {"/".join(key.split("/")[-2:]): shape for key, shape in names.items() if key.startswith(block)}

    patch_h, patch_w, in_chans, embed_dim = names["embedding/kernel"]
    positions = {key.split("/")[-1]: shape[-2] for key, shape in names.items() if len(shape) > 1}["pos_embedding"]
    class_token = "cls" in names
    no_embed_class = class_token and math.isqrt(positions) ** 2 == positions
    side = math.isqrt(positions - (class_token and not no_embed_class))
    pooled = any(key.startswith("MAPHead_0/") for key in names)
    return {
        "img_size": (side * patch_h, side * patch_w),
        "patch_size": (patch_h, patch_w),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": inside["query/kernel"][-2],
        # timm truncates the product: the half keeps rounding from losing a unit
        "mlp_ratio": (inside["Dense_0/kernel"][-1] + 0.5) / embed_dim,
        "class_token": class_token,
        "no_embed_class": no_embed_class,
        "global_pool": "map" if pooled else "token" if class_token else "avg",
        "fc_norm": False,
        "num_classes": names["head/bias"][-1] if "head/bias" in names else 0,
    }
