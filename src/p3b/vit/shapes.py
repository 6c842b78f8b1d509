"""Shapes of the blocks of a small model: all that is needed to build it without weights, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from timm.models.vision_transformer import VisionTransformer

from p3b.errors import ModelError

WHOLE, SMALL, CONSTANT, GONE = "whole", "small", "constant", "gone"
MOST_INNER = 1 << 24
"""Far above any width inside a block."""
_SHAPES = "p3b_branch_shapes"
"""Attribute of a cut timm block that says what its halves were given: widths alone do not tell a small MLP from a dense one. It
lies on the block, so that blocks may be taken out or cut off at the end as those of a dense model may."""


@dataclass(frozen=True)
class BranchShape:
    """Shape of one block of a small model: all that is needed to build it without weights.

    Attributes:
        name: "blocks.3.attn" or "blocks.3.mlp".
        form: "whole", "small", "constant" or "gone".
        inputs: sorted channels of the residual stream that it reads; empty for a constant.
        inner: channels of a head, or hidden channels.
        outputs: sorted channels of the residual stream that it writes to.
        heads: attention heads of a small attention; 0 for anything else.

    Channels of the residual stream are those of the small model, from 0 to D' - 1.
    """

    name: str
    form: str
    inputs: tuple[int, ...] = ()
    inner: int = 0
    outputs: tuple[int, ...] = ()
    heads: int = 0


def branch_shapes(model: VisionTransformer) -> list[BranchShape]:
    """Shapes of all B blocks of a dense or small model, in order."""
    found: list[BranchShape] = []
    for depth, block in enumerate(model.blocks):
        names = [f"blocks.{depth}.{branch}" for branch in ("attn", "mlp")]
        shapes = block.__dict__.get(_SHAPES, (BranchShape("", WHOLE), BranchShape("", WHOLE)))
        found += [replace(shape, name=name) for shape, name in zip(shapes, names, strict=True)]
    return found


def keep_shapes(model: VisionTransformer, shapes: Sequence[BranchShape]) -> None:
    """Let the blocks of a small model remember their B shapes."""
    for depth, block in enumerate(model.blocks):
        block.__dict__[_SHAPES] = tuple(shapes[2 * depth : 2 * depth + 2])


def shapes_from_plain(entries: object, depth: int, width: int, heads: int, *, tells_heads: bool) -> list[BranchShape]:
    """Shapes of all blocks from plain values of unknown origin: what `dataclasses.asdict` made of them, as JSON keeps it.

    Args:
        entries: one mapping for each block.
        depth: timm blocks of the model, each with an attention and an MLP.
        width: channels of the small model's residual stream.
        heads: attention heads of the dense model.
        tells_heads: whether an entry says how many heads it has; those of older files do not, and have all of them.

    Raises:
        ModelError: blocks are missing, too many or out of order, or one has a form or channels that cannot be.
    """
    names = [f"blocks.{index}.{branch}" for index in range(depth) for branch in ("attn", "mlp")]
    if not isinstance(entries, list) or len(entries) != len(names):
        found = len(entries) if isinstance(entries, list) else "no list of"
        raise ModelError(f"there are {found} blocks for a model of depth {depth}; expected {len(names)}")
    return [
        _shape_from_plain(entry, name, width, heads, tells_heads=tells_heads)
        for entry, name in zip(entries, names, strict=True)
    ]


def _shape_from_plain(entry: object, name: str, width: int, dense_heads: int, *, tells_heads: bool) -> BranchShape:
    known = {field.name for field in fields(BranchShape)} - (set() if tells_heads else {"heads"})
    if not isinstance(entry, dict) or entry.keys() != known or entry["name"] != name:
        raise ModelError(f"the entry of {name} is missing, misplaced or incomplete")
    form, inner = entry["form"], entry["inner"]
    for side in ("inputs", "outputs"):
        channels = entry[side]
        if not isinstance(channels, list) or not all(type(channel) is int and 0 <= channel < width for channel in channels):
            raise ModelError(f"the {side} of {name} are not whole numbers within 0..{width - 1}")
        if any(low >= high for low, high in pairwise(channels)):
            raise ModelError(f"the {side} of {name} are not in rising order")
    has = (bool(entry["inputs"]), bool(entry["outputs"]), type(inner) is int and 1 <= inner <= MOST_INNER)
    allowed = {WHOLE: (False, False, False), GONE: (False, False, False), CONSTANT: (False, True, False), SMALL: (True,) * 3}
    if type(form) is not str or allowed.get(form) != has or (form != SMALL and inner != 0) or type(inner) is not int:
        raise ModelError(f"the form of {name}, {str(form)[:20]!r}, does not go with its channels")
    most = dense_heads if form == SMALL and name.endswith(".attn") else 0
    heads = entry["heads"] if tells_heads else most
    if type(heads) is not int or not min(1, most) <= heads <= most:
        raise ModelError(f"the heads of {name} are {str(heads)[:20]}; expected {f'1 to {most}' if most else 'none (0)'}")
    return BranchShape(name, form, tuple(entry["inputs"]), inner, tuple(entry["outputs"]), heads)
