"""The words of a command line as flags: what may be said in other ways, and which settings are given at all.

p3b prune photos --keep 0.3 --from-scratch     is     p3b prune --data-path photos --prune-ratio 0.7 --no-model-pretrained
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from p3b.errors import ConfigError
from p3b.run.flags import NO_FLAG
from p3b.run.none_values import types_of

OTHER_NAMES = {
    "--classifiers": "--wd-classifiers",
    "--classifier-choose": "--wd-classifier-choose",
    "-v": "--verbose",
    "-q": "--quiet",
}
"""Flags of other methods' published command lines and short ones, and what they are called here."""
KEEP, FROM_SCRATCH, PATH = "--keep", "--from-scratch", "--data-path"
_ANY = -1
"""Of a setting that takes any number of values."""


@dataclass(frozen=True)
class Words:
    """A command line that is understood.

    Attributes:
        flags: every setting under its own name.
        given: names of the settings that are given, as of the fields.
    """

    flags: tuple[str, ...]
    given: frozenset[str]


def understand(settings: type, words: Sequence[str]) -> Words:
    """Put words into flags.

    Args:
        settings: class of the command's settings.
        words: of the command line, behind the command.

    Raises:
        ConfigError: a path that is given twice, --keep outside (0, 1], or flags that contradict each other.
    """
    takes = dict(_values_taken(settings))
    takes_path = any(field.name == "data" for field in fields(settings))  # the group of all settings about images
    flags: list[str] = []
    paths: list[str] = []
    given: set[str] = set()
    left = 0  # values that the last flag still takes
    for word in map(_our_name, words):
        if _is_flag(word):
            name = word.partition("=")[0]
            given.add(name)
            left = 0 if "=" in word else _count(name, takes)
        elif left == 0 and takes_path:
            paths.append(word)
            continue
        else:
            left -= 1
        flags.append(word)
    return _without_other_ways([*_path_flag(paths, given), *flags], takes)


def _without_other_ways(flags: Sequence[str], takes: Mapping[str, int]) -> Words:
    """Replace --keep and --from-scratch, where the command has what they stand for."""
    named = {flag.partition("=")[0] for flag in flags if _is_flag(flag)}
    words = list(flags)
    ratio = next((name for name in ("prune_ratio", "prune_ratios") if name in takes), None)
    if KEEP in named and ratio is not None:
        if _flag(ratio) in named:
            raise ConfigError(f"{KEEP} and {_flag(ratio)} say the same thing in two ways; give one of them.")
        words = list(_goes_for_stays(words, _flag(ratio)))
    if FROM_SCRATCH in named and "model_pretrained" in takes:
        for other in ("--model-path", "--model-pretrained"):
            if other in named:
                raise ConfigError(f"{FROM_SCRATCH} starts from random weights and contradicts {other}; give one of them.")
        words = ["--no-model-pretrained" if word == FROM_SCRATCH else word for word in words]
    return Words(tuple(words), frozenset(_settings_given(words, takes)))


def _goes_for_stays(words: Sequence[str], ratio_flag: str) -> Iterator[str]:
    """--keep 0.3 as --prune-ratio 0.7."""
    within = False
    for word in words:
        name, equals, value = word.partition("=")
        if _is_flag(word):
            within = name == KEEP
            yield (ratio_flag + (f"={_goes(value)}" if equals else "")) if within else word
        else:
            yield _goes(word) if within else word


def _goes(stays: str) -> str:
    try:
        share = float(stays)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{KEEP} is the share of all parameters that stays, in (0, 1], such as 0.5; got {stays}.")
    return f"{1 - share:.12g}"


def _path_flag(paths: Sequence[str], given: set[str]) -> list[str]:
    if not paths:
        return []
    if len(paths) > 1 or PATH in given:
        told = " and ".join([*paths, *([PATH] if PATH in given else [])])
        raise ConfigError(f"Got {told}; expected one folder or tar of images: p3b <command> photos.")
    return [PATH, paths[0]]


def _settings_given(words: Sequence[str], takes: Mapping[str, int]) -> Iterator[str]:
    for word in words:
        if _is_flag(word):
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            yield name if name in takes else name.removeprefix("no_")


def _our_name(word: str) -> str:
    """A word with the name that a flag has here, with hyphens."""
    if not _is_flag(word):
        return word
    flag, equals, value = word.partition("=")
    name = flag.replace("_", "-")
    return OTHER_NAMES.get(name, name) + equals + value


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit() and word not in ("-", "--")


def _count(flag: str, takes: Mapping[str, int]) -> int:
    if flag == KEEP:
        return takes.get("prune_ratios", 1)
    name = flag.removeprefix("--").replace("-", "_")
    return takes.get(name, 0 if name.startswith("no_") or flag == FROM_SCRATCH else _ANY)


def _values_taken(settings: type) -> Iterator[tuple[str, int]]:
    """Every setting with the number of values that its flag takes."""
    return ((name, _values_of(kind)) for name, kind in types_of(settings).items() if name not in NO_FLAG)


def _values_of(kind: Any) -> int:
    if get_origin(kind) in (Union, UnionType):
        return max((_values_of(each) for each in get_args(kind) if each is not NoneType), key=lambda count: count == _ANY)
    if get_origin(kind) is tuple:
        return _ANY if Ellipsis in get_args(kind) else len(get_args(kind))
    return 0 if kind is bool else 1


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
