"""Parameters that a cut has replaced: an optimizer that still holds them would train nothing, so its next step is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from p3b.errors import TrainingError

_replaced = WeakIdKeyDictionary()
"""Parameters of models that were shrunk, as long as somebody holds them, and their keys."""
_handles: list[RemovableHandle] = []


def forbid_steps(before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """From now on a step of an optimizer that holds a parameter which is no longer the model's raises a TrainingError.

    Args:
        before: parameters of the model, by key, before it was cut.
        model: after that.
    """
    now = {id(parameter) for parameter in model.parameters()}
    for key, parameter in before.items():
        if id(parameter) not in now:
            _replaced[parameter] = key
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_refuse))


def _refuse(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    if not _replaced:  # whoever held them has let go
        while _handles:
            _handles.pop().remove()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _replaced:
                raise TrainingError(
                    f"The optimizer holds {_replaced[parameter]} as it was before the model was shrunk, so that it would train "
                    "nothing. Make a new one from the parameters of the small model."
                )
