"""How images are to be prepared for weights: who says so, and what is only a guess.

Mean and std are no tensor. A flag says them, the saved model, or the config beside a file. Else the names of its tensors may
tell whose weights they are, and each origin normalises in one way. What is left is timm's default for a model of that name,
which may be the default of other weights. The last two are guesses, and are called so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from p3b.storage.hub_folder import NOTHING_SAID, Facts

DEFAULT_CROP_PCT = 0.875
"""256 resized, 224 cropped."""

_Values = tuple[Sequence[float], Sequence[float]]
_IMAGENET: _Values = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_CLIP: _Values = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
_HALVES: _Values = ((0.5,) * 3, (0.5,) * 3)

_ORIGINS: tuple[tuple[str, str, _Values], ...] = (
    (r"(^|\.)conv_proj\.weight$", "torchvision's", _IMAGENET),
    (r"(^|\.)(head\.probe|attn_pool\.latent)$", "SigLIP's", _HALVES),
    (r"(^|\.)(resblocks\.0\..*|pre_layrnorm\.weight|norm_pre\.weight)$", "CLIP's", _CLIP),
    (r"(^|\.)(dist_token|distillation_token)$", "DeiT's", _IMAGENET),
    (r"(^|\.)(decoder_blocks|decoder_embed)\.", "MAE's", _IMAGENET),
    (r"(^|\.)last_layer\.(weight_[gv]|parametrizations\..*)$", "DINO's and iBOT's", _IMAGENET),
    (r"(^|\.)(mask_token|masked_embed)$", "DINOv2's, iBOT's and MAE's", _IMAGENET),
)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preparation:
    """How images are prepared: mean and std per channel in [0, 1] units, share of the crop, interpolation of the resize.

    `line` is what a report should say of it; "" where there is nothing to be said.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    line: str


def decide_preparation(
    *,
    channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    saved: Mapping[str, Any] | None = None,
    facts: Facts = NOTHING_SAID,
    names: Collection[str] = (),
    timm_cfg: Mapping[str, Any] | None = None,
    is_given: bool = True,
) -> Preparation:
    """Decide by the surest that speaks: flags, the saved model, a config beside the file, the file's names, timm's default.

    Args:
        channels: of the images; three values are averaged for one, as timm does.
        mean, std, crop_pct: as flags say; None: they do not.
        saved: the preprocessing of a model that p3b saved; None or empty where it has none.
        facts: what lies beside the weights.
        names: of the tensors in the file.
        timm_cfg: timm's config for the model's name, whose weights these need not be.
        is_given: the weights come from a file or folder; False: from timm itself, or from chance.
    """
    (means, stds), who = _known(saved, facts, names, timm_cfg)
    chosen_mean = tuple(mean) if mean else _for_channels(means, channels)
    chosen_std = tuple(std) if std else _for_channels(stds, channels)
    is_said = bool(saved) or (mean and std) or not is_given
    interpolation = (saved or {}).get("interpolation") or facts.interpolation
    return Preparation(
        mean=chosen_mean,
        std=chosen_std,
        crop_pct=crop_pct or (saved or {}).get("crop_pct") or facts.crop_pct or DEFAULT_CROP_PCT,
        interpolation=interpolation if interpolation in _INTERPOLATIONS else "bicubic",
        line="" if is_said else f"images: mean {_shown(chosen_mean)}, std {_shown(chosen_std)}: {who}",
    )


def _known(
    saved: Mapping[str, Any] | None, facts: Facts, names: Collection[str], timm_cfg: Mapping[str, Any] | None
) -> tuple[_Values, str]:
    """Mean and std, and who says them."""
    if saved:
        return (saved.get("mean", IMAGENET_DEFAULT_MEAN), saved.get("std", IMAGENET_DEFAULT_STD)), "as the saved model says"
    if facts.mean is not None and facts.std is not None:
        return (facts.mean, facts.std), f"as {facts.said_by} says"
    advice = "the weights do not say; give --mean and --std if they were trained with others"
    for pattern, whose, values in _ORIGINS:
        if any(re.search(pattern, name) for name in names):
            return values, f"a guess: {whose}, by the names of the tensors; {advice}"
    cfg = timm_cfg or {}
    if "mean" in cfg and "std" in cfg:
        name = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag")))) or "model of this name"
        return (cfg["mean"], cfg["std"]), f"a guess: the default of timm's {name}; {advice}"
    return _IMAGENET, f"a guess: ImageNet's; {advice}"


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return (sum(values) / len(values),) if channels == 1 and len(values) == 3 else tuple(values)


def _shown(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
