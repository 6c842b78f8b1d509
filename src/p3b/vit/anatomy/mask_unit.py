"""timm's attention of Hiera, and the halves of its blocks that take the residual stream into another stage.

Attention compares tokens within mask units or all of them. Where a stage begins it pools queries: each is the largest of some
tokens', channel by channel. A channel that is masked is zero in all of them, and a factor above zero goes through the maximum,
so heads become narrower and go as elsewhere.

Such a block also pools the stream itself, which becomes wider: from the normed stream by a layer of its own (`proj`), or from
its maximum beside its mean. That shortcut is no branch: it stays whole, and so does a norm that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.models.hiera import MaskUnitAttention
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.body import in_place_of, narrow_linear, pruned_or, require_linear
from p3b.vit.anatomy.half import PreNorm, read_channels
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Weight
from p3b.vit.anatomy.window import WindowSelfAttention
from p3b.vit.parts import InPlaceOfBranch, ReadingLinear


@dataclass(frozen=True)
class MaskUnitSelfAttention(WindowSelfAttention):
    """timm's MaskUnitAttention (`p3b.vit.anatomy.body.Body`)."""

    classes: tuple[type[nn.Module], ...] = (MaskUnitAttention,)
    tokens: int = 0
    """How many it is given of an image; it gives fewer where it pools."""

    def require_covered(self, name: str, body: Any) -> None:
        if type(body) not in self.classes:
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)} is not covered; in a Hiera MaskUnitAttention is.")
        require_linear(name, body, ("qkv", "proj"))
        widths = (body.qkv.in_features, body.qkv.out_features, body.proj.in_features, body.proj.out_features)
        if widths != (body.dim, 3 * body.dim_out, body.dim_out, body.dim_out) or body.dim_out != body.heads * body.head_dim:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def sizes(self, body: Any) -> dict[str, int]:
        return {"in": body.qkv.in_features, "heads": body.heads, "head": body.head_dim, "out": body.proj.out_features}

    def weights(self, body: Any) -> list[Weight]:
        weight, bias = self.read_weights(body)
        return [
            Weight(weight.key, weight.axes, weight.gated, times=self.tokens),
            bias,
            Weight("proj.weight", (("out",), self.inner(body)), gated=((0, "out"), (1, "heads"), (0, STREAM))),
            Weight("proj.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        ]

    def narrow(self, body: Any, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        rows = shape.heads * shape.inner
        narrow_linear(body.qkv, inputs, 3 * rows)
        narrow_linear(body.proj, rows, outputs)
        body.heads, body.head_dim, body.dim_out, body.scale = shape.heads, shape.inner, rows, shape.inner**-0.5
        module: nn.Module = body
        return module


@dataclass(frozen=True)
class PoolingPreNorm(PreNorm):
    """pool(x) + path(scale(body(norm(x)))): the body reads the stream of one stage and writes to that of the next."""

    def read(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        (before,) = block.get_submodule(self.norm).normalized_shape
        read_channels(block, self.norm, shape, before, example)

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        replacement.q_stride = block.get_submodule(self.name).q_stride  # the shortcut asks for it
        super().replace(block, replacement)


@dataclass(frozen=True)
class ProjectedPreNorm(PoolingPreNorm):
    """pool(proj(norm(x))) + path(scale(body(norm(x)))): the norm, which the shortcut reads too, is no part of the branch."""

    def weights(self, block: nn.Module) -> list[Weight]:
        return [weight for weight in super().weights(block) if not weight.key.startswith(f"{self.norm}.")]

    def read(self, block: nn.Module, shape: BranchShape, width: int, example: Tensor) -> None:
        attention = block.get_submodule(self.name)
        (before,) = block.get_submodule(self.norm).normalized_shape
        if len(shape.inputs) < before:
            layer: nn.Linear = attention.get_submodule("qkv")
            attention.set_submodule("qkv", in_place_of(layer, ReadingLinear(shape.inputs, layer)))

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        norm = block.get_submodule(self.norm)
        super().replace(block, replacement)
        block.set_submodule(self.norm, norm)
