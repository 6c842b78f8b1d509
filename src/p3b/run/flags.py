"""A config as the flags of the command line that give it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

NO_FLAG = ("reasons",)
"""Fields of a config that are said about it and cannot be given."""


def command_line(command: str, config: Any, leave_out: Sequence[str] = ()) -> str:
    """The `p3b <command>` that gives this config, in one line; what is as by default is left out.

    Args:
        command: name of the command whose config class this is.
        config: its settings.
        leave_out: settings that are not shown. If "recipe" is among them, so is what keeps the command from choosing others.
    """
    defaults = dict(settings_of(type(config)()))
    changed = ((name, value) for name, value in settings_of(config) if value != defaults[name] and name not in leave_out)
    words = [word for name, value in changed if name != "recipe" for word in flag(name, value)]
    return shlex.join(["p3b", command, *words, *([] if "recipe" in leave_out else _nothing_chosen(config))])


def _nothing_chosen(config: Any) -> list[str]:
    """Flags that keep the command line from choosing what is left out, for a command that would."""
    if not any(field.name == "recipe" for field in fields(config)):
        return []
    weights = [] if config.model.model_pretrained or config.model.model_path is not None else ["--from-scratch"]
    return ["--recipe", "paper", *weights]


def settings_of(config: Any) -> Iterator[tuple[str, Any]]:
    """Every setting of a config with its value, whatever group it stands in."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from settings_of(value)
        elif field.name not in NO_FLAG:
            yield field.name, value


def flag(name: str, value: Any) -> list[str]:
    """The words of the command line that give a setting a value."""
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{words}" if value else f"--no-{words}"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{words}", *map(str, values)]
