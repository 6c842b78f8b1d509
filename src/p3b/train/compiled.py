"""Training with torch.compile: the model's forward pass and its gradient become kernels that are made for it.

The compiled module is a wrapper; the model itself, its class, its state-dict keys and whatever is saved stay as they are. Hooks
of the model's layers (gates, taps) are compiled with it. Evaluation goes without: it is done with the moving average or with
batches of other sizes, each of which would be compiled anew, and its figures are those of the model that is saved.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from p3b.errors import ConfigError


def require_compiler(device: torch.device) -> None:
    """Compile something tiny for the device, which takes seconds.

    Raises:
        ConfigError: it cannot be done here.
    """
    try:
        torch.compile(_tiny)(torch.ones(8, device=device))
    except Exception as error:  # torch's compiler passes on whatever its parts raise
        cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--compile does not work here ({type(error).__name__}: {cause}). On a CPU it needs a C++ compiler (g++, or the "
            "one that the variable CXX names), on a GPU also Triton. Install what is missing, or leave --compile out."
        ) from error


def compiled(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """The model behind torch.compile; it is compiled when it is first called, and once more when its gates first close.

    What was compiled before in this process is forgotten: torch gives up on a model that it has compiled too often. And hooks
    are watched: unless told so, torch takes a model with gates for the one without that it has compiled before.
    """
    torch.compiler.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return cast(nn.Module, torch.compile(model, backend=backend))


def _tiny(values: torch.Tensor) -> torch.Tensor:
    return (values * 2).sin()
