"""How much memory a model takes: measured in a process of its own, which opens it, computes one batch, and is gone.

What counts is the growth of the process's peak over what Python and the libraries take before the model is opened.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p3b.deploy.bench import Side

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes that ru_maxrss counts in."""


def peak_memory(side: Side, *, layout: str, batch_size: int, threads: int) -> int | None:
    """Bytes by which a fresh process grows at most while it opens a side and computes a batch on the CPU.

    None where the system does not tell, or the process came to no good end.
    """
    if resource is None:
        return None
    flags = [str(side.path), "--layout", layout, "--batch-size", str(batch_size), "--threads", str(threads)]
    flags += ["--dense"] if side.dense else []
    done = subprocess.run([sys.executable, "-m", "p3b.deploy.peak", *flags], check=False, capture_output=True, text=True)
    said = done.stdout.split()
    return int(said[-1]) if done.returncode == 0 and said else None


def main(arguments: Sequence[str] | None = None) -> None:
    """What the process does: prints the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layout", default="index")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dense", action="store_true")
    given = parser.parse_args(arguments)
    if not given.path.exists():
        parser.error(f"there is no {given.path}")  # before torch is loaded, which takes seconds

    import torch

    from p3b.deploy.bench import Side, example, open_side
    from p3b.deploy.onnx_file import require_onnx
    from p3b.deploy.runners import ONNX

    torch.set_num_threads(given.threads)
    if given.path.suffix == ONNX:
        require_onnx("onnxruntime")
        import onnxruntime  # noqa: F401 - before the first look at the peak
    before = _peak()
    runner = open_side(
        Side(given.path, dense=given.dense), layout=given.layout, batch_size=given.batch_size, threads=given.threads
    )
    runner(example(runner.metadata, given.batch_size))
    print(_peak() - before)


def _peak() -> int:
    return UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
