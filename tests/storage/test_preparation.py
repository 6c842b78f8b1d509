"""Mean and std come from the surest source that speaks, and a guess is called one."""

from __future__ import annotations

from typing import Any

import pytest
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN

from p3b.storage.hub_folder import Facts
from p3b.storage.preparation import decide_preparation

HALVES = (0.5, 0.5, 0.5)
TIMM = {"architecture": "vit_small_patch16_224", "tag": "augreg", "mean": HALVES, "std": HALVES}
SAID = Facts(said_by="preprocessor_config.json", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
SAVED = {"mean": [0.7, 0.7, 0.7], "std": [0.2, 0.2, 0.2], "crop_pct": 1.0, "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("given", "mean", "line"),
    [
        ({"mean": (0.3,) * 3, "std": (0.2,) * 3, "saved": SAVED, "facts": SAID}, (0.3,) * 3, ""),
        ({"saved": SAVED, "facts": SAID, "timm_cfg": TIMM}, (0.7,) * 3, ""),
        ({"facts": SAID, "names": ["dist_token"], "timm_cfg": TIMM}, (0.1, 0.2, 0.3), "as preprocessor_config.json says"),
        ({"names": ["decoder_blocks.0.norm1.weight"], "timm_cfg": TIMM}, IMAGENET_DEFAULT_MEAN, "a guess: MAE's"),
        ({"names": ["conv_proj.weight"], "timm_cfg": TIMM}, IMAGENET_DEFAULT_MEAN, "a guess: torchvision's"),
        ({"names": ["visual.transformer.resblocks.0.ln_1.weight"]}, OPENAI_CLIP_MEAN, "a guess: CLIP's"),
        ({"names": ["vision_model.head.probe"], "timm_cfg": TIMM}, HALVES, "a guess: SigLIP's"),
        (
            {"names": ["blocks.0.norm1.weight"], "timm_cfg": TIMM},
            HALVES,
            "a guess: the default of timm's vit_small",
        ),
        ({}, IMAGENET_DEFAULT_MEAN, "a guess: ImageNet's"),
        ({"timm_cfg": TIMM, "is_given": False}, HALVES, ""),
    ],
)
def test_the_surest_source_decides_and_a_guess_is_said(given: dict[str, Any], mean: tuple[float, ...], line: str) -> None:
    decided = decide_preparation(channels=3, **given)
    assert decided.mean == tuple(mean)
    assert line in decided.line if line else decided.line == ""


def test_the_crop_and_the_interpolation_come_along() -> None:
    assert decide_preparation(channels=3, facts=SAID).interpolation == "bilinear"
    assert decide_preparation(channels=3, saved=SAVED).crop_pct == 1.0
    assert decide_preparation(channels=3, saved=SAVED, crop_pct=0.9).crop_pct == 0.9
    assert (decide_preparation(channels=3).crop_pct, decide_preparation(channels=3).interpolation) == (0.875, "bicubic")


def test_three_values_are_averaged_for_grey_images() -> None:
    decided = decide_preparation(channels=1)
    assert decided.mean == pytest.approx((sum(IMAGENET_DEFAULT_MEAN) / 3,))
    assert decided.std == pytest.approx((sum(IMAGENET_DEFAULT_STD) / 3,))
    assert decide_preparation(channels=1, mean=(0.2,)).mean == (0.2,)
