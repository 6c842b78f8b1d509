"""A smaller Vision Transformer of a given number of parameters, and its weights taken from a larger one.

What pruning has to be better than is a smaller model that is simply fine-tuned. Of that exact size there is no pretrained
one, so it starts from evenly spaced channels of the larger model's weights, which is a better start than random ones (weight
selection, Xu et al., ICLR 2024, arXiv 2311.18823).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from p3b.errors import ModelError
from p3b.vit.architecture import build_dense, build_skeleton, describe_dense
from p3b.vit.cost import count_parameters

_PLAIN = ("VisionTransformer", "VisionTransformerDistilled")
_MLPS = ("Mlp", "GluMlp", "SwiGLUPacked")
_OTHER_PARTS = ("scale_attn_norm", "scale_mlp_norm", "mbconv", "conv_stem")
TOLERANCE = 0.02
"""Share of its parameters that the smaller model may be off by."""


def require_known_names(architecture: Mapping[str, Any]) -> None:
    """Refuse a model of whose weights it is not known here what lies along which axis.

    Args:
        architecture: of the larger model, as `describe_dense` gives it.

    Raises:
        ModelError: it is no plain Vision Transformer; the message names the part.
    """
    kind, arguments = architecture["class"], architecture["arguments"]
    other = [] if kind in _PLAIN else [kind]
    other += [f"{name}={arguments[name]!r}" for name in _OTHER_PARTS if arguments.get(name)]
    if arguments.get("mlp_layer", "Mlp") not in _MLPS:
        other.append(f"mlp_layer={arguments['mlp_layer']}")
    if other:
        raise ModelError(
            f"A smaller model of the same kind cannot be cut from this one ({other[0]}): that is known of timm's "
            f"{' and '.join(_PLAIN)} alone, with a plain patch embedding and MLP. Compare without it: --no-smaller."
        )


def smaller_architecture(architecture: Mapping[str, Any], params: float) -> dict[str, Any]:
    """Description of the ViT of the same depth and head width with about so many parameters.

    Each number of heads gives a width, and for it the number of hidden channels comes out of the parameters. Of those that
    are within the tolerance and have no more of anything than the larger model, the one whose ratio of hidden channels to width
    is nearest to the larger model's is taken.

    Args:
        architecture: of the larger model, as `describe_dense` gives it.
        params: to come near to.

    Raises:
        ModelError: no such model comes within 2 % of it, or it is no plain Vision Transformer (`require_known_names`).
    """
    require_known_names(architecture)
    arguments = architecture["arguments"]
    head_width = arguments["embed_dim"] // arguments["num_heads"]
    most_hidden = round(arguments["mlp_ratio"] * arguments["embed_dim"])
    best: tuple[float, float, dict[str, Any]] | None = None
    nearest = math.inf
    for heads in range(1, arguments["num_heads"] + 1):
        found = _with_heads(architecture, heads, heads * head_width, params, most_hidden)
        off = abs(count_parameters(build_skeleton(found)) / params - 1)
        nearest = min(nearest, off)
        if off > TOLERANCE:
            continue
        stretch = abs(math.log(found["arguments"]["mlp_ratio"] / arguments["mlp_ratio"]))
        if best is None or (stretch, off) < best[:2]:
            best = stretch, off, found
    if best is None:
        raise ModelError(
            f"No ViT of {arguments['depth']} blocks with heads of {head_width} channels comes within {TOLERANCE:.0%} of "
            f"{params:,.0f} parameters (the nearest is off by {nearest:.1%}): leave this prune ratio out, or the smaller model "
            "(--no-smaller)."
        )
    return best[2]


def cut_evenly(model: VisionTransformer, architecture: Mapping[str, Any]) -> VisionTransformer:
    """A model of that description with evenly spaced channels, heads and hidden channels of the larger one's weights.

    Args:
        model: dense; it is not changed.
        architecture: of `smaller_architecture` for this model.
    """
    large = describe_dense(model)["arguments"]
    small = build_dense(architecture)
    arguments = architecture["arguments"]
    head_width = arguments["embed_dim"] // arguments["num_heads"]
    heads = evenly_spaced(large["num_heads"], arguments["num_heads"])
    inner = [head * head_width + channel for head in heads for channel in range(head_width)]
    embed = evenly_spaced(large["embed_dim"], arguments["embed_dim"])
    state = model.state_dict()
    with torch.no_grad():
        for key, target in small.state_dict().items():
            tensor = state[key]
            for axis, (full, kept) in enumerate(zip(tensor.shape, target.shape, strict=True)):
                if full != kept:
                    indices = _channels(key, axis, full, kept, inner, embed, large["embed_dim"])
                    tensor = tensor.index_select(axis, torch.tensor(indices, device=tensor.device))
            target.copy_(tensor)
    return small


def evenly_spaced(count: int, kept: int) -> list[int]:
    """So many of the numbers from 0 to count - 1, at equal distances as far as that goes."""
    return [index * count // kept for index in range(kept)]


def _with_heads(architecture: Mapping[str, Any], heads: int, width: int, params: float, most_hidden: int) -> dict[str, Any]:
    """The description with so many heads, and hidden channels that bring the parameters nearest: they are linear in them."""

    def described(hidden: int) -> dict[str, Any]:
        changed = {"num_heads": heads, "embed_dim": width, "mlp_ratio": hidden / width}
        return {**architecture, "arguments": {**architecture["arguments"], **changed}}

    one, many = (count_parameters(build_skeleton(described(hidden))) for hidden in (width, 2 * width))
    wanted = min(most_hidden, max(1, width + round((params - one) * width / (many - one))))
    # timm truncates ratio x width: a count that comes out one lower for rounding makes way for its neighbour.
    return described(next(hidden for hidden in range(wanted, 0, -1) if int(hidden / width * width) == hidden))


def _channels(key: str, axis: int, full: int, kept: int, inner: list[int], embed: list[int], width: int) -> list[int]:
    """Which channels of a weight's axis stay."""
    *_, layer, _ = (f"...{key}").split(".")
    of_attention = ".attn." in key or key.startswith("attn_pool.")
    if of_attention and axis == 0 and layer in ("q", "kv", "qkv"):
        return [part * width + channel for part in range(full // width) for channel in inner]
    if of_attention and axis == 1 and layer == "proj":
        return inner
    if (layer == "fc1" and axis == 0) or (layer == "fc2" and axis == 1):
        return evenly_spaced(full, kept)
    return embed
