"""What a scheme of names is."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Finished = tuple[dict[str, Tensor], list[str]]
"""A state dict by timm's names, and what was done beyond renaming, in words."""


def _as_it_is(state: Mapping[str, Tensor]) -> Finished:
    return dict(state), []


@dataclass(frozen=True)
class Scheme:
    """The names that one origin gives to the parts of a Vision Transformer, as patterns.

    Attributes:
        name: whose names they are, for reports and errors.
        patch: the patch embedding's kernel, which only this scheme calls so.
        blocks: tensors of the first block, one of which is there too.
        renames: (pattern of a whole name, timm's name); the first that fits counts, others keep their name.
        outside: the same for tensors beside the tower, such as a classifier.
        finish: what names cannot say (a reordered tensor, a head that is none).
        pooling: what a classifier of this origin reads, by timm's name; None where that is not known.
    """

    name: str
    patch: str
    blocks: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...] = ()
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


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None
