"""Section 5 of the method: phases, ramps and updates are exact at their edges."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p3b.core.schedule import TAU_MAX, Schedule, applied_keep_ratio, parse_duration
from p3b.errors import ScheduleError

PLAN = Schedule(start=10, sparse=30, final=50, update_every=4)


def test_phases_change_at_their_edges() -> None:
    names = {step: PLAN.phase(step) for step in (0, 9, 10, 29, 30, 49, 50, 99)}
    assert names == {
        0: "warm-up",
        9: "warm-up",
        10: "sparsify",
        29: "sparsify",
        30: "sharpen",
        49: "sharpen",
        50: "done",
        99: "done",
    }


def test_progress_walks_linearly_and_is_whole_at_the_last_sparsify_step() -> None:
    assert [PLAN.progress(step) for step in (0, 9)] == [0.0, 0.0]
    assert [PLAN.progress(step) for step in (10, 19, 28)] == [1 / 20, 10 / 20, 19 / 20]
    assert [PLAN.progress(step) for step in (29, 30, 49, 1000)] == [1.0] * 4


def test_tau_falls_linearly_over_the_sharpen_phase() -> None:
    assert [PLAN.tau(step) for step in (0, 10, 30)] == [TAU_MAX] * 3
    assert [PLAN.tau(step) for step in (31, 40, 49)] == pytest.approx([TAU_MAX * 19 / 20, TAU_MAX / 2, TAU_MAX / 20])
    assert [PLAN.tau(step) for step in (50, 51, 1000)] == [0.0] * 3
    assert replace(PLAN, tau_max=0.5).tau(40) == 0.25


def test_a_schedule_of_hard_masks_is_never_soft() -> None:
    hard = Schedule.from_epochs(1, 3, 5, steps_per_epoch=10, update_every=4, tau_max=0.0)
    assert hard == Schedule(10, 30, 50, 4, tau_max=0.0)
    assert [hard.tau(step) for step in (0, 13, 30, 40, 50)] == [0.0] * 5


@pytest.mark.parametrize("tau_max", [-0.1, float("nan"), float("inf")])
def test_a_softness_that_is_none_is_refused(tau_max: float) -> None:
    with pytest.raises(ScheduleError, match="softness"):
        Schedule(0, 1, 2, 1, tau_max)


def test_without_a_sharpen_phase_masks_are_hard_once_it_is_over() -> None:
    plan = Schedule(start=0, sparse=10, final=10, update_every=2)
    assert plan.tau(9) == TAU_MAX
    assert plan.tau(11) == 0.0


def test_masks_are_renewed_at_the_end_of_every_interval_but_not_in_the_last_step() -> None:
    due = [step for step in range(60) if PLAN.update_due(step)]
    assert due == [13, 17, 21, 25, 29, 33, 37, 41, 45]
    assert PLAN.progress(29) == 1.0
    every_step = Schedule(start=2, sparse=4, final=6, update_every=1)
    assert [step for step in range(8) if every_step.update_due(step)] == [2, 3, 4]


@pytest.mark.parametrize("edges", [(-1, 5, 9), (5, 5, 9), (6, 5, 9), (0, 5, 4), (0, 0, 0)])
def test_phases_out_of_order_are_refused(edges: tuple[int, int, int]) -> None:
    with pytest.raises(ScheduleError, match="out of order"):
        Schedule(*edges, update_every=1)


@pytest.mark.parametrize("update_every", [0, -3])
def test_a_renewal_takes_at_least_one_step(update_every: int) -> None:
    with pytest.raises(ScheduleError, match="1 or more steps"):
        Schedule(0, 1, 2, update_every)
    with pytest.raises(ScheduleError, match="1 or more steps"):
        Schedule.from_epochs(0, 1, 2, steps_per_epoch=10, update_every=update_every)


def test_epochs_are_converted_with_three_renewals_an_epoch() -> None:
    plan = Schedule.from_epochs(10, 25, 50, steps_per_epoch=97)
    assert plan == Schedule(start=970, sparse=2425, final=4850, update_every=32)
    assert Schedule.from_epochs(0.5, 1.25, 2, steps_per_epoch=8) == Schedule(4, 10, 16, 3)
    assert Schedule.from_epochs(1, 2, 3, steps_per_epoch=1).update_every == 1
    assert Schedule.from_epochs(1, 2, 3, steps_per_epoch=30, update_every=7).update_every == 7


@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        ("10", 10),
        (" 2.5 ", 2.5),
        (".5epochs", 0.5),
        ("1 epoch", 1),
        ("500steps", 10),
        ("25 step", 0.5),
        ("20%", 8),
        ("12.5 %", 5),
    ],
)
def test_durations_are_epochs_steps_or_shares_of_the_run(text: str, epochs: float) -> None:
    assert parse_duration(text, total_epochs=40, steps_per_epoch=50) == pytest.approx(epochs)


@pytest.mark.parametrize("text", ["", "ten", "-1", "5 minutes", "%", "1e3x", "10 20", "nan"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ScheduleError, match="is not a duration"):
        parse_duration(text, total_epochs=40, steps_per_epoch=50)


def test_applied_ratios_walk_from_one_to_their_goal() -> None:
    assert [applied_keep_ratio(0.2, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2])
    with pytest.raises(ValueError, match="NaN"):
        applied_keep_ratio(float("nan"), 0.5)
