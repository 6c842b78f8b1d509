"""What the inside of a residual branch, an attention or an MLP, has to say of itself."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import Axis, Moments, Weight
from p3b.vit.coverage import foreign_parts

REPLACED = ("ReadChannels", "WriteChannels", "ConstantBranch", "NoBranch")
"""Classes that only a small model has."""


_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
"""Where torch's modules keep their hooks."""


class Body(Protocol):
    """An attention or an MLP. All methods take the module itself and name what is in it as it stands there.

    Attributes:
        kind: "attn" or "mlp": whether tokens are compared with each other, which costs N * N more.
        any_input_width: whether the dense module computes with fewer inputs than it was made for, once its first layer is
            made for them.
    """

    kind: str
    any_input_width: bool

    def dims_refused(self, body: nn.Module) -> dict[str, str]:
        """Dimensions that cannot be pruned in such a module, each with the reason why; the beginning of it is its name."""

    def inner(self, body: nn.Module) -> Axis:
        """Factors of the channels that the last layer reads, the gates' dimensions by name: ("heads", "head"), ("hidden",)."""

    def unit(self, body: nn.Module) -> int:
        """Channels that one element of the last inner dimension stands for: 2 where they go in pairs."""

    def require_covered(self, name: str, body: nn.Module) -> None:
        """Raise a ModelError, which begins with `name`, where the module computes something that is not covered."""

    def sizes(self, body: nn.Module) -> dict[str, int]:
        """Size of every dimension: "in", those inside, "out", in this order."""

    def weights(self, body: nn.Module) -> list[Weight]:
        """All weights that such a module may have, in its own order; those that this one lacks are left out by the caller."""

    def moments(self, body: nn.Module) -> list[Moments]:
        """Norms inside, which normalise over inner channels."""

    def constant_without(self, body: nn.Module) -> tuple[bool, bool]:
        """Whether it can still give a constant when it reads nothing, and when its inner channels are gone."""

    def blind(self, body: nn.Module, kept: Mapping[str, Sequence[int]]) -> Tensor | None:
        """What the last layer reads when the module reads nothing: a vector of all inner channels, zero where none is kept;
        None where it is nothing at all."""

    def first(self, body: nn.Module) -> nn.Linear:
        """A layer that reads the inputs."""

    def last(self, body: nn.Module) -> nn.Linear:
        """The layer that writes the outputs."""

    def makes_constant(self, body: nn.Module) -> list[Tensor | None]:
        """Weights that a constant is computed from: it wants a gradient if one of them does."""

    def narrow(self, body: nn.Module, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        """Make the module for fewer channels, its new weights without values; the module, or one that takes its place."""

    def small_key(self, key: str) -> str:
        """Where a weight of the dense module lies in a narrow one."""

    def rescale(self, weights: MutableMapping[str, nn.Parameter], sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
        """What a narrower module needs of its cut weights, changed in place, to compute what the masked one computes."""


def require_linear(name: str, body: nn.Module, layers: Sequence[str]) -> None:
    """ModelError where one of the layers is anything but torch's own linear layer."""
    for layer in layers:
        if type(found := body.get_submodule(layer)) is not nn.Linear:
            raise ModelError(
                f"{name}.{layer}: {type(found).__name__} is not covered, only torch.nn.Linear is. {foreign_parts(found)}"
            )


def refuse(name: str, reasons: Mapping[str, bool]) -> None:
    """ModelError for the first reason that holds."""
    for reason, present in reasons.items():
        if present:
            raise ModelError(f"{name}.{reason} is not covered.")


def pruned_or(kind: str) -> str:
    """Name of a class, for a message."""
    return f"{kind} (of a model that has been pruned already)" if kind in REPLACED else kind


def narrow_linear(layer: nn.Linear, inputs: int, outputs: int) -> None:
    """Give a linear layer other numbers of channels; its weights hold no values yet."""
    weight = layer.weight
    fresh = nn.Linear(inputs, outputs, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight, layer.bias = fresh.weight, fresh.bias


def in_place_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """A module that takes another's place: in its mode, with what a user has set on it, and heard by who listened to it."""
    new.train(old.training)
    own = {"elementwise_affine", "_fast_norm", "inplace", "scale_by_keep"}
    new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in new.__dict__ and key not in own})
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    return new
