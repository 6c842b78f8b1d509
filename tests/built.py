"""Tiny models as `build_model` makes them, for the tests of what is built, loaded and saved."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from p3b.storage.models import build_model
from tiny import VIT

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny(name: str = VIT, classes: int = 5, seed: int = 0, **changed: Any) -> VisionTransformer:
    model, report = build_model(name, num_classes=classes, model_kwargs={**TINY, **changed}, seed=seed)
    assert report is None
    assert isinstance(model, VisionTransformer)
    return model.eval()


def shaken(model: VisionTransformer) -> VisionTransformer:
    """Every parameter away from its initial value, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model
