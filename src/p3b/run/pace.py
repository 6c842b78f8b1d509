"""What a stage is going to do, how far it has come, and how long the rest takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A phase of a stage.

    Attributes:
        name: "warm-up", "sparsify", "sharpen", "fine-tune", "train", ...
        end: optimizer steps of the stage that are done when it ends.
        skipped: steps right before it that are counted and not done: the rest of an epoch within which the last phase ended.
    """

    name: str
    end: int
    skipped: int = 0


@dataclass(frozen=True)
class Course:
    """What a stage is going to do.

    Attributes:
        phases: in order; those without a step are left out.
        dense_params: parameters of the model before anything is pruned.
        goal_params: parameters that are to stay; None where nothing is pruned.
    """

    phases: tuple[Phase, ...]
    dense_params: int
    goal_params: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.phases[-1].end

    def phase_at(self, step: int) -> tuple[int, Phase]:
        """The phase of the step to come, and the step that it starts at; the last phase after the end."""
        start = 0
        for phase in self.phases:
            first = start + phase.skipped
            if step < phase.end:
                return first, phase
            last, start = first, phase.end
        return last, self.phases[-1]

    def to_do(self, step: int, end: int) -> int:
        """Steps that are done between these two."""
        starts = (0, *(phase.end for phase in self.phases))
        gaps = ((start, start + phase.skipped) for start, phase in zip(starts, self.phases, strict=False))
        return end - step - sum(max(0, min(end, last) - max(step, first)) for first, last in gaps)


@dataclass(frozen=True)
class Moment:
    """How a training stands.

    Attributes:
        step: optimizer steps of the stage that are done.
        epoch, epochs: the epoch that is under way, counted from 1, and the last one of this training.
        loss: mean training loss of this epoch so far; None before it was looked at.
        accuracy: (part, top-1 in percent) after the last epoch; None before it.
        kept_params: parameters that would stay with the masks of now.
    """

    step: int
    epoch: int
    epochs: int
    loss: float | None
    accuracy: tuple[str, float] | None
    kept_params: int


class Pace:
    """Seconds that a step takes, over about the last epoch, so that evaluation and saving count too.

    Args:
        window: steps that the mean is taken over, at least.
        now: the clock, in seconds.
    """

    def __init__(self, window: int, now: Callable[[], float] = time.monotonic) -> None:
        self._window, self._now = window, now
        self._marks: deque[tuple[int, float]] = deque()

    def mark(self, step: int) -> None:
        """So many steps are done now."""
        self._marks.append((step, self._now()))
        while len(self._marks) > 2 and step - self._marks[1][0] >= self._window:
            self._marks.popleft()

    def seconds_for(self, steps: int) -> float | None:
        """Seconds from now until so many steps after the last mark are done, 0 or more; None while nothing is known."""
        if not self._marks:
            return None
        (first, began), (last, at) = self._marks[0], self._marks[-1]
        if last == first:
            return None
        rate = (at - began) / (last - first)
        return max(0.0, rate * steps - (self._now() - at))
