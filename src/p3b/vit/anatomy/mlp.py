"""timm's Mlp: a layer, an activation, a layer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.body import narrow_linear, pruned_or, refuse, require_linear
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Axis, Moments, Weight

OUT_OF_HIDDEN = (
    Weight("fc2.weight", (("out",), ("hidden",)), gated=((0, "out"), (1, "hidden"), (0, STREAM))),
    Weight("fc2.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
)


class PlainMlp:
    """timm's Mlp (`p3b.vit.anatomy.body.Body`)."""

    kind = "mlp"
    inner: Axis = ("hidden",)

    def require_covered(self, name: str, body: nn.Module) -> None:
        if type(body) is not Mlp:
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)}; only timm's standard Mlp is covered.")
        require_linear(name, body, ("fc1", "fc2"))
        refuse(name, {"norm: a norm on the hidden channels": not isinstance(body.norm, nn.Identity)})
        if body.fc2.out_features != body.fc1.in_features:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def sizes(self, body: Mlp) -> dict[str, int]:
        return {"in": body.fc1.in_features, "hidden": body.fc1.out_features, "out": body.fc2.out_features}

    def weights(self, body: Mlp) -> list[Weight]:
        return [
            Weight("fc1.weight", (("hidden",), ("in",)), gated=((1, "in"),)),
            Weight("fc1.bias", (("hidden",),)),
            *OUT_OF_HIDDEN,
        ]

    def moments(self, body: Mlp) -> list[Moments]:
        return []

    def constant_without(self, body: Mlp) -> tuple[bool, bool]:
        acts_on_zero = bool(body.act(torch.zeros(1)).abs() > 0)
        return body.fc1.bias is not None or body.fc2.bias is not None or acts_on_zero, body.fc2.bias is not None

    def blind(self, body: Mlp, kept: Mapping[str, Sequence[int]]) -> Tensor:
        weight, bias = body.fc1.weight, body.fc1.bias
        hidden = body.act(weight.new_zeros(len(weight)) if bias is None else bias.detach())
        return visible_hidden(hidden, kept)

    def first(self, body: Mlp) -> nn.Linear:
        return body.fc1

    def last(self, body: Mlp) -> nn.Linear:
        return body.fc2

    def makes_constant(self, body: Mlp) -> list[Tensor | None]:
        return [body.fc1.bias, body.fc2.weight, body.fc2.bias]

    def narrow(self, body: Mlp, shape: BranchShape, inputs: int, outputs: int) -> Mlp:
        narrow_linear(body.fc1, inputs, shape.inner)
        narrow_linear(body.fc2, shape.inner, outputs)
        return body

    def rescale(self, weights: MutableMapping[str, nn.Parameter], sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
        """Nothing: what an MLP computes does not depend on how many channels it has."""


def visible_hidden(values: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
    """The same hidden channels, zero where they are not kept."""
    index = torch.tensor(kept["hidden"], device=values.device, dtype=torch.int64)
    return torch.zeros_like(values).index_copy(0, index, values[index])
