"""From what is given to all settings: data, model and machine are looked at, and the config says what was chosen and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import p3b.run.inputs
from p3b.data import DataSplits
from p3b.errors import ScheduleError
from p3b.run.options import (
    DataOptions,
    ModelOptions,
    PhaseOptions,
    PruneConfig,
    RecipeOptions,
    RunOptions,
    SweepConfig,
    SweepOptions,
    TrainingOptions,
)
from p3b.run.prune_plan import plan_pruning
from p3b.run.recipe_choice import Config, recipe_lines, settle
from p3b.run.recipe_facts import weights_fit
from p3b.train.distributed import Processes
from runs import SHAPE, colour_folders, flags, lines, read, run, same_tensors, weights

CPU = torch.device("cpu")
TINY = ModelOptions(model="vit_tiny_patch16_224", model_kwargs=SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("data"))


def config_for(data: Path, recipe: str, model: ModelOptions = TINY) -> PruneConfig:
    chosen = RecipeOptions(recipe)  # type: ignore[arg-type]
    run_options = RunOptions(output_dir=Path("out") if recipe == "paper" else None)
    return PruneConfig(DataOptions(data_path=data), model, run=run_options, recipe=chosen)


def settled(config: Config, *given: str) -> Config:
    return settle(config, frozenset(given), "prune", Processes(), CPU)


def test_paper_chooses_weights_alone(data: Path) -> None:
    config = config_for(data, "paper", ModelOptions())
    found = settled(config)
    assert found.model.model_pretrained and set(found.recipe.reasons) == {"model_pretrained"}
    assert replace(found, model=config.model, recipe=config.recipe) == config
    assert settled(config, "model_pretrained") == config


def test_random_weights_only_where_no_others_fit(data: Path) -> None:
    for kwargs, fits in ((("img_size=96",), True), (("patch_size=8",), True), (("depth=2",), False), (("depth=12",), True)):
        found = settled(config_for(data, "paper", ModelOptions(model_kwargs=kwargs)))
        assert found.model.model_pretrained is fits, kwargs
    assert "random weights: none that are known have the shape depth=2" in found.recipe.reasons["model_pretrained"] or fits
    from_file = settled(config_for(data, "paper", ModelOptions(model_path=Path("w.pth"))))
    assert not from_file.model.model_pretrained and not from_file.recipe.reasons


def test_auto_settles_what_is_not_given(data: Path) -> None:
    config = replace(config_for(data, "auto"), training=TrainingOptions(mixup=0.4))
    found = settled(config, "mixup", "data_path")
    assert isinstance(found, PruneConfig)
    assert found.training.mixup == 0.4 and "mixup" not in found.recipe.reasons
    assert (
        found.training.batch_size == 4 and found.augment.crop_scale == (0.6, 1.0) and found.prune.prune_update_every is not None
    )
    assert found.run.output_dir == Path("runs") / data.name.lower()
    assert f"recipe auto: --batch-size 4  ({found.recipe.reasons['batch_size']})" in recipe_lines(found)
    assert settled(found, "data_path", "mixup") == found, "to settle again changes nothing"


def test_series_are_settled_as_runs_are(data: Path) -> None:
    of_run = settled(config_for(data, "auto"))
    series = SweepConfig(SweepOptions(max_loss=1), DataOptions(data_path=data), TINY, recipe=RecipeOptions("auto"))
    found = settled(series)
    assert isinstance(of_run, PruneConfig)
    assert (found.training, found.augment) == (of_run.training, of_run.augment)


def test_an_interval_may_be_longer_than_an_epoch() -> None:
    """A published interval gives way to three updates an epoch; one in steps, epochs or a share does not."""
    found = [
        plan_pruning(options, 20, 7, 1).schedule.update_every
        for options in (
            PhaseOptions(prune_steps_update_mask=30),
            PhaseOptions(prune_update_every="30steps"),
            PhaseOptions(prune_update_every="2"),
            PhaseOptions(prune_update_every="10%"),
        )
    ]
    assert found == [2, 30, 14, 14]
    with pytest.raises(ScheduleError, match="say the same thing"):
        plan_pruning(PhaseOptions(prune_update_every="2", prune_steps_update_mask=3), 20, 7, 1)


def test_a_run_says_and_keeps_what_was_chosen_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the data would now lead to other choices: what was begun is gone on with. Each time they are opened once."""
    opened: list[object] = []
    really = p3b.run.inputs.open_data

    def open_and_count(*given: Any, **options: Any) -> DataSplits:
        opened.append(given)
        return really(*given, **options)

    monkeypatch.setattr(p3b.run.inputs, "open_data", open_and_count)
    photos = colour_folders(tmp_path / "photos")
    given = ("--epochs", "2", "--finetune-epochs", "0", "--from-scratch", "--layout", "folded")
    words = [word for word in flags(photos, tmp_path / "out", *given, recipe=()) if word not in ("--batch-size", "4")]
    words += ["--batch-size", "6"]
    assert run("prune", *words) == 0 and len(opened) == 1
    config = read(tmp_path / "out" / "prune" / "config.json")
    assert config["recipe"]["recipe"] == "auto" and config["training"]["batch_size"] == 6
    assert {"lr", "mixup", "prune_update_every"} <= config["recipe"]["reasons"].keys()
    assert (
        "recipe auto: --mixup 0.0  (mild augmentation, since each image is seen 2 times only)"
        in (tmp_path / "out" / "prune" / "log.txt").read_text()
    )
    (tmp_path / "out" / "prune" / "summary.json").unlink()
    assert run("prune", *words, "--lr", str(config["training"]["lr"]), "--resume") == 0 and len(opened) == 2
    assert read(tmp_path / "out" / "prune" / "config.json")["training"] == config["training"]


def test_all_flags_given_make_the_same_numbers_by_every_recipe(data: Path, tmp_path: Path) -> None:
    """An explicit flag always wins: with all of them the config.json of a run gives its numbers back, bit for bit."""
    given = ("--epochs", "2", "--prune-start-epoch", "0", "--from-scratch", "--layout", "folded")
    assert run("prune", *flags(data, tmp_path / "paper", *given)) == 0
    again = ("--config", str(tmp_path / "paper" / "prune" / "config.json"), "--recipe", "auto")
    assert run("prune", *again, "--output-dir", str(tmp_path / "auto")) == 0
    assert read(tmp_path / "auto" / "prune" / "config.json")["recipe"] == {"recipe": "auto", "reasons": {}}
    assert same_tensors(*(weights(tmp_path / name / "pruned") for name in ("paper", "auto")))
    losses = [[line["train_loss"] for line in lines(tmp_path / name / "prune" / "metrics.jsonl")] for name in ("paper", "auto")]
    assert losses[0] == losses[1]


def test_run_options_are_not_chosen(data: Path) -> None:
    config = replace(config_for(data, "auto"), run=RunOptions(seed=3, output_dir=Path("here")))
    assert settled(config, "output_dir", "seed").run == config.run


def test_means_of_a_grey_model_are_not_asked_of_the_named_one() -> None:
    options = ModelOptions(model="vit_tiny_patch16_224", model_kwargs=("in_chans=1",), mean=(0.5,), std=(0.5,))
    assert weights_fit(options), "timm makes grey weights of RGB ones"
    assert not weights_fit(replace(options, model_kwargs=("in_chans=1", "embed_dim=48", "num_heads=3")))
