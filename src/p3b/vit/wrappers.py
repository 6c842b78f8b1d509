"""The model inside its wrappers, and what to say where there is none that p3b can work on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from p3b.errors import ConfigError, ModelError
from p3b.vit.families import CLASSES, family_of

COVERED = tuple(CLASSES.values())
_WRAPPERS = (DistributedDataParallel, DataParallel, ModelEma, ModelEmaV2, ModelEmaV3, AveragedModel)
"""Each holds a model as its `module`; a model behind torch.compile is the `_orig_mod` of its wrapper."""
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers of torch.compile, of many devices or processes and of averages, nested or not."""
    *_, inner = _inwards(model)
    return inner


def require_vision_transformer(model: nn.Module, purpose: str = "pruned") -> VisionTransformer:
    """The model inside its wrappers, which is exactly timm's VisionTransformer or its distilled kind, with timm's PatchEmbed.

    Args:
        model: may be wrapped.
        purpose: what is to be done with it, for the message: "pruned", "saved" or "carried out".

    Raises:
        ModelError: it is of another kind; the message says what to hand in instead.
    """
    inner = unwrap(model)
    if is_sharded(type(inner)):
        raise ModelError(f"{type(inner).__name__}: a model that FSDP has sharded cannot be {purpose}. {_UNSHARDED[purpose]}")
    if type(inner) not in COVERED:
        raise ModelError(
            f"Only timm VisionTransformer models can be {purpose}, got {type(inner).__name__}.{_mend(inner)} Covered are the "
            "ViT and DeiT families (also distilled, without class token, with registers or LayerScale), such as "
            "deit_small_patch16_224."
        )
    family_of(inner).require_covered(inner, purpose)
    return cast("VisionTransformer", inner)  # whatever its family, it is used as one


def require_single_replica(model: nn.Module) -> None:
    """ModelError where a forward pass would run on copies of the layers: gates act on the layers themselves."""
    for wrapper in _inwards(model):
        if isinstance(wrapper, DataParallel) and len(wrapper.device_ids) > 1:
            raise ModelError(
                f"DataParallel copies the layers to {len(wrapper.device_ids)} GPUs at every step, and gates do not go along. "
                "Hand in model.module and train that on one GPU, or use DistributedDataParallel."
            )


def require_not_compiled(model: nn.Module) -> None:
    """ConfigError where the model is behind torch.compile: widths that change at every mask update would be compiled anew."""
    if any("_orig_mod" in wrapper._modules for wrapper in _inwards(model)):
        raise ConfigError(
            "compute='active' is not for a model behind torch.compile: what is computed changes at every mask update, "
            "and would be compiled anew each time. Leave out torch.compile (--compile) or compute='active' (--prune-compute)."
        )


def forget_compiled() -> None:
    """Let torch.compile look at every model anew when it is next called.

    By default torch does not watch hooks: what it had compiled before would go on without them, or with those that are gone.
    """
    torch.compiler.reset()


def is_sharded(kind: type) -> bool:
    """Whether FSDP, of either generation, has taken hold of modules of this class."""
    return any(base.__name__ in _SHARDED for base in kind.__mro__)


_UNSHARDED = {
    "pruned": "Hand in the model before fully_shard, and train it with DistributedDataParallel.",
    "saved": "Gather its weights (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), "
    "load them into the model as it was before fully_shard, and save that one.",
    "carried out": "Load its weights into the model as it was before fully_shard, and hand in that one.",
}


def _inwards(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, from the outside inwards."""
    yield model
    while isinstance(model, _WRAPPERS) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, _WRAPPERS) else model.get_submodule("_orig_mod")
        yield model


def _mend(model: nn.Module) -> str:
    """What to hand in instead, where that is plain to see."""
    if isinstance(model, torch.jit.ScriptModule):
        return " Hand in the module that it was scripted or traced from."
    if isinstance(model, VisionTransformer):
        kind = (VisionTransformerDistilled if isinstance(model, VisionTransformerDistilled) else VisionTransformer).__name__
        return (
            f" A subclass may compute something else: build timm's own {kind} with the same arguments, load these weights into "
            "it (load_state_dict), and hand in that one."
        )
    if type(model).__module__.split(".")[0] == "peft":
        return " Merge the adapter first: model.merge_and_unload()."
    found = [name for name, module in model.named_modules() if type(module) in COVERED]
    return f" It holds one: hand in model.{found[0]}." if found else ""
