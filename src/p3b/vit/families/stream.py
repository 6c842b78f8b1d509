"""The residual stream outside of the blocks: what writes it (patches, tokens, positions) and what reads it (norms, heads)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.norms import is_norm
from p3b.vit.anatomy.weights import STREAM, Axis, Weight
from p3b.vit.families.family import Outside

_REFUSED = "is not covered where the residual stream itself is pruned; prune this model by other dimensions, or with another"


def stream_stays(why: str) -> ModelError:
    """The error of a family whose residual stream cannot be pruned; `why` says which part stands in the way."""
    return ModelError(f"{why}, which cannot be pruned; prune this model by other dimensions, as block_benefit does.")


def read_outside(
    model: nn.Module,
    *,
    tokens: Sequence[str],
    norms: Sequence[str],
    heads: Sequence[str],
    others: Sequence[str] = (),
    encoder: str = "",
    writers: Mapping[str, int] | None = None,
) -> Outside:
    """What reads and writes the stream outside of the blocks, in a model built like timm's VisionTransformer.

    Args:
        model: dense; its blocks are `model.blocks`, its patches come from `patch_embed.proj`.
        tokens: names of parameters that are added to the stream or put in front of it, channels last.
        norms: names of norms over the stream.
        heads: names of linear layers that read it.
        others: names of parameters that it does not lie along.
        encoder: what the names of its blocks and of its patch embedding begin with, where these lie deeper: "encoder.".
        writers: parameters of the patch embedding, and the axis that the stream lies along; by default those of
            `patch_embed.proj`.

    Raises:
        ModelError: something reads or writes the stream in another way.
    """
    if getattr(model, "attn_pool", None) is not None:
        raise ModelError(f"attn_pool: attention pooling {_REFUSED} pooling (global_pool=avg).")
    parts = {name: model.get_submodule(name) for name in norms}
    parts |= {name: getattr(model, name) for name in heads if hasattr(model, name)}
    for name, part in parts.items():
        fits = (name in norms and is_norm(part)) or (name in heads and isinstance(part, nn.Linear))
        if not isinstance(part, nn.Identity) and not fits:
            raise ModelError(f"{name}: {type(part).__name__} {_REFUSED} {name}.")
    projection = f"{encoder}patch_embed.proj"
    embedding = {f"{projection}.weight": 0, f"{projection}.bias": 0} if writers is None else writers
    writers = {**embedding, **dict.fromkeys(tokens, 2)}
    there = [name for name in norms if not isinstance(parts[name], nn.Identity)]
    readers = {f"{name}.weight": 1 for name in heads}
    readers |= {f"{name}.{key}": 0 for name in there for key, _ in parts[name].named_parameters()}
    places = {**writers, **readers}
    weights: list[Weight] = []
    for key, parameter in model.named_parameters():
        if key.startswith(f"{encoder}blocks."):
            continue
        if key not in places and key not in [*others, *(f"{name}.bias" for name in heads)]:
            raise ModelError(f"{key}: this parameter {_REFUSED} model.")
        axes: list[Axis] = [(size,) for size in parameter.shape]
        if key in places:
            axes[places[key]] = (STREAM,)
        weights.append(Weight(key, tuple(axes), ((writers[key], STREAM),) if key in writers else ()))
    return Outside(tuple(weights), tuple(there))
