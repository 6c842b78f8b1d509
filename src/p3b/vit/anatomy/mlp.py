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
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.body import narrow_linear, pruned_or, refuse, require_linear
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
    writer: str = "fc2"
    """Name of the layer that writes the outputs."""
    inside: str = "norm"
    """Name of the norm over the hidden channels, or "" where there is no place for one."""

    def require_covered(self, name: str, body: Any) -> None:
        if type(body) not in MLPS:
            known = ", ".join(kind.__name__ for kind in MLPS)
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)} is not covered; of timm's MLPs {known} are.")
        require_linear(name, body, (*self.layers, self.writer))
        norm = self.norm(body)
        refuse(name, {f"{self.inside}: {type(norm).__name__}": not is_none_or_norm(norm)})
        if self.last(body).out_features != self.first(body).in_features:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def norm(self, body: Any) -> nn.Module:
        """The norm over the hidden channels; an identity where there is none."""
        return body.get_submodule(self.inside) if self.inside else nn.Identity()

    def dims_refused(self, body: Any) -> dict[str, str]:
        return {}

    def inner(self, body: Any) -> Axis:
        return ("hidden",)

    def unit(self, body: Any) -> int:
        return 1

    def sizes(self, body: Any) -> dict[str, int]:
        last = self.last(body)
        return {"in": self.first(body).in_features, "hidden": last.in_features, "out": last.out_features}

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
            *affine(self.inside, self.norm(body), ("hidden",)),
            Weight(f"{self.writer}.weight", (("out",), ("hidden",)), gated=((0, "out"), (1, "hidden"), (0, STREAM))),
            Weight(f"{self.writer}.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        ]

    def moments(self, body: Any) -> list[Moments]:
        return [] if isinstance(self.norm(body), nn.Identity) else [Moments(self.inside, ("hidden",))]

    def constant_without(self, body: Any) -> tuple[bool, bool]:
        last = self.last(body).bias is not None
        return last or has_shift(self.norm(body)) or self.sees_something(body), last

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
        norm = self.norm(body)
        if isinstance(norm, nn.Identity):
            return torch.zeros_like(values).index_copy(0, index, values[index])
        return norm_of_kept(norm, values, torch.zeros_like(values).index_fill(0, index, 1))

    def first(self, body: Any) -> nn.Linear:
        layer: nn.Linear = body.get_submodule(self.layers[0])
        return layer

    def last(self, body: Any) -> nn.Linear:
        layer: nn.Linear = body.get_submodule(self.writer)
        return layer

    def makes_constant(self, body: Any) -> list[Tensor | None]:
        biases = [body.get_submodule(layer).bias for layer in self.layers]
        return [*biases, *self.norm(body).parameters(), *self.last(body).parameters()]

    def narrow(self, body: Any, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        for name in self.layers:
            layer: nn.Linear = body.get_submodule(name)
            narrow_linear(layer, inputs, self.copies * shape.inner)
        narrow_norm(self.norm(body), shape.inner)
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
        return self.first(body).bias is not None

    def hidden(self, body: Any) -> Tensor:
        gate, value = (body.get_submodule(layer) for layer in self.layers)
        if gate.bias is None:
            return gate.weight.new_zeros(gate.out_features)
        values: Tensor = body.act(gate.bias.detach()) * value.bias.detach()
        return values


@dataclass(frozen=True)
class NormedGlu(SplitGlu):
    """timm's GeGluMlp of ViTamin: its layers read a norm of its own, which is the half's matter (`NormTwice`)."""

    layers: tuple[str, ...] = ("w0", "w1")
    writer: str = "w2"
    inside: str = ""


MLPS: dict[type[nn.Module], PlainMlp] = {Mlp: PlainMlp(), GluMlp: PackedGlu(), SwiGLU: SplitGlu(), GeGluMlp: NormedGlu()}


def mlp_of(module: nn.Module | None) -> PlainMlp:
    """What kind of MLP it is. Of one that is not covered, or replaced in a small model, it says what is known of any."""
    return MLPS.get(type(module), MLPS[Mlp])
