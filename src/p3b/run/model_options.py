"""Settings of `p3b models`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ModelsConfig:
    """Which models of the installed timm can be pruned, how far, and why the others cannot."""

    pattern: Annotated[str, tyro.conf.Positional] = ""
    """Which models, with wildcards in quotes ('vit_*dinov3*', 'deit*.fb_*') or a part of the name; by default all."""
    all: bool = False
    """Without a pattern: list those that cannot be pruned, too. All of timm is built for that, which takes minutes."""
    num_classes: int = 1000
    """Classes of the head, which counts among the parameters that stay."""
    json: bool = False
    """Print JSON in place of the table."""
    markdown: Path | None = None
    """A page such as docs/models.md, between whose marks tables of all families are written."""
