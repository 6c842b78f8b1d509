"""Settings written down: as the flags of a command line, and in a YAML file of the same names."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from p3b.errors import ConfigError, unknown_name


def command_line(command: str, config: Any, leave_out: Sequence[str] = ()) -> str:
    """The `p3b <command>` that gives this config, in one line; what is as by default is left out.

    Args:
        command: name of the command whose config class this is.
        config: its settings.
        leave_out: settings that are not shown.
    """
    defaults = dict(_settings(type(config)()))
    changed = ((name, value) for name, value in _settings(config) if value != defaults[name] and name not in leave_out)
    return shlex.join(["p3b", command, *(word for name, value in changed for word in _flag(name, value))])


def flags_of_file(config_class: type, file: Path) -> list[str]:
    """The settings in a YAML file as flags: put before those of the command line, they are what the latter win over.

    Args:
        config_class: settings of the command.
        file: one `name: value` a line, names as of the flags, with hyphens or underscores; lists where a flag takes several.

    Raises:
        ConfigError: the file cannot be read, is no such list, or has a name that is not known.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {file} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"--config {file} holds no settings; expected one 'name: value' a line, such as 'epochs: 30'.")
    known = {name: value for name, value in _settings(config_class()) if name != "config"}
    given: dict[str, list[str]] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {file}: {unknown_name('setting', name, known)}")
        if name in given:
            raise ConfigError(f"--config {file} gives {name} twice; give it once.")
        if not _is_plain(value) or isinstance(value, bool) != isinstance(known[name], bool):
            expected = "true or false" if isinstance(known[name], bool) else "a number, a text or a list of these"
            raise ConfigError(f"--config {file}: {name} is {value!r}; expected {expected}.")
        given[name] = _flag(name, value)
    return [word for words in given.values() for word in words]


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Every setting of a config with its value, whatever group it stands in."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _settings(value)
        else:
            yield field.name, value


def _flag(name: str, value: Any) -> list[str]:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{words}" if value else f"--no-{words}"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{words}", *map(str, values)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in value)
    return value is None or isinstance(value, (str, int, float))
