"""What a stage records as it goes: a line of metrics.jsonl for each epoch, a line of blocks.jsonl for each mask update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p3b.methods.base import BlockDecision, Decision
from p3b.run.folder import StageFolder
from p3b.run.machine import Machine
from p3b.run.screen import Screen
from p3b.run.short_figures import duration, short_count, short_loss
from p3b.run.tracking import Tracking
from p3b.train.evaluate import Accuracy


def epoch_line(line: Mapping[str, Any], epochs: int, part: str, top1: float) -> str:
    """What is said of an epoch; it fits 80 columns.

    Args:
        line: of metrics.jsonl.
        epochs: of the stage, up to the end of this training.
        part: name of the images that were evaluated on.
        top1: on these, in percent.
    """
    loss = short_loss(line["train_loss"])
    return (
        f"epoch {line['epoch']:>3}/{epochs}  {line['phase']:<9} loss {loss}  {part} top-1 {top1:6.2f} %  "
        f"{short_count(line['kept_params'])} params  {duration(line['seconds'])}"
    )


def _update_line(decision: Decision, steps_done: int, kept_params: int) -> str:
    """What is said of a mask update."""
    shares = {block.name: block.kept_params / block.params for block in decision.blocks if block.params}
    least, most = (choose(shares, key=lambda name: shares[name]) for choose in (min, max))
    return (
        f"masks at step {steps_done:,}: {short_count(kept_params)} parameters stay; least in {least} ({shares[least]:.0%}), "
        f"most in {most} ({shares[most]:.0%})"
    )


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
        tracking: that is told of them, too.
    """

    def __init__(self, folder: StageFolder, screen: Screen, machine: Machine, steps_per_epoch: int, tracking: Tracking) -> None:
        self.folder, self._screen, self._machine, self._steps_per_epoch = folder, screen, machine, steps_per_epoch
        self.tracking = tracking

    def log_epoch(self, line: dict[str, Any], epochs: int, part: str, accuracy: Accuracy) -> None:
        """Add a line to metrics.jsonl.

        Args:
            line: of an epoch that is complete.
            epochs: of the stage, up to the end of this training.
            part: name of the images that were evaluated on.
            accuracy: on these.
        """
        self._machine.on_main(lambda: self._write("metrics.jsonl", line))
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
        self._screen.show_blocks(decision.blocks)
        self._screen.detail(_update_line(decision, steps_done, kept_params))
        if decision.note is not None:
            line["note"] = decision.note
            self._screen.say(decision.note)
        self._machine.on_main(lambda: self._write("blocks.jsonl", line))

    def show_last_update(self) -> None:
        """Show the blocks as the last mask update that is recorded left them."""
        file = self.folder.path / "blocks.jsonl"
        if self._machine.is_main and file.exists() and (lines := file.read_text(encoding="utf-8").splitlines()):
            self._screen.show_blocks([BlockDecision(**block) for block in json.loads(lines[-1])["blocks"]])

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

    def _write(self, name: str, line: dict[str, Any]) -> None:
        self.folder.append_line(name, line)
        self.tracking.send(name, line)

    def draw(self, figure_format: str) -> list[Path]:
        """Draw what blocks.jsonl holds; returns the files of the figures."""
        if not self._machine.is_main or not (self.folder.path / "blocks.jsonl").exists():
            return []
        from p3b.report.figures import draw_figures  # matplotlib would take half a second of every start

        return draw_figures(self.folder.path, figure_format)
