"""Ways of saying a setting: the path first, --keep, --from-scratch, short and published names."""

from __future__ import annotations

import pytest

from p3b.commands.words import understand
from p3b.errors import ConfigError
from p3b.run.options import CompareConfig, PruneConfig, SweepConfig, TrainConfig


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("photos --epochs 3", "--data-path photos --epochs 3"),
        ("--epochs 3 photos", "--data-path photos --epochs 3"),
        ("--no-augment photos --mean 1 2 3", "--data-path photos --no-augment --mean 1 2 3"),
        ("--crop-scale 0.5 1.0 photos", "--data-path photos --crop-scale 0.5 1.0"),
        ("--epochs=3 photos", "--data-path photos --epochs=3"),
        ("photos --keep 0.3", "--data-path photos --prune-ratio 0.7"),
        ("photos --keep=1", "--data-path photos --prune-ratio=0"),
        ("photos --from-scratch", "--data-path photos --no-model-pretrained"),
        ("photos --output_dir a_b -q", "--data-path photos --output-dir a_b --quiet"),
        ("photos --lr -1", "--data-path photos --lr -1"),
        ("photos --classifiers 8 10", "--data-path photos --wd-classifiers 8 10"),
    ],
)
def test_other_ways_of_saying_a_setting(words: str, flags: str) -> None:
    assert " ".join(understand(PruneConfig, words.split()).flags) == flags


def test_several_budgets_are_kept_as_well() -> None:
    for settings in (CompareConfig, SweepConfig):
        assert understand(settings, ["photos", "--keep", "0.7", "0.5", "--epochs", "3"]).flags[2:] == (
            "--prune-ratios", "0.3", "0.5", "--epochs", "3",
        )  # fmt: skip


def test_what_is_given_is_known_by_the_name_of_the_setting() -> None:
    given = understand(PruneConfig, ["photos", "--keep", "0.3", "--no-augment", "--lr=1", "--from-scratch"]).given
    assert given == {"data_path", "prune_ratio", "augment", "lr", "model_pretrained"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a b", "Got a and b; expected one folder"),
        ("a --data-path b", "Got a and --data-path"),
        ("a --keep 0", r"in \(0, 1\], such as 0.5; got 0"),
        ("a --keep half", "got half"),
        ("a --keep 0.5 --prune-ratio 0.5", "say the same thing in two ways"),
        ("a --from-scratch --model-path w.pth", "contradicts --model-path"),
    ],
)
def test_words_that_contradict_each_other(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        understand(PruneConfig, words.split())


def test_what_a_command_has_no_setting_for_is_left_to_its_parser() -> None:
    assert understand(TrainConfig, ["--keep", "0.5"]).flags == ("--keep", "0.5")
