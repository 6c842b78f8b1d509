"""Width and depth pruning (WD-Pruning).

Yu, Huang, Wang, Cheng, Chu and Cui, "Width & Depth Pruning for Vision Transformers", AAAI 2022.

Width is learned while the model trains. Every element of a gate has a score and every gate a threshold:

    share_g  = sigmoid(threshold_g),  mask = top share of the scores, gradients passed straight through      core.learned_width
    loss     = task + auxiliary + lambda_1 (R - target) + lambda_2 (R - target)^2    where R > target
    scores, thresholds: descent at 0.0025;  lambda_1, lambda_2: ascent at 10;  both with a cosine to 0 over the pruning

R is the share of the blocks' parameters that the shares let expect, target what the prune ratio leaves of them. Gates begin
with scores of 0 and thresholds of 10, so that all is kept. Masks are renewed after every optimizer step, hard from the start:
progress and softness of the schedule play no part, only its first and last step do.

Depth is cut by classifiers behind chosen blocks, which are trained with the model by the sum of their losses. Where one is
chosen, the blocks behind it go and it takes the place of the model's norm and head; the budget is met by what the cut network
keeps, and the widths of blocks that will go are not learned.

The last decision meets the budget: it takes the learned shares; where they miss it, all thresholds move by one common offset,
found by bisection, and then single gates gain or lose single elements (`core.learned_width.counts_at_budget`).

Departures from the paper and its published code, and what they leave open:

- The gradient of a share, sum(gradient * mask), reaches the threshold through the sigmoid, as the Lagrangian term's does.
- R counts biases, norms and LayerScale too, not matrices alone, so that its target is the budget itself.
- Which optimizers move these is left open. Scores descend by the gradient over its root mean square within the gate: their
  order there is all that counts, late steps count like early ones, and an element without a gradient stays where it is, where
  Adam would make as much of its rounding errors as of another's gradient. Thresholds have Adamax without momentum, with a
  short memory: a step is never longer than the learning rate, so that R does not fall far below its target, where no term
  brings it back; and once the term is gone, the loss's own gradient, which is smaller by orders, moves thresholds again
  after some dozen steps, each gate's its own way. Multipliers climb by plain ascent.
- Pruning phases are often much shorter here than the published runs. A threshold moves by at most one learning rate a step,
  and from 10 it has a way of about 10 to go: in fewer than 24,000 steps the default rate rises so that the sum of all rates
  stays 30, up to 0.5 (`default_lr`). A rate that is given is taken as it is.
- Kept counts are whole numbers without further rounding; `round_to=16` is the published rounding, and the last decision says by
  how much the budget is missed for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor

from p3b.core.finite import all_finite, step_where
from p3b.core.learned_width import WidthCost, counts_at_budget, kept_counts, lagrangian, top_mask, top_share_masks
from p3b.core.schedule import Schedule
from p3b.errors import BudgetError, ConfigError, TrainingError
from p3b.methods.base import Criterion, Decision, decisions_by_kept, overall_keep_ratio
from p3b.scoring.meter import Reduce, average
from p3b.vit.anatomy.weights import dims_of
from p3b.vit.cost import dense_params
from p3b.vit.gates import Gates
from p3b.vit.layout import BlockLayout, ModelLayout
from p3b.vit.tails import MiddleClassifiers

FIRST_THRESHOLD = 10.0
LR, LAMBDA_LR = 0.0025, 10.0
LEAST_PATH, MOST_LR = 30.0, 0.5
FORGETTING = 0.9
"""Of the largest gradient of a threshold so far, at every step."""
TOLERANCE = 5e-4
"""Share of all parameters that the last decision may miss the budget by where the budget lies at an end of what is possible."""


class WDPruning:
    """WD-Pruning behind the `Method` protocol.

    Args:
        model: dense model; its gates' gradients are learned from, and its blocks listened to where there are classifiers.
        layout: its map: every prunable dimension of a block has a gate.
        prune_ratio: rho, share of parameters that goes, in [0, 1).
        reduce: mean of a tensor over all ranks.
        blocks_only: count the budget over the blocks alone (P_rest = 0).
        round_to: gates with so many elements keep a multiple of it in the last masks; 1 is off.
        classifiers: numbers of blocks, counted from 1, that get a classifier; rising, all before the last block.
        classifier_choose: one of these: the network keeps so many blocks; None keeps all.
        classifier_lr: learning rate of the classifiers, not scaled with the batch size; None: 5e-4.
        lr: learning rate of scores and thresholds; None: `default_lr`.
        lambda_lr: rate of ascent of both Lagrange multipliers.

    Raises:
        ConfigError: an option outside its range, or one that would be ignored.
        BudgetError: a prune ratio that cannot be met; with a chosen classifier also one that the cut alone exceeds.
    """

    def __init__(
        self,
        model: VisionTransformer,
        layout: ModelLayout,
        prune_ratio: float,
        reduce: Reduce,
        *,
        blocks_only: bool = False,
        round_to: int = 1,
        classifiers: Sequence[int] | None = None,
        classifier_choose: int | None = None,
        classifier_lr: float | None = None,
        lr: float | None = None,
        lambda_lr: float = LAMBDA_LR,
    ) -> None:
        classifiers, depth = list(classifiers or ()), len({block.depth for block in layout.blocks})
        _check_options(classifiers, classifier_choose, depth, classifier_lr=classifier_lr, lr=lr, lambda_lr=lambda_lr)
        if round_to < 1:
            raise ConfigError(f"round_to must be 1 or more, got {round_to}.")
        self._model, self._layout, self._reduce = model, layout, reduce
        self._lr, self._lambda_lr, self._round_to = lr, lambda_lr, round_to
        self._chosen = classifier_choose
        stays = [block for block in layout.blocks if self._chosen is None or block.depth < self._chosen]
        self._sizes = {block.gate(dim): size for block in stays for dim, size in block.dims.items()}
        self._cost = width_cost(stays)
        self._dense = float(sum(map(dense_params, layout.blocks)))
        self._target = overall_keep_ratio(layout, prune_ratio, blocks_only)
        self._all_params = self._dense + (0 if blocks_only else layout.other_params)
        self._require_possible(prune_ratio)

        self._device = next(model.parameters()).device
        # In float64 elements whose gradients differ in their last digits alone still have an order.
        start = (torch.zeros(sum(self._sizes.values())), torch.full((len(self._sizes),), FIRST_THRESHOLD), torch.zeros(2))
        self._scores_N, self._thresholds_G, self._lambdas = (
            values.to(self._device, torch.float64).requires_grad_() for values in start
        )
        self._threshold_optimizer = torch.optim.Adamax([self._thresholds_G], lr=0.0, betas=(0.0, FORGETTING))
        self._cost_on_device = self._cost.to(self._device)
        self._steps = self._learned_steps = 0
        self._gates: Gates | None = None
        self._schedule: Schedule | None = None
        self._classifiers: MiddleClassifiers | None = None
        if classifiers:
            self._classifiers = MiddleClassifiers(model, classifiers)
            groups = param_groups_weight_decay(self._classifiers.tails, weight_decay=0.05)
            self._classifier_optimizer = torch.optim.AdamW(groups, lr=5e-4 if classifier_lr is None else classifier_lr)

    needs_gradients = False  # it collects those of the gates in any case
    probes = False

    def attach(self, gates: Gates, schedule: Schedule) -> None:
        self._gates, self._schedule = gates, schedule
        self._follow()

    def loss(self, criterion: Criterion, targets: Any) -> Tensor:
        if self._classifiers is None:
            return torch.zeros((), device=self._device)
        logits = self._classifiers.logits()
        if not logits:
            raise TrainingError(
                "No forward pass has been recorded: call model(images), with gradients enabled, before pruner.loss."
            )
        losses = [criterion(each.to(torch.promote_types(each.dtype, torch.float32)), targets) for each in logits]
        return torch.stack(losses).sum()

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        """What a step measures are the gates' gradients: they hold them until `train_own` learns from them."""

    def discard(self) -> None:
        """In the warm-up no gate has a gradient."""

    def train_own(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        scaled = scaler is not None and scaler.is_enabled()
        if self._classifiers is not None:
            # Classifiers are outside the distributed wrapper, since they run after its forward pass.
            gradients = [each.grad for each in self._classifiers.tails.parameters() if each.grad is not None]
            average(self._reduce, gradients)
            if scaler is not None and gradients:
                scaler.unscale_(self._classifier_optimizer)
            step_where(self._classifier_optimizer, gradients_finite & all_finite(gradients))
            self._classifier_optimizer.zero_grad()
        if self._is_learning():
            assert self._gates is not None
            by_gate = self._gates.gradients()
            gradient_N = self._reduce(torch.cat([by_gate[gate] for gate in self._sizes]).double())
            if scaled:
                assert scaler is not None
                gradient_N = gradient_N / scaler.get_scale()
            if gradients_finite & all_finite([gradient_N]):
                self._learn(gradient_N)
        self._steps += 1
        self._follow()

    def renew(self, kept_params: Mapping[str, int], progress: float, tau: float) -> Decision:
        return self._decision(self._shares_counts(), progress, tau)

    def last(self, kept_params: Mapping[str, int]) -> Decision:
        if self._learned_steps == 0:
            raise TrainingError(
                "Nothing has been measured that masks could be decided from. Call pruner.loss(criterion, targets) after each "
                "forward pass and pruner.step() after each backward pass, and let pruning start before it is due to end. If "
                "that was done, no gradient was finite: lower the learning rate, or train in --precision fp32 or bf16."
            )
        notes = []
        if self._chosen is not None:
            notes.append(
                f"the network is cut after block {self._chosen}, whose classifier takes the place of its norm and head"
            )
        counts_G, _ = self._counts_at_budget()
        if self._round_to > 1:
            rounded_G, _ = self._counts_at_budget(self._round_to)
            kept, unrounded = (float(self._cost.params(each)) for each in (rounded_G, counts_G))
            counts_G = rounded_G
            notes.append(
                f"widths in multiples of {self._round_to} keep {kept:,.0f} parameters in the blocks, {unrounded:,.0f} without "
                f"rounding: it costs {100 * (kept - unrounded) / self._all_params:+.2f} percentage points of the budget"
            )
        return self._decision(counts_G, 1.0, 0.0, is_last=True, note="; ".join(notes) or None)

    def detach(self) -> None:
        if self._classifiers is not None:
            self._classifiers.detach()
            if self._chosen is not None:
                self._classifiers.install(self._model, self._chosen)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "name": "wdpruning",
            "saliency": self._scores_N.detach(),
            "thresholds": self._thresholds_G.detach(),
            "lambdas": self._lambdas.detach(),
            "threshold_optimizer": self._threshold_optimizer.state_dict(),
            "steps": self._steps,
            "learned_steps": self._learned_steps,
        }
        if self._classifiers is not None:
            state["classifiers"] = self._classifiers.tails.state_dict()
            state["classifier_optimizer"] = self._classifier_optimizer.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["name"] != "wdpruning":
            raise ValueError(f"it is a state of {state['name']}, this is wdpruning")
        if ("classifiers" in state) != (self._classifiers is not None):
            raise ValueError("it has classifiers where this one has none, or the other way round")
        for mine, key in ((self._scores_N, "saliency"), (self._thresholds_G, "thresholds"), (self._lambdas, "lambdas")):
            if state[key].shape != mine.shape:
                raise ValueError(f"its {key} are {len(state[key])}, here are {len(mine)}")
            mine.copy_(state[key])
        self._threshold_optimizer.load_state_dict(state["threshold_optimizer"])
        self._steps, self._learned_steps = int(state["steps"]), int(state["learned_steps"])
        if self._classifiers is not None:
            self._classifiers.tails.load_state_dict(state["classifiers"])
            self._classifier_optimizer.load_state_dict(state["classifier_optimizer"])
        self._follow()

    @property
    def expected_keep_ratio(self) -> float:
        """R: share of the blocks' parameters that the shares of now let expect."""
        return float(self._remaining(torch.sigmoid(self._thresholds_G)).detach())

    def _learn(self, gradient_N: Tensor) -> None:
        """One step of scores, thresholds and multipliers, from the gradient of the loss with respect to all masks."""
        shares_G = torch.sigmoid(self._thresholds_G)
        masks = top_share_masks(self._by_gate(self._scores_N), shares_G)
        penalty = lagrangian(self._remaining(shares_G), self._target, *self._lambdas)
        torch.autograd.backward([torch.cat(masks), penalty], [gradient_N, None])
        decay = self._decay()
        lr = self._full_lr() * decay
        self._threshold_optimizer.param_groups[0]["lr"] = lr
        self._threshold_optimizer.step()
        assert self._scores_N.grad is not None
        assert self._lambdas.grad is not None
        with torch.no_grad():
            self._scores_N -= lr * torch.cat([of_unit_size(gradient) for gradient in self._by_gate(self._scores_N.grad)])
            self._lambdas += self._lambda_lr * decay * self._lambdas.grad
        for learned in (self._scores_N, self._thresholds_G, self._lambdas):
            learned.grad = None
        self._learned_steps += 1

    def _follow(self) -> None:
        """Let the gates hold the masks of now, and collect gradients for the step to come; in the warm-up let them be."""
        if self._gates is None or not self._is_learning():
            return
        self._gates.collect_gradients()
        self._gates.set(self._masks(self._shares_counts()))

    def _masks(self, counts_G: Tensor, later_blocks: float = 1.0) -> dict[str, Tensor]:
        """Hard masks of all gates; `later_blocks` is the mask of blocks behind the chosen classifier."""
        tops = {
            gate: top_mask(scores, count).float()
            for gate, scores, count in zip(self._sizes, self._by_gate(self._scores_N.detach()), counts_G.tolist(), strict=True)
        }
        return {
            block.gate(dim): tops.get(block.gate(dim), torch.full((size,), later_blocks, device=self._device))
            for block in self._layout.blocks
            for dim, size in block.dims.items()
        }

    def _decision(
        self, counts_G: Tensor, progress: float, tau: float, *, is_last: bool = False, note: str | None = None
    ) -> Decision:
        masks = {gate: mask.cpu() for gate, mask in self._masks(counts_G, 0.0 if is_last else 1.0).items()}
        goal = {gate: mask.cpu() for gate, mask in self._masks(self._counts_at_budget()[0], 0.0).items()}
        return Decision(masks, decisions_by_kept(self._layout, masks, goal), progress, tau, note)

    def _by_gate(self, values_N: Tensor) -> tuple[Tensor, ...]:
        return values_N.split(list(self._sizes.values()))

    def _shares_counts(self) -> Tensor:
        return kept_counts(torch.sigmoid(self._thresholds_G), self._cost.sizes)

    def _counts_at_budget(self, round_to: int = 1) -> tuple[Tensor, float]:
        sizes_G = self._cost.sizes
        multiples_G = torch.where(sizes_G >= round_to, round_to, 1)
        return counts_at_budget(self._cost, self._thresholds_G, self._target * self._dense, multiples_G)

    def _remaining(self, shares_G: Tensor) -> Tensor:
        return self._cost_on_device.expected_params(shares_G) / self._dense

    def _is_learning(self) -> bool:
        """Whether the step to come, or just being ended, lies in the pruning phase."""
        return self._schedule is not None and self._steps >= self._schedule.start

    def _decay(self) -> float:
        assert self._schedule is not None
        done = (self._steps - self._schedule.start) / (self._schedule.final - self._schedule.start)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _full_lr(self) -> float:
        assert self._schedule is not None
        return default_lr(self._schedule.final - self._schedule.start) if self._lr is None else self._lr

    def _require_possible(self, prune_ratio: float) -> None:
        """BudgetError where not even all or one of every gate's elements would meet the budget."""
        budget, tolerance = self._target * self._dense, TOLERANCE * self._all_params
        whole = float(self._cost.params(self._cost.sizes))
        least = float(self._cost.params(torch.ones_like(self._cost.sizes)))
        if budget > whole + tolerance:
            cut = 1 - (self._all_params - self._dense + whole) / self._all_params
            raise BudgetError(
                f"A prune ratio of {prune_ratio:g} cannot be met: cutting the network after block {self._chosen} alone takes "
                f"{cut:.4f} of the parameters. Choose a later block (--wd-classifier-choose) or a higher ratio."
            )
        if budget < least - tolerance:
            largest = math.floor(1e4 * (self._dense - least) / self._all_params) / 1e4
            raise BudgetError(
                f"A prune ratio of {prune_ratio:g} cannot be met: wdpruning keeps one element of every gate, "
                f"{least:,.0f} parameters in the blocks, and {budget:,.0f} may remain there. The largest ratio that can be met "
                f"is {largest:.4f}."
            )


def default_lr(steps: int) -> float:
    """Learning rate of scores and thresholds for a pruning phase of so many steps, at its beginning: 0.0025 as published; in a
    phase too short for it as much as makes the rates of all steps sum to 30, up to 0.5.
    """
    return min(MOST_LR, max(LR, 2 * LEAST_PATH / steps))


def of_unit_size(gradient_n: Tensor) -> Tensor:
    """A gradient over its root mean square; zeros stay zeros."""
    size = gradient_n.square().mean().sqrt()
    return torch.where(size > 0, gradient_n / size, 0.0)


def width_cost(blocks: Sequence[BlockLayout]) -> WidthCost:
    """Parameters of these blocks as a function of what each of their gates keeps, gates in the order of blocks and dimensions.

    Every weight counts with the gates along its axes; weights that have the same gates are one term.
    """
    gates = [block.gate(dim) for block in blocks for dim in block.dims]
    terms: dict[tuple[str, ...], int] = {}
    for block in blocks:
        for weight in block.weights:
            along = tuple(sorted(block.gate(dim) for axis in weight.axes for dim in dims_of(axis)))
            fixed = math.prod(factor for axis in weight.axes for factor in axis if isinstance(factor, int))
            terms[along] = terms.get(along, 0) + fixed
    members_WG = torch.tensor([[gate in along for gate in gates] for along in terms])
    sizes_G = torch.tensor([size for block in blocks for size in block.dims.values()])
    return WidthCost(torch.tensor(list(terms.values()), dtype=torch.float64), members_WG, sizes_G)


def _check_options(classifiers: Sequence[int], chosen: int | None, depth: int, **rates: float | None) -> None:
    for name, rate in rates.items():
        if rate is not None and not rate > 0:
            raise ConfigError(f"{name} must be above 0, got {rate}.")
    if list(classifiers) != sorted(set(classifiers)) or not all(1 <= number < depth for number in classifiers):
        raise ConfigError(
            f"Classifiers after the blocks {' '.join(map(str, classifiers))} (--wd-classifiers) do not fit a model of {depth}; "
            f"expected rising numbers from 1 to {depth - 1}: the last block has the model's own head."
        )
    if chosen is not None and chosen not in classifiers:
        known = " ".join(map(str, classifiers)) or "none (give --wd-classifiers)"
        raise ConfigError(f"There is no classifier after block {chosen} (--wd-classifier-choose); those given are {known}.")
    if rates["classifier_lr"] is not None and not classifiers:
        raise ConfigError("A learning rate of classifiers (--wd-classifier-lr) needs classifiers: give --wd-classifiers.")
