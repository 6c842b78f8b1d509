"""Shapes of the blocks of a small model: all that is needed to build it without weights, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import pairwise
from typing import Any

from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.shape import CONSTANT, GONE, SMALL, WHOLE, BranchShape
from p3b.vit.families import family_of
from p3b.vit.families.family import BranchOutline

MOST_INNER = 1 << 24
"""Far above any width inside a block."""
_SHAPES = "p3b_branch_shapes"
"""Attribute of a cut timm block that says what its halves were given: widths alone do not tell a small MLP from a dense one. It
lies on the block, so that blocks may be taken out or cut off at the end as those of a dense model may."""


def branch_shapes(model: nn.Module) -> list[BranchShape]:
    """Shapes of all B branches of a dense or small model, in order."""
    found: list[BranchShape] = []
    for block in family_of(model).blocks(model):
        whole = [BranchShape("", WHOLE)] * len(block.halves)
        shapes = block.module.__dict__.get(_SHAPES, whole)
        found += [replace(shape, name=block.branch(half)) for shape, half in zip(shapes, block.halves, strict=True)]
    return found


def keep_shapes(model: nn.Module, shapes: Sequence[BranchShape]) -> None:
    """Let the blocks of a small model remember their B shapes."""
    by_name = {shape.name: shape for shape in shapes}
    for block in family_of(model).blocks(model):
        block.module.__dict__[_SHAPES] = tuple(by_name[block.branch(half)] for half in block.halves)


def plain_shape(shape: BranchShape) -> dict[str, Any]:
    """A shape as JSON keeps it; pairs are told of a small branch that has them, and of no other."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(shape).items()}
    return plain if shape.pairs else {key: value for key, value in plain.items() if key != "pairs"}


def shapes_from_plain(
    entries: object, branches: Sequence[BranchOutline], width: int, *, tells_heads: bool
) -> list[BranchShape]:
    """Shapes of all branches from plain values of unknown origin: what `plain_shape` made of them.

    Args:
        entries: one mapping for each branch.
        branches: what the description says of each (`p3b.vit.architecture.branches_of`).
        width: channels of the small model's residual stream.
        tells_heads: whether an entry says how many heads it has; those of older files do not, and have all of them.

    Raises:
        ModelError: branches are missing, too many or out of order, or one has a form or channels that cannot be.
    """
    if not isinstance(entries, list) or len(entries) != len(branches):
        found = len(entries) if isinstance(entries, list) else "no list of"
        raise ModelError(f"there are {found} blocks; expected {len(branches)} for what the architecture says")
    return [
        _shape_from_plain(entry, branch, width, tells_heads=tells_heads)
        for entry, branch in zip(entries, branches, strict=True)
    ]


def _shape_from_plain(entry: object, branch: BranchOutline, width: int, *, tells_heads: bool) -> BranchShape:
    name, width = branch.name, width if branch.width is None else branch.width
    known = {field.name for field in fields(BranchShape)} - {"pairs"} - (set() if tells_heads else {"heads"})
    known |= {"pairs"} if branch.pairs and isinstance(entry, dict) and entry.get("form") == SMALL else set()
    if not isinstance(entry, dict) or entry.keys() != known or entry["name"] != name:
        raise ModelError(f"the entry of {name} is missing, misplaced or incomplete")
    form, inner = entry["form"], entry["inner"]
    most_of = {
        "inputs": width if branch.reads is None else branch.reads,
        "outputs": width,
        **({"pairs": branch.pairs} if "pairs" in entry else {}),
    }
    for side, most in most_of.items():
        channels = entry[side]
        if not isinstance(channels, list) or not all(type(channel) is int and 0 <= channel < most for channel in channels):
            raise ModelError(f"the {side} of {name} are not whole numbers within 0..{most - 1}")
        if any(low >= high for low, high in pairwise(channels)):
            raise ModelError(f"the {side} of {name} are not in rising order")
    has = (bool(entry["inputs"]), bool(entry["outputs"]), type(inner) is int and 1 <= inner <= MOST_INNER)
    allowed = {WHOLE: (False, False, False), GONE: (False, False, False), CONSTANT: (False, True, False), SMALL: (True,) * 3}
    if type(form) is not str or allowed.get(form) != has or (form != SMALL and inner != 0) or type(inner) is not int:
        raise ModelError(f"the form of {name}, {str(form)[:20]!r}, does not go with its channels")
    pairs = tuple(entry.get("pairs", ()))
    if form == SMALL and 2 * len(pairs) != (inner if branch.pairs else 0):
        raise ModelError(f"{name} keeps {len(pairs)} pairs of channels, which are not its {inner} channels of a head")
    most = branch.heads if form == SMALL else 0
    heads = entry["heads"] if tells_heads else most
    if type(heads) is not int or not min(1, most) <= heads <= most:
        raise ModelError(f"the heads of {name} are {str(heads)[:20]}; expected {f'1 to {most}' if most else 'none (0)'}")
    return BranchShape(name, form, tuple(entry["inputs"]), inner, tuple(entry["outputs"]), heads, pairs)
