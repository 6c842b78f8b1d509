"""What the recorded runs share: JSON lines, and under which circumstances they were made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from p3b.storage.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def circumstances() -> dict[str, Any]:
    """Commit, whether the code has been changed since, and hardware."""
    changes = _git("status", "--porcelain", "--", "src", "benchmarks", "tests", "requirements.lock")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": bool(changes),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "accelerator": _accelerator()},
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision_of(made_by: Mapping[str, Any]) -> str:
    """The code that a line was made by, in words: from `circumstances`."""
    return f"commit {made_by['commit'][:12]}" + (" with changes that were not committed" if made_by["changed_since"] else "")


def machine_of(made_by: Mapping[str, Any]) -> str:
    """The machine that a line was made on, in words: from `circumstances`."""
    hardware = made_by["hardware"]
    return f"{hardware['cores']} cores {hardware['machine']}, {hardware['accelerator'] or 'no accelerator'}"


def packages_of(made_by: Mapping[str, Any]) -> str:
    """The versions that a line was made with, in words: from `versions`."""
    return ", ".join(f"{package} {version}" for package, version in made_by["versions"].items())


def add_line(file: Path, line: dict[str, Any]) -> None:
    """Append to a record; the line is on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as record:
        record.write(json.dumps(line) + "\n")
        record.flush()
        os.fsync(record.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All lines of a record; none where there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def replace_part(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two markers of a page; what is written around them stays."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    made = f"{before}{begin}\n\n{text}\n{end}{after}"
    write_atomically(page, lambda file: file.write_text(made))


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
