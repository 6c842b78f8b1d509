"""Modules without values: their classes, parts and sizes, on the meta device and without drawing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_VALUES_ALONE = {"normal_", "uniform_", "erfinv_", "fill_", "zero_", "clamp_", "mul_", "add_", "kaiming_uniform_"}
"""Methods, and functions of torch.nn.init, that change the values of a tensor and nothing else of it."""


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, modules are made on the meta device, and what would set values of their tensors is left out."""
    with torch.device("meta"), NoValues():
        yield


class NoValues(TorchFunctionMode):
    """Leaves out what sets values of tensors on the meta device. They have none, and it takes most of the time."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _VALUES_ALONE:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **kwargs)
