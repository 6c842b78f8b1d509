"""Laws of whole networks: shrinking, costs, and a decision from benefits to a small network."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import p3b
from laws.law import SEEDS, Law, demand, lists
from laws.masks import step_around
from p3b.core.masks import GATE_FACTORS, block_masks, hard_masks, order_elements
from p3b.errors import TrainingError
from p3b.methods.block_benefit import BlockBenefit
from p3b.scoring.meter import IntervalMeter
from p3b.vit.active import ActiveWidths
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import block_params, dense_params, prefix_cost
from p3b.vit.gates import Gates
from p3b.vit.layout import ModelLayout, read_layout
from tiny import DISTILLED, tiny_vit


@dataclass(frozen=True)
class Shape:
    """A tiny network; its arguments are those of timm."""

    depth: int
    heads: int
    head_width: int
    hidden: int
    classes: int
    seed: int
    more: dict[str, Any]

    def build(self) -> torch.nn.Module:
        width = self.heads * self.head_width
        return tiny_vit(
            **{
                "seed": self.seed,
                "dtype": torch.float64,
                "img_size": 16,
                "depth": self.depth,
                "embed_dim": width,
                "num_heads": self.heads,
                "mlp_ratio": self.hidden / width,
                "num_classes": self.classes,
                **self.more,
            }
        )


@st.composite
def _shapes(draw: st.DrawFn) -> Shape:
    heads, head_width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    more = {
        "init_values": draw(st.sampled_from([None, 0.1])),
        "qkv_bias": draw(st.booleans()),
        "proj_bias": draw(st.booleans()),
        "reg_tokens": draw(st.integers(0, 2)),
        "act_layer": draw(st.sampled_from(["gelu", "relu", "sigmoid"])),
    }
    kind = draw(st.sampled_from(["class token", "mean of the patches", "no class token", "distilled"]))
    more |= {
        "class token": {},
        "mean of the patches": {"global_pool": "avg"},
        "no class token": {"class_token": False, "global_pool": "avg"},
        "distilled": {"name": DISTILLED, "reg_tokens": 0},
    }[kind]
    return Shape(
        depth=draw(st.integers(1, 3)),
        heads=heads,
        head_width=head_width,
        hidden=draw(st.integers(1, 4 * heads * head_width)),
        classes=draw(st.integers(1, 6)),
        seed=draw(SEEDS),
        more=more,
    )


KEPT = {"nothing": 0.0, "one": 0.0, "few": 0.2, "half": 0.5, "most": 0.9, "everything": 1.1}
"""What a gate keeps, and about which share of its elements that is."""


@dataclass(frozen=True)
class Cut:
    """A network and what each of its gates keeps, in their order."""

    shape: Shape
    kept: list[str]
    seed: int

    def masks(self, layout: ModelLayout) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        masks = {}
        for (gate, size), kept in zip(layout.gates.items(), self.kept, strict=True):
            masks[gate] = (torch.rand(size, generator=generator) < KEPT[kept]).float()
            if kept == "one":
                masks[gate][int(torch.randint(size, (), generator=generator))] = 1.0
        return masks


@st.composite
def _cuts(draw: st.DrawFn, gates_of_block: int = 6, gates_beside: int = 0) -> Cut:
    shape = draw(_shapes())
    gates = gates_of_block * shape.depth + gates_beside
    return Cut(shape, draw(st.lists(st.sampled_from(sorted(KEPT)), min_size=gates, max_size=gates)), draw(SEEDS))


def _cut_as_planned(model: torch.nn.Module, layout: ModelLayout, masks: dict[str, Tensor], seed: int) -> Tensor:
    """Make a model small and demand that its parameters are those planned; images to compare its answers on."""
    plan = plan_cuts(layout, masks)
    apply_cuts(model, plan)
    counted = sum(parameter.numel() for parameter in model.parameters())
    demand(counted == plan.params, f"{counted} parameters, planned were {plan.params}")
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _small_is_the_masked_one(given: Cut) -> None:
    dense = given.shape.build()
    layout = read_layout(dense)
    masks = given.masks(layout)
    masked, small = deepcopy(dense), deepcopy(dense)
    gates = Gates(layout, masked)
    gates.attach(masked)
    gates.set(masks)
    images = _cut_as_planned(small, layout, masks, given.seed)
    with torch.no_grad():
        answer, expected = small(images), masked(images)
    miss = float((answer - expected).abs().max())
    demand(miss <= 1e-10, f"the small network's answers differ from the masked one's by {miss}")

    with tempfile.TemporaryDirectory() as folder:
        loaded = p3b.load(p3b.save(small, Path(folder)))
    state, again = small.state_dict(), loaded.state_dict()
    demand(state.keys() == again.keys(), "other tensors after saving and loading")
    demand(all(torch.equal(state[key], again[key]) for key in state), "other values after saving and loading")
    with torch.no_grad():
        demand(torch.equal(loaded(images), answer), "other answers after saving and loading")


def _narrow_small_is_the_masked_one(given: Cut) -> None:
    """The same with the dimensions of a narrower stream; and what is closed need not be computed."""
    dense = given.shape.build()
    layout = read_layout(dense, ("heads", "head", "hidden", STREAM))
    masks = given.masks(layout)
    if not masks[STREAM].any():
        masks[STREAM][given.seed % layout.width] = 1.0
    masked, active, small = deepcopy(dense), deepcopy(dense), deepcopy(dense)
    for model in (masked, active):
        gates = Gates(layout, model)
        if model is active:
            gates.active = ActiveWidths(layout, model)
        gates.attach(model)
        gates.set(masks)
        if gates.active is not None:
            gates.active.set(masks)
    images = _cut_as_planned(small, layout, masks, given.seed)
    with torch.no_grad():
        expected, answers = masked(images), {"small": small(images), "active": active(images)}
    for name, answer in answers.items():
        miss = float((answer - expected).abs().max())
        demand(miss <= 1e-10, f"the {name} network's answers differ from the masked one's by {miss}")


@dataclass(frozen=True)
class Case:
    """A network, and everything that masks are decided from."""

    shape: Shape
    benefits: list[list[float]]
    share: float
    blocks_only: bool
    levels: int
    seed: int
    progress: float
    tau: float

    def scores(self, layout: ModelLayout) -> dict[str, Tensor]:
        """Scores of every gate; with few levels most are ties, with none all are 0."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            block.gate(dim): (torch.rand(size, generator=generator) * self.levels).floor()
            for block in layout.blocks
            for dim, size in block.dims.items()
        }


@st.composite
def _decisions(draw: st.DrawFn) -> Case:
    shape = draw(_shapes())
    number = st.one_of(
        st.sampled_from([0.0, 1.0, -50.0]),
        st.floats(-1, 1, width=32),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
    )
    return Case(
        shape=shape,
        benefits=[draw(lists(number, 2 * shape.depth)) for _ in range(2)],
        share=draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))),
        blocks_only=draw(st.booleans()),
        levels=draw(st.sampled_from([0, 3, 10**6])),
        seed=draw(SEEDS),
        progress=draw(st.one_of(st.just(1.0), st.floats(0, 1))),
        tau=draw(st.floats(0, 0.1)),
    )


def _prefixes_never_rise(given: Case) -> None:
    """Elements go one at a time, and no parameter comes back."""
    layout = read_layout(given.shape.build())
    scores = given.scores(layout)
    for block in layout.blocks:
        order = order_elements([scores[block.gate(dim)] for dim in block.dims], [GATE_FACTORS[dim] for dim in block.dims])
        demand(order.kept[0].tolist() == list(block.dims.values()), f"{block.name} begins with {order.kept[0].tolist()}")
        demand((order.kept[:-1] - order.kept[1:]).sum(-1).eq(1).all(), f"{block.name}: not one element at a time")
        demand((order.kept.diff(dim=0) <= 0).all(), f"{block.name}: an element comes back")
        remaining = prefix_cost(block)(order.kept)
        demand((remaining.diff() <= 0).all(), f"{block.name}: the cost rises: {remaining.tolist()}")
        demand(
            remaining[0] == dense_params(block) and remaining[-1] == 0, f"{block.name}: from {remaining[0]} to {remaining[-1]}"
        )
        count = given.seed % len(remaining)
        masks = dict(zip(map(block.gate, block.dims), block_masks(order, count, given.tau), strict=True))
        kept = {dim: (masks[block.gate(dim)] >= 0.5).sum() for dim in block.dims}
        demand(torch.stack(list(kept.values())).equal(order.kept[count]), f"{block.name}: the masks keep {kept}")
        demand(block_params(block, kept) == remaining[count], f"{block.name}: the masks leave {block_params(block, kept)}")


def _decision_meets_the_budget(given: Case) -> None:
    """The real method, with measurements put in: budget -> benefits -> ratios -> shares -> masks -> small network."""
    model = given.shape.build()
    layout = read_layout(model)
    params = [dense_params(block) for block in layout.blocks]
    other = 0 if given.blocks_only else layout.other_params
    prune_ratio = min(given.share, 0.999) * sum(params) / (sum(params) + other)
    scores, method = (
        given.scores(layout),
        BlockBenefit(model, layout, prune_ratio, lambda tensor: tensor, blocks_only=given.blocks_only),
    )
    method.detach()
    meter = IntervalMeter()
    for name, values in {"scores": torch.cat(list(scores.values())), "benefits": torch.tensor(given.benefits)}.items():
        meter.add(name, values, torch.tensor(True))
    method.load_state_dict({**method.state_dict(), "meter": meter.state_dict()})
    kept_now = dict(zip((block.name for block in layout.blocks), params, strict=True))
    if not torch.cat(list(scores.values())).any():
        try:
            method.renew(kept_now, given.progress, given.tau)
        except TrainingError:
            return
        demand(False, "scores that are all zero rank nothing, and were not refused")
    decision = method.renew(kept_now, given.progress, given.tau)

    missed, largest = 0.0, 0.0
    for block, decided in zip(layout.blocks, decision.blocks, strict=True):
        order = order_elements([scores[block.gate(dim)] for dim in block.dims], [GATE_FACTORS[dim] for dim in block.dims])
        remaining, share = prefix_cost(block)(order.kept).tolist(), decided.keep_ratio * decided.params
        count = int(sum(int((decision.masks[block.gate(dim)] < 0.5).sum()) for dim in block.dims))
        demand(remaining[count] == decided.kept_params, f"{block.name}: {decided.kept_params} said, {remaining[count]} kept")
        largest = max(largest, step_around(remaining, count, share))
        missed += decided.kept_params - share
    demand(abs(missed) <= largest / 2 + 1e-6, f"all blocks together miss their shares by {missed}, an element has {largest}")

    plan = plan_cuts(layout, hard_masks(decision.masks))
    small = p3b.count_parameters(apply_cuts(model, plan))
    demand(small == plan.params, f"{small} parameters, planned were {plan.params}")
    blocks_left = small - layout.other_params
    goal = (1 - prune_ratio) * (sum(params) + other) - other
    budget = sum(params) - (sum(params) - goal) * given.progress
    demand(abs(blocks_left - budget) <= largest / 2 + 1e-6, f"{blocks_left} parameters in blocks, the budget is {budget}")


LAWS = (
    Law("what remains of a block never rises as elements go", 300, _decisions(), _prefixes_never_rise),
    Law("the small network is the masked one, also saved and loaded", 1200, _cuts(), _small_is_the_masked_one),
    Law(
        "so it is where the stream narrows and heads go, and closed elements need not be computed",
        400,
        _cuts(gates_of_block=3, gates_beside=1),
        _narrow_small_is_the_masked_one,
    ),
    Law("a whole decision meets the budget within half an element", 600, _decisions(), _decision_meets_the_budget),
)
