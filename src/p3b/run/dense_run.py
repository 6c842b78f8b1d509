"""A dense run that is there already: what pruned models are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p3b.errors import ConfigError, RunFolderError
from p3b.run.folder import StageFolder
from p3b.run.products import PRODUCTS
from p3b.run.series_lines import results
from p3b.run.series_plan import DENSE

GIVEN = f"{DENSE}-given"
"""Name of its line in a sweep."""


def read_dense_run(output_dir: Path) -> dict[str, Any]:
    """Summary of a finished `p3b train`.

    Args:
        output_dir: of that run, as given to --dense-run.

    Raises:
        RunFolderError: there is none, or it is not finished.
    """
    stage = StageFolder(output_dir, "train")
    if not stage.finished:
        raise RunFolderError(f"{output_dir} holds no finished `p3b train`; give --dense-run the output folder of one.")
    return stage.read_json("summary.json")


def require_same_images(accuracy: Mapping[str, Any], parts: Mapping[str, int], output_dir: Path) -> None:
    """Refuse a dense run that was measured on other images than the pruned models will be.

    Args:
        accuracy: of the dense run, by part.
        parts: images of each part that will be evaluated on.
        output_dir: as given to --dense-run.

    Raises:
        ConfigError: their numbers differ.
    """
    for name in ("val", "test"):
        found, expected = accuracy.get(name, {}).get("images", 0), parts.get(name, 0)
        if found != expected:
            raise ConfigError(
                f"--dense-run {output_dir} was measured on {found} {name} images, the pruned models will be on {expected}: "
                "they would not compare. Train it on the same data, or leave it out."
            )


def line_of_dense_run(output_dir: Path, seed: int) -> dict[str, Any]:
    """The line of a dense run in a sweep that did not train it.

    Args:
        output_dir: of that run.
        seed: of the sweep.

    Raises:
        RunFolderError: there is none, or it is not finished.
    """
    summary = read_dense_run(output_dir)
    return {
        "kind": "run",
        "name": GIVEN,
        "row": DENSE,
        "ratio": None,
        "seed": seed,
        "command": f"(the dense model is that of --dense-run {output_dir})",
        "status": "done",
        **results(summary, output_dir / "train"),
        "model": str(output_dir / PRODUCTS["train"]),
        "commit": None,
        "hardware": None,
        "date": summary["provenance"]["date"],
    }
