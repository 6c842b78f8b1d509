"""Help by levels, completion, and settings given back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import p3b.commands.train
from p3b.commands.command_line import COMMANDS, main
from p3b.commands.first_help import _HELP, _TEXTS
from p3b.commands.words import FROM_SCRATCH, KEEP
from p3b.run.augment_options import AugmentOptions
from p3b.run.flags import settings_of
from p3b.run.options import DataOptions, TrainConfig, TrainingOptions, to_plain
from runs import run


@pytest.mark.parametrize("command", _HELP)
def test_the_first_help_fits_a_screen_and_names_what_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 24 and max(map(len, said)) <= 80
    module, name = COMMANDS[command].settings.split(":")
    settings = getattr(__import__(module, fromlist=[name]), name)
    known = {"--" + setting.replace("_", "-") for setting, _ in settings_of(settings())} | {KEEP, FROM_SCRATCH, "--config"}
    assert len(_HELP[command].flags) <= 10 and set(_HELP[command].flags) <= known
    assert sum(line.startswith("example: ") for line in said) == 1


def test_every_text_is_shown_somewhere() -> None:
    assert {flag for shown in _HELP.values() for flag in shown.flags} == _TEXTS.keys()


def test_an_unknown_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "photos", "--epoch", "3") == 2
    said = capsys.readouterr()
    assert "Perhaps you meant" in said.err + said.out and "--epochs" in said.err + said.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "sweep" in said and "prune-ratio" in said
    assert main(["completion"]) == 2 and "bash, zsh, fish" in capsys.readouterr().err


def test_the_config_of_a_run_can_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any command takes what it has a setting for; flags on the command line win, and the old folder is not given back."""
    before = TrainConfig(
        data=DataOptions(data_path=Path("photos"), cache="off"),
        training=TrainingOptions(epochs=7, lr=3e-5, model_ema=True, clip_grad=None),
        augment=AugmentOptions(aa=None, crop_scale=(0.5, 1.0), repeated_aug=False),
    )
    written = {**to_plain(before), "resolved": {"lr": 1.0}, "launch": None}
    written["run"] |= {"output_dir": "old", "resume": True}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**written, "prune": {"prune_ratio": 0.3}}))
    found: list[TrainConfig] = []
    monkeypatch.setattr(p3b.commands.train, "train", lambda config, splits: found.append(config))
    assert main(["train", "--config", str(file), "--epochs", "9", "--output-dir", "new"]) == 0
    (again,) = found
    assert again.training.epochs == 9 and again.training.lr == 3e-5 and again.training.model_ema
    assert (again.data, again.augment) == (before.data, before.augment)
    assert again.run.output_dir == Path("new") and not again.run.resume


def test_a_file_without_settings_of_the_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text("{}")
    assert main(["train", "--config", str(tmp_path / "summary.json")]) == 2
    assert "expected a config.json that a run wrote" in capsys.readouterr().err
    assert main(["train", "--config"]) == 2 and "--config is given no file" in capsys.readouterr().err
