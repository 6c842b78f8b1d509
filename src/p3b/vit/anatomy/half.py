"""Where a body stands in a block: the norm before it, what scales and drops its output, and what takes their places in a cut.

A half is one residual branch, x + f(x). `PreNorm` is that of timm's Block: x + drop_path1(ls1(attn(norm1(x)))). Another order
of the same things is another class with these methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from timm.layers import LayerScale
from torch import Tensor, nn

from p3b.vit.anatomy.body import Body, in_place_of, pruned_or, refuse
from p3b.vit.anatomy.norms import is_centred, is_norm
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Moments, Weight, affine
from p3b.vit.parts import DropAndWrite, ReadChannels, WriteChannels


class Half(Protocol):
    """One residual branch of a block. All methods take the block.

    Attributes:
        name: of its body in the block: "attn" or "mlp".
        body: what its body is.
        stream_norms: names of the norms in the block that normalise over the residual stream.
    """

    @property
    def name(self) -> str: ...

    @property
    def body(self) -> Body: ...

    @property
    def stream_norms(self) -> tuple[str, ...]: ...

    def require_covered(self, name: str, block: nn.Module) -> None:
        """Raise a ModelError, which begins with the block's `name`, for what is not covered; the body looks after itself."""

    def weights(self, block: nn.Module) -> list[Weight]:
        """All weights of the branch, by their keys in the block."""

    def moments(self, block: nn.Module) -> list[Moments]:
        """Norms in the branch, by their names in the block, whose moments are taken over the channels that stay."""

    def constant_without(self, block: nn.Module) -> tuple[bool, bool]:
        """Whether the branch can still add a constant when its body reads nothing, and when its inner channels are gone."""

    def entry(self, block: nn.Module) -> nn.Module:
        """The module whose input is the residual stream before this branch."""

    def exit(self, block: nn.Module) -> nn.Module:
        """The module whose output is what this branch adds to the stream."""

    def scaled(self, block: nn.Module, value: Tensor, mask: Tensor) -> Tensor:
        """What becomes of (D,) outputs of the body on their way to the stream; `mask` is 1 for the channels written to."""

    def scale(self, block: nn.Module) -> Tensor | None:
        """The weight of `scaled`."""

    def narrow(self, block: nn.Module, shape: BranchShape, width: int) -> None:
        """Make the branch read and write some of the stream's `width` channels; new weights hold no values yet."""

    def small_key(self, key: str) -> str:
        """Where a weight of the dense branch lies in a narrow one; both by their keys in the block."""

    def replace(self, block: nn.Module, replacement: nn.Module) -> None:
        """Put a constant or nothing in the place of the branch: no norm, scale or drop path is left around it."""

    def set_drop_path(self, block: nn.Module, path: nn.Module) -> None:
        """Give the branch another stochastic depth."""


class AsItsBody:
    """What halves say where that is what their body says, and where stochastic depth comes last."""

    name: str
    body: Body
    drop_path: str

    def moments(self, block: nn.Module) -> list[Moments]:
        """See `Half`."""
        found = self.body.moments(block.get_submodule(self.name))
        return [Moments(f"{self.name}.{moments.norm}", moments.axis) for moments in found]

    def constant_without(self, block: nn.Module) -> tuple[bool, bool]:
        """See `Half`."""
        return self.body.constant_without(block.get_submodule(self.name))

    def exit(self, block: nn.Module) -> nn.Module:
        """See `Half`."""
        return block.get_submodule(self.drop_path)


@dataclass(frozen=True)
class PreNorm(AsItsBody):
    """x + path(scale(body(norm(x)))), each by its name in the block (`Half`)."""

    name: str
    body: Body
    norm: str
    layer_scale: str
    drop_path: str

    @property
    def stream_norms(self) -> tuple[str, ...]:
        return (self.norm,)

    @property
    def reading_norm(self) -> str:
        """Name of the norm that gives the channels which are read."""
        return self.norm

    def require_covered(self, name: str, block: nn.Module) -> None:
        self.body.require_covered(f"{name}.{self.name}", block.get_submodule(self.name))
        norm, scale = block.get_submodule(self.norm), block.get_submodule(self.layer_scale)
        refuse(
            name,
            {
                f"{self.layer_scale}: {pruned_or(type(scale).__name__)}": type(scale) not in (nn.Identity, LayerScale),
                f"{self.norm}: {pruned_or(type(norm).__name__)}": not is_norm(norm),
            },
        )

    def weights(self, block: nn.Module) -> list[Weight]:
        body = self.body.weights(block.get_submodule(self.name))
        return [
            *affine(self.norm, block.get_submodule(self.norm), ("in",)),
            *(weight.inside(self.name) for weight in body),
            Weight(f"{self.layer_scale}.gamma", (("out",),)),
        ]

    def entry(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.norm)

    def scaled(self, block: nn.Module, value: Tensor, mask: Tensor) -> Tensor:
        gamma = self.scale(block)
        return value if gamma is None else value * gamma

    def scale(self, block: nn.Module) -> Tensor | None:
        scale = block.get_submodule(self.layer_scale)
        return scale.gamma if isinstance(scale, LayerScale) else None

    def narrow(self, block: nn.Module, shape: BranchShape, width: int) -> None:
        example = narrow_body(self, block, shape)
        self.read(block, shape, width, example)
        if len(shape.outputs) < width:
            scale = block.get_submodule(self.layer_scale)
            write = WriteChannels(shape.outputs, width, example, isinstance(scale, LayerScale))
            setattr(block, self.layer_scale, in_place_of(scale, write))

    def read(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        """Let the narrowed body read some of the stream's channels."""
        read_channels(block, self.reading_norm, shape, width, example)

    def small_key(self, key: str) -> str:
        return small_key(self, key)

    def replace(self, block: nn.Module, replacement: nn.Module) -> None:
        setattr(block, self.name, replacement.train(block.training))
        for around in (self.norm, self.layer_scale, self.drop_path):
            setattr(block, around, nn.Identity().train(block.training))

    def set_drop_path(self, block: nn.Module, path: nn.Module) -> None:
        setattr(block, self.drop_path, path)


@dataclass(frozen=True)
class NormTwice(PreNorm):
    """x + path(scale(body(norm(x)))), where the body begins with a norm of its own (`Half`).

    The first norm gives all channels, which the second one takes its moments over; this one picks those that are read.
    """

    own_norm: str = "mlp.norm"

    @property
    def stream_norms(self) -> tuple[str, ...]:
        return (self.norm, self.own_norm)

    def require_covered(self, name: str, block: nn.Module) -> None:
        super().require_covered(name, block)
        norm = block.get_submodule(self.own_norm)
        refuse(name, {f"{self.own_norm}: {pruned_or(type(norm).__name__)}": not is_norm(norm)})

    def weights(self, block: nn.Module) -> list[Weight]:
        first = affine(self.norm, block.get_submodule(self.norm), (STREAM,))
        picks = affine(self.own_norm, block.get_submodule(self.own_norm), ("in",))
        return [*first, *picks, *super().weights(block)[len(first) :]]

    @property
    def reading_norm(self) -> str:
        return self.own_norm


@dataclass(frozen=True)
class GammaPreNorm(AsItsBody):
    """x + path(gamma * body(norm(x))), where gamma is a parameter of the block itself, or None (`Half`)."""

    name: str
    body: Body
    norm: str
    gamma: str
    drop_path: str

    @property
    def stream_norms(self) -> tuple[str, ...]:
        return (self.norm,)

    def require_covered(self, name: str, block: nn.Module) -> None:
        self.body.require_covered(f"{name}.{self.name}", block.get_submodule(self.name))
        norm = block.get_submodule(self.norm)
        refuse(name, {f"{self.norm}: {pruned_or(type(norm).__name__)}": not is_norm(norm)})

    def weights(self, block: nn.Module) -> list[Weight]:
        body = self.body.weights(block.get_submodule(self.name))
        return [
            *affine(self.norm, block.get_submodule(self.norm), ("in",)),
            *(weight.inside(self.name) for weight in body),
            Weight(self.gamma, (("out",),)),
        ]

    def entry(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.norm)

    def scaled(self, block: nn.Module, value: Tensor, mask: Tensor) -> Tensor:
        gamma = self.scale(block)
        return value if gamma is None else value * gamma

    def scale(self, block: nn.Module) -> Tensor | None:
        return block._parameters.get(self.gamma)

    def narrow(self, block: nn.Module, shape: BranchShape, width: int) -> None:
        example = narrow_body(self, block, shape)
        read_channels(block, self.norm, shape, width, example)
        if len(shape.outputs) < width:
            if self.scale(block) is not None:
                setattr(block, self.gamma, nn.Parameter(example.new_empty(len(shape.outputs))))
            path = block.get_submodule(self.drop_path)
            write = DropAndWrite(shape.outputs, width, example, getattr(path, "drop_prob", 0.0))
            setattr(block, self.drop_path, in_place_of(path, write))

    def small_key(self, key: str) -> str:
        return small_key(self, key)

    def replace(self, block: nn.Module, replacement: nn.Module) -> None:
        setattr(block, self.name, replacement.train(block.training))
        setattr(block, self.gamma, None)
        for around in (self.norm, self.drop_path):
            setattr(block, around, nn.Identity().train(block.training))

    def set_drop_path(self, block: nn.Module, path: nn.Module) -> None:
        there = block.get_submodule(self.drop_path)
        if isinstance(there, DropAndWrite):
            there.drop_prob = getattr(path, "drop_prob", 0.0)
        else:
            setattr(block, self.drop_path, path)


def narrow_body(half: Half, block: nn.Module, shape: BranchShape) -> Tensor:
    """Make the body of a half narrower, in the block; a weight of it, for its device and dtype, is returned."""
    body = block.get_submodule(half.name)
    example: Tensor = half.body.last(body).weight
    setattr(block, half.name, half.body.narrow(body, shape, len(shape.inputs), len(shape.outputs)))
    return example


def read_channels(block: nn.Module, name: str, shape: BranchShape, width: int, example: Tensor) -> None:
    """Let the norm of this name give the channels that are read, and no others."""
    if len(shape.inputs) < width:
        norm = block.get_submodule(name)
        block.set_submodule(name, in_place_of(norm, ReadChannels(shape.inputs, width, norm, example, is_centred(norm))))


def small_key(half: Half, key: str) -> str:
    """Where a weight of a dense half lies in a narrow one, whose body may keep it elsewhere."""
    inside = f"{half.name}."
    return inside + half.body.small_key(key.removeprefix(inside)) if key.startswith(inside) else key
