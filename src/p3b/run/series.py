"""Runs one after the other into one table: what `p3b compare` and `p3b sweep` have in common.

Every run is an ordinary `p3b train` or `p3b prune` in a folder of its own, `<output-dir>/runs/<name>/`, so that it can be
looked into, resumed and repeated by itself. What came out of it is one line of `<output-dir>/<series>.jsonl`; tables are made
of these lines alone (`p3b.report.comparison`). Runs whose first steps are the same, up to where pruning starts, train them
once (`p3b.run.warm_up`), in `<output-dir>/warm-ups/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer

from p3b.data import DataSplits
from p3b.errors import TrainingError, UserError
from p3b.report.comparison import read_lines, summarise, table
from p3b.run.failures import explained
from p3b.run.flags import command_line
from p3b.run.folder import StageFolder
from p3b.run.inputs import open_model, open_splits
from p3b.run.interruption import stopped_by_signals
from p3b.run.option_checks import check_screen
from p3b.run.options import CompareConfig, PruneConfig, TrainConfig
from p3b.run.provenance import circumstances
from p3b.run.same_settings import comparable, read_comparable, require_comparable
from p3b.run.screen import Screen, open_screen
from p3b.run.series_lines import finished, results
from p3b.run.series_plan import SMALLER, Run, about_teacher, config_of, warm_up_of
from p3b.run.series_speed import due_batch_sizes, speed_lines
from p3b.run.smaller_start import make_start
from p3b.run.warm_up import WARM_UP, train_warm_up
from p3b.storage import artifact
from p3b.storage.files import write_atomically
from p3b.train.distributed import Processes, gather, in_group, process_group
from p3b.vit.layout import read_layout
from p3b.vit.smaller import require_known_names


@dataclass(frozen=True)
class Commands:
    """What carries the runs of a series out; each returns the summary of the run.

    Attributes:
        train: a dense or a smaller model.
        prune: a model that is pruned, after the warm-up in a folder where one is given.
    """

    train: Callable[[TrainConfig], dict[str, Any]]
    prune: Callable[[PruneConfig, Path | None], dict[str, Any]]


class Series:
    """Runs that are carried out one after the other, on every rank; only the main one writes.

    Args:
        config: what is alike for all of them.
        name: of the files: `<name>.jsonl`, `<name>.json`, ...
        shared: names of the warm-ups that are trained once, for all runs that can go on from them.
        commands: that carry the runs out.
        processes, device, screen: of this process.

    Attributes:
        lines: what has come to an end so far, the same on every rank.
        is_main: whether this is the rank that writes.
        device, screen: as given.
    """

    def __init__(
        self,
        config: CompareConfig,
        name: str,
        shared: Collection[str],
        commands: Commands,
        processes: Processes,
        device: torch.device,
        screen: Screen,
    ) -> None:
        assert config.run.output_dir is not None
        self._config, self._name, self._shared, self._commands = config, name, shared, commands
        self._out, self._processes = config.run.output_dir, processes
        self.device, self.screen, self.is_main = device, screen, processes.is_main
        # Of its own, so that a rank that has failed alone does not answer what the others ask of one another in training.
        timeout = timedelta(minutes=config.run.timeout_minutes)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if in_group() else None
        self.lines: list[dict[str, Any]] = gather(read_lines(self._out, name) if processes.is_main else None)[0]
        if processes.is_main:
            text = json.dumps(comparable(config, processes.world_size), indent=1) + "\n"
            write_atomically(self._out / f"{name}.json", lambda path: path.write_text(text))

    def carry_out(self, run: Run, heading: str) -> dict[str, Any]:
        """The line of a run that has come to its end, well or not, now or before; it is in the file.

        Raises:
            Stopped: a signal asked for it. TrainingError: it failed on some ranks only.
        """
        before = finished(self.lines).get(run.name)
        if before is not None:
            self.screen.say(f"{heading}: already done")
            return before
        self.screen.say(f"\n{heading}")
        line = self._carry_out(run)
        if line["status"] == "failed":
            self.screen.warn(f"{run.name} failed: {line['message']}")
        self.add(line)
        return line

    def _carry_out(self, run: Run) -> dict[str, Any]:
        """The line of a run that has come to its end, well or not."""
        config = config_of(self._config, run)
        line = {
            "kind": "run",
            "name": run.name,
            "row": run.row,
            "ratio": run.ratio,
            "seed": run.seed,
            **({"changed": dict(run.changed)} if run.changed else {}),
            "command": command_line(run.stage, config, leave_out=("resume", "verbose", "quiet")),
        }
        summary: dict[str, Any] = {}
        failure: UserError | None = None
        try:
            summary = self._result_of(run, config)
        except UserError as error:
            failure = error
        message = self._agree(failure)
        if message is None and self.is_main:
            assert config.run.output_dir is not None
            line |= {"status": "done", **results(summary, config.run.output_dir / run.stage)}
        elif message is not None:
            line |= {"status": "failed", "message": message}
        told: dict[str, Any] = gather({**line, **circumstances()} if self.is_main else None)[0]
        return told

    def _result_of(self, run: Run, config: TrainConfig) -> dict[str, Any]:
        """The summary of a run."""
        if isinstance(config, PruneConfig):
            return self._commands.prune(config, self._warm_up_of(config, run))
        if run.row == SMALLER:
            assert config.model.model_path is not None and run.ratio is not None
            ours = self._config
            make_start(
                config.model.model_path,
                ours.data,
                ours.model,
                self._processes,
                ratio=run.ratio,
                blocks_only=ours.prune.prune_blocks_only,
                seed=run.seed,
            )
        return self._commands.train(config)

    def _warm_up_of(self, config: PruneConfig, run: Run) -> Path | None:
        """Folder of the warm-up that a run goes on from, trained where it is not there; None where it trains its own."""
        name = warm_up_of(config, run)
        if name is None or name not in self._shared:
            return None
        folder = self._out / "warm-ups" / name
        if not gather(StageFolder(folder, WARM_UP).finished)[0]:
            # No budget, so that one that cannot be met stops nobody but the run that asks for it.
            alike = replace(config.prune, prune_ratio=0.0)
            train_warm_up(replace(config, prune=alike, run=replace(config.run, output_dir=folder)))
        return folder

    def _agree(self, failure: UserError | None) -> str | None:
        """What a run failed of, on every rank; None where it did not.

        Raises:
            TrainingError: it failed on some ranks only. The others are left in the middle of it, so nothing can go on.
        """
        messages = [None if failure is None else str(failure)]
        if self._group is not None:
            messages = [None] * self._processes.world_size
            dist.all_gather_object(messages, None if failure is None else str(failure), group=self._group)
        if len({message is None for message in messages}) > 1:
            told = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None)
            raise TrainingError(
                f"A run failed on some processes and not on others ({told}). Run the same command again to continue."
            )
        return messages[0]

    def add(self, line: dict[str, Any]) -> None:
        """One line more, in the file too. What fails again as before, and nothing since, is not said again."""
        told = ("name", "command", "status", "message")
        if any(
            all(before.get(key) == line.get(key) for key in told) for before in self.lines if before.get("status") == "failed"
        ):
            return
        self.lines = [*self.lines, line]
        if self.is_main:
            text = "".join(json.dumps(each) + "\n" for each in self.lines)
            write_atomically(self._out / f"{self._name}.jsonl", lambda path: path.write_text(text))

    def measure_speed(self) -> None:
        """Images per second of all models that are done, measured in one go; again where one has come in since."""
        comparison = summarise(self.lines)
        due = due_batch_sizes(comparison)
        if not due:
            return
        self.screen.say(f"\nimages per second of {len(comparison.runs)} models, side by side")
        if self.is_main:
            # The other ranks wait for the end of it, and do not wait for ever.
            most_seconds = 60 * self._config.run.timeout_minutes / 4
            for line in speed_lines(comparison.runs, due, self._out / "runs", self.device, most_seconds):
                self.add(line)
        self.lines = gather(self.lines)[0]


@contextmanager
def open_series(
    config: CompareConfig,
    name: str,
    shared: Collection[str],
    commands: Commands,
    require: Callable[[Processes, list[dict[str, Any]]], None],
) -> Iterator[Series]:
    """Join the process group, refuse what cannot be used, claim the folder; at the end let go of them.

    Args:
        config, name, shared, commands: see `Series`.
        require: refuses what is wrong with data and model before anything is written; is told what is done.

    Raises:
        UserError: settings or a folder that cannot be used.
        Stopped: a signal asked for it; the same call goes on.
    """
    out = config.run.output_dir
    assert out is not None
    check_screen(config.run)
    folder = StageFolder(out, name)  # for its lock, and what killed writers left
    with (
        stopped_by_signals(),
        process_group(config.run.device, config.run.timeout_minutes) as (processes, device),
        explained(processes, out, lambda: False),
    ):
        found = (read_lines(out, name), read_comparable(out / f"{name}.json")) if processes.is_main else None
        lines, before = gather(found)[0]
        require(processes, lines)
        require_comparable(comparable(config, processes.world_size), before, out)
        screen = open_screen(config.run, processes.is_main)
        folder.claim_for_all(processes.is_main, screen.warn, resume=True, overwrite=False)
        if processes.is_main:
            folder.tidy()
        if (teacher := about_teacher(config)) is not None:
            screen.say(teacher)
        try:
            yield Series(config, name, shared, commands, processes, device, screen)
        finally:
            folder.release()


def open_inputs(
    config: CompareConfig, processes: Processes, splits: DataSplits | None = None
) -> tuple[DataSplits, VisionTransformer]:
    """Open data and model once, so that a mistake in what all rows share is refused and not met with by each of them."""
    seed = config.compare.seeds[0]
    splits = splits or open_splits(config.data, seed, processes)
    model = open_model(config.model, len(splits.class_names), seed).model
    read_layout(model)
    architecture = artifact.model_config(model)["architecture"]
    if config.compare.smaller:
        require_known_names(architecture)
    return splits, model


def show_tables(lines: Sequence[Mapping[str, Any]], written: Sequence[Path], title: str, screen: Screen) -> None:
    """Show the table in short, and say which files hold it."""
    head, cells = table(summarise(lines))
    shown = [head.index(name) for name in ("model", "goes", "top-1 (%)", "parameters", "of dense")]
    shown += [index for index, name in enumerate(head) if name.startswith("images/s")][-1:]
    screen.table(title, [head[i] for i in shown], [[row[i] for i in shown] for row in cells])
    for file in written:
        screen.say(f"table:   {file}" if file.suffix in (".md", ".html") else f"figure:  {file}")
