"""Laws of phases, epochs and durations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from hypothesis import strategies as st

from laws.law import NOT_FINITE, ROUNDING, Law, demand
from p3b.core.schedule import Schedule, applied_keep_ratio, parse_duration
from p3b.errors import ScheduleError


@dataclass(frozen=True)
class Plan:
    """Phases in any order, and steps to look at."""

    start: int
    sparse: int
    final: int
    update_every: int
    tau_max: float
    steps: list[int]


@st.composite
def _plans(draw: st.DrawFn) -> Plan:
    if draw(st.integers(0, 3)):
        reach = 10 ** draw(st.integers(0, 7))
        start = draw(st.integers(0, reach))
        sparse = start + draw(st.integers(1, reach))
        final, update_every = sparse + draw(st.integers(0, reach)), draw(st.integers(1, reach))
    else:
        start, sparse, final, update_every = draw(st.tuples(*[st.integers(-3, 6)] * 4))
    tau_max = draw(st.one_of(st.just(0.1), st.floats(0, 1)))
    return Plan(start, sparse, final, update_every, tau_max, draw(st.lists(st.integers(0, max(final, 0) + 3), max_size=8)))


def _phases_are_exact(given: Plan) -> None:
    valid = 0 <= given.start < given.sparse <= given.final and given.update_every >= 1
    try:
        plan = Schedule(given.start, given.sparse, given.final, given.update_every, given.tau_max)
    except ScheduleError:
        demand(not valid, "refused")
        return
    demand(valid, "not refused")
    start, sparse, final = plan.start, plan.sparse, plan.final
    near_edges = {edge + offset for edge in (0, start, sparse, final) for offset in range(-2, 3)}
    renewals = range(start + plan.update_every - 1, final - 1, plan.update_every)
    near_edges |= {step + offset for step in (*renewals[:2], *renewals[-2:]) for offset in (-1, 0, 1)}
    steps = sorted(step for step in near_edges | set(given.steps) if step >= 0)
    spans = {"warm-up": range(start), "sparsify": range(start, sparse), "sharpen": range(sparse, final)}
    for step in steps:
        name = next((name for name, span in spans.items() if step in span), "done")
        demand(plan.phase(step) == name, f"step {step} lies in {plan.phase(step)}, expected {name}")
        demand(plan.update_due(step) == (step in renewals), f"step {step}: an update is due: {plan.update_due(step)}")
        demand(step >= start or plan.progress(step) == 0, f"step {step}: progress {plan.progress(step)} in the warm-up")
        demand(step < sparse - 1 or plan.progress(step) == 1, f"step {step}: progress {plan.progress(step)} once it is sparse")
        demand(step > sparse or plan.tau(step) == given.tau_max, f"step {step}: tau falls before it is sparse")
        demand(step <= sparse or step < final or plan.tau(step) == 0, f"step {step}: a tau after the end")
    demand(not plan.update_due(final - 1), "an update in the last step")
    for values, rises in (
        ([plan.progress(step) for step in steps], 1),
        ([plan.tau(step) / max(given.tau_max, 5e-324) for step in steps], -1),
    ):
        demand(all(0 <= value <= 1 for value in values), f"outside the range: {values}")
        walks = [rises * (after - before) for before, after in pairwise(values)]
        demand(all(walk >= 0 for walk in walks), f"not monotone: {values}")
    for goal in (0.0, 1e-300, 0.25, 1.0):
        applied = [applied_keep_ratio(goal, plan.progress(step)) for step in steps]
        demand(all(goal - 1e-15 <= ratio <= 1 for ratio in applied), f"goal {goal}, applied {applied}")
        demand(applied == sorted(applied, reverse=True), f"goal {goal}: an applied ratio rises: {applied}")


@dataclass(frozen=True)
class Epochs:
    """Phases in epochs."""

    start: float
    sparse: float
    final: float
    steps_per_epoch: int
    update_every: int | None


@st.composite
def _epochs(draw: st.DrawFn) -> Epochs:
    number = st.one_of(st.integers(0, 400), st.floats(-1, 400), NOT_FINITE)
    edges = draw(st.tuples(number, number, number))
    if draw(st.booleans()):
        edges = tuple(sorted(edges, key=lambda edge: (math.isnan(edge), edge)))
    return Epochs(*edges, draw(st.integers(1, 5000)), draw(st.one_of(st.none(), st.integers(-1, 500))))


def _epochs_become_steps(given: Epochs) -> None:
    edges = (given.start, given.sparse, given.final)
    try:
        plan = Schedule.from_epochs(*edges, given.steps_per_epoch, given.update_every)
    except ScheduleError:
        if all(map(math.isfinite, edges)):
            start, sparse, final = (round(edge * given.steps_per_epoch) for edge in edges)
            in_order = 0 <= start < sparse <= final and (given.update_every is None or given.update_every >= 1)
            demand(not in_order, "refused")
        return
    demand(all(map(math.isfinite, edges)), f"not refused: {plan}")
    for edge, step in zip(edges, (plan.start, plan.sparse, plan.final), strict=True):
        miss = abs(step - Fraction(edge) * given.steps_per_epoch)
        demand(miss <= Fraction(1, 2) + Fraction(1e-9), f"{edge} epochs are {step} steps")
        demand(not isinstance(edge, int) or Fraction(step, given.steps_per_epoch) == edge, f"{edge} epochs became {step} steps")
    renewals = Fraction(given.steps_per_epoch, plan.update_every)
    demand(given.update_every in (None, plan.update_every), f"masks renewed every {plan.update_every}")
    demand(given.update_every is not None or given.steps_per_epoch < 3 or 2 <= renewals <= 4, f"{float(renewals)} an epoch")


@dataclass(frozen=True)
class Duration:
    """A text that may be a duration; `number` and `unit` where it is one."""

    text: str
    total_epochs: float
    steps_per_epoch: int
    number: Fraction | None = None
    unit: str = ""


@st.composite
def _durations(draw: st.DrawFn) -> Duration:
    total, steps = draw(st.floats(0.5, 5000)), draw(st.integers(1, 10**5))
    if draw(st.integers(0, 2)) == 0:
        return Duration(draw(st.one_of(st.text(max_size=8), st.text("0123456789.-+e% epochsnaif_", max_size=12))), total, steps)
    digits = st.integers(0, 10**6).map(str)
    long = st.integers(1, 400).map(lambda length: "9" * length)
    decimal = st.tuples(st.one_of(digits, st.just("")), digits).map(".".join)
    number = draw(st.one_of(digits, decimal, digits.map("{}.".format), long))
    unit = draw(st.sampled_from(["", "epoch", "epochs", "step", "steps", "%"]))
    spaces = st.sampled_from(["", " ", "  ", "\t"])
    text = draw(spaces) + number + draw(spaces) + unit + draw(spaces)
    return Duration(text, total, steps, Fraction("0" + number.rstrip(".")), unit.rstrip("s"))


def _durations_are_read(given: Duration) -> None:
    factor = {"step": Fraction(1, given.steps_per_epoch), "%": Fraction(given.total_epochs) / 100}.get(given.unit, Fraction(1))
    expected = None if given.number is None else given.number * factor
    try:
        epochs = parse_duration(given.text, given.total_epochs, given.steps_per_epoch)
    except ScheduleError:
        demand(expected is None or expected > 1e300, "refused")
        return
    demand(math.isfinite(epochs) and epochs >= 0, f"{epochs} epochs")
    if expected is not None:
        demand(abs(Fraction(epochs) - expected) <= ROUNDING * expected, f"{epochs} epochs, expected {float(expected)}")
        if given.unit == "step" and given.number == int(given.number):  # type: ignore[arg-type]
            there = round(epochs * given.steps_per_epoch)
            demand(there == given.number or there > 2**50, f"{given.text} are {there} steps there and back")


LAWS = (
    Law("phases, progress, tau and mask updates are exact at their edges", 700, _plans(), _phases_are_exact),
    Law(
        "epochs become steps and back",
        400,
        _epochs(),
        _epochs_become_steps,
        known=(Epochs(0, 1, math.nan, 1, None), Epochs(0, 1, math.inf, 1, None)),
    ),
    Law(
        "durations are read, and nothing else is",
        400,
        _durations(),
        _durations_are_read,
        known=(Duration("9" * 309, 1.0, 1, Fraction("9" * 309)),),
    ),
)
