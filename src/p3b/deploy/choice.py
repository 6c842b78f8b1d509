"""A model in the layout that is quickest where it runs: chosen by measurement, or by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.deploy.hub import local_copy
from p3b.deploy.layouts import BranchPlan, LayoutPlan, apply_layout, check_layout, plan_layout
from p3b.deploy.speed import images_per_second
from p3b.errors import ConfigError
from p3b.storage import artifact
from p3b.vit.attention import choose_attention
from p3b.vit.deployment import compact_of, layout_of
from p3b.vit.families import images_of
from p3b.vit.wrappers import require_vision_transformer

AUTO = "auto"
CANDIDATES = ("index", "folded", "gathered", "balanced", "zeros")
"""What a measurement chooses from: each is the quickest somewhere. `padded` never beats `folded`; `reordered` gains next to
nothing over `balanced`."""
LEAST_GAIN = 1.01
"""A layout has to be quicker by this factor than the one before it in the list: below lies noise."""


@dataclass(frozen=True)
class LayoutChoice:
    """What was measured, and what follows.

    Attributes:
        layout: the quickest.
        batch_size: images at a time.
        images_per_second: of each candidate, the median over rounds in which they took turns.
    """

    layout: str
    batch_size: int
    images_per_second: dict[str, float]


def with_layout(model: nn.Module, layout: str = AUTO, *, batch_size: int = 1) -> VisionTransformer:
    """A small model carried out in another way; it computes the same (to 1e-12, relative, in float64).

    Args:
        model: dense or small VisionTransformer, in any layout; it is not changed.
        layout: "auto" (measure on the model's device, which takes about a second for a small network), or a name of
            `p3b.deploy.layouts.LAYOUTS`. "index" gives the compact model, the only one that can be trained.
        batch_size: images at a time that "auto" measures with.

    Returns:
        The model in that layout, for inference alone (`train()` raises a ModelError) unless it is the compact one. Saving it
        saves the compact model, whatever the layout. An autocast that is active is what "auto" measures under, and what
        attention is made for (`p3b.vit.attention`).

    Raises:
        ConfigError: unknown layout, or a batch size below 1. ModelError: no VisionTransformer, or a part that is not covered.
    """
    check_layout(layout, [AUTO])
    vit = require_vision_transformer(model, "carried out")
    name = choose_layout(vit, batch_size=batch_size).layout if layout == AUTO else layout
    return vit if layout_of(vit) == name else _laid_out(vit, plan_layout(vit, name))


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    layout: str = "index",
    batch_size: int = 1,
    revision: str | None = None,
) -> nn.Module:
    """The module that `p3b.save` or `p3b.push` wrote, in evaluation mode, carried out in the layout that is asked for.

    Args:
        path: a folder, a .pth file, or a model of the Hugging Face hub: "user/name", where nothing lies here by that name, or
            "hf-hub:user/name".
        device: where the model is to be.
        layout: how it is carried out (`with_layout`): "index" is the compact model, which can be trained; "auto" measures.
        batch_size: images at a time that "auto" measures with.
        revision: branch, tag or commit of a model of the hub; by default its main branch.

    Raises:
        ConfigError: an unknown layout, or a revision of something that is not of the hub.
        WeightsError: nothing is there, or what is there is damaged, edited or of a schema that this version does not know.
    """
    check_layout(layout, [AUTO])
    return with_layout(artifact.load(local_copy(path, revision), device), layout, batch_size=batch_size)


def choose_layout(model: nn.Module, *, batch_size: int = 1, seconds: float = 4.0) -> LayoutChoice:
    """Measure the candidates side by side on the model's device, with images of the size that the model was made for.

    Args:
        model: dense or small VisionTransformer, in any layout; it is not changed.
        batch_size: images at a time.
        seconds: that the rounds may take, about; a round of each candidate takes a few hundredths of one, or one batch.

    Raises:
        ConfigError: a batch size below 1. ModelError: the model is no VisionTransformer.
    """
    if batch_size < 1:
        raise ConfigError(f"The batch size must be 1 or more, got {batch_size}.")
    compact = compact_of(require_vision_transformer(model, "carried out"))
    was_training = compact.training
    plans: dict[tuple[BranchPlan, ...], LayoutPlan] = {}
    for name in CANDIDATES:
        plan = plan_layout(compact, name)
        plans.setdefault(plan.branches, plan)  # those that come to the same are measured once
    models = {plan.name: _laid_out(compact, plan) for plan in plans.values()}
    speeds = [0.0] * len(models)
    if len(models) > 1:
        speeds = images_per_second(
            list(models.values()),
            images_of(compact).shape,
            batch_size=batch_size,
            device=next(compact.parameters()).device,
            rounds=11,
            seconds_per_round=0.015,
            seconds=seconds,
        )
    compact.train(was_training)
    chosen, best = CANDIDATES[0], speeds[0]
    for name, speed in zip(models, speeds, strict=True):
        if speed > LEAST_GAIN * best:
            chosen, best = name, speed
    return LayoutChoice(chosen, batch_size, dict(zip(models, speeds, strict=True)))


def _laid_out(model: VisionTransformer, plan: LayoutPlan) -> VisionTransformer:
    """A model in a layout, its attention in the form for the number format in force; the compact one as it is."""
    built = apply_layout(model, plan)
    if layout_of(built) == CANDIDATES[0]:
        return built
    weights = next(built.parameters())
    kind = weights.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights.dtype
    return choose_attention(built, weights.device, dtype)
