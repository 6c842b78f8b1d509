"""The phases of a pruning run, from durations in epochs, steps or shares to optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from p3b.core.schedule import ONE_SHOT, TAU_MAX, Schedule, parse_duration
from p3b.errors import ScheduleError
from p3b.run.options import AT_ONCE, PhaseOptions
from p3b.run.pace import Phase


@dataclass(frozen=True)
class PrunePlan:
    """When what is pruned.

    Attributes:
        schedule: the phases in optimizer steps.
        epochs: that pruning takes; the model is shrunk at the end of the last; 0: one shot.
        finetune_epochs: that follow.
        at_once: the model is shrunk in one shot when the warm-up ends, be it within the last of these epochs, whose rest is
            left out.
    """

    schedule: Schedule
    epochs: int
    finetune_epochs: int
    at_once: bool = False

    @property
    def one_shot(self) -> bool:
        """Whether nothing is masked before the cut."""
        return self.at_once or self.epochs == 0

    @property
    def gradual(self) -> Schedule | None:
        """The schedule by which masks close; None in one shot."""
        return None if self.one_shot else self.schedule


def plan_pruning(options: PhaseOptions, epochs: int, steps_per_epoch: int, grad_accum_steps: int) -> PrunePlan:
    """The phases of a pruning run.

    An interval between mask updates that is longer than an epoch gives way to three updates an epoch.

    Args:
        options: of pruning; durations are in epochs, steps or shares.
        epochs: of training before what --finetune-epochs adds.
        steps_per_epoch: optimizer steps.
        grad_accum_steps: mini-batches of an optimizer step.

    Raises:
        ScheduleError: phases out of order, or longer than the run.
    """
    if epochs == 0:
        return PrunePlan(ONE_SHOT, 0, options.finetune_epochs)
    start = parse_duration(options.prune_start_epoch, epochs, steps_per_epoch)
    if options.prune_schedule == AT_ONCE:
        return _at_once(start, epochs, steps_per_epoch, options.finetune_epochs)
    final = parse_duration(options.prune_finalize_epoch or "100%", epochs, steps_per_epoch)
    if options.prune_sparse_epoch is None:
        sparse = start + 0.375 * (final - start)
    else:
        sparse = parse_duration(options.prune_sparse_epoch, epochs, steps_per_epoch)
    final = -(-final // 1)
    if not 0 <= start < sparse <= final <= epochs:
        raise ScheduleError(
            f"The phases do not fit: pruning starts after {start:g} epochs (--prune-start-epoch), is sparse after {sparse:g} "
            f"(--prune-sparse-epoch), is finalized after {final:g} (--prune-finalize-epoch) of {epochs} (--epochs); expected "
            "0 <= start < sparse <= finalize <= epochs."
        )
    update_every = _update_every(options, epochs, steps_per_epoch, grad_accum_steps)
    _require_steps(start, sparse, final, steps_per_epoch)
    tau_max = TAU_MAX if options.prune_masks == "soft" else 0.0
    schedule = Schedule.from_epochs(start, sparse, final, steps_per_epoch, update_every, tau_max)
    return PrunePlan(schedule, int(final), epochs - int(final) + options.finetune_epochs)


def _at_once(start: float, epochs: int, steps_per_epoch: int, finetune_epochs: int) -> PrunePlan:
    """A warm-up, and the cut."""
    steps = round(start * steps_per_epoch)
    whole = -(-steps // steps_per_epoch)
    if not 0 < start <= epochs or steps == 0:
        raise ScheduleError(
            f"With --prune-schedule at-once the model is cut after {start:g} epochs, which are {steps} optimizer steps "
            f"(--prune-start-epoch), of {epochs} (--epochs); expected 0 < start <= epochs, and a step at least. To cut it as "
            "it is give --epochs 0."
        )
    schedule = Schedule(steps, steps + 1, steps + 1, update_every=1)
    return PrunePlan(schedule, whole, epochs - whole + finetune_epochs, at_once=True)


def phases_of(plan: PrunePlan, steps_per_epoch: int) -> tuple[Phase, ...]:
    """The phases of a run, but for those without a step; none where nothing is trained."""
    schedule = plan.schedule
    gradual = (("warm-up", schedule.start), ("sparsify", schedule.sparse), ("sharpen", schedule.final))
    pruning = gradual[:1] if plan.at_once else gradual if plan.epochs else ()
    before = (0, *(step for _, step in pruning))
    phases = [Phase(name, step) for (name, step), start in zip(pruning, before, strict=False) if step > start]
    if plan.finetune_epochs:
        skipped = plan.epochs * steps_per_epoch - schedule.start if plan.at_once else 0
        phases.append(Phase("fine-tune", (plan.epochs + plan.finetune_epochs) * steps_per_epoch, skipped))
    return tuple(phases)


def _update_every(options: PhaseOptions, epochs: int, steps_per_epoch: int, grad_accum_steps: int) -> int | None:
    """Optimizer steps between two mask updates; None: three times an epoch."""
    if options.prune_update_every is not None:
        if options.prune_steps_update_mask is not None:
            raise ScheduleError("--prune-update-every and --prune-steps-update-mask say the same thing; give one of them.")
        return max(1, round(parse_duration(options.prune_update_every, epochs, steps_per_epoch) * steps_per_epoch))
    if options.prune_steps_update_mask is None:
        return None
    # The flag counts mini-batches and stands for about three updates an epoch; in an epoch that is shorter than the
    # interval there would be none at all.
    asked = max(1, round(options.prune_steps_update_mask / grad_accum_steps))
    return asked if asked <= steps_per_epoch else None


def _require_steps(start: float, sparse: float, final: float, steps_per_epoch: int) -> None:
    """Refuse phases that are apart in epochs but not in whole optimizer steps."""
    if round(start * steps_per_epoch) < round(sparse * steps_per_epoch):
        return
    steps = f"{steps_per_epoch} optimizer step{'' if steps_per_epoch == 1 else 's'}"
    raise ScheduleError(
        f"An epoch has {steps}, too few to tell the phases apart: pruning starts after {start:g} epochs and is sparse after "
        f"{sparse:g}, which is the same step, and is finalized after {final:g}. Give a smaller --batch-size for more steps an "
        "epoch, more --epochs, or a later --prune-sparse-epoch."
    )
