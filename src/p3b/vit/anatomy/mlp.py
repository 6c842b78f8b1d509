"""timm's MLPs: a layer, an activation, a layer; and the gated ones, where a second layer's output is multiplied in.

A gated MLP's hidden channel is act(gate) * value: one mask speaks for both. A norm before the last layer takes its moments over
the hidden channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.body import Body, narrow_linear, pruned_or, refuse, require_linear
from p3b.vit.anatomy.norms import has_shift, is_none_or_norm, narrow_norm, norm_of_kept
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Axis, Moments, Weight, affine


@dataclass(frozen=True)
class PlainMlp:
    """timm's Mlp (`p3b.vit.anatomy.body.Body`); the other kinds differ in their first layer."""

    kind: str = "mlp"
    any_input_width: bool = True
    layers: tuple[str, ...] = ("fc1",)
    """Names of the layers that read the inputs."""
    copies: int = 1
    """How often the hidden channels lie along the rows of such a layer."""

    def require_covered(self, name: str, body: Any) -> None:
        if type(body) not in MLPS:
            known = ", ".join(kind.__name__ for kind in MLPS)
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)} is not covered; of timm's MLPs {known} are.")
        require_linear(name, body, (*self.layers, "fc2"))
        refuse(name, {f"norm: {type(body.norm).__name__}": not is_none_or_norm(body.norm)})
        if body.fc2.out_features != self.first(body).in_features:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def dims_refused(self, body: Any) -> dict[str, str]:
        return {}

    def inner(self, body: Any) -> Axis:
        return ("hidden",)

    def unit(self, body: Any) -> int:
        return 1

    def sizes(self, body: Any) -> dict[str, int]:
        return {"in": self.first(body).in_features, "hidden": body.fc2.in_features, "out": body.fc2.out_features}

    def weights(self, body: Any) -> list[Weight]:
        rows: Axis = ("hidden",) if self.copies == 1 else (self.copies, "hidden")
        first = [
            weight
            for layer in self.layers
            for weight in (
                Weight(f"{layer}.weight", (rows, ("in",)), gated=((1, "in"),)),
                Weight(f"{layer}.bias", (rows,)),
            )
        ]
        return [
            *first,
            *affine("norm", body.norm, ("hidden",)),
            Weight("fc2.weight", (("out",), ("hidden",)), gated=((0, "out"), (1, "hidden"), (0, STREAM))),
            Weight("fc2.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        ]

    def moments(self, body: Any) -> list[Moments]:
        return [] if isinstance(body.norm, nn.Identity) else [Moments("norm", ("hidden",))]

    def constant_without(self, body: Any) -> tuple[bool, bool]:
        last = body.fc2.bias is not None
        return last or has_shift(body.norm) or self.sees_something(body), last

    def sees_something(self, body: Any) -> bool:
        """Whether a hidden channel can be other than zero where nothing is read."""
        return body.fc1.bias is not None or bool(body.act(torch.zeros(1)).abs() > 0)

    def hidden(self, body: Any) -> Tensor:
        """The hidden channels where nothing is read."""
        weight, bias = body.fc1.weight, body.fc1.bias
        values: Tensor = body.act(weight.new_zeros(len(weight)) if bias is None else bias.detach())
        return values

    def blind(self, body: Any, kept: Mapping[str, Sequence[int]]) -> Tensor:
        values = self.hidden(body)
        index = torch.tensor(kept["hidden"], device=values.device, dtype=torch.int64)
        if isinstance(body.norm, nn.Identity):
            return torch.zeros_like(values).index_copy(0, index, values[index])
        return norm_of_kept(body.norm, values, torch.zeros_like(values).index_fill(0, index, 1))

    def first(self, body: Any) -> nn.Linear:
        layer: nn.Linear = body.get_submodule(self.layers[0])
        return layer

    def last(self, body: Any) -> nn.Linear:
        layer: nn.Linear = body.get_submodule("fc2")
        return layer

    def makes_constant(self, body: Any) -> list[Tensor | None]:
        biases = [body.get_submodule(layer).bias for layer in self.layers]
        return [*biases, *body.norm.parameters(), body.fc2.weight, body.fc2.bias]

    def narrow(self, body: Any, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        for name in self.layers:
            layer: nn.Linear = body.get_submodule(name)
            narrow_linear(layer, inputs, self.copies * shape.inner)
        narrow_norm(body.norm, shape.inner)
        narrow_linear(self.last(body), shape.inner, outputs)
        return body

    def small_key(self, key: str) -> str:
        return key

    def rescale(self, weights: MutableMapping[str, nn.Parameter], sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
        """Nothing: what an MLP computes does not depend on how many channels it has."""


@dataclass(frozen=True)
class PackedGlu(PlainMlp):
    """timm's GluMlp (and SwiGLUPacked): gate and value are the two halves of one layer."""

    copies: int = 2

    def sees_something(self, body: Any) -> bool:
        return body.fc1.bias is not None

    def hidden(self, body: Any) -> Tensor:
        bias = body.fc1.bias
        one, two = (body.fc1.weight.new_zeros(body.fc1.out_features) if bias is None else bias.detach()).chunk(2)
        values: Tensor = one * body.act(two) if body.gate_last else body.act(one) * two
        return values


@dataclass(frozen=True)
class SplitGlu(PlainMlp):
    """timm's SwiGLU: gate and value are two layers."""

    layers: tuple[str, ...] = ("fc1_g", "fc1_x")

    def sees_something(self, body: Any) -> bool:
        return body.fc1_g.bias is not None

    def hidden(self, body: Any) -> Tensor:
        gate, value = body.fc1_g.bias, body.fc1_x.bias
        if gate is None:
            return body.fc1_g.weight.new_zeros(body.fc1_g.out_features)
        values: Tensor = body.act(gate.detach()) * value.detach()
        return values


MLPS: dict[type[nn.Module], Body] = {Mlp: PlainMlp(), GluMlp: PackedGlu(), SwiGLU: SplitGlu()}


def mlp_of(module: nn.Module | None) -> Body:
    """What kind of MLP it is. Of one that is not covered, or replaced in a small model, it says what is known of any."""
    return MLPS.get(type(module), MLPS[Mlp])
