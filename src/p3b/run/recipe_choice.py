"""From what is given on a command line to all settings of a run: the recipe chooses the rest, and the config says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from p3b.data import DataSplits
from p3b.run.flags import flag, settings_of
from p3b.run.folder import StageFolder, restarted_by
from p3b.run.inputs import open_splits
from p3b.run.option_checks import check
from p3b.run.options import CompareConfig, ModelOptions, PruneConfig, RecipeOptions, SweepConfig, TrainConfig
from p3b.run.recipe_facts import read_facts, weights_fit
from p3b.run.recipe_terms import Choice
from p3b.run.recipes import auto_recipe, small_recipe
from p3b.train.distributed import Processes

Config = TrainConfig | CompareConfig | SweepConfig

RUNS_FOLDER = Path("runs")
"""Where a run is written that is given no output folder."""


def settle(
    config: Config,
    given: frozenset[str],
    stage: str,
    processes: Processes,
    device: torch.device,
    keep: Callable[[DataSplits], object] = lambda _splits: None,
) -> Config:
    """Choose what is not given, by the recipe that the config names.

    Args:
        config: settings as they were parsed.
        given: names of the settings that are given; they stay as they are.
        stage: name of the command.
        processes, device: that the run will use.
        keep: is given the data where they were opened, so that the run need not open them again.

    Returns:
        The config with all choices, and with the reason of each in `recipe.reasons`.

    Raises:
        UserError: data, model or settings that cannot be used.
    """
    config = _with(config, list(_output(config)))
    if isinstance(config, TrainConfig):
        check(config)
    if "model_pretrained" not in given and config.model.model_path is None:
        config = _with(config, [_weights(config.model)])
    if config.recipe.recipe == "paper":
        return config
    given = given | config.recipe.reasons.keys()
    if isinstance(config, TrainConfig):
        begun = _of_begun_run(config, given, stage)
        if begun is not None:
            return _with(config, begun)
    values = {name: value for name, value in settings_of(config) if name in given}
    if config.recipe.recipe == "small":
        return _with(config, small_recipe(values, prunes=_prunes(config)).choices)
    seed = _seed(config)
    splits = open_splits(config.data, seed, processes)
    keep(splits)
    facts = read_facts(splits, config.model, processes, device, seed=seed, prunes=_prunes(config))
    return _with(config, auto_recipe(facts, values).choices)


def recipe_lines(config: Config) -> list[str]:
    """What was chosen and why, a line for each setting."""
    values, reasons = dict(settings_of(config)), config.recipe.reasons
    return [f"recipe {config.recipe.recipe}: {' '.join(flag(name, values[name]))}  ({reasons[name]})" for name in reasons]


def _output(config: Config) -> Iterator[Choice]:
    """A folder to write to, named after the images."""
    place = config.data.data_path
    if config.run.output_dir is None and config.recipe.recipe != "paper":
        name = config.data.data_set.replace("/", "-") if place is None else place.resolve().name.removesuffix(".tar")
        yield Choice("output_dir", RUNS_FOLDER / name.lower(), "none was given")


def _weights(model: ModelOptions) -> Choice:
    if weights_fit(model):
        return Choice(
            "model_pretrained", True, f"timm's weights of {model.model}, since no --model-path and no --from-scratch was given"
        )
    shape = " ".join(model.model_kwargs)
    return Choice(
        "model_pretrained", False, f"random weights: none that are known have the shape {shape}; a file: --model-path"
    )


def _of_begun_run(config: TrainConfig, given: frozenset[str], stage: str) -> list[Choice] | None:
    """What was chosen when the run that is gone on with began; None where there is none."""
    assert config.run.output_dir is not None
    folder = StageFolder(config.run.output_dir, stage)
    if not folder.has_begun or not (config.run.resume or folder.begun_by(restarted_by())):
        return None
    before = folder.read_json("config.json")
    chosen: Mapping[str, str] = before.get("recipe", {}).get("reasons", {})
    values = {name: value for group in before.values() if isinstance(group, dict) for name, value in group.items()}
    known = dict(settings_of(config))
    return [
        Choice(name, tuple(value) if isinstance(value := values[name], list) else value, reason)
        for name, reason in chosen.items()
        if name in known and name not in given
    ]


def _with(config: Config, choices: Sequence[Choice]) -> Config:
    """The config with these values in their groups, and with the reasons; a setting that it does not have is left out."""
    values = {choice.setting: choice.value for choice in choices}
    reasons = {choice.setting: choice.reason for choice in choices}
    known = {name for name, _ in settings_of(config)}
    groups: dict[str, Any] = {}
    for field in fields(config):
        group = getattr(config, field.name)
        if is_dataclass(group) and not isinstance(group, (type, RecipeOptions)):
            own = {each.name for each in fields(group)} & values.keys()
            groups[field.name] = replace(group, **{name: values[name] for name in own})
    told = {**config.recipe.reasons, **{name: reason for name, reason in reasons.items() if name in known}}
    return replace(config, **groups, recipe=replace(config.recipe, reasons=told))


def _prunes(config: Config) -> bool:
    return isinstance(config, (PruneConfig, CompareConfig, SweepConfig))


def _seed(config: Config) -> int:
    if isinstance(config, TrainConfig):
        return config.run.seed
    return config.sweep.seed if isinstance(config, SweepConfig) else config.compare.seeds[0]
