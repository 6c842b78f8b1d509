"""timm's Attention: q, k and v of all heads in one layer.

A head narrowed from d to d' channels would be scaled by 1/sqrt(d'), since attention divides by the root of the width that it
finds: the queries are multiplied by sqrt(d'/d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence

import torch
from timm.layers import Attention
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.body import narrow_linear, pruned_or, refuse, require_linear
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Axis, Moments, Weight

OUT_OF_HEADS = (
    # A head's output is what proj reads of it: scaling the columns scales the output, the value's bias included.
    Weight("proj.weight", (("out",), ("heads", "head")), gated=((0, "out"), (1, "heads"), (0, STREAM))),
    Weight("proj.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
)


class SelfAttention:
    """timm's Attention (`p3b.vit.anatomy.body.Body`)."""

    kind = "attn"
    inner: Axis = ("heads", "head")

    def require_covered(self, name: str, body: nn.Module) -> None:
        if type(body) is not Attention:
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)}; only timm's standard Attention is covered.")
        require_linear(name, body, ("qkv", "proj"))
        refuse(
            name,
            {
                "q_norm: query/key normalisation": not isinstance(body.q_norm, nn.Identity),
                "k_norm: query/key normalisation": not isinstance(body.k_norm, nn.Identity),
                "norm: a norm on the attention output": not isinstance(body.norm, nn.Identity),
                "gate: gated attention": body.gate is not None,
            },
        )
        width = body.qkv.in_features
        if body.attn_dim != width or body.proj.out_features != width:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def sizes(self, body: Attention) -> dict[str, int]:
        return {
            "in": body.qkv.in_features,
            "heads": body.num_heads,
            "head": body.head_dim,
            "out": body.proj.out_features,
        }

    def weights(self, body: Attention) -> list[Weight]:
        rows: Axis = (3, "heads", "head")
        return [
            Weight("qkv.weight", (rows, ("in",)), gated=((0, "head"), (1, "in"))),
            Weight("qkv.bias", (rows,), gated=((0, "head"),)),
            *OUT_OF_HEADS,
        ]

    def moments(self, body: Attention) -> list[Moments]:
        return []

    def constant_without(self, body: Attention) -> tuple[bool, bool]:
        return body.qkv.bias is not None or body.proj.bias is not None, body.proj.bias is not None

    def blind(self, body: Attention, kept: Mapping[str, Sequence[int]]) -> Tensor | None:
        # Every token offers the same value, so attention returns it, whatever its weights.
        if body.qkv.bias is None:
            return None
        return visible_heads(body.qkv.bias.unflatten(0, (3, body.num_heads, body.head_dim))[2], kept)

    def first(self, body: Attention) -> nn.Linear:
        return body.qkv

    def last(self, body: Attention) -> nn.Linear:
        return body.proj

    def makes_constant(self, body: Attention) -> list[Tensor | None]:
        return [body.qkv.bias, body.proj.weight, body.proj.bias]

    def narrow(self, body: Attention, shape: BranchShape, inputs: int, outputs: int) -> Attention:
        rows = shape.heads * shape.inner
        narrow_linear(body.qkv, inputs, 3 * rows)
        narrow_linear(body.proj, rows, outputs)
        body.num_heads, body.head_dim, body.attn_dim, body.scale = shape.heads, shape.inner, rows, shape.inner**-0.5
        return body

    def rescale(self, weights: MutableMapping[str, nn.Parameter], sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
        for key in ("qkv.weight", "qkv.bias"):
            if key in weights:
                weights[key].unflatten(0, (3, -1))[0].mul_(math.sqrt(kept["head"] / sizes["head"]))


def visible_heads(values_HK: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
    """(H * K,) values of all heads (H, K), zero where neither head nor channel is kept."""
    heads, channels = (torch.tensor(kept[dim], device=values_HK.device, dtype=torch.int64) for dim in ("heads", "head"))
    visible = torch.zeros_like(values_HK)
    visible[heads[:, None], channels] = values_HK[heads[:, None], channels]
    return visible.flatten()
