"""The study of recipes: names, flags that a command takes, and what its page says of its lines."""

from __future__ import annotations

from typing import Any

import pytest

from p3b.commands.command_line import _parse
from recipes import AUTO, BY_HAND, CHANGED, MACHINE, SHAPE, flags_of, names, split_name, tables


def line(data: str, recipe: str, top1: float, seed: int = 0) -> dict[str, Any]:
    return {
        "name": f"{data}-{recipe}-seed{seed}", "data": data, "recipe": recipe, "seed": seed, "top1": top1, "train_images": 240,
        "images": {"val": 24, "test": 1200}, "command": "python benchmarks/recipes.py run", "commit": "0" * 40,
        "hardware": {"machine": "x86_64", "cores": 2, "threads": 1, "accelerator": None}, "seconds": 20.0,
    }  # fmt: skip


def test_every_run_has_a_name_that_says_what_it_is() -> None:
    assert len(set(names())) == len(names()) and len(BY_HAND) == 12
    for name in names():
        data, recipe, seed = split_name(name)
        assert name == f"{data}-{recipe}-seed{seed}" and recipe in {AUTO, *BY_HAND, *CHANGED}


@pytest.mark.parametrize("recipe", [AUTO, *CHANGED, *BY_HAND])
def test_the_command_takes_the_flags_of_every_recipe(recipe: str) -> None:
    words = f"folder --keep 0.5 --output-dir out {SHAPE} {flags_of(recipe)} {MACHINE} --seed 1 --overwrite".split()
    config, given = _parse("prune", words, "p3b prune", published=False)
    assert config.recipe.recipe == ("paper" if recipe in BY_HAND else AUTO) and config.run.track == ("none",)
    assert ("lr" in given) == (recipe in BY_HAND)


def test_the_page_says_what_auto_loses_against_the_best() -> None:
    lines = [line("digits", recipe, 80.0 + number) for number, recipe in enumerate(BY_HAND)]
    lines += [line("digits", AUTO, 90.0), line("digits", AUTO, 91.0, seed=1), line("digits", "auto-layers", 89.5)]
    lines.append(line("shapes", AUTO, 40.0))
    text = "\n".join(tables(lines))
    best = list(BY_HAND)[-1]
    assert f"| 90.50 | 91.00 | -0.50 | 85.50 | 80.00 | {best} | 1 |" in text
    assert "| digits | --layer-decay 0.75 | 89.50 | -1.00 | 1 |" in text
    assert "0 of 12 are run" in text, "a data set that is not done says so"
