"""What has to hold of a model so that its weights say all that it computes.

A layer computes what its weight says only if it is exactly the layer that timm builds: no subclass, no parametrization, no hook
that changes what goes in or out, no forward pass of its own, nothing shared with another layer. `require_plain` looks for all
that classes do not tell; which classes stand where is compared with what timm builds by `p3b.vit.described`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import FunctionType

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.errors import ModelError

_CALLED = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_TRUSTED = ("torch", "timm", "p3b")
_FORWARD = tuple(_CALLED)[:2]
_MAY_BE_HEARD = re.compile(
    r"|encoder|(encoder\.)?(patch_embed|blocks|blocks\.\d+)|norm_pre|norm|fc_norm|head_drop|head|head_dist"
)
"""Modules that stay, and whose inputs and outputs mean the same after the cut: hooks on them stay and are right."""


def require_prunable_layers(vit: VisionTransformer) -> None:
    """Refuse what would make the small network compute something else than the masked one, or forget what was set on it.

    Raises:
        ModelError: names the layer, and says how to mend it.
    """
    require_plain(vit)
    for name, kind, hook in _hooks(vit):
        if not _MAY_BE_HEARD.fullmatch(name):
            raise ModelError(
                f"{name} has {_CALLED[kind]} ({_name_of(hook)}), which may change what it computes, and the layer is cut. "
                "Remove it (handle.remove()), or listen to a whole block."
            )
    require_nothing_shared(vit)
    for key, parameter in vit.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ModelError(
                f"{key} has a hook that runs as soon as its gradient is there, as where an optimizer steps within backward: "
                "scores are read before the weights move. Remove it, and call the optimizer after pruner.step()."
            )


def require_saveable_layers(vit: VisionTransformer) -> None:
    """Refuse what the weights do not tell, so that it would be lost in a file.

    Raises:
        ModelError: names the layer, and says how to mend it.
    """
    require_not_gated(
        vit,
        "Masks are not saved: call pruner.finalize() and save what it returns, or pruner.detach() to save the dense model.",
    )
    require_plain(vit)
    for name, kind, hook in _hooks(vit):
        if kind in _FORWARD:
            raise ModelError(
                f"{_place(name)} has {_CALLED[kind]} ({_name_of(hook)}), which may change what it computes and is not saved. "
                "Remove it before (handle.remove())."
            )


def require_not_gated(vit: VisionTransformer, mend: str) -> None:
    """ModelError where a pruner is attached to the model, or was to the one that it is a copy of."""
    if any(_is_ours(hook) for *_, hook in _all_hooks(vit)):
        raise ModelError(f"A pruner is attached to this model, or to the one that it was copied from. {mend}")


def require_plain(vit: VisionTransformer) -> None:
    """ModelError where a module or parameter is not what its class says."""
    for name, module in vit.named_modules(remove_duplicate=False):
        registered = {*module._parameters, *module._buffers, *module._modules}
        methods = (key for key in module.__dict__ if isinstance(getattr(type(module), key, None), FunctionType))
        patched = [*methods, *(registered & module.__dict__.keys())]
        if patched:
            raise ModelError(
                f"{_place(name)}.{patched[0]} was replaced on this one object, which no longer computes what its class does. "
                f"Take that off (del model.{_dotted(name)}{patched[0]})."
            )
        forward = type(module).forward
        if _origin(type(module)) in _TRUSTED and _origin(forward) not in _TRUSTED:
            raise ModelError(
                f"{_place(name)}: {type(module).__name__}.forward was replaced by {forward.__module__}.{forward.__qualname__}. "
                "Put timm's own back."
            )
    for key, parameter in vit.named_parameters(remove_duplicate=False):
        if type(parameter) is not nn.Parameter:
            raise ModelError(
                f"{key} is a {type(parameter).__name__}, no plain torch.nn.Parameter. Hand in the model as it was before that "
                "(sharded, quantised)."
            )


def foreign_parts(module: nn.Module) -> str:
    """What a module of another kind looks like, and how to get back to a plain one; for the end of a message."""
    parameters = {key.rsplit(".", maxsplit=1)[-1] for key, _ in module.named_parameters()}
    buffers = {key.rsplit(".", maxsplit=1)[-1] for key, _ in module.named_buffers()}
    if "parametrizations" in module._modules:
        return "Make the parametrization permanent: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
    if "weight_orig" in parameters and "weight_mask" in buffers:
        return "Make the mask permanent: torch.nn.utils.prune.remove(layer, 'weight')."
    if {"weight_g", "weight_v"} <= parameters:
        return "Take the norm off: torch.nn.utils.remove_weight_norm(layer)."
    if "weight_orig" in parameters:
        return "Take the norm off: torch.nn.utils.remove_spectral_norm(layer)."
    if "quantized" in type(module).__module__:
        return "It is quantised: hand in the model as it was before, and quantise what you load."
    if "_orig_mod" in module._modules:
        return "Compile the whole model instead: torch.compile(model)."
    return "Merge an adapter into the layer first, or put timm's own layer back."


def require_nothing_shared(vit: VisionTransformer) -> None:
    """ModelError where two layers are one, or hold the same weights."""
    modules: dict[int, str] = {}
    for name, module in vit.named_modules(remove_duplicate=False):
        if (first := modules.setdefault(id(module), name)) != name:
            raise ModelError(
                f"{name} is the same module as {first}: cutting one would cut the other. Give it weights of its own."
            )
    tensors: dict[object, str] = {}
    for key, parameter in vit.named_parameters(remove_duplicate=False):
        place = id(parameter) if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
        if (first := tensors.setdefault(place, key)) != key:
            raise ModelError(
                f"{key} shares its weights with {first}: cutting one would cut the other. Give it weights of its own: "
                "torch.nn.Parameter(weight.detach().clone())."
            )


def _hooks(vit: VisionTransformer) -> Iterator[tuple[str, str, object]]:
    """Everything but a pruner's own that is called with what goes in and out of a module."""
    return (found for found in _all_hooks(vit) if not _is_ours(found[-1]))


def _all_hooks(vit: VisionTransformer) -> Iterator[tuple[str, str, object]]:
    for name, module in vit.named_modules():
        for kind in _CALLED:
            hooks: Mapping[int, object] = module.__dict__[kind]
            for hook in hooks.values():
                yield name, kind, hook


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("p3b.")


def _origin(of: type | FunctionType) -> str:
    return of.__module__.split(".")[0]


def _name_of(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _place(name: str) -> str:
    return name or "the model"


def _dotted(name: str) -> str:
    return re.sub(r"\.(\d+)", r"[\1]", name) + "." if name else ""
