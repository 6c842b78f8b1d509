"""`none` and `None` are the same, whatever the type of the setting."""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import get_args, get_type_hints

import pytest
import tyro

from p3b.run.augment_options import AugmentOptions
from p3b.run.none_values import with_one_none
from p3b.run.options import DataOptions, ModelOptions, TrainConfig, TrainingOptions

GROUPS = (DataOptions, ModelOptions, TrainingOptions, AugmentOptions)
MAY_BE_NONE = [name for group in GROUPS for name, kind in get_type_hints(group).items() if NoneType in get_args(kind)]


def parsed(*words: str) -> TrainConfig:
    return tyro.cli(TrainConfig, args=with_one_none(TrainConfig, words), config=(tyro.conf.OmitArgPrefixes,))


@pytest.mark.parametrize("written", ["none", "None", "NONE"])
def test_every_setting_that_may_be_none_takes_it_however_it_is_written(written: str) -> None:
    words = [word for name in MAY_BE_NONE for word in (f"--{name.replace('_', '-')}", written)]
    config = parsed(*words)
    values = {field.name: getattr(group, field.name) for group in vars(config).values() for field in fields(group)}
    assert len(MAY_BE_NONE) > 8 and all(values[name] is None for name in MAY_BE_NONE)


@pytest.mark.parametrize("written", ["--distillation-type=None", "--distillation_type=none"])
def test_a_choice_called_none_is_that_choice(written: str) -> None:
    assert parsed(written).training.distillation_type == "none"


def test_other_words_stay_as_they_are() -> None:
    words = ["--aa", "rand-m9", "--data-path", "nonesuch", "--model-kwargs", "global_pool=avg", "-v"]
    assert with_one_none(TrainConfig, words) == words
