"""Linear layers that see all tokens of a batch as one matrix, for ONNX Runtime.

Of a linear layer on a 3-D tensor the exporter makes a MatMul and an Add; of one on a matrix, a Gemm, which adds the bias as it
multiplies. ONNX Runtime fuses the former into the latter for matrices alone. The same is computed; only the order in which
the bias is added differs.
"""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn
from torch.nn import functional as F


class FlatLinear(nn.Module):
    """A linear layer (..., I) -> (..., O) that multiplies (tokens of all images, I)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.reshape(-1, *x.shape[1:-1], y.shape[-1])


def with_flat_linears(model: nn.Module) -> nn.Module:
    """A copy of a model whose linear layers are flat ones."""
    copy = deepcopy(model)
    for name, module in list(copy.named_modules()):
        if type(module) is nn.Linear:
            parent, _, attribute = name.rpartition(".")
            setattr(copy.get_submodule(parent), attribute, FlatLinear(module))
    return copy
