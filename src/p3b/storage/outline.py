"""timm's models on the meta device: their classes, parts and sizes, without memory for weights and without drawing any."""

from __future__ import annotations

import warnings
from typing import Any

import timm
from torch import nn

from p3b.errors import ModelError
from p3b.vit.coverage import require_prunable_layers
from p3b.vit.described import require_described
from p3b.vit.layout import ModelLayout, read_layout
from p3b.vit.valueless import without_values


def outline(name: str, **arguments: Any) -> nn.Module:
    """timm's model of this name, without values.

    Args:
        name: known to timm.
        arguments: of the model.

    Raises:
        Whatever timm raises: some of its models ask for values while they are built, others do not take the arguments.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on names that timm gives up: not what was asked
        with without_values():
            return timm.create_model(name, **arguments)


def require_prunable(model: nn.Module) -> ModelLayout:
    """The map of a model that is covered down to every leaf, as `p3b.Pruner` asks for it.

    Raises:
        ModelError: it is not; the message names the part.
    """
    layout = read_layout(model)
    require_described(model, "pruned")  # type: ignore[arg-type]  # read_layout has seen to its class
    require_prunable_layers(model)  # type: ignore[arg-type]
    return layout


def can_be_pruned(name: str) -> bool:
    """Whether timm's model of this name is covered."""
    try:
        require_prunable(outline(name, depth=1))  # one block tells, and is built quickly
    except (ModelError, AssertionError, RuntimeError, NotImplementedError, TypeError):
        return False
    return True
