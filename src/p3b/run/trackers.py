"""The tools that a run can be followed with, and how each is opened; nothing of them is imported before it is used.

tensorboard   event files in <output-dir>/tensorboard/<stage>/
wandb         Weights & Biases, in <output-dir>/wandb/ and as its own settings say (WANDB_MODE=offline, WANDB_PROJECT, ...)
trackio       in its own folder (TRACKIO_DIR) or space (TRACKIO_SPACE_ID)
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from p3b.errors import ConfigError

NONE = "none"
PROJECT = "p3b"
TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "trackio"}
"""Trackers by the package that they need, which is their name on the command line, too."""


class Tracker(Protocol):
    """One tool, for one stage of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Values at an optimizer step; steps never fall."""
        ...

    def close(self) -> None:
        """Let all that was logged arrive."""
        ...


Open = Callable[[Path, str, str, int, Mapping[str, Any]], Tracker]
"""(output folder, stage, name of the run, first step that will be logged, settings) to a tracker."""


def trackers_asked_for(given: Sequence[str]) -> tuple[str, ...]:
    """The trackers of --track; TensorBoard, where it is installed, if nothing is given.

    Raises:
        ConfigError: a package is missing, or "none" is given with others.
    """
    if not given:
        return ("tensorboard",) if _is_installed("tensorboard") else ()
    if NONE in given:
        if len(given) > 1:
            raise ConfigError(f"--track {' '.join(given)}: none contradicts the others; give either.")
        return ()
    for name in given:
        if not _is_installed(name):
            raise ConfigError(
                f"--track {name} needs the package {name} ({TITLES[name]}), which is not installed: pip install {name}; "
                'all of them: pip install "p3b[track]".'
            )
    return tuple(dict.fromkeys(given))


class _TensorBoard:
    def __init__(self, root: Path, stage: str, name: str, first_step: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        events = root / "tensorboard" / stage
        if first_step == 0 and events.is_dir():  # of a run that is replaced
            shutil.rmtree(events)
        # What a killed run wrote beyond is taken back.
        self._writer = SummaryWriter(str(events), purge_step=first_step or None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, root: Path, stage: str, name: str, first_step: int, settings: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name.rpartition("-")[2],
            name=name,
            resume="allow",
            dir=str(root),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, root: Path, stage: str, name: str, first_step: int, settings: Mapping[str, Any]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        with contextlib.redirect_stdout(io.StringIO()):  # what it says of itself would break the view
            self._trackio.init(project=PROJECT, name=name, resume="allow", config=dict(settings), embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


OPENERS: Mapping[str, Open] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases, "trackio": _Trackio}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
