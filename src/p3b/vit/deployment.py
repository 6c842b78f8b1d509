"""A model that is carried out in another way than it is saved in, and the compact model that it was made of.

Saving, counting parameters and training are for the compact model (`p3b.vit.compact`). A layout (`p3b.deploy.layouts`) is a
second model with the same outputs; it keeps the compact one beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.errors import ModelError


def compact_of(model: VisionTransformer) -> VisionTransformer:
    """The model as it is saved and trained: the one that a layout was made of, or the model itself.

    Raises:
        ModelError: the model or the compact one was changed after the one had been made of the other: what is saved would be
            something else than what was run.
    """
    deployment = getattr(model, "deployment", None)
    if not isinstance(deployment, Deployment):
        return model
    compact, example = deployment.compact[0], next(model.parameters())
    if (changed := _changed(deployment.rebuild(compact), model)) is not None:
        raise ModelError(
            f"{changed} is not what it was when this model was brought into the layout '{deployment.layout}': a change of it, "
            "or of the model that it was made of, would be lost. Change the compact model (p3b.load without a layout), then "
            "bring it into a layout again: p3b.with_layout."
        )
    theirs = next(compact.parameters())
    same = (theirs.device, theirs.dtype) == (example.device, example.dtype)
    return compact if same else deepcopy(compact).to(example)


def layout_of(model: nn.Module) -> str:
    """Name of the layout that a model is in."""
    deployment = getattr(model, "deployment", None)
    return deployment.layout if isinstance(deployment, Deployment) else "index"


class Deployment(nn.Module):
    """Says that a model is in a layout, keeps the compact one, and refuses training: zeros would not stay zeros."""

    def __init__(
        self, layout: str, compact: VisionTransformer, rebuild: Callable[[VisionTransformer], VisionTransformer]
    ) -> None:
        super().__init__()
        self.layout = layout
        self.rebuild = rebuild
        """Makes the model in the layout of the compact one, once more."""
        self.compact = (compact,)  # a tuple: it is no part of this model

    def train(self, mode: bool = True) -> Deployment:
        if mode:
            raise ModelError(
                f"A model in the layout '{self.layout}' is for inference alone; train the compact one: p3b.with_layout(model, "
                "'index'), or p3b.load without a layout."
            )
        return super().train(mode)


def _changed(made: nn.Module, model: nn.Module) -> str | None:
    """The first part of a model that is other than as it was made; None where it is all the same, if perhaps rounded."""
    kinds, now = ({name: type(module) for name, module in each.named_modules()} for each in (made, model))
    if odd := [name for name in {**kinds, **now} if kinds.get(name) is not now.get(name)]:
        return odd[0] or "the model"
    tensors, found = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (made, model))
    odd = [key for key in {**tensors, **found} if key not in tensors or key not in found]
    return odd[0] if odd else next((key for key in found if not _is_rounded(tensors[key], found[key])), None)


def _is_rounded(exact: Tensor, found: Tensor) -> bool:
    """Whether one tensor is the other, once brought to its number format, directly or by way of a half-precision one."""
    if not exact.is_floating_point():
        return torch.equal(exact.to(found.device), found)
    ways = (found.dtype, torch.float16, torch.bfloat16)
    return any(torch.equal(exact.to(found.device, way).to(found.dtype), found) for way in ways)
