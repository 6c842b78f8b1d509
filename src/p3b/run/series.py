"""Runs one after the other into one table: what `p3b compare` and `p3b sweep` have in common.

Every run is an ordinary `p3b train` or `p3b prune` in a folder of its own, `<output-dir>/runs/<name>/`, so that it can be
looked into, resumed and repeated by itself. What came out of it is one line of `<output-dir>/<series>.jsonl`; tables are made
of these lines alone (`p3b.report.comparison`). Runs whose first steps are the same, up to where pruning starts, train them
once (`p3b.run.warm_up`), in `<output-dir>/warm-ups/`.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer

import p3b
from p3b.commands.prune import METHOD_OPTIONS, method_options_of, prune, train, train_warm_up
from p3b.commands.settings import command_line
from p3b.data import DataSplits
from p3b.deploy.speed import images_per_second
from p3b.errors import ConfigError, Stopped, TrainingError, UserError
from p3b.methods import method_options
from p3b.methods.base import overall_keep_ratio
from p3b.report.comparison import read_lines, summarise, table
from p3b.run.folder import StageFolder
from p3b.run.inputs import open_model, open_splits
from p3b.run.interruption import SIGNALS
from p3b.run.options import CompareConfig, PhaseOptions, PruneConfig, PruneOptions, RunOptions, TrainConfig, to_plain
from p3b.run.screen import Display
from p3b.run.stage import PRODUCTS, explained
from p3b.run.warm_up import WARM_UP, warm_up_name
from p3b.storage import saved_model as artifact
from p3b.storage.files import write_atomically
from p3b.train.distributed import Processes, gather, in_group, process_group, wait_for_all
from p3b.vit.architecture import describe_dense
from p3b.vit.layout import read_layout
from p3b.vit.smaller import cut_evenly, smaller_architecture

DENSE, SMALLER = "dense", "smaller"
"""The rows that are no method."""
SPEED_BATCHES = (1, 32)
OF_WARM_UP = ("prune_start_epoch", "probe_lr")
"""Settings of pruning that a warm-up depends on and its name does not tell: a run that changes one trains its own."""
SECONDS_OF_SPEED = 3.0
"""That each model is measured for, about, at each batch size."""


@dataclass(frozen=True)
class Run:
    """One run of a series: a row of the table, at a prune ratio (None for dense), with a seed."""

    row: str
    ratio: float | None
    seed: int
    changed: tuple[tuple[str, Any], ...] = ()
    """Settings of pruning in which it differs from the rest of its series, by name: (("prune_alpha", 1.0),)."""

    @property
    def name(self) -> str:
        """Of its folder and its lines."""
        changes = [f"{key.removeprefix('prune_')}_{value}" for key, value in self.changed]
        return "-".join([self.row, *changes, *([] if self.ratio is None else [str(self.ratio)]), f"seed{self.seed}"])

    @property
    def stage(self) -> str:
        """Command that carries it out."""
        return "train" if self.row in (DENSE, SMALLER) else "prune"

    def __str__(self) -> str:
        goes = "" if self.ratio is None else f", {100 * self.ratio:g} % of the parameters go"
        changes = "".join(f", --{key.replace('_', '-')} {value}" for key, value in self.changed)
        return f"{self.row}{changes}{goes}, seed {self.seed}"


def config_of(config: CompareConfig, run: Run) -> TrainConfig | PruneConfig:
    """Settings of the command that carries a run out.

    Every row is trained for as many epochs as a pruned one is pruned and fine-tuned. A setting that a method does not take
    stays as it is by default: it means nothing to it.
    """
    assert config.run.output_dir is not None
    folder = config.run.output_dir / "runs" / run.name
    options = RunOptions(**{**_fields(config.run), "output_dir": folder}, resume=True, seed=run.seed)
    if run.row in (DENSE, SMALLER):
        model = config.model
        if run.row == SMALLER:  # its start brings its shape along
            model = replace(model, model_path=folder / "start", model_pretrained=False, model_kwargs=(), input_size=None)
        training = replace(config.training, epochs=config.training.epochs + config.prune.finetune_epochs)
        return TrainConfig(config.data, model, training, config.augment, options)
    assert run.ratio is not None
    defaults, taken = _fields(PhaseOptions()), method_options(run.row)
    unused = {setting for setting, option in METHOD_OPTIONS.items() if option not in taken}
    shared = {key: defaults[key] if key in unused else value for key, value in _fields(config.prune).items()}
    pruning = PruneOptions(**{**shared, **dict(run.changed)}, prune_method=run.row, prune_ratio=run.ratio)
    return PruneConfig(config.data, config.model, config.training, config.augment, options, pruning)


class Series:
    """Runs that are carried out one after the other, on every rank; only the main one writes.

    Args:
        config: what is alike for all of them.
        name: of the files: `<name>.jsonl`, `<name>.json`, ...
        shared: names of the warm-ups that are trained once, for all runs that can go on from them.
        processes, device, display: of this process.

    Attributes:
        lines: what has come to an end so far, the same on every rank.
        is_main: whether this is the rank that writes.
        device: as given.
    """

    def __init__(
        self,
        config: CompareConfig,
        name: str,
        shared: Collection[str],
        processes: Processes,
        device: torch.device,
        display: Display,
    ) -> None:
        assert config.run.output_dir is not None
        self._config, self._name, self._shared, self._out = config, name, shared, config.run.output_dir
        self._processes, self.device, self.display, self.is_main = processes, device, display, processes.is_main
        # Of its own, so that a rank that has failed alone does not answer what the others ask of one another in training.
        timeout = timedelta(minutes=config.run.timeout_minutes)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if in_group() else None
        self.lines: list[dict[str, Any]] = gather(read_lines(self._out, name) if processes.is_main else None)[0]
        if processes.is_main:
            _write_json(self._out / f"{name}.json", comparable(config, processes.world_size))

    def carry_out(self, run: Run, heading: str) -> dict[str, Any]:
        """The line of a run that has come to its end, well or not, now or before; it is in the file.

        Raises:
            Stopped: a signal asked for it. TrainingError: it failed on some ranks only.
        """
        before = finished(self.lines).get(run.name)
        if before is not None:
            self.display.say(f"{heading}: done before")
            return before
        self.display.say(f"\n{heading}")
        line = self._carry_out(run)
        if line["status"] == "failed":
            self.display.say(f"{run.name} failed: {line['message']}")
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
            "command": command_line(run.stage, config, leave_out=("resume",)),
        }
        summary: dict[str, Any] = {}
        failure: UserError | None = None
        try:
            if run.row == SMALLER:
                self._make_start(run, config)
            if isinstance(config, PruneConfig):
                summary = prune(config, self._warm_up_of(config, run))
            else:
                summary = train(config)
        except UserError as error:
            failure = error
        message = self._agree(failure)
        if message is None and self._processes.is_main:
            assert config.run.output_dir is not None
            line |= {"status": "done", **results(summary, config.run.output_dir / run.stage)}
        elif message is not None:
            line |= {"status": "failed", "message": message}
        told: dict[str, Any] = gather({**line, **circumstances()} if self._processes.is_main else None)[0]
        return told

    def _warm_up_of(self, config: PruneConfig, run: Run) -> Path | None:
        """Folder of the warm-up that a run goes on from, trained where it is not there; None where it trains its own."""
        name = warm_up_name(config, method_options_of(config))
        if name is None or name not in self._shared or any(key in OF_WARM_UP for key, _ in run.changed):
            return None
        folder = self._out / "warm-ups" / name
        if not gather(StageFolder(folder, WARM_UP).finished)[0]:
            # No budget, so that one that cannot be met stops nobody but the run that asks for it.
            alike = replace(config.prune, prune_ratio=0.0)
            train_warm_up(replace(config, prune=alike, run=replace(config.run, output_dir=folder)))
        return folder

    def _make_start(self, run: Run, config: TrainConfig) -> None:
        """Write what a smaller model starts from: channels of the model that the dense row of this seed starts from."""
        start = config.model.model_path
        assert start is not None and run.ratio is not None
        if gather(artifact.is_artifact(start))[0]:
            return
        splits = open_splits(self._config.data, run.seed, self._processes)
        dense = open_model(self._config.model, len(splits.class_names), run.seed)
        layout = read_layout(dense.model)
        in_blocks = sum(parameter.numel() for parameter in dense.model.parameters()) - layout.other_params
        kept = overall_keep_ratio(layout, run.ratio, self._config.prune.prune_blocks_only) * in_blocks
        architecture = smaller_architecture(describe_dense(dense.model), kept + layout.other_params)
        if self._processes.is_main:
            artifact.save(
                cut_evenly(dense.model, architecture),
                start,
                class_names=dense.class_names if len(dense.class_names or ()) == len(splits.class_names) else None,
                preprocessing=dense.preprocessing.to_dict(),
                provenance={"stage": "start of a smaller model", "model": self._config.model.model, "seed": run.seed},
            )
        wait_for_all()

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
            raise TrainingError(f"A run failed on some processes and not on others ({told}). The same command goes on.")
        return messages[0]

    def add(self, line: dict[str, Any]) -> None:
        """One line more, in the file too. What fails again as before, and nothing since, is not said again."""
        told = ("name", "command", "status", "message")
        if any(
            all(before.get(key) == line.get(key) for key in told) for before in self.lines if before.get("status") == "failed"
        ):
            return
        self.lines = [*self.lines, line]
        if self._processes.is_main:
            text = "".join(json.dumps(each) + "\n" for each in self.lines)
            write_atomically(self._out / f"{self._name}.jsonl", lambda path: path.write_text(text))

    def measure_speed(self) -> None:
        """Images per second of all models that are done, measured in one go; again where one has come in since."""
        comparison = summarise(self.lines)
        names = [line["name"] for line in comparison.runs]
        known = {line["batch_size"]: line for line in comparison.speeds}
        due = [size for size in SPEED_BATCHES if size not in known or set(known[size]["images_per_second"]) != set(names)]
        if not names or not due:
            return
        self.display.say(f"\nimages per second of {len(names)} models, side by side")
        if self._processes.is_main:
            folders = [
                Path(run.get("model") or self._out / "runs" / run["name"] / _product(run["row"])) for run in comparison.runs
            ]
            models = [artifact.load(folder, self.device) for folder in folders]
            shape = models[0].patch_embed.proj.in_channels, *models[0].patch_embed.img_size
            # The other ranks wait for the end of it, and do not wait for ever.
            seconds = min(SECONDS_OF_SPEED * len(models), 60 * self._config.run.timeout_minutes / 4)
            for size in due:
                speeds = images_per_second(models, shape, batch_size=size, device=self.device, seconds=seconds)
                line = {
                    "kind": "speed",
                    "batch_size": size,
                    "images_per_second": dict(zip(names, speeds, strict=True)),
                    "device": _device_name(self.device),
                    "precision": "float32",
                    "threads": torch.get_num_threads(),
                    "versions": _versions(),
                    **circumstances(),
                }
                self.add(line)
        self.lines = gather(self.lines)[0]


@contextmanager
def open_series(
    config: CompareConfig,
    name: str,
    shared: Collection[str],
    require: Callable[[Processes, list[dict[str, Any]]], None],
) -> Iterator[Series]:
    """Join the process group, refuse what cannot be used, claim the folder; at the end let go of them.

    Args:
        config, name, shared: see `Series`.
        require: refuses what is wrong with data and model before anything is written; is told what is done.

    Raises:
        UserError: settings or a folder that cannot be used.
        Stopped: a signal asked for it; the same call goes on.
    """
    out = config.run.output_dir
    assert out is not None
    folder = StageFolder(out, name)  # for its lock
    with (
        _stopped_by_signals(),
        process_group(config.run.device, config.run.timeout_minutes) as (processes, device),
        explained(processes, out, lambda: False),
    ):
        lines, before = gather((read_lines(out, name), _read_settings(out, name)) if processes.is_main else None)[0]
        require(processes, lines)
        _require_same_settings(config, processes, before)
        display = Display(processes.is_main)
        folder.claim_for_all(processes.is_main, display.say, resume=True, overwrite=False)
        try:
            yield Series(config, name, shared, processes, device, display)
        finally:
            folder.release()


def shared_warm_ups(config: CompareConfig, runs: Sequence[Run]) -> set[str]:
    """Names of the warm-ups that more than one of the runs can go on from."""
    pruned = (found for run in runs if isinstance(found := config_of(config, run), PruneConfig))
    counts = Counter(warm_up_name(each, method_options_of(each)) for each in pruned)
    return {name for name, count in counts.items() if name is not None and count > 1}


def show_tables(lines: Sequence[Mapping[str, Any]], written: Sequence[Path], title: str, display: Display) -> None:
    """Show the table in short, and say which files hold it."""
    head, cells = table(summarise(lines))
    shown = [head.index(name) for name in ("model", "goes", "top-1 (%)", "parameters", "of dense")]
    shown += [index for index, name in enumerate(head) if name.startswith("images/s")][-1:]
    display.table(title, [head[i] for i in shown], [[row[i] for i in shown] for row in cells])
    for file in written:
        display.say(f"table:   {file}" if file.suffix in (".md", ".html") else f"figure:  {file}")


def finished(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lines of the runs that are not run again, by name."""
    return {line["name"]: line for line in lines if line["kind"] == "run" and line["status"] == "done"}


def open_inputs(config: CompareConfig, processes: Processes) -> tuple[DataSplits, VisionTransformer]:
    """Open data and model once, so that a mistake in what all rows share is refused and not met with by each of them."""
    seed = config.compare.seeds[0]
    splits = open_splits(config.data, seed, processes)
    model = open_model(config.model, len(splits.class_names), seed).model
    read_layout(model)
    artifact.model_config(model)
    return splits, model


def results(summary: Mapping[str, Any], stage: Path) -> dict[str, Any]:
    """What a finished run says of its model, from its summary and its epochs."""
    figures = summary["pruned" if summary["stage"] == "prune" else "model"]
    part = "test" if "test" in summary["accuracy"] else "val"
    accuracy, provenance = summary["accuracy"][part], summary["provenance"]
    epochs = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return {
        "part": part,
        "images": accuracy["images"],
        "top1": accuracy["top1"],
        "top5": accuracy["top5"],
        "accuracy": summary["accuracy"],
        "params": figures["params"],
        "macs": figures["macs"],
        "epochs": len(epochs),
        "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
        "data": provenance["data"],
        "device": provenance["device"],
        "processes": provenance["processes"],
        "precision": provenance["precision"],
        "versions": provenance["versions"],
    }


def circumstances() -> dict[str, Any]:
    """Where, when and by which code."""
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"commit": _commit(), "hardware": hardware, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def _commit() -> str | None:
    """Commit of the code that runs, where it lies in a git repository that knows it; with a + where it was changed since."""
    source = Path(p3b.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    return {"p3b": p3b.__version__, "torch": str(torch.__version__), "timm": version("timm")}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def _product(row: str) -> str:
    return PRODUCTS["train" if row in (DENSE, SMALLER) else "prune"]


def comparable(config: CompareConfig, processes: int) -> dict[str, Any]:
    """What must stay as it is from one call to the next, or the rows would not compare. More rows may always come in."""
    plain = to_plain(config)
    free = {"output_dir", "device", "figure_format", "checkpoint_minutes", "timeout_minutes", "num_workers", "cache"}
    places = {"data_path", "val_path", "test_path", "model_path", "teacher_path"}
    settings = {
        key: value
        for group, values in plain.items()
        if group != "compare"
        for key, value in values.items()
        if key not in free | places
    }
    return {**settings, "number of processes": processes}  # it decides how large a batch is


def _read_settings(out: Path, name: str) -> dict[str, Any] | None:
    """Settings that a series was begun with in this folder."""
    file = out / f"{name}.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}. Choose another --output-dir.") from error
    return content


def _require_same_settings(config: CompareConfig, processes: Processes, before: Mapping[str, Any] | None) -> None:
    if before is None:
        return
    now = comparable(config, processes.world_size)
    changed = [
        f"{key.replace('_', '-')} was {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{config.run.output_dir} holds runs with other settings: {'; '.join(changed)}. Their rows would not compare; "
            "choose another --output-dir. (What the first group of --help lists may be changed.)"
        )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


def _fields(options: Any) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in fields(options)}


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` at a signal, wherever the program is; while a run trains, it listens itself and ends its step first."""
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread alone
        yield
        return
    process, taken = os.getpid(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal taken
        if os.getpid() == process and not taken:  # a forked worker: the main process decides for it
            taken = True
            raise Stopped(f"stopped by {signal.Signals(number).name}; what is done is kept")

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
