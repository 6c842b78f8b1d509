"""Where a body stands in a block: the norm before it, what scales and drops its output, and what takes their places in a cut.

A half is one residual branch, x + f(x). `PreNorm` is that of timm's Block: x + drop_path1(ls1(attn(norm1(x)))). Another order
of the same things is another class with these methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from timm.layers import LayerScale
from torch import Tensor, nn

from p3b.vit.anatomy.body import Body, in_place_of, pruned_or, refuse
from p3b.vit.anatomy.norms import is_centred, is_norm
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Moments, Weight, affine
from p3b.vit.parts import DropAndWrite, InPlaceOfBranch, ReadChannels, WriteChannels


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

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        """Put a constant or nothing in the place of the branch: no norm, scale or drop path is left around it."""

    def set_drop_path(self, block: nn.Module, path: nn.Module) -> None:
        """Give the branch another stochastic depth."""


@dataclass(frozen=True)
class PlainPreNorm:
    """x + path(body(norm(x))), each by its name in the block (`Half`)."""

    name: str
    body: Body
    norm: str
    drop_path: str
    writer: ClassVar[type[DropAndWrite]] = DropAndWrite
    """What takes the place of stochastic depth where some channels are written to."""

    @property
    def stream_norms(self) -> tuple[str, ...]:
        return (self.norm,)

    @property
    def reading_norm(self) -> str:
        """Name of the norm that gives the channels which are read."""
        return self.norm

    def require_covered(self, name: str, block: nn.Module) -> None:
        self.body.require_covered(f"{name}.{self.name}", block.get_submodule(self.name))
        refuse(name, self.refused(block))

    def refused(self, block: nn.Module) -> dict[str, bool]:
        """What would not be covered beside the body, and whether it is there (`refuse`)."""
        norm = block.get_submodule(self.norm)
        return {f"{self.norm}: {pruned_or(type(norm).__name__)}": not is_norm(norm)}

    def weights(self, block: nn.Module) -> list[Weight]:
        norm = affine(self.norm, block.get_submodule(self.norm), ("in",))
        return [*norm, *self.body_weights(block)]

    def body_weights(self, block: nn.Module) -> list[Weight]:
        """Those of the body, by their keys in the block."""
        return [weight.inside(self.name) for weight in self.body.weights(block.get_submodule(self.name))]

    def moments(self, block: nn.Module) -> list[Moments]:
        found = self.body.moments(block.get_submodule(self.name))
        return [Moments(f"{self.name}.{moments.norm}", moments.axis) for moments in found]

    def constant_without(self, block: nn.Module) -> tuple[bool, bool]:
        return self.body.constant_without(block.get_submodule(self.name))

    def entry(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.norm)

    def exit(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.drop_path)

    def scaled(self, block: nn.Module, value: Tensor, mask: Tensor) -> Tensor:
        scale = self.scale(block)
        return value if scale is None else value * scale

    def scale(self, block: nn.Module) -> Tensor | None:
        return None

    def narrow(self, block: nn.Module, shape: BranchShape, width: int) -> None:
        body = block.get_submodule(self.name)
        example: Tensor = self.body.last(body).weight  # of the device and dtype of new weights
        setattr(block, self.name, self.body.narrow(body, shape, len(shape.inputs), len(shape.outputs)))
        self.read(block, shape, width, example)
        if len(shape.outputs) < width:
            self.write(block, shape, width, example)

    def read(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        """Let the narrowed body read some of the stream's channels."""
        read_channels(block, self.reading_norm, shape, width, example)

    def write(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        """Let the narrowed body write to some of the stream's channels."""
        path = block.get_submodule(self.drop_path)
        write = self.writer(shape.outputs, width, example, getattr(path, "drop_prob", 0.0))
        setattr(block, self.drop_path, in_place_of(path, write))

    def small_key(self, key: str) -> str:
        inside = f"{self.name}."
        return inside + self.body.small_key(key.removeprefix(inside)) if key.startswith(inside) else key

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        setattr(block, self.name, replacement.train(block.training))
        for around in (self.norm, self.drop_path):
            setattr(block, around, nn.Identity().train(block.training))

    def set_drop_path(self, block: nn.Module, path: nn.Module) -> None:
        there = block.get_submodule(self.drop_path)
        if isinstance(there, DropAndWrite):
            there.drop_prob = getattr(path, "drop_prob", 0.0)
        else:
            setattr(block, self.drop_path, path)


@dataclass(frozen=True)
class PreNorm(PlainPreNorm):
    """x + path(scale(body(norm(x)))), where timm's LayerScale scales (`Half`)."""

    layer_scale: str

    def refused(self, block: nn.Module) -> dict[str, bool]:
        scale = block.get_submodule(self.layer_scale)
        other = type(scale) not in (nn.Identity, LayerScale)
        return {f"{self.layer_scale}: {pruned_or(type(scale).__name__)}": other, **super().refused(block)}

    def weights(self, block: nn.Module) -> list[Weight]:
        return [*super().weights(block), Weight(f"{self.layer_scale}.gamma", (("out",),))]

    def scale(self, block: nn.Module) -> Tensor | None:
        scale = block.get_submodule(self.layer_scale)
        return scale.gamma if isinstance(scale, LayerScale) else None

    def write(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        scale = block.get_submodule(self.layer_scale)
        write = WriteChannels(shape.outputs, width, example, isinstance(scale, LayerScale))
        setattr(block, self.layer_scale, in_place_of(scale, write))

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        super().replace(block, replacement)
        setattr(block, self.layer_scale, nn.Identity().train(block.training))


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
class GammaPreNorm(PlainPreNorm):
    """x + path(gamma * body(norm(x))), where gamma is a parameter of the block itself, or None (`Half`)."""

    gamma: str

    def weights(self, block: nn.Module) -> list[Weight]:
        return [*super().weights(block), Weight(self.gamma, (("out",),))]

    def scale(self, block: nn.Module) -> Tensor | None:
        return block._parameters.get(self.gamma)

    def write(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        super().write(block, shape, width, example)
        if self.scale(block) is not None:
            setattr(block, self.gamma, nn.Parameter(example.new_empty(len(shape.outputs))))

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        super().replace(block, replacement)
        setattr(block, self.gamma, None)


def read_channels(block: nn.Module, name: str, shape: BranchShape, width: int, example: Tensor) -> None:
    """Let the norm of this name give the channels that are read, and no others."""
    if len(shape.inputs) < width:
        norm = block.get_submodule(name)
        block.set_submodule(name, in_place_of(norm, ReadChannels(shape.inputs, width, norm, example, is_centred(norm))))
