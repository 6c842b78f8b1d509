"""Does a run that is killed and resumed end, bit for bit, as an undisturbed one?

Each case is a short pruning run with fine-tuning, full of randomness (augmentation, mixup, stochastic depth, random erasing,
moving average, accumulated gradients), killed by SIGKILL once to three times: at random moments, in the middle of writing a
checkpoint, between a file's completion and its renaming, while the model is shrunk and saved. Then it is resumed and compared
with its undisturbed twin: the weights of the final model and of the sparse checkpoint, every line of the metrics and of the
mask updates but for the seconds. One case in five runs in two processes under torchrun's agent, which starts a killed run
again by itself.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import api as agent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import p3b
from faults import child
from processes import on_agent
from runs import MODEL, colour_folders

IMAGES = {"train": 16, "val": 3, "test": 3}
"""Of each of three classes: two or four steps an epoch."""
RUN = (
    *(
        "--recipe",
        "paper",
        "--device",
        "cpu",
        "--epochs",
        "3",
        "--prune-start-epoch",
        "1",
        "--finetune-epochs",
        "2",
        "--batch-size",
        "4",
    ),
    *("--drop-path", "0.3", "--lr", "0.05", "--reprob", "0.5", "--timeout-minutes", "0.5"),
)
KINDS = {
    "plain": ("--precision", "fp32", "--num-workers", "0", "--model-ema", "--model-ema-decay", "0.9"),
    "distilled": ("--precision", "fp32", "--num-workers", "0", "--distill-from", "warm-up"),
    "smaller while it trains": (
        *("--precision", "fp32", "--num-workers", "0", "--prune-benefit", "linear", "--prune-compute", "active"),
        *("--prune-stream", "auto", "--align", "4", "--model-ema", "--model-ema-decay", "0.9"),
    ),
    "cut at once": (
        *("--precision", "fp32", "--num-workers", "0", "--prune-schedule", "at-once", "--prune-stream", "auto", "--align", "4"),
    ),
    "bf16, accumulated, a data worker": ("--precision", "bf16", "--num-workers", "1", "--grad-accum-steps", "2"),
}
TWO_RANKS = "two processes"
EVERY_STEP, RARELY = ("--checkpoint-minutes", "1e-6"), ("--checkpoint-minutes", "0")
TRAPS = (
    *("clock", "clock", "clock", "write", "rename", "renamed", "clock"),
    *("call:p3b.pruner.Pruner.shrink", "call:p3b.pruner.Pruner.decide_last", "call:p3b.storage.artifact.save", "clock"),
    *("call:p3b.storage.artifact.save_checkpoint", "call:p3b.run.folder.StageFolder.append_line", "write"),
    *("call:p3b.run.stage.Stage.write_summary", "clock"),
)
_WORDS = {
    "clock": "at a random moment",
    "write": "half-way through writing a file",
    "rename": "before a complete file takes its name",
    "renamed": "right after a file has taken its name",
    "call:p3b.pruner.Pruner.decide_last": "before the last decision",
    "call:p3b.pruner.Pruner.shrink": "before the model is shrunk",
    "call:p3b.storage.artifact.save": "before the small model is saved",
    "call:p3b.storage.artifact.save_checkpoint": "before the sparse checkpoint or the best epoch is saved",
    "call:p3b.run.folder.StageFolder.append_line": "before a line of the metrics is written",
    "call:p3b.run.stage.Stage.write_summary": "before the summary is written",
}
_MOST_WRITES = 24
_KILLED = "failed (exitcode: -9)"
"""How torch's agent tells of a process that was killed."""


@dataclass(frozen=True)
class _Twin:
    """An undisturbed run: where it lies, and how long its training took in seconds."""

    out: Path
    seconds: float


def cases(count: int, seed: int, work: Path, images: Mapping[str, int] = IMAGES) -> Iterator[dict[str, Any]]:
    """Kill and resume `count` runs; a fifth of them (at least one) in two processes.

    Args:
        count: cases in all.
        seed: of kinds, moments and the runs' own randomness.
        work: folder for the runs.
        images: of each class, by part.
    """
    torch.set_num_threads(1)  # before the first fork: threads do not survive one
    draw = random.Random(seed)
    data = colour_folders(work / "data", images)
    twins: dict[str, _Twin] = {}
    traps = [TRAPS[number % len(TRAPS)] for number in range(count)]
    for number, trap in enumerate(traps):
        two = number % 5 == 4 or (number == count - 1 and count < 5)
        kind = TWO_RANKS if two else draw.choice(list(KINDS))
        command = ["prune", "--data-path", str(data), *MODEL, *RUN, *KINDS.get(kind, KINDS["plain"])]
        if kind not in twins:
            began = time.time()
            out = work / f"undisturbed-{len(twins)}"
            _require_done(_run(kind, "none", [*command, "--output-dir", str(out)], out.with_suffix(".log"))[0], out)
            summary = json.loads((out / "prune" / "summary.json").read_text())
            twins[kind] = _Twin(out, min(time.time() - began, summary["seconds"]))
        case = _kill_and_resume(kind, trap, command, twins[kind], work / f"case-{number}", draw)
        processes = TWO_RANKS if two else "one process"
        yield {"part": "kills", "kind": f"{_WORDS[trap]}, {processes}", "case": f"{trap}, {kind}", **case}


def _kill_and_resume(
    kind: str, trap: str, command: Sequence[str], twin: _Twin, out: Path, draw: random.Random
) -> dict[str, Any]:
    how_often = draw.choice((EVERY_STEP, RARELY))
    given = [*command, "--output-dir", str(out), *how_often]
    log = out.with_suffix(".log")
    kills, restarts, status, latest = 0, 0, -signal.SIGKILL, 1.0
    for _ in range(draw.choice((1, 1, 2, 3))):
        status, snapped = _run(kind, _moment(trap, kind, twin, draw, latest), [*given, *(["--resume"] if kills else [])], log)
        while status == 0 and not kills and not snapped and latest > 0.01:  # it ended before the trap: once more, sooner
            shutil.rmtree(out)
            latest /= 2
            status, snapped = _run(kind, _moment(trap, kind, twin, draw, latest), given, log)
        kills += snapped
        restarts += snapped and status == 0
        if status == 0:
            break
    if status != 0:
        status, _ = _run(kind, "none", [*given, "--resume"], log)
    if status != 0 or not kills:
        return {"ok": False, "kills": kills, "detail": f"exit status {status}: {log.read_text()[-600:]}"}
    different = _differences(twin.out, out)
    resumed = re.findall(r"resumed after .* at step (\d+)", log.read_text())
    return {
        "ok": not different,
        "kills": kills,
        "resumed_at_steps": [int(step) for step in resumed],
        "restarted_by_itself": bool(restarts),
        "checkpoints": "every step" if how_often is EVERY_STEP else "every epoch",
        "detail": "; ".join(different) or "bit-identical",
    }


def _moment(trap: str, kind: str, twin: _Twin, draw: random.Random, latest: float) -> str:
    """A trap with its number: when it snaps, in the first `latest` part of the run."""
    if trap == "clock":
        armed = f"clock:{draw.uniform(0, latest * twin.seconds):.2f}"
    elif trap in ("write", "rename", "renamed"):
        armed = f"{trap}:{draw.randint(1, max(1, round(latest * _MOST_WRITES)))}"
    elif trap.endswith("append_line"):
        armed = f"{trap}:{draw.randint(1, 9)}"
    else:
        armed = trap
    # Files are written by the main process alone.
    return armed if kind != TWO_RANKS else f"rank:{draw.choice((0, 1)) if trap == 'clock' else 0}:{armed}"


def _run(kind: str, trap: str, arguments: Sequence[str], log: Path) -> tuple[int, bool]:
    """Run to the end or to the kill; returns the exit status, negative for a signal, and whether the trap has snapped."""
    # Forked, so that torch is loaded once; the processes are as real as any other.
    forked = multiprocessing.get_context("fork").Process(target=_forked, args=(kind, trap, list(arguments), log))
    log.touch()
    killed_before = log.read_text().count(_KILLED)
    forked.start()
    forked.join(timeout=300)
    assert forked.exitcode is not None, f"{arguments} did not end within five minutes"
    snapped = forked.exitcode == -signal.SIGKILL or log.read_text().count(_KILLED) > killed_before
    return forked.exitcode, snapped


def _forked(kind: str, trap: str, arguments: list[str], log: Path) -> None:
    output = log.open("a", buffering=1)  # until the process is gone
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    if kind != TWO_RANKS:
        os._exit(_child(trap, arguments))
    agent.logger.addHandler(logging.StreamHandler(output))
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        on_agent(2, rank, trap, arguments, restarts=1)
    except ChildFailedError as error:
        print(error, file=output)
        os._exit(1)
    os._exit(0)


def rank(trap: str, arguments: list[str]) -> None:
    """What a process of many does: torch's agent waits for it to return, or to fail."""
    if status := _child(trap, arguments):
        sys.exit(status)


def _child(trap: str, arguments: list[str]) -> int:
    child.set_trap(trap)
    return child.run(arguments)


def _require_done(status: int, out: Path) -> None:
    if status != 0:
        raise RuntimeError(f"the undisturbed run failed: {out.with_suffix('.log').read_text()[-2000:]}")


def _differences(left: Path, right: Path) -> list[str]:
    """What two runs differ in: nothing, if resuming is exact."""
    different = []
    for saved in ("pruned", "first_sparse_checkpoint.pth"):
        ours, theirs = (p3b.load(out / saved).state_dict() for out in (left, right))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            different.append(f"the weights of {saved}")
    for name in ("metrics.jsonl", "blocks.jsonl"):
        if _lines(left / "prune" / name) != _lines(right / "prune" / name):
            different.append(f"the lines of {name}")
    leftovers = [path.name for path in right.rglob(".*.part")] + [path.name for path in right.rglob("*.unnamed")]
    return different + [f"left over: {name}" for name in leftovers]


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]
