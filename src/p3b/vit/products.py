"""Gated weights that are let go of after the forward pass, and computed again when the backward pass comes to them.

For its backward pass autograd keeps the weight that a layer has computed with. A gated weight is a product, as large as the
weight itself: kept for all layers, the products would take a quarter of what parameters, gradients and AdamW's moments take.
So a product's memory is freed as soon as its layer has computed. The gradient of the layer's output, which comes before those
of the layer, brings it back: from the same factors by the same operations, so to the same bits.

Under autocast nothing is to be freed: a layer computes with a copy in half precision, as it does where nothing is gated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from p3b.errors import TrainingError

FREED_FROM = 2**20
"""Numbers of a weight from which on its product is let go of: narrow models are quicker with fewer calls."""


def product_of(weight: Tensor, scales: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """A weight times its masks, each along one of its axes; `out`: where it is written to."""
    first, *others = (scale.to(weight.dtype) for scale in scales)
    product = weight * first if out is None else torch.mul(weight, first, out=out)
    for scale in others:
        product = product.mul_(scale)
    return product


def free_until_gradient(product: Tensor, weight: nn.Parameter, scales: Sequence[Tensor], output: object) -> None:
    """Let go of a product's memory, where that is worth it, until the gradient of its layer's output is there.

    Args:
        product: of `product_of`, which the layer has computed with and nothing else.
        weight, scales: what it is made of.
        output: of the layer.
    """
    if isinstance(output, Tensor) and output.requires_grad and _is_kept(product, scales):
        memory = product.data  # autograd need not know that it is written again
        size = memory.untyped_storage().nbytes()
        output.register_hook(_refill([memory], size, weight, scales))
        memory.untyped_storage().resize_(0)


def _is_kept(product: Tensor, scales: Sequence[Tensor]) -> bool:
    """Whether autograd keeps a product, large as it is."""
    return (
        product.numel() >= FREED_FROM
        and not product.is_meta
        and torch._C._current_graph_task_id()
        == -1  # within a backward pass, checkpointing computes what that pass reads at once
        and not torch.is_autocast_enabled(product.device.type)
        and not any(scale.requires_grad for scale in scales)  # the gradient of a mask may read half a product
    )


def _refill(freed: list[Tensor], size: int, weight: nn.Parameter, scales: Sequence[Tensor]) -> Callable[[Tensor], None]:
    """A hook that fills memory once and then holds it no longer: autograd alone does."""
    version = weight._version

    @torch.no_grad()
    def refill(_gradient: Tensor) -> None:
        if not freed:
            return
        if weight._version != version:
            raise TrainingError(
                "A weight was changed between the forward pass and its backward pass, so that gradients would be those of "
                "another model. Step the optimizer after loss.backward()."
            )
        memory = freed.pop()
        memory.untyped_storage().resize_(size)
        product_of(weight.data, scales, out=memory)

    return refill
