"""Settings of the commands that look at runs that are there: report, doctor, runs, inspect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ReportConfig:
    """One page of a run, or of several side by side, from their folders alone."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output folders of p3b train, prune or finetune."""
    out: Path | None = None
    """The HTML file; by default report.html in the folder of the first run."""
    follow: bool = False
    """Write the page again every --seconds until the run has ended; the page loads itself again."""
    seconds: int = 20
    """Between two pages of --follow."""


@dataclass(frozen=True)
class DoctorConfig:
    """Why a run's accuracy is lower than it could be: what its records show, and the setting to try."""

    run: Annotated[Path, tyro.conf.Positional]
    """Output folder of p3b train, prune or finetune."""


@dataclass(frozen=True)
class RunsConfig:
    """List and compare the runs below a folder."""

    folder: Annotated[Path, tyro.conf.Positional] = Path()
    """Folder whose sub-folders hold runs."""


@dataclass(frozen=True)
class InspectConfig:
    """The architecture of a saved model: what each block keeps, its classes, its preprocessing, where it comes from."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder or .pth file that p3b saved, such as run/pruned."""
