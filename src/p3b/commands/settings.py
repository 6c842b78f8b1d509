"""Settings in a file, under the names of the flags: a YAML file of one's own, or what a run wrote of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p3b.errors import ConfigError, unknown_name
from p3b.run.flags import flag, settings_of

_OF_ANOTHER_RUN = {"output_dir", "resume", "overwrite"}
"""What the config.json of a run says of that run alone."""


def flags_of_file(config_class: type, file: Path) -> list[str]:
    """The settings in a file as flags: put before those of the command line, they are what the latter win over.

    A YAML file is written by hand, and every name in it must be known. Of a run's config.json any command takes what it has a
    setting for; where and how that run was carried out (output folder, resumed or not) is not given back.

    Args:
        config_class: settings of the command.
        file: YAML with one `name: value` a line, names as of the flags, with hyphens or underscores; lists where a flag takes
            several. Or the config.json of a run (*.json).

    Raises:
        ConfigError: the file cannot be read, is no such list, or has a name that is not known.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))  # of which JSON is a part
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {file} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"--config {file} holds no settings; expected one 'name: value' a line, such as 'epochs: 30'.")
    known = dict(settings_of(config_class()))
    if file.suffix == ".json":
        content = {name: value for name, value in _of_a_run(content).items() if name in known.keys() - _OF_ANOTHER_RUN}
        if not content:
            raise ConfigError(f"--config {file} holds no settings of this command; expected a config.json that a run wrote.")
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
        given[name] = flag(name, value)
    return [word for words in given.values() for word in words]


def _of_a_run(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config.json without the groups that they stand in."""
    groups = {name: value if isinstance(value, Mapping) else {name: value} for name, value in content.items()}
    return {name: value for group, values in groups.items() if group != "resolved" for name, value in values.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in value)
    return value is None or isinstance(value, (str, int, float))
