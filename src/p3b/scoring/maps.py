"""Tokens as the map of patches that they are of, also where a hierarchy keeps them in another order."""

from __future__ import annotations

from itertools import chain

from torch import Tensor

from p3b.vit.layout import ModelLayout


def as_map(x_SNC: Tensor, layout: ModelLayout) -> Tensor:
    """(S, N, C) tokens without those in front -> (S, C, H, W), channels last in memory.

    Tokens that were taken out of the map by strides (Sy, Sx), once or more, lie as (Sy, Sx, ..., H / Sy..., W / Sx...).
    """
    strides, grid = layout.unrolled, layout.grid
    if strides:
        rows, columns = grid
        for high, wide in strides:
            rows, columns = rows // high, columns // wide
        x_SNC = x_SNC.unflatten(1, (*chain(*strides), rows, columns))
        places = range(1, 2 * len(strides) + 3)
        # The last stride taken is the coarsest: its rows are as far apart as those of the map that is left.
        x_SNC = x_SNC.permute(0, *places[::2][::-1], *places[1::2][::-1], 2 * len(strides) + 3).flatten(1, -2)
    return x_SNC.unflatten(1, grid).permute(0, 3, 1, 2)
