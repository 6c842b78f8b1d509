"""Whether timm builds a saved model without p3b: where all blocks are alike and read and write the whole stream, it does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from p3b.vit.anatomy.shape import CONSTANT, GONE, SMALL

_NAMES = {"VisionTransformer": "vit_base_patch16_224", "VisionTransformerDistilled": "deit_base_distilled_patch16_224"}
"""Models of timm that are built with the defaults of their class."""
_NORM, _EPS = "LayerNorm", 1e-6


def plain_call(config: Mapping[str, Any]) -> str | None:
    """The call of timm that builds a model with the same state dict, as Python; None where there is none.

    Args:
        config: of the saved model (`p3b.storage.artifact.read_config`).
    """
    arguments = dict(config["architecture"]["arguments"])
    if config["architecture"]["class"] not in _NAMES:
        return None
    width = config.get("stream", arguments["embed_dim"])
    sizes = [_size(block, arguments, width) for block in config["blocks"]]
    attention, mlp = set(sizes[0::2]), set(sizes[1::2])
    if None in attention | mlp or len(attention) != 1 or len(mlp) != 1:
        return None
    (heads, head_width), (_, hidden) = *attention, *mlp  # type: ignore[misc]
    if heads * head_width != width or (arguments.pop("norm_layer"), arguments.pop("norm_eps")) != (_NORM, _EPS):
        return None
    arguments |= {"embed_dim": width, "num_heads": heads, "mlp_ratio": _ratio(hidden, width)}
    if arguments["act_layer"] == "gelu":
        del arguments["act_layer"]
    known = inspect.signature(VisionTransformer.__init__).parameters
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    if arguments.keys() - known.keys() or "mlp_layer" in arguments:
        return None  # layers that a call would have to build before
    said = [f"{key}={value!r}" for key, value in given.items() if value != known[key].default or key == "num_classes"]
    return f'timm.create_model("{_NAMES[config["architecture"]["class"]]}", {", ".join(said)})'


def _size(block: Mapping[str, Any], dense: Mapping[str, Any], width: int) -> tuple[int, int] | None:
    """Heads and their width of an attention, 1 and the hidden width of an MLP; None where it does not use the whole stream."""
    is_attention = block["name"].endswith(".attn")
    if block["form"] in (GONE, CONSTANT):
        return None
    if block["form"] == SMALL:
        if not len(block["inputs"]) == len(block["outputs"]) == width:
            return None
        return (block.get("heads", dense["num_heads"]) if is_attention else 1, block["inner"])
    if is_attention:
        return dense["num_heads"], dense["embed_dim"] // dense["num_heads"]
    return 1, int(dense["embed_dim"] * dense["mlp_ratio"])


def _ratio(hidden: int, width: int) -> float:
    """What timm, which truncates, makes so many hidden channels of."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
