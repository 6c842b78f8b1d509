"""When what happens: the phases of section 5 of the method, in optimizer steps.

    0 .. start      warm-up     the model and the method's probes train; nothing is masked
    start .. sparse sparsify    masks are renewed every `update_every` steps; applied keep ratios walk linearly to their goals
    sparse .. final sharpen     goals are met; masks go from soft to hard
    final           finalize    the last masks become hard and the model is shrunk

The paper counts mini-batches. An optimizer step is `grad_accum_steps` of them, so a schedule in optimizer steps means the same
phases; only whoever converts (`Schedule.from_epochs`) has to know how many there are in an epoch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from p3b.errors import ScheduleError

TAU_MAX = 0.1
"""Softness of soft masks until the keep ratios have reached their goals."""


@dataclass(frozen=True)
class Schedule:
    """Phase edges and mask updates, all in optimizer steps counted from 0.

    Raises:
        ScheduleError: unless 0 <= start < sparse <= final, update_every >= 1 and tau_max is finite and >= 0.
    """

    start: int
    """First step at which benefits and scores are collected."""
    sparse: int
    """Step from which on the applied keep ratios have reached their goals."""
    final: int
    """Number of steps after which the model is finalized."""
    update_every: int
    """Steps between two renewals of the masks."""
    tau_max: float = TAU_MAX
    """Softness of the masks until `sparse`; 0: they are hard from the first update on, what is pruned gets no score."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.sparse <= self.final:
            raise ScheduleError(
                f"The phases are out of order: pruning starts at step {self.start}, is sparse at {self.sparse} and final at "
                f"{self.final}; expected 0 <= start < sparse <= final."
            )
        if self.update_every < 1:
            raise ScheduleError(f"Masks must be renewed every 1 or more steps, got {self.update_every}.")
        if not 0 <= self.tau_max < math.inf:
            raise ScheduleError(f"The softness of masks must be finite and 0 or more, got {self.tau_max}.")

    @classmethod
    def from_epochs(
        cls,
        start: float,
        sparse: float,
        final: float,
        steps_per_epoch: int,
        update_every: int | None = None,
        tau_max: float = TAU_MAX,
    ) -> Schedule:
        """Convert epochs to steps. `update_every` is in steps; None means three times an epoch.

        Raises:
            ScheduleError: an epoch is not finite, or the steps are out of order.
        """
        if not all(map(math.isfinite, (start, sparse, final))):
            raise ScheduleError(f"Phases must begin and end at finite epochs, got {start:g}, {sparse:g} and {final:g}.")
        start_step, sparse_step, final_step = (round(epochs * steps_per_epoch) for epochs in (start, sparse, final))
        if update_every is None:
            update_every = max(1, round(steps_per_epoch / 3))
        return cls(start_step, sparse_step, final_step, update_every, tau_max)

    def phase(self, step: int) -> str:
        """Name of the phase that a step lies in: warm-up, sparsify, sharpen or done."""
        if step < self.start:
            return "warm-up"
        if step < self.sparse:
            return "sparsify"
        return "sharpen" if step < self.final else "done"

    def progress(self, step: int) -> float:
        """p in [0, 1]: how far the applied keep ratios have walked, k_b(t) = 1 - (1 - k_b) p."""
        return min(1.0, max(0.0, (step + 1 - self.start) / (self.sparse - self.start)))

    def tau(self, step: int) -> float:
        """Softness of the masks: `tau_max` until `sparse`, then linearly to 0 at `final`."""
        if step <= self.sparse:
            return self.tau_max
        return self.tau_max * (self.final - step) / (self.final - self.sparse) if step < self.final else 0.0

    def update_due(self, step: int) -> bool:
        """Whether the masks are renewed at the end of this step. The last step leaves them to finalizing."""
        return self.start <= step < self.final - 1 and (step + 1 - self.start) % self.update_every == 0


ONE_SHOT = Schedule(start=0, sparse=1, final=1, update_every=1)
"""In place of phases where nothing is trained: all that is measured counts, and no mask closes before the last ones."""


def parse_duration(text: str, total_epochs: float, steps_per_epoch: int) -> float:
    """Epochs that a duration stands for: '10' epochs, '500steps' optimizer steps, '20%' of the run.

    Raises:
        ScheduleError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(|epochs?|steps?|%)\s*", text)
    if match is None or math.isinf(float(match[1])):
        raise ScheduleError(
            f"'{text}' is not a duration; give epochs (10), optimizer steps (500steps) or a share of the run (20%)."
        )
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return total_epochs * number / 100
    return number / steps_per_epoch if unit.startswith("step") else number


def applied_keep_ratio(goal: float, progress: float) -> float:
    """k_b(t) = 1 - (1 - k_b) p: the goal reached from 1 linearly in the progress p in [0, 1]."""
    if math.isnan(goal):
        raise ValueError("a keep ratio must not be NaN")
    return 1 - (1 - goal) * progress
