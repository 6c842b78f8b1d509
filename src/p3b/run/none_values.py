"""`none` and `None` mean the same on the command line, whatever the type of the setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_type_hints


def with_one_none(config_class: type, words: Sequence[str]) -> list[str]:
    """The words of a command line with every value `none`, in any case, as its flag spells it.

    A setting that may be None takes `None`; one whose choices have the word `none` takes that.

    Args:
        config_class: settings of the command.
        words: flags and values.
    """
    spelling = {name: "None" if NoneType in get_args(kind) else "none" for name, kind in types_of(config_class).items()}
    written: list[str] = []
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            word = flag + equals + _spelled(value, flag, spelling)
        else:
            word = _spelled(word, flag, spelling)
        written.append(word)
    return written


def _spelled(value: str, flag: str, spelling: dict[str, str]) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    return spelling.get(name, value) if value.casefold() == "none" else value


@cache
def types_of(config_class: type) -> Mapping[str, Any]:
    """Every setting of a command with its type, those of its groups in their places."""
    hints = get_type_hints(config_class)
    found: dict[str, Any] = {}
    for field in fields(config_class):
        kind = hints[field.name]
        found |= types_of(kind) if isinstance(kind, type) and is_dataclass(kind) else {field.name: kind}
    return MappingProxyType(found)
