"""What a run was told, and what of it must stay: when it is resumed, and from one row of a series to the next."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3b.errors import ConfigError
from p3b.run.options import CompareConfig, TrainConfig, to_plain

_PLACES = {"data_path", "val_path", "test_path", "model_path", "teacher_path"}
"""Where things lie."""
_ON_THIS_MACHINE = {
    "output_dir",
    "device",
    "figure_format",
    "report",
    "track",
    "checkpoint_minutes",
    "timeout_minutes",
    "num_workers",
    "cache",
    "verbose",
    "quiet",
}
"""How a run is carried out: no result depends on it."""
_HOW_CHOSEN = {"recipe", "reasons"}
"""How settings came to be what they are: these are compared themselves."""
_FREE_ON_RESUME = _PLACES | _ON_THIS_MACHINE | _HOW_CHOSEN | {"resume", "overwrite", "layout", "dense_run"}


@dataclass(frozen=True)
class Settings:
    """What a run was told, as plain values.

    Attributes:
        given: settings by group and name.
        defaults: of the same settings.
        resolved: what they come to, with the data and the machine.
    """

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    resolved: Mapping[str, Any]

    def require_same(self, before: Mapping[str, Any]) -> None:
        """Refuse to resume a run with other settings, with more or fewer data, or with other processes.

        Args:
            before: config.json of the run.

        Raises:
            ConfigError: names all that differs.
        """
        changed = _changed(self.given, self.defaults, before, _FREE_ON_RESUME)
        lengths = before.get("resolved", {})
        changed += [
            f"{key} was {lengths.get(key)}, now {self.resolved[key]} (from the data and the number of processes)"
            for key in ("global_batch", "steps_per_epoch")
            if lengths.get(key) != self.resolved[key]
        ]
        if changed:
            raise ConfigError(f"--resume needs the settings that the run began with: {'; '.join(changed)}.")


def require_finished_as_asked(config: TrainConfig, before: Mapping[str, Any], folder: Path) -> None:
    """Refuse to take a finished run for one that is asked for with other settings, or on other data.

    Args:
        config: that is asked for.
        before: config.json of the finished run.
        folder: of its stage.

    Raises:
        ConfigError: names all that differs.
    """
    given, defaults = _with_whole_paths(to_plain(config)), to_plain(type(config)())
    changed = _changed(given, defaults, _with_whole_paths(before), _FREE_ON_RESUME - _PLACES)
    if changed:
        raise ConfigError(
            f"{folder} holds a finished run with other settings: {'; '.join(changed)}. Choose another --output-dir to keep it, "
            "or give --overwrite to replace it."
        )


def _changed(
    given: Mapping[str, Any], defaults: Mapping[str, Any], before: Mapping[str, Any], free: Collection[str]
) -> list[str]:
    """What differs, setting by setting, but for those that are free."""
    return [
        f"--{key.replace('_', '-')} was {was!r}, now {value!r}"
        for group, values in given.items()
        for key, value in values.items()
        # A setting that an earlier version did not know does by default what was done without it.
        if key not in free and (was := before.get(group, {}).get(key, defaults[group][key])) != value
    ]


def _with_whole_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with places from the root of the file system on, however they were given."""
    return {
        group: {key: str(Path(value).resolve()) if key in _PLACES and value else value for key, value in values.items()}
        for group, values in settings.items()
        if isinstance(values, Mapping)
    }


def comparable(config: CompareConfig, processes: int) -> dict[str, Any]:
    """What must stay as it is from one call to the next, or the rows would not compare. More rows may always be added.

    Args:
        config: of the series.
        processes: how many there are; this decides how large a batch is.
    """
    settings = {
        key: value
        for group, values in to_plain(config).items()
        if group != "compare"
        for key, value in values.items()
        if key not in _PLACES | _ON_THIS_MACHINE | _HOW_CHOSEN
    }
    return {**settings, "number of processes": processes}


def read_comparable(file: Path) -> dict[str, Any] | None:
    """Settings that a series was begun with; None where there is no such file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}. Choose another --output-dir.") from error
    return content


def require_comparable(now: Mapping[str, Any], before: Mapping[str, Any] | None, folder: Path) -> None:
    """Refuse to add rows that would not compare with those that are there.

    Args:
        now, before: what `comparable` says of this call and of the first.
        folder: of the series.

    Raises:
        ConfigError: names all that differs.
    """
    if before is None:
        return
    changed = [
        f"{key.replace('_', '-')} was {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds runs with other settings: {'; '.join(changed)}. Their rows would not compare; choose another "
            "--output-dir. (What the first group of --help lists may be changed.)"
        )
