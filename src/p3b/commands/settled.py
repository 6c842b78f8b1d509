"""The settings of a command with what its recipe chooses; this loads torch and looks at the data, which are opened once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from p3b.data import DataSplits
from p3b.run.options import CompareConfig, TrainConfig
from p3b.run.recipe_choice import Config, recipe_lines, settle
from p3b.run.screen import open_screen
from p3b.train.distributed import process_group


@contextmanager
def with_recipe(name: str, config: Config, given: frozenset[str]) -> Iterator[tuple[Config, DataSplits | None]]:
    """Settle the config within the group of processes, which stays for the command.

    Args:
        name: of the command.
        config: as it was parsed.
        given: names of the settings that are given.

    Yields:
        The config, and the data where the recipe has opened them.

    Raises:
        UserError: data, model or settings that cannot be used.
    """
    if isinstance(config, CompareConfig) and config.compare.table_only:
        yield config, None
        return
    with process_group(config.run.device, config.run.timeout_minutes) as (processes, device):
        opened: list[DataSplits] = []
        settled = settle(config, given, name, processes, device, opened.append)
        if not isinstance(settled, TrainConfig):  # runs of training say themselves what was chosen
            screen = open_screen(settled.run, processes.is_main)
            for line in recipe_lines(settled):
                screen.say(line)
        yield settled, (opened[0] if opened else None)
