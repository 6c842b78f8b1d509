"""Weights with names for their axes: which gate multiplies what, and what a cut takes along.

A weight's axis is written as a tuple of factors, outermost first: the rows of `qkv.weight` are (3, heads, "head"), so the
dimension "head" lies along that axis 3 * heads times. A factor is a name where the dimension is prunable and a number where it
is not: with whole heads alone it is (3, "heads", head), with both (3, "heads", "head"). Parts (`p3b.vit.anatomy`) name all
dimensions; `p3b.vit.layout` puts numbers for those that are not prunable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

Axis = tuple[int | str, ...]

STREAM = "stream"
"""Name of the residual stream's dimension and of its gate."""


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        key: in the model; a part writes it as it stands in its own module.
        axes: factors of each axis.
        gated: which gates multiply it, each along one axis: (axis, dimension).
        user: name of the module in whose forward pass it is read; None where that is the module that holds it.
        times: vectors of an image that a matrix is multiplied with; None where these are its tokens.
    """

    key: str
    axes: tuple[Axis, ...]
    gated: tuple[tuple[int, str], ...] = ()
    user: str | None = None
    times: int | None = None

    def factors(self, axis: int, dim: str) -> Axis:
        """Factors of an axis as a gate on it sees them: the stream's gate looks through the "in" or "out" of a block."""
        return self.axes[axis] if dim in self.axes[axis] else (dim,)

    def inside(self, module: str) -> Weight:
        """The same weight with the names that it has in a larger module, which holds this one under a name."""
        user = None if self.user is None else f"{module}.{self.user}".removesuffix(".")
        return replace(self, key=f"{module}.{self.key}", user=user)


@dataclass(frozen=True)
class Moments:
    """A norm whose moments are taken over the channels that stay.

    Attributes:
        norm: name of the module; a part writes it as it stands in its own module.
        axis: factors of the channels that it normalises over.
    """

    norm: str
    axis: Axis


def affine(name: str, norm: nn.Module, axis: Axis) -> list[Weight]:
    """Parameters of a norm, or of whatever else has one number for each channel."""
    return [Weight(f"{name}.{key}", (axis,)) for key, _ in norm.named_parameters()]


def split_axis(tensor: Tensor, axis: int, factors: Axis, sizes: Mapping[str, int]) -> Tensor:
    """View of a weight with one axis unfolded into its factors, e.g. (3 * H * K, D) -> (3, H, K, D)."""
    shape = [sizes[factor] if isinstance(factor, str) else factor for factor in factors]
    return tensor.unflatten(axis, shape)


def expand_along(vector: Tensor, factors: Axis, dim: str, sizes: Mapping[str, int]) -> Tensor:
    """A dimension's vector repeated along an axis: (K,) -> (3 * H * K,) for "head" and the factors (3, H, "head")."""
    shape = [sizes[factor] if isinstance(factor, str) else factor for factor in factors]
    if math.prod(shape) == len(vector):
        return vector
    position = factors.index(dim)
    return vector.view([-1 if i == position else 1 for i in range(len(shape))]).expand(shape).flatten()


def dims_of(axis: Axis) -> tuple[str, ...]:
    """Names of the prunable dimensions along an axis."""
    return tuple(factor for factor in axis if isinstance(factor, str))
