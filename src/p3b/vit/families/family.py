"""What a family of models has to say of itself: where its blocks lie, what they consist of, and how a model is described.

A family is a class of timm's and the parts (`p3b.vit.anatomy`) of its blocks. docs/families.md shows how one is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from p3b.vit.anatomy.half import Half
from p3b.vit.anatomy.weights import Weight
from p3b.vit.families.allowed import Rule


@dataclass(frozen=True)
class Block:
    """One of a model's blocks.

    Attributes:
        name: in the model, "blocks.3".
        module: timm's block, or what is left of it in a small model.
        halves: its residual branches in order, as a dense block has them.
        width: channels of the residual stream at this block.
        stage: number of the stage that it lies in; 0 where all blocks have one residual stream.
        grid: (H, W) tokens there beside the prefix tokens; None where it is that of the patches.
        window: where tokens are compared in windows, the tokens of one and those of all of them, padding included.
        distances: vectors of relative positions that a query is multiplied with, beside the keys.
        pools: whether its first branch is added to what the block itself makes of the stream, for another stage: the block
            stays even where both branches are gone, and the stream of its stage begins after that.
        unrolled: strides by which its tokens were taken out of the map, the first one taken first; empty where they lie row
            by row.
    """

    name: str
    module: nn.Module
    halves: tuple[Half, ...]
    width: int
    stage: int = 0
    grid: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    distances: int = 0
    pools: bool = False
    unrolled: tuple[tuple[int, int], ...] = ()

    def branch(self, half: Half) -> str:
        """Name of a branch: "blocks.3.attn"."""
        return f"{self.name}.{half.name}"


@dataclass(frozen=True)
class BranchOutline:
    """What a description says of one residual branch.

    Attributes:
        name: "blocks.3.attn".
        heads: attention heads, of its keys where queries have more; 0 for an MLP.
        pairs: pairs that positions turn a head's channels in; 0 where they do not.
        width: channels of the dense model's residual stream there; None where it is that of the whole model.
        reads: channels that it may read where they are those of the stage before; None where they are `width`.
    """

    name: str
    heads: int
    pairs: int = 0
    width: int | None = None
    reads: int | None = None


@dataclass(frozen=True)
class Outside:
    """What reads and writes the residual stream outside of the blocks.

    Attributes:
        weights: every parameter there, with the stream as a factor of the axes that lie along it; gated are those that write.
        norms: names of the norms over the stream, those in blocks not included.
    """

    weights: tuple[Weight, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """The images that a model is made for.

    Attributes:
        channels: of an image.
        size: (height, width) in pixels.
        patch: (height, width) of a patch in pixels.
        grid: (H, W) patches, as they enter the first block.
    """

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    grid: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        return self.channels, *self.size


class Family(Protocol):
    """A class of models, or several that are alike but for their heads.

    Attributes:
        classes: of timm's, by the name that a description has for them.
        rules: the arguments that every description has.
        more_rules: arguments that a description has where they are other than their default.
    """

    @property
    def classes(self) -> Mapping[str, type[nn.Module]]: ...

    @property
    def rules(self) -> Mapping[str, Rule]: ...

    @property
    def more_rules(self) -> Mapping[str, tuple[Rule, Any]]: ...

    def blocks(self, model: nn.Module) -> Sequence[Block]:
        """All blocks of a dense or small model, in the order in which they compute."""

    def patch_embed(self, model: nn.Module) -> nn.Module:
        """The module that makes patches of images; what it gives has the grid of the patches for its axes 1 and 2 where the
        model takes images of any size."""

    def images(self, model: nn.Module) -> Images:
        """The images that it is made for."""

    def require_covered(self, model: nn.Module, purpose: str) -> None:
        """Raise a ModelError for what is not covered outside of the blocks."""

    def require_blocks_covered(self, model: nn.Module) -> None:
        """Raise a ModelError for what is not covered about the blocks of a dense model, beside what their halves say."""

    def outside(self, model: nn.Module) -> Outside:
        """What reads and writes the stream outside of the blocks.

        Raises:
            ModelError: something there does so in a way that is not covered.
        """

    def describe_outside(self, model: nn.Module) -> dict[str, Any]:
        """Arguments that can be read off any model, dense or small. ModelError for what they cannot express."""

    def describe_blocks(self, model: nn.Module) -> dict[str, Any]:
        """Arguments that can only be read off a dense model. ModelError for what they cannot express."""

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise a ModelError where arguments that are each in their range do not go together."""

    def branches(self, arguments: Mapping[str, Any]) -> list[BranchOutline]:
        """The branches of the model that checked arguments describe, in order."""

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        """The dense model of checked arguments; its parameters need no values where `values` is False."""


def classes_of(model: nn.Module) -> int:
    """Outputs of the head as it is: a head that was replaced by another layer leaves `num_classes` behind."""
    head = getattr(model, "head", None)
    return head.out_features if isinstance(head, nn.Linear) else model.num_classes


def as_features(model: nn.Module, final_norm: bool) -> nn.Module:
    """A model as it was built, or as timm takes the last norm off for features of the blocks alone (`features_only`)."""
    if not final_norm:
        model.prune_intermediate_layers(None, prune_norm=True, prune_head=False)
    return model


def ratio_of(layer: nn.Module, width: int, of: str = "out_features") -> float:
    """The ratio to a width that timm, which truncates, makes the outputs (or the inputs) of a layer of."""
    hidden = getattr(layer, of)
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
