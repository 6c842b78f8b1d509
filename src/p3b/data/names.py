"""Names that people give to the parts of a data set."""

from __future__ import annotations

import re
from collections.abc import Sequence

PART_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "development", "holdout", "hold-out", "hold_out"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
"""Words for each part, in any case."""

_KINDS = r"(?:set|data|dataset|images?|imgs?|split|part|folder)"
_LISTS = r"(?:set|data|images?|imgs?|list|files?|filelist|labels?|annotations?|info|split|solution|classes)"
_WORDS = "|".join(re.escape(word) for words in PART_WORDS.values() for word in words)
_PART_OF_WORD = {word: part for part, words in PART_WORDS.items() for word in words}
_FOLDER = re.compile(rf"(?:(?:images?|imgs?|data)[ _-])?(?P<word>{_WORDS})(?:[ _-]?{_KINDS})?(?:[ _-]?(?:19|20)\d\d)?")
_LIST = re.compile(rf"(?:(?:loc|images?|imgs?|data)[ _-])?(?P<word>{_WORDS})(?:[ _-]?{_LISTS})*(?:[ _-]?\d+)?")
_LIKE_A_PART = re.compile(rf"(?P<word>{_WORDS})(?![a-z])")
_TRAIN_AND_VAL = re.compile(r"train(?:ing)?[ _-]?(?:and[ _-])?(?:val|valid|validation)[ _-]?(?:set|images)?[ _-]?\d*")


def part_of(name: str, *, with_lists: bool = False) -> str | None:
    """The part that a folder's name stands for: train, val, test or None. With `with_lists`, that of a list's name."""
    match = (_LIST if with_lists else _FOLDER).fullmatch(name.casefold())
    return None if match is None else _PART_OF_WORD[match["word"]]


def like_a_part(name: str) -> str | None:
    """The part that a name begins with, as train_mini or test2 do; None for others, training_shoes among them."""
    match = _LIKE_A_PART.match(name.casefold())
    return None if match is None else _PART_OF_WORD[match["word"]]


def looks_like_train_and_val(names: Sequence[str]) -> bool:
    """Whether a name is that of one folder for both training and validation, as train_val2018."""
    return any(_TRAIN_AND_VAL.fullmatch(name.casefold()) for name in names)
