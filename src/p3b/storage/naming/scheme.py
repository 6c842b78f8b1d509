"""What a scheme of names is."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Finished = tuple[dict[str, Tensor], list[str]]
"""A state dict by timm's names, and what was done beyond renaming, in words."""


Renames = tuple[tuple[str, str], ...]
"""Pattern of a whole name and timm's name, row by row; the first that fits counts."""

_KIND = r"\.(weight|bias)"


def modules(table: Mapping[str, str]) -> Renames:
    """Renames of modules with weight and bias: patterns without groups, and timm's names."""
    return tuple((f"{theirs}{_KIND}", rf"{timms}.\1") for theirs, timms in table.items())


def in_blocks(
    layer: str, *, norms: tuple[str, str], proj: str, mlp: tuple[str, str], others: Mapping[str, str] | None = None
) -> Renames:
    """Renames of the modules of a block with weight and bias; what is not known keeps its name inside its block.

    Args:
        layer: pattern of what stands before a layer's own names; its one group is the layer's number.
        norms, proj, mlp: patterns of the parts that every Vision Transformer has, without groups.
        others: the same of further parts, and timm's names for them.
    """
    parts = dict(zip((*norms, proj, *mlp), ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"), strict=True))
    table = {**parts, **(others or {})}
    rows = [(f"{layer}{theirs}{_KIND}", rf"blocks.\1.{timms}.\2") for theirs, timms in table.items()]
    return (*rows, (rf"{layer}(.+)", r"blocks.\1.\2"))


def without_head_behind(layer: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, less its head where that reads a layer that timm's models no longer have.

    Args:
        layer: what the names of that layer begin with.
        state: by timm's names.
    """
    is_there = any(name.startswith(layer) for name in state)
    return {name: tensor for name, tensor in state.items() if not is_there or not name.startswith(("head.", layer))}


def _as_it_is(state: Mapping[str, Tensor]) -> Finished:
    return dict(state), []


@dataclass(frozen=True)
class Scheme:
    """The names that one origin gives to the parts of a Vision Transformer, as patterns.

    Attributes:
        name: whose names they are, for reports and errors.
        patch: the patch embedding's kernel, which only this scheme calls so.
        blocks: tensors of the first block, one of which is there too.
        renames: of tensors of the tower; others keep their name.
        outside: the same for tensors beside the tower, such as a classifier.
        finish: what names cannot say (a reordered tensor, a head that is none).
        pooling: what a classifier of this origin reads, by timm's name; None where that is not known.
    """

    name: str
    patch: str
    blocks: tuple[str, ...]
    renames: Renames
    outside: Renames = ()
    finish: Callable[[Mapping[str, Tensor]], Finished] = field(default=_as_it_is)
    pooling: str | None = None
    is_timm: bool = False

    def is_at(self, prefix: str, names: Collection[str]) -> bool:
        """Whether a tower of this scheme stands under a prefix."""
        return (not prefix or prefix.endswith(".")) and any(prefix + block in names for block in self.blocks)

    def rename(self, name: str) -> str:
        """timm's name of a tensor of the tower."""
        return _renamed(name, self.renames) or name

    def rename_outside(self, name: str) -> str | None:
        """timm's name of a tensor beside the tower; None where it belongs to something else."""
        return _renamed(name, self.outside)


def _renamed(name: str, table: Renames) -> str | None:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None
