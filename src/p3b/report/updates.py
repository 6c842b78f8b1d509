"""The mask updates of a pruning stage, from its `blocks.jsonl`: one line an update, checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3b.errors import RunFolderError

KIND_TITLES = {"attn": "Attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Update:
    """One line of `blocks.jsonl`: epochs since the start, the phase where known, and the blocks in their order."""

    epoch: float
    phase: str | None
    blocks: list[dict[str, Any]]


def lines_so_far(text: str, *, running: bool) -> list[str]:
    """The lines of a file; of one that a run is writing to, without a last line that has no end yet."""
    if running and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    return text.splitlines()


def read_updates(folder: Path, *, running: bool = False) -> list[Update]:
    """Read and check `blocks.jsonl`: the same blocks in the same order on every line, and time goes on.

    Args:
        folder: of a pruning stage.
        running: whether a run may be writing to it at this moment.

    Raises:
        RunFolderError: the file cannot be read, or a line is damaged; the message names the line.
    """
    path = folder / "blocks.jsonl"
    try:
        lines = lines_so_far(path.read_text(encoding="utf-8"), running=running)
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"Cannot read '{path}' ({error}). Expected the folder of a pruning stage, "
            "where a run writes one line per mask update into blocks.jsonl."
        ) from error
    updates: list[Update] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            update = _parse_update(json.loads(line))
            if updates and _names(update) != _names(updates[0]):
                raise ValueError("its blocks are not those of the first line")
            if updates and update.epoch < updates[-1].epoch:
                raise ValueError(f"its epoch {update.epoch} lies before the {updates[-1].epoch} of the line above")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise RunFolderError(
                f"Line {number} of '{path}' is not a mask update: {reason}. Expected a JSON object with 'epoch' and "
                "'blocks', and for each block a name, a kind (attn or mlp), benefits, keep_ratio_goal and keep_ratio. "
                "Remove the line, or run the stage again."
            ) from error
        updates.append(update)
    return updates


def _parse_update(record: Any) -> Update:
    """Check one record; KeyError, TypeError or ValueError where it is not as expected."""
    if not isinstance(record, dict):
        raise TypeError(f"it is a {type(record).__name__}, not an object")
    blocks = record["blocks"]
    if not isinstance(blocks, list) or not blocks:
        raise ValueError("'blocks' is not a list with at least one block")
    for block in blocks:
        if not isinstance(block, dict):
            raise TypeError(f"a block is a {type(block).__name__}, not an object")
        if block["kind"] not in KIND_TITLES:
            raise ValueError(f"block {block['name']!r} is of kind {block['kind']!r}")
        for key in ("benefit_cls", "benefit_patch", "keep_ratio_goal", "keep_ratio"):
            if block[key] is not None:
                _check_number(key, block[key])
    _check_number("epoch", record["epoch"])
    if not math.isfinite(record["epoch"]):
        raise ValueError("'epoch' is not finite")
    phase = record.get("phase")
    return Update(float(record["epoch"]), phase if isinstance(phase, str) else None, blocks)


def _check_number(key: str, got: Any) -> None:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise TypeError(f"'{key}' is {got!r}, not a number")


def _names(update: Update) -> list[tuple[str, str]]:
    return [(block["name"], block["kind"]) for block in update.blocks]


def kinds_of(updates: list[Update]) -> list[str]:
    """The kinds of block that occur, attention first."""
    present = {block["kind"] for block in updates[0].blocks}
    return [kind for kind in KIND_TITLES if kind in present]


def series_of(updates: list[Update], kind: str) -> list[list[dict[str, Any]]]:
    """For each block of a kind, from the first to the deepest, its records over the updates."""
    by_update = [[block for block in update.blocks if block["kind"] == kind] for update in updates]
    return [list(records) for records in zip(*by_update, strict=True)]
