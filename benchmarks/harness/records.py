"""Records: JSON lines, one for each measurement, with a birth certificate (command, commit, hardware, versions, time)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from p3b.storage.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
Line = Mapping[str, Any]


def certified(measure: Callable[[], Mapping[str, Any]], command: str, *packages: str) -> dict[str, Any]:
    """What a measurement finds, and its birth certificate.

    Args:
        measure: does the work. The commit is read before it: changes made while it runs are not part of it.
        command: repeats the measurement.
        packages: whose versions are recorded beside Python's, where they are installed.
    """
    changes = _git("status", "--porcelain", "--", "src", "benchmarks", "tests", "requirements.lock")
    made_by = {"commit": _git("rev-parse", "HEAD"), "changed_since": bool(changes), "hardware": _hardware()}
    began = time.monotonic()
    found = measure()
    return {
        **found,
        "command": command,
        **made_by,
        "versions": _versions(packages),
        "seconds": round(time.monotonic() - began, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All lines of a record; none where there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add_line(file: Path, line: Line) -> None:
    """Append to a record; the line is on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as record:
        record.write(json.dumps(line) + "\n")
        record.flush()
        os.fsync(record.fileno())


def write_lines(file: Path, lines: Iterable[Line]) -> None:
    """Write a whole record, all at once."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(file, lambda path: path.write_text(text))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    found = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads, "accelerator": accelerator}
    # Products of bf16 are about twice as fast with these: what shrinks with the widths is a smaller part of a step.
    capped = "AMX" not in os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX")
    return {**found, "instructions": "AMX"} if torch.cpu._is_amx_tile_supported() and not capped else found


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
