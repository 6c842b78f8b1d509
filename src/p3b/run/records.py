"""What a stage records as it goes: a line of metrics.jsonl for each epoch, a line of blocks.jsonl for each mask update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p3b.methods.base import Decision
from p3b.run.folder import StageFolder
from p3b.run.machine import Machine
from p3b.run.screen import Screen
from p3b.train.evaluate import Accuracy


def epoch_line(line: Mapping[str, Any], epochs: int, part: str, top1: float) -> str:
    """What is said of an epoch; it fits 80 columns.

    Args:
        line: of metrics.jsonl.
        epochs: of the stage, up to the end of this training.
        part: name of the images that were evaluated on.
        top1: on these, in percent.
    """
    loss = f"{line['train_loss']:.4f}" if line["train_loss"] < 10 else f"{line['train_loss']:.4g}"
    return (
        f"epoch {line['epoch']:>3}/{epochs}  {line['phase']:<9} loss {loss}  {part} top-1 {top1:6.2f} %  "
        f"{short_count(line['kept_params'])} params  {duration(line['seconds'])}"
    )


def short_count(number: int) -> str:
    """A number in three digits or four: 97.3 k, 5.52 M, 304 M."""
    scaled, unit = (number / 1e6, "M") if number >= 999_950 else (number / 1e3, "k")
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"


def duration(seconds: float) -> str:
    """A time in at most six letters: 8.3 s, 21m05s, 3h20m, 12d04h."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, small, unit, smaller in ((60, 1, "m", "s"), (3600, 60, "h", "m"), (86400, 3600, "d", "h")):
        if whole < 100 * size or unit == "d":
            return f"{whole // size}{unit}{whole % size // small:02}{smaller}"
    raise AssertionError


@dataclass(frozen=True)
class Returned:
    """How often pruned elements came back, over all mask updates of a stage, the last decision among them."""

    elements: int = 0
    """That came back, each as often as it did."""
    updates: int = 0
    """Mask updates."""
    chances: int = 0
    """Elements that were pruned before an update, summed over the updates: as many could have come back."""


class Records:
    """Writes the lines on the main process, and says each of them in short.

    Args:
        folder: of the stage.
        screen: that the lines are said on.
        machine: whose main process writes.
        steps_per_epoch: optimizer steps.
    """

    def __init__(self, folder: StageFolder, screen: Screen, machine: Machine, steps_per_epoch: int) -> None:
        self.folder, self._screen, self._machine, self._steps_per_epoch = folder, screen, machine, steps_per_epoch

    def log_epoch(self, line: dict[str, Any], epochs: int, part: str, accuracy: Accuracy) -> None:
        """Add a line to metrics.jsonl.

        Args:
            line: of an epoch that is complete.
            epochs: of the stage, up to the end of this training.
            part: name of the images that were evaluated on.
            accuracy: on these.
        """
        self._machine.on_main(lambda: self.folder.append_line("metrics.jsonl", line))
        self._screen.say(epoch_line(line, epochs, part, accuracy.top1))
        if line["skipped_steps"]:
            self._screen.say(f"  {line['skipped_steps']} steps skipped (not finite)")

    def log_decision(self, decision: Decision, phase: str, steps_done: int, kept_params: int) -> None:
        """Add a line to blocks.jsonl.

        Args:
            decision: made at the end of an optimizer step.
            phase: of that step.
            steps_done: with that step.
            kept_params: that the decision keeps.
        """
        line = {
            "epoch": steps_done / self._steps_per_epoch,
            "step": steps_done,
            "phase": phase,
            "progress": decision.progress,
            "tau": decision.tau,
            "kept_params": kept_params,
            "blocks": [asdict(block) for block in decision.blocks],
        }
        if decision.computed is not None:
            line |= {"computed": decision.computed, "left_out": decision.left_out}
            without = "" if decision.left_out is None else f"; logits differ by at most {decision.left_out:.2g} of their size"
            self._screen.detail(f"{decision.computed:.0%} of all elements are computed{without}")
        if decision.note is not None:
            line["note"] = decision.note
            self._screen.say(decision.note)
        self._machine.on_main(lambda: self.folder.append_line("blocks.jsonl", line))

    def returned(self) -> Returned:
        """How often pruned elements came back, from blocks.jsonl; nothing on a process that does not write."""
        file = self.folder.path / "blocks.jsonl"
        if not self._machine.is_main or not file.exists():
            return Returned()
        updates = [json.loads(line)["blocks"] for line in file.read_text(encoding="utf-8").splitlines()]
        return Returned(
            elements=sum(block["returned"] for blocks in updates for block in blocks),
            updates=len(updates),
            chances=sum(block["pruned"] for blocks in updates[:-1] for block in blocks),
        )

    def draw(self, figure_format: str) -> list[Path]:
        """Draw what blocks.jsonl holds; returns the files of the figures."""
        if not self._machine.is_main or not (self.folder.path / "blocks.jsonl").exists():
            return []
        from p3b.report.figures import draw_figures  # matplotlib would take half a second of every start

        return draw_figures(self.folder.path, figure_format)
