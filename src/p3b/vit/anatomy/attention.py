"""timm's attention: plain, and with rotary positions.

A head narrowed from d to d' channels would be scaled by 1/sqrt(d'), since attention divides by the root of the width that it
finds: the queries are multiplied by sqrt(d'/d), or what scales them last, which is the weight of their norm where they have
one. Norms over a head's width take their moments over the channels that stay, and so does a norm before the last layer.

Rotary positions turn a head's channels in pairs, (0, 1), (2, 3), ... or (0, K/2), (1, K/2 + 1), ...: an element of the
dimension "head" is such a pair, in q, k and v alike. A small attention reads of the table of angles the columns of its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.body import in_place_of, narrow_linear, pruned_or, refuse, require_linear
from p3b.vit.anatomy.norms import has_shift, is_none_or_norm, narrow_norm, norm_of_kept
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Axis, Moments, Weight, affine
from p3b.vit.parts import PairsAttention, QueryValueLinear

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class SelfAttention:
    """timm's Attention (`p3b.vit.anatomy.body.Body`)."""

    kind: str = "attn"
    any_input_width: bool = True
    classes: tuple[type[nn.Module], ...] = (Attention,)

    def require_covered(self, name: str, body: Any) -> None:
        if type(body) not in self.classes:
            known = ", ".join(kind.__name__ for kind in self.classes)
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)} is not covered; of timm's attentions {known} is.")
        require_linear(name, body, (*self.readers(body), "proj"))
        refuse(
            name,
            {
                **{
                    f"{norm}: {type(part).__name__}": not is_none_or_norm(part)
                    for norm, part in (("q_norm", body.q_norm), ("k_norm", body.k_norm), ("norm", body.norm))
                },
                "q_norm: a norm of queries without weights": getattr(body.q_norm, "weight", 0) is None,
                "gate: gated attention": body.gate is not None,
            },
        )
        width = self.first(body).in_features
        if body.proj.in_features != width or body.proj.out_features != width:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def readers(self, body: Any) -> tuple[str, ...]:
        """Names of the layers that read the inputs."""
        return ("qkv",)

    def head_axis(self, body: Any) -> Axis:
        """Factors of the channels of one head."""
        return ("head",)

    def dims_refused(self, body: Any) -> dict[str, str]:
        return {}

    def inner(self, body: Any) -> Axis:
        return ("heads", *self.head_axis(body))

    def unit(self, body: Any) -> int:
        return 1

    def sizes(self, body: Any) -> dict[str, int]:
        return {
            "in": self.first(body).in_features,
            "heads": body.num_heads,
            "head": body.head_dim // self.unit(body),
            "out": body.proj.out_features,
        }

    def weights(self, body: Any) -> list[Weight]:
        head, inner = self.head_axis(body), self.inner(body)
        return [
            *self.read_weights(body),
            *affine("q_norm", body.q_norm, head),
            *affine("k_norm", body.k_norm, head),
            *affine("norm", body.norm, inner),
            # A head's output is what proj reads of it: scaling the columns scales the output, the value's bias included.
            Weight("proj.weight", (("out",), inner), gated=((0, "out"), (1, "heads"), (0, STREAM))),
            Weight("proj.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        ]

    def read_weights(self, body: Any) -> list[Weight]:
        """Weights of the layers that read the inputs."""
        rows: Axis = (3, *self.inner(body))
        return [
            Weight("qkv.weight", (rows, ("in",)), gated=((0, "head"), (1, "in"))),
            Weight("qkv.bias", (rows,), gated=((0, "head"),)),
        ]

    def moments(self, body: Any) -> list[Moments]:
        head, inner = self.head_axis(body), self.inner(body)
        there = {"q_norm": head, "k_norm": head, "norm": inner}
        return [Moments(norm, axis) for norm, axis in there.items() if not isinstance(getattr(body, norm), nn.Identity)]

    def constant_without(self, body: Any) -> tuple[bool, bool]:
        last = body.proj.bias is not None
        return last or has_shift(self.last_norm(body)) or self.value_bias(body) is not None, last

    def last_norm(self, body: Any) -> nn.Module:
        """The norm before the last layer, which some of timm's attentions have no place for."""
        norm: nn.Module = getattr(body, "norm", nn.Identity())
        return norm

    def value_bias(self, body: Any) -> Tensor | None:
        """(heads * channels,) bias of the values."""
        return None if body.qkv.bias is None else body.qkv.bias.chunk(3)[2]

    def blind(self, body: Any, kept: Mapping[str, Sequence[int]]) -> Tensor | None:
        # Every token offers the same value, so attention returns it, whatever its weights.
        values, norm = self.value_bias(body), self.last_norm(body)
        if values is None and not has_shift(norm):
            return None
        axis, sizes = self.inner(body), self.sizes(body)
        mask = torch.ones([sizes[f] if isinstance(f, str) else f for f in axis], device=body.proj.weight.device)
        for dim in ("heads", "head"):
            along = torch.zeros(sizes[dim], device=mask.device)
            along[torch.tensor(kept[dim], device=mask.device, dtype=torch.int64)] = 1
            mask = mask * along.view([-1 if factor == dim else 1 for factor in axis])
        visible = mask.flatten()
        values = torch.zeros_like(body.proj.weight[0]) if values is None else self.of_queries(body, values.detach())
        if not isinstance(norm, nn.Identity):
            return norm_of_kept(norm, values, visible)
        return values.where(visible == 1, 0)

    def of_queries(self, body: Any, values: Tensor) -> Tensor:
        """What the queries' heads get of one value for each of the keys' heads."""
        return values

    def first(self, body: Any) -> nn.Linear:
        layer: nn.Linear = body.get_submodule(self.readers(body)[0])
        return layer

    def last(self, body: Any) -> nn.Linear:
        layer: nn.Linear = body.get_submodule("proj")
        return layer

    def makes_constant(self, body: Any) -> list[Tensor | None]:
        return [body.qkv.bias, *body.norm.parameters(), body.proj.weight, body.proj.bias]

    def narrow(self, body: Any, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        rows = shape.heads * shape.inner
        narrow_linear(self.first(body), inputs, 3 * rows)
        self.narrow_inside(body, shape.inner, rows, outputs)
        body.num_heads, body.head_dim, body.attn_dim, body.scale = shape.heads, shape.inner, rows, shape.inner**-0.5
        return body

    def narrow_inside(self, body: Any, width: int, rows: int, outputs: int) -> None:
        """Make what follows the queries, keys and values for fewer channels."""
        for norm, channels in (("q_norm", width), ("k_norm", width), ("norm", rows)):
            narrow_norm(getattr(body, norm, nn.Identity()), channels)
        narrow_linear(self.last(body), rows, outputs)

    def small_key(self, key: str) -> str:
        return key

    def rescale(self, weights: MutableMapping[str, nn.Parameter], sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
        factor = math.sqrt(kept["head"] / sizes["head"])
        if "q_norm.weight" in weights:
            scaled = [weights["q_norm.weight"], *([weights["q_norm.bias"]] if "q_norm.bias" in weights else [])]
        else:
            packed = [weights[key].unflatten(0, (3, -1))[0] for key in ("qkv.weight", "qkv.bias") if key in weights]
            scaled = [*packed, *(weights[key] for key in ("q_proj.weight", "q_proj.bias", "q_bias") if key in weights)]
        for weight in scaled:
            weight.mul_(factor)


@dataclass(frozen=True)
class RotaryAttention(SelfAttention):
    """timm's EvaAttention and AttentionRope, with or without rotary positions; q, k and v in one layer or apart.

    Where queries have more heads than keys, an element of "heads" is a head of keys with all its heads of queries.
    """

    classes: tuple[type[nn.Module], ...] = (EvaAttention, AttentionRope)
    any_input_width: bool = False  # EvaAttention takes the number of its inputs for that of its heads' channels
    turned: bool = True
    """Whether positions turn its channels."""
    by_head: bool = False
    """Whether each head has angles of its own (mixed rotary positions)."""

    def dims_refused(self, body: Any) -> dict[str, str]:
        return {"heads": "each of its heads has angles of its own (mixed rotary positions)"} if self.by_head else {}

    def readers(self, body: Any) -> tuple[str, ...]:
        return ("qkv",) if body.qkv is not None else _PROJECTIONS

    def head_axis(self, body: Any) -> Axis:
        if not self.turned:
            return ("head",)
        return (2, "head") if body.rotate_half else ("head", 2)

    def inner(self, body: Any) -> Axis:
        groups = getattr(body, "num_kv_groups", 1)
        return ("heads", *((groups,) if groups > 1 else ()), *self.head_axis(body))

    def unit(self, body: Any) -> int:
        return 2 if self.turned else 1

    def sizes(self, body: Any) -> dict[str, int]:
        return {**super().sizes(body), "heads": getattr(body, "num_kv_heads", body.num_heads)}

    def read_weights(self, body: Any) -> list[Weight]:
        inner, keys = self.inner(body), ("heads", *self.head_axis(body))
        if body.qkv is None:
            apart = {"q_proj": inner, "k_proj": keys, "v_proj": keys}
            return [
                weight
                for layer, rows in apart.items()
                for weight in (
                    Weight(f"{layer}.weight", (rows, ("in",)), gated=((0, "head"), (1, "in"))),
                    Weight(f"{layer}.bias", (rows,), gated=((0, "head"),)),
                )
            ]
        weight, bias = super().read_weights(body)
        if isinstance(body, AttentionRope):
            return [weight, bias]
        # EvaAttention reads the weight of its layer without calling it.
        own = [Weight(name, (inner,), gated=((0, "head"),)) for name in ("q_bias", "v_bias")]
        return [Weight(weight.key, weight.axes, weight.gated, user=""), *own]

    def value_bias(self, body: Any) -> Tensor | None:
        if body.qkv is None:
            return body.v_proj.bias
        return super().value_bias(body) if isinstance(body, AttentionRope) else body.v_bias

    def of_queries(self, body: Any, values: Tensor) -> Tensor:
        groups = getattr(body, "num_kv_groups", 1)
        return values.view(-1, 1, body.head_dim).expand(-1, groups, -1).flatten()

    def makes_constant(self, body: Any) -> list[Tensor | None]:
        return [self.value_bias(body), *body.norm.parameters(), body.proj.weight, body.proj.bias]

    def narrow(self, body: Any, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        groups, width, example = getattr(body, "num_kv_groups", 1), body.head_dim, body.proj.weight
        keys = shape.heads * shape.inner
        if body.qkv is None:
            for name, rows in zip(_PROJECTIONS, (keys * groups, keys, keys), strict=True):
                narrow_linear(body.get_submodule(name), inputs, rows)
        elif getattr(body, "q_bias", None) is not None:
            body.qkv = QueryValueLinear(inputs, keys, example).train(body.training)
        else:
            narrow_linear(body.qkv, inputs, 3 * keys)
        self.narrow_inside(body, shape.inner, keys * groups, outputs)
        angles = _angles(shape.pairs, width, half=body.rotate_half) if 0 < shape.inner < width and self.turned else None
        return in_place_of(body, PairsAttention(body, shape.heads, shape.inner, angles, example))

    def small_key(self, key: str) -> str:
        return f"qkv.{key}" if key in ("q_bias", "v_bias") else key


def _angles(pairs: Sequence[int], width: int, *, half: bool) -> list[int]:
    """Columns of the table of angles, `width` sines and as many cosines, that pairs of a head's channels are turned by."""
    first = [[pair, pair + width // 2] if half else [2 * pair, 2 * pair + 1] for pair in pairs]
    channels = sorted(channel for pair in first for channel in pair)
    return [*channels, *(width + channel for channel in channels)]
