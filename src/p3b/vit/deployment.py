"""A model that is carried out in another way than it is saved in, and the compact model that it was made of.

Saving, counting parameters and training are for the compact model (`p3b.vit.compact`). A layout (`p3b.deploy.layouts`) is a
second model with the same outputs; it keeps the compact one beside it.
"""

from __future__ import annotations

from copy import deepcopy

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.errors import ModelError


def compact_of(model: VisionTransformer) -> VisionTransformer:
    """The model as it is saved and trained: the one that a layout was made of, or the model itself."""
    deployment = getattr(model, "deployment", None)
    if not isinstance(deployment, Deployment):
        return model
    compact, example = deployment.compact[0], next(model.parameters())
    theirs = next(compact.parameters())
    same = (theirs.device, theirs.dtype) == (example.device, example.dtype)
    return compact if same else deepcopy(compact).to(example)


def layout_of(model: nn.Module) -> str:
    """Name of the layout that a model is in."""
    deployment = getattr(model, "deployment", None)
    return deployment.layout if isinstance(deployment, Deployment) else "index"


class Deployment(nn.Module):
    """Says that a model is in a layout, keeps the compact one, and refuses training: zeros would not stay zeros."""

    def __init__(self, layout: str, compact: VisionTransformer) -> None:
        super().__init__()
        self.layout = layout
        self.compact = (compact,)  # a tuple: it is no part of this model

    def train(self, mode: bool = True) -> Deployment:
        if mode:
            raise ModelError(
                f"A model in the layout '{self.layout}' is for inference alone; train the compact one: p3b.with_layout(model, "
                "'index'), or p3b.load without a layout."
            )
        return super().train(mode)
