"""What a pruning method offers to the training loop, whichever it is, and what methods have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p3b.core.allocation import block_budget
from p3b.core.masks import (
    GATE_FACTORS,
    Heads,
    align_counts,
    block_masks,
    gate_masks,
    order_elements,
    shares_to_counts,
    soft_mask,
    spend_rest,
    take_turns,
)
from p3b.core.schedule import Schedule, applied_keep_ratio
from p3b.errors import ConfigError, TrainingError
from p3b.scoring.scores import ElementScores
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.cost import dense_params, kept_params, prefix_cost
from p3b.vit.gates import Gates
from p3b.vit.layout import BlockLayout, ModelLayout, alike
from p3b.vit.narrow_stream import NarrowStream

Criterion = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class BlockDecision:
    """What was decided for one block, and why; one entry of a line in blocks.jsonl. None where a method does not measure it."""

    name: str
    kind: str
    benefit_cls: float | None
    benefit_patch: float | None
    importance: float | None
    keep_ratio_goal: float
    keep_ratio: float
    kept_params: int
    params: int
    pruned: int = 0
    """Elements (channels, heads) whose mask is now below 0.5, over all gates of the block; the pruner counts them."""
    returned: int = 0
    """Those whose mask was below 0.5 until now and is not any more."""


@dataclass(frozen=True)
class Decision:
    """New masks for all gates, by gate name, and what they mean block by block."""

    masks: Mapping[str, Tensor]
    blocks: tuple[BlockDecision, ...]
    progress: float
    tau: float
    note: str | None = None
    """What the user is to know of it, in a sentence."""
    left_out: float | None = None
    """Where only active elements are computed from now on: the largest relative difference of an image's logits to those of the
    model at full width, on a few images of the last batch."""
    computed: float | None = None
    """Share of all elements that are computed from now on; None where all are, always."""


class Method(Protocol):
    """A pruning method. `Pruner` calls it; the loop never sees it.

    At the beginning `attach`. In every forward pass `loss`; after the last backward of an optimizer step `collect` (or
    `discard`, in the warm-up) and `train_own`; at a mask update `renew`; at the end `last`.

    What builds a method takes these, and options of its own by keyword:

    Args:
        model: dense model that is measured.
        layout: its map.
        prune_ratio: rho, share of parameters that goes, in [0, 1).
        reduce: mean of a tensor over all ranks.
        blocks_only: count the budget over the blocks alone (P_rest = 0).

    Raises:
        BudgetError: a prune ratio that cannot be met.
    """

    @property
    def needs_gradients(self) -> bool:
        """Whether elements are scored by gradients, so that those of frozen weights have to be found by their gates."""
        ...

    @property
    def probes(self) -> bool:
        """Whether it measures by probes, which have to learn before what they say counts."""
        ...

    def attach(self, gates: Gates, schedule: Schedule) -> None:
        """Take note of the gates that the masks act through and of the phases; a method that learns masks needs both."""
        ...

    def loss(self, criterion: Criterion, targets: Any) -> Tensor:
        """What the method adds to the training loss of the forward pass just done: a scalar, 0 where it adds nothing."""
        ...

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take in what the step measured; a step whose gradients are not finite (0-dim bool) counts for nothing."""
        ...

    def discard(self) -> None:
        """Forget what the step measured."""
        ...

    def train_own(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        """One optimizer step of the method's own parameters, where it has any; none where a gradient is not finite."""
        ...

    def renew(self, kept_params: Mapping[str, int], progress: float, tau: float) -> Decision:
        """Close the interval and decide.

        Args:
            kept_params: what each block keeps now, by block name.
            progress, tau: from the schedule.
        """
        ...

    def last(self, kept_params: Mapping[str, int]) -> Decision:
        """The hard masks that the model is shrunk by."""
        ...

    def detach(self) -> None:
        """Take off everything that was attached to the model; a part trained to replace one of its own takes its place."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


Decide = Callable[[Tensor, float, float, bool], Decision]
"""From (N,) scores of all elements, progress, tau and whether these masks are the last to new masks."""


class ScoreMethod:
    """The `Method` that measures nothing but a score for each element: no probe, no loss and no parameter of its own.

    Args:
        name: of the method; a state of another one is refused.
        model: on whose device the loss is 0.
        scores: what elements are ranked by.
        decide: what the ranking comes to.
    """

    def __init__(self, name: str, model: nn.Module, scores: ElementScores, decide: Decide) -> None:
        self._name, self._model, self._scores, self._decide = name, model, scores, decide

    probes = False

    @property
    def needs_gradients(self) -> bool:
        return self._scores.needs_gradients

    def attach(self, gates: Gates, schedule: Schedule) -> None:
        self._scores.attach(gates)

    def loss(self, criterion: Criterion, targets: Any) -> Tensor:
        return torch.zeros((), device=next(self._model.parameters()).device)

    def collect(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
        self._scores.collect(gradients_finite, scaler)

    def discard(self) -> None:
        pass

    def train_own(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        pass

    def renew(self, kept_params: Mapping[str, int], progress: float, tau: float) -> Decision:
        self._scores.close()
        return self._decide(_measured(self._scores.of_interval()), progress, tau, False)

    def last(self, kept_params: Mapping[str, int]) -> Decision:
        self._scores.close()
        return self._decide(_measured(self._scores.of_last_two()), 1.0, 0.0, True)

    def detach(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"name": self._name, "scores": self._scores.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError, KeyError: it belongs to another method or model.
        """
        if state["name"] != self._name:
            raise ValueError(f"it is a state of {state['name']}, this is {self._name}")
        self._scores.load_state_dict(state["scores"])


class BlockShares:
    """From the share that each block may keep to its masks, for all methods that share the budget out among blocks.

    Within a block the elements of all gates are ranked together and the lowest go until the block meets its share.

    Args:
        blocks: B blocks.
        align: with more than 1 every gate keeps a multiple of it in the last masks. Heads, where they are prunable, then take
            no part in the ranking: they go whole, in the last masks alone, where they would be too thin (`align_counts`).
        spared: numbers of blocks that give up nothing; the rounding of the others is not made good by them.
        stream: the residual stream where it is narrowed; keep ratios are then shares of what a block has at its width.

    Attributes:
        params: (B,) float64, P_b.
        params_at_goal: (B,) float64, what blocks have where the stream is as narrow as it gets; P_b where it is not narrowed.
    """

    def __init__(
        self,
        blocks: Sequence[BlockLayout],
        align: int = 1,
        spared: Collection[int] = (),
        stream: NarrowStream | None = None,
    ) -> None:
        self._blocks, self._align, self._stream = blocks, align, stream
        self._pruned = [b for b in range(len(blocks)) if b not in spared]
        self.params = torch.tensor([dense_params(block) for block in blocks], dtype=torch.float64)
        self.params_at_goal = self.params if stream is None else stream.params(stream.goal)
        apart = ("heads",) if align > 1 else ()
        self._ranked = [tuple(dim for dim in block.dims if dim not in apart) for block in blocks]
        """Dimensions of each block that are ranked together."""
        self._heads = [
            Heads(dims.index("head"), block.heads) if len(dims) < len(block.dims) else None
            for block, dims in zip(blocks, self._ranked, strict=True)
        ]
        """Heads of each block that can go whole in the last masks."""
        self._alike = alike(blocks)
        self._width: int | None = None
        """Channels of the stream that `_remaining` is for; None where it is not narrowed."""
        self._remaining = self._left_after()
        self._there = self.params
        """(B,) float64: what blocks have at this width."""

    def decide(
        self,
        goals: Sequence[float],
        scores: Mapping[str, Tensor],
        progress: float,
        tau: float,
        benefits_2B: Tensor | None = None,
        importance_B: Tensor | None = None,
        *,
        last: bool = False,
    ) -> Decision:
        """Goals -> applied ratios -> counts -> masks.

        Args:
            goals: k_b in [0, 1] for each block, of `params_at_goal`.
            scores: by gate name, on the CPU; only their order within a gate counts.
            progress, tau: from the schedule.
            benefits_2B, importance_B: what the goals come from, where that was measured; it is passed on.
            last: the masks that the model is shrunk by: where counts are to be aligned they are, and the masks are hard.
        """
        if self._stream is not None:
            self._narrow_to(self._stream.width(progress))
        applied = [applied_keep_ratio(goal, progress) for goal in goals]
        shares = [ratio * params for ratio, params in zip(applied, self._there.tolist(), strict=True)]
        counts = [0] * len(shares)
        found = shares_to_counts([self._remaining[b] for b in self._pruned], [shares[b] for b in self._pruned])
        for b, count in zip(self._pruned, found, strict=True):
            counts[b] = count
        if last and self._align > 1:
            masks, kept_params = self._aligned_masks(scores, counts, sum(shares))
        else:
            masks = self._masks(scores, counts, tau)
            kept_params = [int(left[count]) for left, count in zip(self._remaining, counts, strict=True)]
        if self._stream is not None:
            masks[STREAM] = self._stream.mask(scores[STREAM], progress, 0.0 if last else tau)
        of_dense = (self.params_at_goal / self.params).tolist(), (self._there / self.params).tolist()
        decisions = [
            BlockDecision(
                name=block.name,
                kind=block.kind,
                benefit_cls=None if benefits_2B is None else float(benefits_2B[0, b]),
                benefit_patch=None if benefits_2B is None else float(benefits_2B[1, b]),
                importance=None if importance_B is None else float(importance_B[b]),
                keep_ratio_goal=goals[b] * of_dense[0][b],
                keep_ratio=applied[b] * of_dense[1][b],
                kept_params=kept_params[b],
                params=int(self.params[b]),
            )
            for b, block in enumerate(self._blocks)
        ]
        return Decision(masks, tuple(decisions), progress, tau)

    def _narrow_to(self, width: int) -> None:
        """Count what blocks have at so many channels of the stream."""
        assert self._stream is not None
        if width != self._width:
            self._width, self._there = width, self._stream.params(width)
            self._remaining = self._left_after()

    def _masks(self, scores: Mapping[str, Tensor], counts: Sequence[int], tau: float) -> dict[str, Tensor]:
        """Masks of all gates, in the order of `scores`, ones where a gate is not ranked; blocks of one shape together."""
        found: dict[str, Tensor] = {}
        for group in self._alike:
            dims = self._ranked[group[0]]
            together = [torch.stack([scores[self._blocks[b].gate(dim)] for b in group]) for dim in dims]
            order = order_elements(together, _factors(dims))
            to_go = torch.tensor([counts[b] for b in group])[:, None]
            for dim, masks in zip(dims, block_masks(order, to_go, tau), strict=True):
                found |= zip((self._blocks[b].gate(dim) for b in group), masks, strict=True)
        return {gate: found[gate] if gate in found else torch.ones(len(each)) for gate, each in scores.items()}

    def _aligned_masks(
        self, scores: Mapping[str, Tensor], counts: Sequence[int], budget: float
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Hard masks of all gates with aligned counts, and the parameters that each block keeps, of a budget of all of them."""
        blocks = list(zip(self._blocks, self._ranked, self._heads, strict=True))
        orders = [order_elements([scores[block.gate(dim)] for dim in dims], _factors(dims)) for block, dims, _ in blocks]
        costs = [prefix_cost(block, dims if heads is None else (*dims, "heads"), self._width) for block, dims, heads in blocks]
        kept = align_counts(orders, costs, counts, self._align, self._heads)
        if self._stream is not None:  # gates are few and wide then, so that multiples alone would miss the budget
            rest = budget - sum(float(cost(torch.tensor(each))) for cost, each in zip(costs, kept, strict=True))
            hidden = [dims.index("hidden") if "hidden" in dims else None for _, dims, _ in blocks]
            kept = spend_rest(kept, costs, hidden, [order.sizes for order in orders], rest)
        found: dict[str, Tensor] = {}
        for (block, dims, heads), order, each in zip(blocks, orders, kept, strict=True):
            found |= zip((block.gate(dim) for dim in dims), gate_masks(order, each[: len(dims)]), strict=True)
            if heads is not None:
                gate = block.gate("heads")
                found[gate] = soft_mask(scores[gate], heads.count - each[-1] + 0.5, tau=0.0)
        kept_params = [int(cost(torch.tensor(each))) for cost, each in zip(costs, kept, strict=True)]
        return {gate: found[gate] for gate in scores if gate != STREAM}, kept_params

    def _left_after(self) -> list[Tensor]:
        """Parameters that each block has left after t of its ranked elements are gone, t = 0..n: (n + 1,) float64, exact."""
        found: dict[int, Tensor] = {}
        for group in self._alike:
            shape, dims = self._blocks[group[0]], self._ranked[group[0]]
            kept = take_turns(tuple(shape.dims[dim] for dim in dims), _factors(dims)).kept
            found |= dict.fromkeys(group, prefix_cost(shape, dims, self._width)(kept).double())
        return [found[b] for b in range(len(self._blocks))]


def decisions_by_kept(
    layout: ModelLayout, masks: Mapping[str, Tensor], goal: Mapping[str, Tensor] | None = None
) -> tuple[BlockDecision, ...]:
    """What masks come to, block by block, for methods that measure no benefit.

    Args:
        layout: of the model.
        masks: that were decided, by gate name.
        goal: masks at the end of the schedule as they are foreseen now; those decided where nothing else is foreseen.
    """
    kept = kept_params(layout, masks)
    kept_at_goal = kept if goal is None else kept_params(layout, goal)
    return tuple(
        BlockDecision(
            name=block.name,
            kind=block.kind,
            benefit_cls=None,
            benefit_patch=None,
            importance=None,
            keep_ratio_goal=kept_at_goal[block.name] / dense_params(block),
            keep_ratio=kept[block.name] / dense_params(block),
            kept_params=kept[block.name],
            params=dense_params(block),
        )
        for block in layout.blocks
    )


def overall_keep_ratio(layout: ModelLayout, prune_ratio: float, blocks_only: bool) -> float:
    """What all blocks together may keep of their parameters, in [0, 1].

    Args:
        layout: of the model.
        prune_ratio: rho, share of parameters that goes, in [0, 1).
        blocks_only: count the budget over the blocks alone (P_rest = 0).

    Raises:
        BudgetError: it cannot be met.
    """
    in_blocks = float(sum(dense_params(block) for block in layout.blocks))
    return block_budget(in_blocks, 0 if blocks_only else layout.other_params, prune_ratio) / in_blocks


def require_align(align: int) -> None:
    """ConfigError where it is no multiple that counts can have."""
    if align < 1:
        raise ConfigError(f"align must lie in [1, inf), got {align}.")


def _measured(scores_N: Tensor | None) -> Tensor:
    if scores_N is None:
        raise TrainingError(
            "Nothing has been measured that masks could be decided from. Call pruner.step() after each backward pass, and let "
            "pruning start before it is due to end."
        )
    return scores_N


def _factors(dims: Sequence[str]) -> tuple[float, ...]:
    return tuple(GATE_FACTORS[dim] for dim in dims)
