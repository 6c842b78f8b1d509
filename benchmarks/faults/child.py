"""A run that is killed at a chosen moment: `p3b` in a process of its own, with a trap in it.

    python benchmarks/faults/child.py "clock:1.7" prune --output-dir ...

The trap kills the process as the system would, by SIGKILL: nothing in it can notice, tidy up or answer. A trap snaps once: in a
process that a launcher has started again there is none.

    none            no trap
    clock:S         S seconds after the training has begun
    write:N         in the middle of writing the N-th file: half of it is on disk, under its temporary name
    rename:N        before the N-th complete file takes its name
    renamed:N       right after it
    call:NAME:N     at the N-th call of a function of ours, before it does anything
    rank:R:TRAP     one of these, in one process of many
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import p3b.deploy.choice
import p3b.run.final_table
import p3b.run.records
import p3b.run.stage
import p3b.run.training
import p3b.storage.files
from p3b.commands.command_line import main
from p3b.deploy.speed import images_per_second


def set_trap(trap: str) -> None:
    """Arm a trap in this process."""
    kind, _, rest = trap.partition(":")
    if kind == "rank":
        rank, _, inner = rest.partition(":")
        return set_trap(inner) if os.environ.get("RANK") == rank else None
    if kind == "none" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return None
    if kind == "clock":
        return _at_call(p3b.run.stage.Stage, "begin", 1, lambda *_: _kill_in(float(rest)))
    if kind == "write":
        return _at_call(p3b.storage.files, "flush_to_disk", 2 * int(rest) - 1, _halve_and_kill)
    if kind == "rename":
        return _at_call(Path, "replace", int(rest), _kill)
    if kind == "renamed":
        return _at_call(Path, "replace", int(rest), _kill, after=True)
    if kind == "call":
        name, _, count = rest.partition(":")
        owner, _, function = name.rpartition(".")
        return _at_call(_resolve(owner), function, int(count or 1), _kill)
    raise ValueError(f"'{trap}' is no trap")


def run(arguments: list[str]) -> int:
    """Exit status of `p3b` with these arguments; everything is real, but throughput is measured more briefly."""
    torch.set_num_threads(1)
    for module in (p3b.run.final_table, p3b.deploy.choice):
        module.images_per_second = _one_batch  # type: ignore[attr-defined]
    p3b.run.records.Records.draw = lambda _records, _figure_format: []
    return main(arguments)


def _one_batch(*given: Any, **more: Any) -> list[float]:
    """Throughput by a batch of each model."""
    return images_per_second(*given, **{**more, "rounds": 1, "seconds_per_round": 0.0})


def _at_call(owner: Any, name: str, count: int, act: Callable[..., object], *, after: bool = False) -> None:
    """Do something before (or after) the `count`-th call of a function, given its arguments, and let the call happen."""
    original, calls = getattr(owner, name), 0

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == count
        if due and not after:
            act(*given)
        result = original(*given, **more)
        if due and after:
            act(*given)
        return result

    setattr(owner, name, counted)


def _kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in(seconds: float) -> None:
    timer = threading.Timer(seconds, _kill)
    timer.daemon = True
    timer.start()


def _halve_and_kill(path: Path) -> None:
    """What a machine leaves that went down in the middle of a write."""
    os.truncate(path, path.stat().st_size // 2)
    _kill()


def _resolve(name: str) -> Any:
    """A module or a class by its dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    set_trap(sys.argv[1])
    sys.exit(run(sys.argv[2:]))
