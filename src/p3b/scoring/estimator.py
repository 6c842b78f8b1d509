"""What every estimator of block benefit offers to a pruning method.

    benefit_b = CE(h_b(x_{b-1})) - CE(h_b(x_b)),   the same small probe h_b on a block's input and output,

once for the class token and once for the patches (arXiv 2506.23675, section 3.1). Estimators differ in what h_b is, how it
learns, and how much of the features they look at.

S samples, N tokens, D width, C classes, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p3b.vit.layout import ModelLayout

Criterion = Callable[[Tensor, Tensor], Tensor]


class BenefitEstimator(Protocol):
    """Measures benefits while a model trains; its probes learn on the way, without any gradient for the model.

    For each forward pass of a step that is `due`, `observe`; at the end of every optimizer step, due or not, `train`.
    """

    @property
    def every(self) -> int:
        """Optimizer steps from one observation to the next; at the steps between nothing is looked at and nothing computed."""
        ...

    def due(self) -> bool:
        """Whether the forward passes of the coming (or present) optimizer step are to be observed."""
        ...

    def observe(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Score every block's input and output by the same probe.

        Args:
            stream_SND: x_0 .. x_B, detached, each (S, N, D).
            criterion: the task loss, from (S, C) logits and targets to a scalar.
            targets: what the task loss takes; soft labels of mixup included.

        Returns:
            (2, B) benefits for class token and patches, without a graph, in units of the loss; and a scalar to be added to
            the training loss, by which the probes learn (0 where they learn otherwise). Both are over this rank's samples.
        """
        ...

    def train(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        """End an optimizer step: the probes learn, unless a gradient was not finite (0-dim bool, one answer for all ranks)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


class Probes(nn.Module):
    """2B probes that learn by gradient; called as `BenefitEstimator.observe` is."""

    def forward(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters that decay does not act on: biases, and what belongs to norms."""
        raise NotImplementedError


def read_tokens(x_SND: Tensor, layout: ModelLayout) -> tuple[Tensor, Tensor]:
    """The class token (or the mean patch token where there is none) and the mean patch token, both (S, D)."""
    mean_SD = x_SND[:, layout.prefix_tokens :].mean(1)
    return (x_SND[:, 0] if layout.has_class_token else mean_SD), mean_SD


def read_class_token(x_SND: Tensor, layout: ModelLayout) -> Tensor:
    """The first of `read_tokens` alone."""
    return x_SND[:, 0] if layout.has_class_token else x_SND[:, layout.prefix_tokens :].mean(1)


def compare(
    logits: Iterable[tuple[Tensor, Tensor]], criterion: Criterion, targets: Tensor, probes: Sequence[nn.Module] | None = None
) -> tuple[Tensor, Tensor]:
    """Benefits from the logits of the same probe before and after each block, the class token's for all blocks first.

    Args:
        logits: 2B pairs, each (S, C) twice; taken one after the other.
        criterion, targets: as in `BenefitEstimator.observe`.
        probes: 2B modules that the pairs come from, where each pair depends on the parameters of its own probe alone. Their
            gradients are then taken pair by pair, so that no more than one probe's graph is held at a time; under float16 they
            are not, since the loss is not scaled yet.

    Returns:
        (2, B) benefits without a graph, and the sum of all 4B losses.
    """
    at_once = probes is not None and torch.is_grad_enabled() and not computes_in_half(targets.device.type)
    losses: list[Tensor] = []
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []
    for number, pair in enumerate(logits):
        both = [criterion(at_least_float32(each), targets) for each in pair]
        if at_once:
            assert probes is not None
            own = list(probes[number].parameters())
            parameters += own
            gradients += torch.autograd.grad(both[0] + both[1], own)
            both = [each.detach() for each in both]
        losses += both
        del pair, both  # or the graph would live until the next one is there
    together = torch.stack(losses).view(2, -1, 2)
    total = GradientsKnown.apply(together.sum(), gradients, *parameters) if at_once else together.sum()
    return (together[..., 0] - together[..., 1]).detach(), total


class GradientsKnown(torch.autograd.Function):
    """A scalar whose gradients by some parameters are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *by_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The probes' loss is gone through backward a second time; its gradients are let go of by then.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient * by_value[0] for gradient in gradients)


def computes_in_half(kind: str) -> bool:
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
