"""Where a result comes from: code, machine and date, for saved models, summaries and the lines of a series."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch

import p3b
from p3b.run.machine import Machine


def provenance(machine: Machine, **what: Any) -> dict[str, Any]:
    """What a saved model and a summary say of their origin.

    Args:
        machine: that computed them.
        what: was computed: stage, model, data, seed.
    """
    return {
        **what,
        "processes": machine.processes.world_size,
        "device": device_name(machine.device),
        "precision": machine.number_format,
        "versions": versions(),
        "date": today(),
    }


def circumstances() -> dict[str, Any]:
    """The commit, the hardware and the date of a line of a series."""
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"commit": commit(), "hardware": hardware, "date": today()}


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def versions() -> dict[str, str]:
    """Of this package and of the two that it stands on."""
    return {"p3b": p3b.__version__, "torch": str(torch.__version__), "timm": timm.__version__}


def today() -> str:
    """The date, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())


@cache
def commit() -> str | None:
    """Commit of the running code, where it lies in a git repository that tracks it; with a + where it was changed since.

    Asked once in a process: what changes later on disk is not what runs.
    """
    source = Path(p3b.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
