"""Pruning that is over after a fraction of the epochs: phases within an epoch, and the rest trains the small model."""

from __future__ import annotations

from p3b.core.schedule import Schedule
from p3b.run.options import PhaseOptions
from p3b.run.prune_plan import plan_pruning

EARLY = PhaseOptions(prune_start_epoch="0.25", prune_finalize_epoch="1", prune_steps_update_mask=30, finetune_epochs=11)


def test_phases_may_begin_and_end_within_an_epoch() -> None:
    plan = plan_pruning(EARLY, epochs=1, steps_per_epoch=312, grad_accum_steps=1)
    assert plan.schedule == Schedule(start=78, sparse=166, final=312, update_every=30)
    assert (plan.epochs, plan.finetune_epochs) == (1, 11)
    updates = [step for step in range(312) if plan.schedule.update_due(step)]
    assert len(updates) == 7 and plan.schedule.progress(updates[2]) == 1.0, "the budget is met long before the end"


def test_epochs_after_finalizing_are_fine_tuning_whichever_flag_asks_for_them() -> None:
    within = PhaseOptions(prune_start_epoch="0.25", prune_finalize_epoch="1", prune_steps_update_mask=30)
    assert plan_pruning(within, epochs=12, steps_per_epoch=312, grad_accum_steps=1) == plan_pruning(EARLY, 1, 312, 1)
