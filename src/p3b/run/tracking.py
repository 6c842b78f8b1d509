"""What a run records, told to the tools that it is followed with.

A tracker gets the lines of metrics.jsonl and blocks.jsonl, each once and in the order of its step, however often the run is
stopped: how far each has come stands in `<stage>/tracking.json`. A run that is resumed at an earlier step makes some lines
again; those that a tracker has are not sent a second time. One that is added later gets all lines from the first on.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from p3b.errors import ConfigError
from p3b.run.folder import LINE_FILES, StageFolder
from p3b.run.trackers import OPENERS, TITLES, Open, Tracker

STATE_FILE = "tracking.json"
_TAGS = {
    "epoch": "epoch",
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "test_loss": "loss/test",
    "val_top1": "top1/val",
    "test_top1": "top1/test",
    "val_top5": "top5/val",
    "test_top5": "top5/test",
    "kept_params": "kept_params",
    "lr": "lr",
    "skipped_steps": "skipped_steps",
    "seconds": "seconds",
}


def tracked_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The values of a line of metrics.jsonl or blocks.jsonl, under the names that trackers show."""
    if "blocks" not in line:
        return {tag: float(line[key]) for key, tag in _TAGS.items() if line.get(key) is not None}
    found = {}
    for block in line["blocks"]:
        found[f"kept/{block['name']}"] = block["kept_params"] / max(block["params"], 1)
        for key in ("benefit_cls", "benefit_patch"):
            if block[key] is not None:
                found[f"{key}/{block['name']}"] = float(block[key])
    return found


class Tracking:
    """Hands the lines of a stage on to its trackers; on a process that does not write there are none.

    Args:
        folder: of the stage.
        names: of the trackers.
        settings: of the run, which trackers keep with it.
        asked: whether they were asked for; else one that cannot be opened is no error.
        say, warn: take a line for the screen.
        openers: how each is opened, by name.
    """

    def __init__(
        self,
        folder: StageFolder,
        names: Sequence[str],
        settings: Mapping[str, Any],
        *,
        asked: bool,
        say: Callable[[str], object],
        warn: Callable[[str], object],
        openers: Mapping[str, Open] | None = None,
    ) -> None:
        self._folder, self._names, self._settings, self._asked = folder, names, settings, asked
        self._say, self._warn = say, warn
        self._openers = OPENERS if openers is None else openers
        self._trackers: dict[str, Tracker] = {}
        self._state: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "sent": {}}

    def open(self, *, goes_on: bool) -> None:
        """Open all trackers; nothing is written into the folder of the stage yet.

        Args:
            goes_on: whether an earlier run is gone on with, so that trackers go on, too.

        Raises:
            ConfigError: one that was asked for cannot be opened.
        """
        if not self._names:
            return
        state = self._folder.path / STATE_FILE
        if goes_on and state.exists():
            self._state = self._folder.read_json(STATE_FILE)
        name = f"{self._folder.root.resolve().name}-{self._folder.stage}-{self._state['id']}"
        for tracker in self._names:
            sent = self._state["sent"].setdefault(tracker, dict.fromkeys(LINE_FILES, -1))
            try:
                found = self._openers[tracker](
                    self._folder.root, self._folder.stage, name, max(sent.values()) + 1, self._settings
                )
            except Exception as error:  # of a library that is not ours: it may raise anything
                if self._asked:
                    self.close()
                    said = str(error).rstrip(".")
                    raise ConfigError(f"--track {tracker} cannot be used: {said}. Or give --track none.") from error
                self._warn(f"warning: TensorBoard is installed and cannot be used ({error}); nothing is tracked")
                continue
            self._trackers[tracker] = found
            self._say(f"tracking: {TITLES.get(tracker, tracker)}, run {name}")

    def catch_up(self) -> None:
        """Send what the files of the stage hold and trackers do not have."""
        if not self._trackers:
            return
        lines = [(line["step"], file, line) for file in LINE_FILES for line in self._lines(file)]
        for _, file, line in sorted(lines, key=lambda entry: entry[:2]):  # blocks.jsonl before metrics.jsonl
            self._send(file, line)
        self._keep()

    def send(self, file: str, line: Mapping[str, Any]) -> None:
        """A line that has just been written to a file of the stage."""
        if self._trackers:
            self._send(file, line)
            self._keep()

    def close(self) -> None:
        """Let all that was sent arrive."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.close()
            except Exception as error:
                self._warn(f"warning: {name} could not be closed: {error}")

    def _send(self, file: str, line: Mapping[str, Any]) -> None:
        values, step = tracked_values(line), int(line["step"])
        for name, tracker in list(self._trackers.items()):
            sent = self._state["sent"][name]
            if step <= sent[file]:
                continue
            try:
                tracker.log(values, step)
            except Exception as error:  # a run of hours must not end because a web service does
                self._warn(f"warning: {name} takes nothing any more ({error}); the run goes on without it")
                del self._trackers[name]
                continue
            sent[file] = step

    def _keep(self) -> None:
        self._folder.write_json(STATE_FILE, self._state)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        file = self._folder.path / name
        if file.exists():
            yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())
