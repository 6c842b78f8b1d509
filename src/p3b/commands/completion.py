"""`p3b completion bash`: the script that lets a shell complete commands and flags, made by tyro from all settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

SHELLS = ("bash", "zsh", "fish")


def print_completion(settings: Mapping[str, type], shell: str) -> None:
    """Print the script of a shell, to be put where the shell looks for it.

    Args:
        settings: of each command by its name.
        shell: one of SHELLS.
    """
    commands: Any = Union[  # noqa: UP007 - of a list that is known at run time alone
        tuple(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in settings.items())
    ]
    try:
        tyro.cli(commands, args=["--tyro-print-completion", shell], prog="p3b", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as printed:
        if printed.code:
            raise
