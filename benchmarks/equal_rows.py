"""The rows of the table at equal processor time, and how many epochs each of them gets for the time of dense training.

A row has up to three phases: a warm-up of the whole model, its pruning, and the small model. What a step of each takes is
measured in turns in one process (`equal_costs.py`) and told in dense steps, so that time is counted in epochs of dense
training. The first two phases are the row's own; the small model gets the epochs that fit into the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.records import Line
from p3b.errors import ConfigError
from p3b.methods import own_in_warm_up
from p3b.run.options import AT_ONCE
from p3b.run.series_plan import DENSE, SMALLER

PEER, TEACHER = "torch-pruning", "teacher"
TIME, EPOCHS = "time", "epochs"
"""What rows may have as much of as dense training."""


@dataclass(frozen=True)
class Row:
    """A way to a model of a given size.

    Attributes:
        name: in names of runs and in the record.
        title: in tables.
        method: "dense", "smaller", "torch-pruning", or a method of p3b.
        warm_up, pruning: epochs; together a whole number, unless the model is cut at once.
        settings: of `p3b prune` in which it differs from the others, by name.
        training: settings of training in which it does.
        structure: row whose small model costs the same, where that is another one.
        cost: of a pruning step, where that is the one of another row.
        explores: not a row of the table, but of the questions that decide on the default recipe.
    """

    name: str
    title: str
    method: str
    warm_up: float = 0.0
    pruning: float = 0.0
    settings: tuple[tuple[str, Any], ...] = ()
    training: tuple[tuple[str, Any], ...] = ()
    structure: str | None = None
    cost: str | None = None
    explores: bool = False

    @property
    def prunes(self) -> bool:
        """Whether `p3b prune` carries it out."""
        return self.method not in (DENSE, SMALLER, PEER)

    @property
    def at_once(self) -> bool:
        """Whether the model is cut in one shot when its warm-up ends."""
        return ("prune_schedule", AT_ONCE) in self.settings

    @property
    def trains_quickly(self) -> bool:
        """Whether its small model trains in the quick form."""
        return ("small_form", "quick") in self.training

    @property
    def narrows(self) -> bool:
        """Whether steps get cheaper in the course of pruning."""
        return ("prune_compute", "active") in self.settings

    @property
    def probes_in_warm_up(self) -> bool:
        """Whether a step of the warm-up costs about what one of pruning does, since the method trains something of its own."""
        return self.prunes and bool(own_in_warm_up(self.method, {}))


LINEAR = (("prune_benefit", "linear"),)
LOW_RANK = (("prune_benefit", "low_rank"),)
REMOVAL = (("prune_benefit", "removal"),)
ONCE = (("prune_schedule", AT_ONCE), ("prune_steps_update_mask", None), ("calibration_images", 128))
ACTIVE, COMPENSATED = ("prune_compute", "active"), ("compensate", "on")
ALIGNED = ("align", 8)
NARROW = (ALIGNED, ("prune_stream", "auto"))
QUICK = (("small_form", "quick"),)
EARLY = (*LINEAR, ACTIVE)
explored = partial(Row, method="block_benefit", warm_up=0.25, pruning=0.75, settings=EARLY, explores=True)
"""A row that asks what another setting of P3B would give."""
_SOFT = "p3b-early"

ROWS: Mapping[str, Row] = {
    row.name: row
    for row in (
        Row(DENSE, "dense", DENSE),
        Row(SMALLER, "smaller ViT", SMALLER),
        Row("uniform", "uniform", "uniform", 1, 1),
        Row("magnitude", "magnitude", "magnitude", 1, 1),
        Row("taylor", "taylor", "taylor", 1, 1),
        Row("wdpruning", "WD-Pruning", "wdpruning", 1, 1),
        Row("savit", "SAViT", "savit", 0.8, 0.2, (("savit_every", 2),)),
        Row("p3b-published", "P3B as published", "block_pr", 0.5, 0.5, structure=_SOFT),
        Row(_SOFT, "P3B, small early", "block_benefit", 0.25, 0.75, EARLY),
        Row("p3b-early-stream", "P3B, small early, narrow stream", "block_benefit", 0.25, 0.75, (*EARLY, *NARROW)),
        Row(
            "p3b-removal-stream",
            "P3B by removal, small early, narrow stream",
            "block_benefit",
            0.25,
            0.75,
            (*REMOVAL, ACTIVE, *NARROW),
            structure="p3b-early-stream",
            cost="uniform-early-stream",  # it has no probes either
        ),
        Row("uniform-early-stream", "uniform, small early, narrow stream", "uniform", 0.25, 0.75, (ACTIVE, *NARROW)),
        Row("p3b-once", "P3B at once, narrow stream", "block_benefit", 0.25, 0, (*ONCE, *NARROW), structure="p3b-early-stream"),
        Row(
            "uniform-once",
            "uniform at once, narrow stream",
            "uniform",
            0.25,
            0,
            (*ONCE, *NARROW),
            structure="uniform-early-stream",
        ),
        Row("taylor-once", "taylor at once", "taylor", 0.25, 0, ONCE, structure="taylor"),
        Row("uniform-early", "uniform, small early", "uniform", 0.25, 0.75, structure="uniform", cost="uniform"),
        Row("taylor-early", "taylor, small early", "taylor", 0.25, 0.75, structure="taylor", cost="taylor"),
        Row(PEER, "Torch-Pruning (Taylor, isomorphic)", PEER, 1, 0),
        explored("p3b-early-full", "every element computed", settings=LINEAR, structure=_SOFT),
        explored(
            "p3b-early-compensated", "compensated at the cut", settings=(*EARLY, COMPENSATED), structure=_SOFT, cost=_SOFT
        ),
        explored("p3b-early-aligned", "widths in multiples of 8, whole heads", settings=(*EARLY, ALIGNED)),
        explored("p3b-early-stream-0.69", "0.69 of the stream goes", settings=(*EARLY, ALIGNED, ("prune_stream", 0.6875))),
        explored("p3b-early-quick", "trained in the quick form", training=QUICK),
        explored("p3b-early-low_rank", "low_rank probes", settings=LOW_RANK, structure=_SOFT),
        explored("p3b-early-0.1", "0.1 + 0.9 epochs", warm_up=0.1, pruning=0.9, structure=_SOFT, cost=_SOFT),
        explored("p3b-early-0.5", "0.5 + 0.5 epochs", warm_up=0.5, pruning=0.5, structure=_SOFT, cost=_SOFT),
        explored("p3b-late", "0.5 + 1.5 epochs", warm_up=0.5, pruning=1.5, structure=_SOFT, cost=_SOFT),
    )
}
"""All rows in the order of the table."""


@dataclass(frozen=True)
class Costs:
    """What steps take at one prune ratio, in steps of dense training.

    Attributes:
        pruning: a step with masks in place, by row.
        small: a step of the small model, by row.
        cut: measuring, cutting and compensating in one shot, by row, in epochs of dense training.
        teacher: a forward pass of the dense model in inference mode.
    """

    pruning: Mapping[str, float]
    small: Mapping[str, float]
    teacher: float
    cut: Mapping[str, float] = field(default_factory=dict)


def is_timed(line: Line, precision: str) -> bool:
    """Whether times of a line count in the table: it computes in the precision of the others, and its processor has no AMX.

    Where bf16 is fast, the dense model gains more than the small ones: with AMX their steps take 0.6 of a dense one and not
    0.4. Runs elsewhere have the epochs that follow from the table's costs, so their accuracies count and their times do not.

    Args:
        line: of a run, or of costs. Those of costs say their precision since 2026-11-30; before, it was bfloat16.
        precision: of the table.
    """
    return line.get("precision", "bfloat16") == precision and "instructions" not in line.get("hardware", {})


def costs_of(line: Line) -> Costs:
    """The costs that a line of the record tells."""
    ratios = {name: side["ratio"] for name, side in line["sides"].items()}

    def of(kind: str) -> dict[str, float]:
        return {name.removeprefix(kind): ratio for name, ratio in ratios.items() if name.startswith(kind)}

    cuts = {name: steps / line["steps_per_epoch"] for name, steps in of("cut ").items()}
    return Costs(of("pruning "), of("small "), ratios[TEACHER], cuts)


@dataclass(frozen=True)
class Plan:
    """The epochs of a run.

    Attributes:
        warm_up, pruning, small: epochs of each phase; a model that is not pruned has only the last.
        dense_epochs: what they take, in epochs of dense training.
    """

    warm_up: float
    pruning: float
    small: int
    dense_epochs: float

    @property
    def before(self) -> int:
        """Epochs before the model is small, the last of which may end sooner."""
        return math.ceil(self.warm_up + self.pruning)


def plan(row: Row, costs: Costs, epochs: int, *, distilled: bool, equal: str = TIME) -> Plan:
    """The epochs of a row whose time is that of some epochs of dense training, to half an epoch of the small model.

    Those are whole, and rounded to the nearest: to round all down would leave some rows a tenth less time than others. Where
    epochs are equal and not time, all phases together have as many as dense training.
    A teacher is asked from the end of the warm-up on, by a model without warm-up at every step. Its own training does not
    count.

    Raises:
        ConfigError: not even one epoch of the small model fits; or there is no cost of the row.
    """
    if row.method == DENSE:
        return Plan(0, 0, epochs, float(epochs))
    teacher = costs.teacher if distilled else 0.0
    small = _cost(costs.small, row.structure or row.name) + teacher
    spent = row.warm_up
    if row.pruning:
        step = _cost(costs.pruning, row.cost or row.name)
        before = max(1.0, step) if row.probes_in_warm_up else 1.0
        mean = (before + step) / 2 if row.narrows else step  # measured where masks have closed; they close step by step
        spent = row.warm_up * before + row.pruning * (mean + teacher)
    if row.at_once:
        spent += _cost(costs.cut, row.name)
    if equal == EPOCHS:
        small_epochs = epochs - math.ceil(row.warm_up + row.pruning)
    else:
        small_epochs = round((epochs - spent) / small)
    if small_epochs < 1:
        raise ConfigError(f"{row.name} takes {spent:.2f} epochs before its model is small; it may take {epochs} in all.")
    return Plan(row.warm_up, row.pruning, small_epochs, spent + small_epochs * small)


def _cost(costs: Mapping[str, float], name: str) -> float:
    if name not in costs:
        raise ConfigError(f"What a step of {name} takes was not measured; measured were {', '.join(costs)}.")
    return costs[name]


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
        epochs: of dense training; every row may take as long.
        pixels: side of the images.
        images: of the training set that an epoch goes through.
        equal: what a row has as much of as dense training: "time", or "epochs", as published comparisons have it.
    """

    epochs: int = 3
    pixels: int = 32
    images: int = 10_000
    equal: str = TIME

    @property
    def name(self) -> str:
        """In names of runs: e3-32px-10000."""
        return f"e{self.epochs}-{self.pixels}px-{self.images}"


@dataclass(frozen=True)
class Entry:
    """One run of the table.

    Attributes:
        row: which way.
        ratio: share of the parameters that goes; None for the dense row.
        seed: of everything random.
        scale: of the study.
        distilled: learns from the dense run of its seed and scale.
        alpha, tau: weight of the teacher and its temperature, where they are not the usual ones.
    """

    row: Row
    ratio: float | None
    seed: int
    scale: Scale
    distilled: bool = False
    alpha: float | None = None
    tau: float | None = None

    @property
    def name(self) -> str:
        """Of its folder and its line: p3b-early-distilled-0.9-e3-32px-10000-seed0."""
        teacher = ["distilled"] if self.distilled else []
        teacher += [f"alpha{self.alpha:g}"] if self.alpha is not None else []
        teacher += [f"tau{self.tau:g}"] if self.tau is not None else []
        ratio = [] if self.ratio is None else [f"{self.ratio:g}"]
        equal = [] if self.scale.equal == TIME or self.row.method == DENSE else [f"equal-{self.scale.equal}"]
        return "-".join([self.row.name, *teacher, *ratio, *equal, self.scale.name, f"seed{self.seed}"])

    @property
    def teacher(self) -> Entry:
        """The dense run that it learns from."""
        return Entry(ROWS[DENSE], None, self.seed, self.scale)
