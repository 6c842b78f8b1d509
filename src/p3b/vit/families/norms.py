"""Norms as a description has them: by name and epsilon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.norms import NORMS, is_norm, norm_name


def require_describable(model: nn.Module, norms: Sequence[str]) -> None:
    """ModelError for norms outside of the blocks that no argument expresses."""
    for name in norms:
        part = model.get_submodule(name)
        if not isinstance(part, nn.Identity) and not is_norm(part):
            raise ModelError(f"{name}: {type(part).__name__} cannot be described in config.json; put timm's own layer back.")


def describe_norm(name: str, norm: nn.Module) -> dict[str, Any]:
    """Arguments for a norm of the blocks, which is called `name` in the model; ModelError where it has none."""
    if (found := norm_name(norm)) is None:
        raise ModelError(f"{name}: {type(norm).__name__} cannot be described in config.json.")
    return {"norm_layer": found, "norm_eps": norm.eps}


def take_norm(arguments: dict[str, Any]) -> Callable[..., nn.Module]:
    """Take the arguments for a norm out of others; what timm takes for them is returned."""
    return partial(NORMS[arguments.pop("norm_layer")], eps=arguments.pop("norm_eps"))
