"""Benefit by ridge regression in closed form: no gradients, no optimizer, one pass over two tokens of each feature.

S samples, D width, C classes, B blocks; K = 2 kinds of token (class token, mean patch token); P = B + 1 places x_0 .. x_B.

From every batch the second moments of the tokens and of tokens with targets are taken and averaged with exponential decay. A
block's probe is the ridge regression from the tokens of both its input and its output to the (soft) one-hot targets,

    W_b = (Cov_b + r diag(Cov_b))^-1 Cov(t, y)_b,        f_b(t) = mean y + (t - mean t) W_b,

solved anew every few steps. The penalty is relative to each channel's own variance, so that the scale of features, which
grows through the residual stream, and single channels of huge variance play no part.

How f becomes a probability. A regression on one-hot targets estimates p(c | t), not a logit; its values may even be negative.
To the first order in what a token says, log p_c = log pi_c + (f_c - pi_c) / pi_c with the prior pi, so

    logit_c = log pi_c + a C (f_c - mean y_c),        a >= 0 fitted,

which for balanced classes is that expansion at a = 1. (With 1 / pi_c itself in the place of C the noise of rare classes would
be multiplied.) At a = 0 it is the prior: a probe that has learnt nothing scores the entropy of the labels and no block has a
benefit. The cross-entropy is convex in the single number a, which is fitted by a damped Newton step per observation, one
number for a block's input and output as for all of its probe. Every batch is scored before it goes into the moments and
before a moves, so the scores are on samples that the probe has not learnt from.

Costs: about 2 S D (D + C) P K multiply-accumulates a step, P K D (D + C) numbers of state: linear in the number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from p3b.core.finite import all_finite
from p3b.errors import TrainingError
from p3b.scoring.estimator import Criterion, read_tokens
from p3b.scoring.meter import Reduce, average, is_alone
from p3b.vit.layout import ModelLayout

DECAY = 0.98
"""Weight of what was before a step: the moments reach back about 50 steps, over which features move little."""
PENALTY = 0.03
"""r, the penalty as a share of each channel's variance."""
SOLVE_EVERY = 8
"""Steps between two solutions."""
LEAST_PRIOR = 0.01
"""Share of the prior that is spread evenly, so that a class not seen of late stays possible."""
LEARNING = 0.25
"""Share of a Newton step that the factor a takes at each observation: a batch tells its best place with noise."""


@dataclass(frozen=True)
class _Seen:
    """What a step keeps of a micro-batch: its tokens (2, B + 1, S, D), targets (S, C), and derivatives by the factors."""

    tokens: Tensor
    targets: Tensor
    slope: Tensor
    curvature: Tensor


class RidgeProbes:
    """Behind the `BenefitEstimator` protocol.

    Args:
        layout: of the model whose features are read.
        reduce: mean of a tensor over all ranks; the identity in a single process.
        device: of the features.
    """

    every = 1

    def __init__(self, layout: ModelLayout, reduce: Reduce, device: torch.device) -> None:
        self._layout, self._reduce = layout, reduce
        self._blocks, self._classes, width = len(layout.blocks), layout.num_classes, layout.width
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        places, blocks = (2, self._blocks + 1), (2, self._blocks)
        self._state: dict[str, Tensor] = {
            "steps": torch.zeros((), **wide),  # finite ones, decayed: the moments are sums to be divided by this
            "square": torch.zeros(*places, width, width, **wide),
            "cross": torch.zeros(*places, width, self._classes, **wide),
            "token": torch.zeros(*places, width, **wide),
            "target": torch.zeros(self._classes, **wide),
            "factor": torch.zeros(*blocks, **wide),
            "weight": torch.zeros(*blocks, width, self._classes, dtype=torch.float32, device=device),
            "offset": torch.zeros(*blocks, self._classes, dtype=torch.float32, device=device),
            "prior": torch.full((self._classes,), 1 / self._classes, dtype=torch.float32, device=device),
        }
        self._steps_done = 0
        self._pending: list[_Seen] = []  # the micro-batches of the step
        self._alone: bool | None = None

    def due(self) -> bool:
        return True

    @torch.no_grad()
    def observe(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(stream_SND[0].device.type, enabled=False):
            tokens_KPSD = torch.stack([torch.stack(read_tokens(x_SND, self._layout)).float() for x_SND in stream_SND], dim=1)
            y_SC = _distributions(targets, self._classes)
            benefits_2B, slope, curvature = self._score(tokens_KPSD, criterion, targets)
            self._pending.append(_Seen(tokens_KPSD, y_SC, slope, curvature))
        return benefits_2B, stream_SND[0].new_zeros(())

    def train(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        if self._pending:
            self._take_in(gradients_finite)
            self._pending = []
        if self._steps_done % SOLVE_EVERY == 0:
            self._solve()
        self._steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"ridge": {name: tensor.clone() for name, tensor in self._state.items()}, "ridge_steps": self._steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = state["ridge"]
        if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in self._state.items()}:
            raise ValueError("the ridge probes have other shapes")
        self._state = {name: found[name].to(tensor) for name, tensor in self._state.items()}
        self._steps_done = int(state["ridge_steps"])

    def _score(self, tokens_KPSD: Tensor, criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(2, B) benefits; first and second derivative of the probes' losses, on input and output together, by their factors.

        Block by block, so that no more than one block's logits are there at a time.
        """
        benefits, slopes, curvatures = [], [], []
        log_prior_C = self._state["prior"].log()
        for kind in range(2):
            for b in range(self._blocks):
                weight_DC, offset_C = self._state["weight"][kind, b], self._state["offset"][kind, b]
                pair_2SD = tokens_KPSD[kind, b : b + 2]
                signals = [self._classes * torch.addmm(offset_C, token_SD, weight_DC) for token_SD in pair_2SD]
                with torch.enable_grad():
                    factor = self._state["factor"][kind, b].float().requires_grad_()
                    logits = [log_prior_C + factor * signal_SC for signal_SC in signals]
                    before, after = (criterion(each_SC, targets) for each_SC in logits)
                    (slope,) = torch.autograd.grad(before + after, factor)
                curvature = sum(
                    _variance(each_SC.detach().softmax(1), s_SC) for each_SC, s_SC in zip(logits, signals, strict=True)
                )
                benefits.append((before - after).detach())
                slopes.append(slope.double())
                curvatures.append(torch.as_tensor(curvature).double())
        return tuple(torch.stack(each).view(2, -1) for each in (benefits, slopes, curvatures))  # type: ignore[return-value]

    def _take_in(self, gradients_finite: Tensor) -> None:
        """Add a step's moments, and move the factors; the same on all ranks."""
        state = self._state
        found = {
            "token": torch.stack([seen.tokens.double().mean(2) for seen in self._pending]).mean(0),
            "target": torch.stack([seen.targets.double().mean(0) for seen in self._pending]).mean(0),
            "slope": torch.stack([seen.slope for seen in self._pending]).mean(0),
            "curvature": torch.stack([seen.curvature for seen in self._pending]).mean(0),
        }
        if self._alone is None:
            self._alone = is_alone(self._reduce, found["slope"])
        if not self._alone:
            found |= {name: torch.empty_like(state[name]) for name in ("square", "cross")}
            self._add_products(found, keep=0.0)
            average(self._reduce, found.values())
        if not gradients_finite & all_finite([found["token"], found["slope"]]):
            return
        if self._alone:  # right into the state: with many classes a second copy of the products would cost more than they do
            self._add_products(state, keep=DECAY)
        for name in found.keys() & {"square", "cross", "token", "target"}:
            state[name].mul_(DECAY).add_(found[name])
        state["steps"] = DECAY * state["steps"] + 1
        step = LEARNING * found["slope"] / (found["curvature"] + 1e-12)
        bound = LEARNING * (1 + state["factor"])  # where the curvature vanishes Newton's step says nothing
        state["factor"] = (state["factor"] - step.clamp(min=-bound, max=bound)).clamp(min=0)

    def _add_products(self, into: Mapping[str, Tensor], keep: float) -> None:
        """Put keep x what is there + the mean products of the step's samples into "square" and "cross"."""
        square, cross = into["square"].flatten(0, 1), into["cross"].flatten(0, 2)
        for seen in self._pending:
            wide = seen.tokens.double().flatten(0, 1)
            evenly = wide.mT / (wide.shape[1] * len(self._pending))
            square.baddbmm_(evenly, wide, beta=keep)
            cross.addmm_(evenly.flatten(0, 1), seen.targets.double(), beta=keep)
            keep = 1.0

    def _solve(self) -> None:
        """New probes from the moments of now; a system that cannot be solved leaves its probe as it was."""
        state = self._state
        steps = state["steps"].clamp(min=1e-12)
        target_C = state["target"] / steps
        state["prior"] = ((target_C + LEAST_PRIOR / self._classes) / (1 + LEAST_PRIOR)).float()
        for kind in range(2):
            for b in range(self._blocks):
                ends = slice(b, b + 2)
                mean_D = state["token"][kind, ends].sum(0) / (2 * steps)
                covariance_DD = state["square"][kind, ends].sum(0) / (2 * steps) - torch.outer(mean_D, mean_D)
                cross_DC = state["cross"][kind, ends].sum(0) / (2 * steps) - torch.outer(mean_D, target_C)
                # Channels in units of their own deviation; one that moves by no more than rounding is left out.
                variance_D, size_D = covariance_DD.diagonal(), covariance_DD.diagonal() + mean_D.square()
                unit_D = torch.where(variance_D > 1e-10 * size_D, variance_D, torch.inf).rsqrt()
                correlation_DD = covariance_DD * unit_D * unit_D[:, None]
                correlation_DD.diagonal().add_(PENALTY)
                factor_DD, failed = torch.linalg.cholesky_ex(correlation_DD)
                weight_DC = unit_D[:, None] * torch.cholesky_solve(unit_D[:, None] * cross_DC, factor_DD)
                solved = (failed == 0) & weight_DC.isfinite().all()
                offset_C = -(mean_D @ weight_DC)
                for name, found in (("weight", weight_DC), ("offset", offset_C)):
                    state[name][kind, b] = torch.where(solved, found.float(), state[name][kind, b])


def _distributions(targets: Tensor, classes: int) -> Tensor:
    """(S, C) float32: hard targets as one-hot rows, soft ones as they are."""
    if targets.ndim == 1 and not targets.is_floating_point():
        return F.one_hot(targets.long(), classes).float()
    if targets.ndim == 2 and targets.shape[1] == classes:
        return targets.float()
    raise TrainingError(
        f"The ridge estimator needs targets of shape (S,) with class numbers or (S, {classes}) with shares, got "
        f"{tuple(targets.shape)} of {targets.dtype}. Choose another estimator (--prune-benefit linear)."
    )


def _variance(p_SC: Tensor, signal_SC: Tensor) -> Tensor:
    """Mean over samples of the variance of a signal under each sample's distribution over classes."""
    mean_S = (p_SC * signal_SC).sum(1)
    return ((p_SC * signal_SC.square()).sum(1) - mean_S.square()).clamp(min=0).mean()
