"""The config of a saved model as timm reads it: the same file is ours and that of a folder of timm.

timm takes two entries of a config.json: `architecture`, a name in its registry, and `pretrained_cfg`. The name is that of an
entry point which p3b registers (`p3b.deploy.timm_model`), so that `timm.create_model("local-dir:run/pruned")` gives the small
model. What we call the architecture, the class of the dense network with its arguments, lies under `network` in the file.
`pretrained_cfg` repeats what other entries say (`class_names`, `preprocessing`), under timm's names; the two have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p3b.errors import ModelError

ENTRY_POINT = "p3b_vit"
_OURS, _THEIRS = "network", "pretrained_cfg"
_ANY_SIZE = {"Qwen3VitClassifier", "Qwen3VitEncoder", "NaFlexVit"}
"""Classes whose models take images of any size."""
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct")


def to_timm_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json, from a config by our names."""
    others = {key: value for key, value in config.items() if key != "architecture"}
    return {"architecture": ENTRY_POINT, _THEIRS: pretrained_cfg(config), **others, _OURS: config["architecture"]}


def from_timm_form(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A config by our names, from the entries of config.json; the way back from `to_timm_form`.

    Raises:
        ModelError: an entry that timm reads is missing.
    """
    if entries.get("architecture") != ENTRY_POINT or _OURS not in entries or _THEIRS not in entries:
        raise ModelError(f"it lacks {_OURS} or {_THEIRS}, or its architecture is not '{ENTRY_POINT}'")
    config = {key: value for key, value in entries.items() if key not in ("architecture", _OURS, _THEIRS)}
    return {**config, "architecture": entries[_OURS]}


def require_agreement(entries: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """ModelError where what timm reads is not what the checked config says."""
    if entries[_THEIRS] != pretrained_cfg(config):
        raise ModelError(f"its {_THEIRS}, which timm reads, does not say what its other entries say")


def pretrained_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm is told of the head and of the images, by its names; plain JSON values."""
    arguments = config["architecture"]["arguments"]
    said = config["preprocessing"] or {}
    names, resnet = config["class_names"], arguments.get("resnet")
    classifiers = {"VisionTransformerDistilled": ["head", "head_dist"], "Hiera": "head.fc"}
    return {
        "input_size": [arguments["in_chans"], *arguments["img_size"]],
        **{key: said[key] for key in _PREPROCESSING if key in said},
        "fixed_input_size": not arguments.get("dynamic_img_size", config["architecture"]["class"] in _ANY_SIZE),
        "num_classes": arguments["num_classes"],
        **({} if names is None else {"label_names": list(names)}),
        "first_conv": _first_convolution(config["architecture"]["class"], resnet),
        "classifier": classifiers.get(config["architecture"]["class"], "head"),
    }


def _first_convolution(kind: str, resnet: list[int] | None) -> str:
    """Name of the layer that reads the image; `resnet` tells of the one in front of a hybrid's patches."""
    if resnet is not None:
        return "patch_embed.backbone.stem.conv" if resnet else "patch_embed.backbone.conv"
    return {"Qwen3VitClassifier": "encoder.patch_embed.proj", "NaFlexVit": "embeds.proj"}.get(kind, "patch_embed.proj")
