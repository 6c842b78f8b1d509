"""Checkpoints to go on from: whatever influences the next step, as tensors and plain values."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p3b.errors import WeightsError
from p3b.files import write_atomically
from p3b.train.distributed import gather, unwrap
from p3b.train.loop import Learner


def save_checkpoint(file: Path, learner: Learner, is_main: bool, **progress: Any) -> None:
    """Write last.pth. Every rank must call it, since each adds its random states; the main one writes.

    Args:
        file: replaced as a whole.
        learner: model, optimizer, scheduler, scaler, moving average and pruner.
        progress: plain values that say where the run is.
    """
    random_states = gather(_random_state())
    if is_main:
        content = {**_learner_state(learner), "random": random_states, "progress": progress}
        write_atomically(file, lambda path: torch.save(content, path))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Content of last.pth, on the CPU.

    Raises:
        WeightsError: it is damaged.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        content["progress"]
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{file} cannot be resumed from: {error}. Start again with --overwrite.") from error
    return content


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


def _learner_state(learner: Learner) -> dict[str, Any]:
    return {
        "model": unwrap(learner.model).state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "steps_done": learner.steps_done,
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
