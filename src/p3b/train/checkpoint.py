"""Checkpoints to go on from: whatever influences the next step, as tensors and plain values.

    <stage>/checkpoints/000007-5e9a0c31d2f4b688.pth     the seventh; half of its content's SHA-256 stands in its name

A new one is complete on disk before an old one goes, and the newest two stay: one that is damaged later (its content no longer
fits its name) is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p3b.errors import RunFolderError, WeightsError
from p3b.storage.files import flush_to_disk, remove_unfinished, write_atomically
from p3b.storage.untrusted import read_pickle
from p3b.train.distributed import gather, require_agreement
from p3b.train.loop import Learner
from p3b.vit.wrappers import unwrap

_NAME = re.compile(r"(\d{6,})-([0-9a-f]{16})\.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read: its content, on the CPU, and what was found to be damaged on the way to it."""

    content: dict[str, Any]
    file: Path
    passed_over: tuple[str, ...]


class Checkpoints:
    """The checkpoints of a stage. One process writes at a time (the run folder's lock sees to that).

    Args:
        folder: made when the first one is written.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep

    def write(self, content: Mapping[str, Any]) -> Path:
        """Add a checkpoint, then remove all but the newest few.

        Args:
            content: tensors and plain values only.

        Raises:
            RunFolderError: it cannot be written (a full disk, say); those that were there stay.
        """
        files = self._files()
        serial = 1 + max((number for number, _ in files), default=0)
        unnamed = self._folder / f"{serial:06d}.unnamed"
        try:
            write_atomically(unnamed, lambda path: torch.save(dict(content), path))
            file = unnamed.with_name(f"{serial:06d}-{_digest(unnamed)}.pth")
            unnamed.replace(file)
            flush_to_disk(self._folder)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
            unnamed.unlink(missing_ok=True)
            raise RunFolderError(
                f"A checkpoint cannot be written to {self._folder}: {error}. The run stops and keeps the earlier ones. Make "
                "room there, then continue with --resume."
            ) from error
        for _, old in files[: len(files) + 1 - self._keep]:
            old.unlink(missing_ok=True)
        return file

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is as it was written; None where there has never been one.

        Raises:
            WeightsError: there are some, and all are damaged.
        """
        damaged: list[str] = []
        for _, file in reversed(self._files()):
            content = _read(file, damaged)
            if content is not None:
                return Checkpoint(content, file, tuple(damaged))
        if damaged:
            raise WeightsError(f"There is no checkpoint to resume from: {'; '.join(damaged)}. Start again with --overwrite.")
        return None

    def tidy(self) -> None:
        """Remove what a writer that was killed has left half done."""
        if self._folder.is_dir():
            remove_unfinished(self._folder)
            for unnamed in self._folder.glob("*.unnamed"):
                unnamed.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        """Serial numbers and files, in ascending order."""
        found = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted((int(match[1]), file) for file in found if (match := _NAME.fullmatch(file.name)))


def save_checkpoint(checkpoints: Checkpoints, learner: Learner, is_main: bool, **progress: Any) -> None:
    """Write a checkpoint. Every rank must call it, since each adds its random states; the main one writes.

    Args:
        checkpoints: where to.
        learner: model, optimizer, scheduler, scaler, moving average and pruner.
        progress: plain values that say where the run is.

    Raises:
        RunFolderError: it cannot be written.
    """
    random_states = gather(_random_state())
    if is_main:
        checkpoints.write({**_learner_state(learner), "random": random_states, "progress": progress})


def newest_for_all(checkpoints: Checkpoints) -> Checkpoint | None:
    """The newest good checkpoint, the same on every rank.

    Raises:
        WeightsError: all are damaged. TrainingError: the ranks see different files.
    """
    found = checkpoints.newest()
    require_agreement("the checkpoint to go on from", "none" if found is None else found.file.name)
    return found


def restore(learner: Learner, content: Mapping[str, Any], rank: int) -> None:
    """Put a checkpoint's content into a learner of the same shape, and this rank's random states into the generators.

    Raises:
        WeightsError: the checkpoint is of another model or other settings.
    """
    try:
        unwrap(learner.model).load_state_dict(content["model"])
        learner.optimizer.load_state_dict(content["optimizer"])
        learner.scaler.load_state_dict(content["scaler"])
        learner.steps_done = content["steps_done"]
        learner.skipped.load(content["skipped_steps"], content["skipped_in_a_row"])
        if learner.scheduler is not None:
            learner.scheduler.load_state_dict(content["scheduler"])
        if learner.ema is not None:
            learner.ema.load_state_dict(content["ema"])
        learner.pruner.load_state_dict(content["pruner"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise WeightsError(f"The checkpoint belongs to another model or other settings: {error}") from error
    if rank < len(content["random"]):
        _set_random_state(content["random"][rank])


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators; each rank draws its own numbers."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def _read(file: Path, damaged: list[str]) -> dict[str, Any] | None:
    """The content of a checkpoint, or None and a line about what is wrong with it."""
    try:
        if _digest(file) != file.stem.split("-")[1]:
            damaged.append(f"{file.name} has changed since it was written")
            return None
        content = read_pickle(file)
    except (OSError, WeightsError) as error:
        damaged.append(f"{file.name} cannot be read ({error})")
        return None
    if not isinstance(content, dict) or "progress" not in content:
        damaged.append(f"{file.name} cannot be read (it is no checkpoint of a run)")
        return None
    return content


def _digest(file: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of what lies on disk."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _learner_state(learner: Learner) -> dict[str, Any]:
    return {
        "model": unwrap(learner.model).state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "steps_done": learner.steps_done,
        "skipped_steps": learner.skipped.steps,
        "skipped_in_a_row": learner.skipped.in_a_row,
        "scheduler": None if learner.scheduler is None else learner.scheduler.state_dict(),
        "ema": None if learner.ema is None else learner.ema.state_dict(),
        "pruner": learner.pruner.state_dict(),
    }


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    numpy_name, numpy_words, *numpy_rest = np.random.get_state(legacy=True)
    assert isinstance(numpy_words, np.ndarray)
    return {
        "python": [version, list(words), gauss],
        "numpy": [numpy_name, torch.from_numpy(numpy_words.astype(np.int64)), *numpy_rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, numpy_words, *rest = state["numpy"]
    np.random.set_state((name, numpy_words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
