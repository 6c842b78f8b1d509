"""What the arguments of a description may be: a description is read from files of unknown origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST_BLOCKS, MOST_CHANNELS, MOST_STAGES = 1024, 1 << 16, 8
"""Far above any Vision Transformer. A description is read from files, and building what it asks for must stay cheap."""

Rule = tuple[Callable[[Any], bool], str]
"""What an argument of a description may be: as a question, and in words."""


def is_whole(low: int, high: int) -> Callable[[Any], bool]:
    """Whether a value is a whole number of a range."""
    return lambda value: type(value) is int and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether a value is a number that a model may be built with."""
    return type(value) in (int, float) and 0.0 <= value <= MOST_CHANNELS


def is_pair(value: Any) -> bool:
    """Whether a value is a list of two sizes."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_whole(1, MOST_CHANNELS), value))


def is_pair_from_0(value: Any) -> bool:
    """Whether a value is a list of two sizes that may be zero."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_whole(0, MOST_CHANNELS), value))


def is_one_of(known: Sequence[Any]) -> Callable[[Any], bool]:
    """Whether a value is one of some."""
    choices = tuple(known)
    return lambda value: type(value) in map(type, choices) and value in choices


def is_flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return type(value) is bool


FLAG: Rule = (is_flag, "true or false")
PAIR: Rule = (is_pair, f"two whole numbers from 1 to {MOST_CHANNELS}")
PAIR_OR_NULL: Rule = (lambda value: value is None or is_pair(value), f"{PAIR[1]}, or null")
SIZE: Rule = (is_whole(1, MOST_CHANNELS), f"a whole number from 1 to {MOST_CHANNELS}")
COUNT: Rule = (is_whole(0, MOST_CHANNELS), f"a whole number from 0 to {MOST_CHANNELS}")
CLASSES: Rule = (is_whole(0, 1 << 24), "a whole number from 0 to 16777216")
DEPTH: Rule = (is_whole(1, MOST_BLOCKS), f"a whole number from 1 to {MOST_BLOCKS}")
NUMBER: Rule = (is_number, f"a number from 0 to {MOST_CHANNELS}")
NUMBER_OR_NULL: Rule = (lambda value: value is None or is_number(value), "a number or null")
OF_SHAPE: Mapping[str, Rule] = {
    **dict.fromkeys(("img_size", "patch_size"), PAIR),
    **dict.fromkeys(("in_chans", "embed_dim", "num_heads"), SIZE),
    "num_classes": CLASSES,
    "depth": DEPTH,
    **dict.fromkeys(("mlp_ratio", "norm_eps"), NUMBER),
}
"""Of the arguments that families of blocks alike have in common."""


def of_stages(fits: Callable[[Any], bool], words: str) -> Rule:
    """The rule that a value is a list with an entry for each stage."""
    return (
        lambda value: isinstance(value, list) and 1 <= len(value) <= MOST_STAGES and all(map(fits, value)),
        f"a list of {words}, one for each of at most {MOST_STAGES} stages",
    )


def one_of(known: Sequence[str], words: str | None = None) -> Rule:
    """The rule that a value is one of some names."""
    return is_one_of(known), words or f"one of {', '.join(known)}"
