"""Optimizers, learning rates and precision of the recipe in section 8 of the method."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from p3b.errors import ConfigError, unknown_name

_FUSED = (torch.optim.Adam, torch.optim.AdamW)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def scaled_lr(lr: float, global_batch: int) -> float:
    """Learning rate for a global batch (images per optimizer step over all ranks): lr is meant for 512."""
    return lr * global_batch / 512


def build_optimizer(
    model: VisionTransformer, name: str, lr: float, weight_decay: float, layer_decay: float | None = None
) -> torch.optim.Optimizer:
    """timm's optimizer by name. Weight decay acts on matrices only: not on biases, norms, tokens and position embeddings.

    Args:
        model: whose trainable parameters are moved.
        name: timm's, of the optimizer.
        lr: learning rate of a step; of the head, where layers differ.
        weight_decay: of matrices.
        layer_decay: the rate of a layer is that of the next one towards the head times this, in (0, 1]; None: all are alike.

    Raises:
        ConfigError: the optimizer is unknown, needs a library that is missing, or second derivatives.
    """
    base = name.lower().removeprefix("lookahead_")
    known = [str(optimizer) for optimizer in list_optimizers()]
    if base not in known:
        raise ConfigError(unknown_name("optimizer", name, known))
    if get_optimizer_info(base).second_order:
        raise ConfigError(f"Optimizer '{name}' needs second derivatives, which training here does not compute. Try adamw.")
    if layer_decay is None:
        groups = decay_groups(model, weight_decay, model.no_weight_decay())
    else:
        groups = layer_groups(model, lr, weight_decay, layer_decay)
    # torch's fused kernels take about a third of the time on a CPU, too, and can leave a step out without asking the host.
    fused: dict[str, Any] = {"fused": True} if get_optimizer_info(base).opt_class in _FUSED else {}
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **fused)
    except (ValueError, AssertionError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(f"Optimizer '{name}' cannot be used: {error}") from error


def decay_groups(model: nn.Module, weight_decay: float, no_decay: Any = ()) -> list[dict[str, Any]]:
    """Two explicit groups over all trainable parameters: those that decay and those that do not."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [p for name, p in trainable if p.ndim <= 1 or name in no_decay]
    decaying = [p for name, p in trainable if not (p.ndim <= 1 or name in no_decay)]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decaying, "weight_decay": weight_decay}]


def layer_groups(model: VisionTransformer, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups of `decay_groups` for each layer, with a rate that falls from the head to the patch embedding (BEiT)."""
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay, model.no_weight_decay(), layer_decay=layer_decay
    )
    # timm's schedulers scale the rate that a group began with; without a scheduler the rate itself has to be scaled.
    return [{**group, "lr": lr * group["lr_scale"], "initial_lr": lr} for group in groups]


def cosine_schedule(
    optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, min_lr: float, warmup_epochs: int
) -> Scheduler:
    """timm's cosine schedule from the optimizer's learning rate down to `min_lr`, updated every optimizer step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs - warmup_epochs,  # a prefix: it comes before the cosine, within the same epochs
        min_lr=min_lr,
        warmup_epochs=warmup_epochs,
        warmup_lr=min_lr,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None
    return scheduler


@dataclass(frozen=True)
class Precision:
    """How a step computes: its autocast dtype, or None for float32 throughout."""

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """`auto` is bf16 where the hardware multiplies it natively, else fp32.

        Raises:
            ConfigError: unknown name.
        """
        if name not in PRECISIONS:
            raise ConfigError(unknown_name("precision", name, PRECISIONS))
        if name == "auto":
            name = "bf16" if _multiplies_bf16(device) else "fp32"
        return cls(device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name])

    @property
    def is_mixed(self) -> bool:
        """Whether steps compute in less than float32, where a gradient that is not finite is no reason to stop at once."""
        return self.dtype is not None

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass and the losses."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaler; it does nothing except under fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN takes bf16 on every AVX512 processor, but where the instruction is missing it takes four times as long as fp32.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
