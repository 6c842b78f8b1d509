"""docs/flags.md, made from the settings of the commands: every group of flags once, then each command's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from made_markdown import MADE, anchor, cell, field_texts, listed, page, sentence, table
from p3b.commands.command_line import COMMANDS
from p3b.commands.words import OTHER_NAMES
from p3b.run.flags import NO_FLAG

TITLES = {
    "PhaseOptions": "Pruning",
    "PruneOptions": "Pruning: method and budget",
    "MachineOptions": "Run",
    "RunOptions": "Run: resume and seed",
}
"""Of groups whose own first words are those of another one."""
HEAD = """`p3b <command> --help` shows the flags that matter, `--help-all` shows all of them. Hyphens and underscores are
equivalent. If a flag is given twice, the last one counts. [Settings](settings.md) explains what belongs together,
[your photos](photos.md) explains what `--recipe auto` chooses. The defaults below are those of `--recipe paper`."""
IN_OTHER_WORDS = (
    ("`p3b prune photos`", "`p3b prune --data-path photos`; the same for every command that takes images"),
    ("`--keep 0.3`", "`--prune-ratio 0.7`; in `compare` and `sweep`, `--prune-ratios`"),
    ("`--from-scratch`", "`--no-model-pretrained`: start from random weights"),
    (
        "`--config FILE`",
        "settings from YAML, one `name: value` a line, or from the `config.json` of a run; flags win over it",
    ),
    ("`block_pr`", "the published name of `--prune-method block_benefit`, with `--prune-benefit paper`"),
)


@dataclass(frozen=True)
class Setting:
    """A flag of a command.

    Attributes:
        owner: class whose field it is.
        name: of the field.
        kind: its type.
        default: MISSING where it has to be given.
        positional: whether it is given without its name.
    """

    owner: type
    name: str
    kind: Any
    default: Any
    positional: bool


Rows = Mapping[str, Mapping[str, Setting]]
"""Settings by name and by the commands that take them."""


def flags_page() -> str:
    """The page."""
    by_owner: dict[type, dict[str, dict[str, Setting]]] = {}
    for name in COMMANDS:
        for setting in settings_in(settings_class(name)):
            by_owner.setdefault(setting.owner, {}).setdefault(setting.name, {})[name] = setting
    groups = {owner: rows for owner, rows in by_owner.items() if owner.__name__.endswith("Options")}
    purposes = [(f"[`p3b {name}`](#p3b-{name})", command.purpose) for name, command in COMMANDS.items()]
    short = [(f"`{given}`", f"`{means}`") for given, means in OTHER_NAMES.items()]
    lines = [MADE, "", "# Every flag", "", HEAD, "", "## Commands", "", *table(("command", "what it does"), purposes)]
    lines += ["## In other words", "", *table(("given", "means"), [*IN_OTHER_WORDS, *short])]
    for owner, rows in groups.items():
        taken = dict.fromkeys(command for by_command in rows.values() for command in by_command)
        lines += [f"## {_title(owner)}", "", f"Taken by {listed([f'`{name}`' for name in taken])}.", "", *_flags(rows)]
    for name in COMMANDS:
        lines += [f"## p3b {name}", "", *_command(name, groups)]
    return page(lines)


def settings_class(command: str) -> type:
    """Class of a command's settings."""
    module, name = COMMANDS[command].settings.split(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def settings_in(kind: type, defaults: Any = None) -> Iterator[Setting]:
    """Every flag of a class of settings, those of its groups in their places.

    Args:
        kind: the class.
        defaults: an object of it whose values are the defaults; by default those of the class count.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, marks = hints[field.name], []
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from settings_in(hint, default)
        elif field.name not in NO_FLAG:
            yield Setting(
                _owner(kind, field.name), field.name, hint, default, any("OSITIONAL" in repr(mark).upper() for mark in marks)
            )


def _command(name: str, groups: Iterable[type]) -> list[str]:
    """What one command takes: the groups, and what is its own."""
    settings = list(settings_in(settings_class(name)))
    owners = {setting.owner for setting in settings}
    links = [f"[{_title(owner)}](#{anchor(_title(owner))})" for owner in groups if owner in owners]
    own = {setting.name: {name: setting} for setting in settings if setting.owner not in groups}
    return [
        sentence(settings_class(name)),
        "",
        *([f"Takes {listed(links)}.", ""] if links else []),
        *(_flags(own) if own else []),
    ]


def _title(owner: type) -> str:
    return TITLES.get(owner.__name__, sentence(owner).split(":")[0].rstrip("."))


def _flags(rows: Rows) -> list[str]:
    return table(("flag", "value", "default", "meaning"), [_row(list(by_command.items())) for by_command in rows.values()])


def _row(by_command: Sequence[tuple[str, Setting]]) -> tuple[str, str, str, str]:
    setting = by_command[0][1]
    flag = "--" + setting.name.replace("_", "-")
    written = setting.name.upper() if setting.positional else flag
    of: dict[str, list[str]] = {}
    for command, each in by_command:
        of.setdefault(_shown(each.default), []).append(command)
    first, *others = of
    default = "; ".join([first, *(f"{value} in {listed([f'`{name}`' for name in of[value]])}" for value in others)])
    switch = f", `--no-{flag[2:]}`" if setting.kind is bool else ""
    return f"`{written}`{switch}", _values(setting.kind), default, cell(field_texts(setting.owner)[setting.name])


def _values(kind: Any) -> str:
    """What is written behind the flag, in words."""
    if get_origin(kind) in (Union, UnionType):
        return ", ".join(_values(each) for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        of, *rest = get_args(kind)
        word = {int: "whole numbers", float: "numbers", str: "words", Path: "paths"}.get(of) or f"some of {_values(of)}"
        return word if rest == [...] else f"{len(rest) + 1} {word}"
    return {bool: "", int: "whole number", float: "number", str: "word", Path: "path"}[kind]


def _shown(default: Any) -> str:
    if default is MISSING:
        return "required"
    if default is None or default in ((), ""):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default))}`" if isinstance(default, tuple) else f"`{default}`"


def _owner(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in inspect.get_annotations(base))


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
