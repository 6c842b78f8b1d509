"""`p3b compare`: methods x prune ratios x seeds on one data set, run after run, into one table.

Every run is an ordinary `p3b train` or `p3b prune` in a folder of its own, `<output-dir>/runs/<name>/`, so that it can be
looked into, resumed and repeated by itself. What came out of it is one line of `<output-dir>/compare.jsonl`; tables are made
of these lines alone (`p3b.report.comparison`).
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import p3b
from p3b import artifact
from p3b.bench import images_per_second
from p3b.commands import METHOD_OPTIONS, prune, train
from p3b.config import CompareConfig, PhaseOptions, PruneConfig, PruneOptions, RunOptions, TrainConfig, check, to_plain
from p3b.errors import ComparisonError, ConfigError, Stopped, TrainingError, UserError
from p3b.files import write_atomically
from p3b.inputs import open_model, open_splits
from p3b.methods import METHODS, PUBLISHED_NAMES, method_options
from p3b.methods.base import overall_keep_ratio
from p3b.report.comparison import LINES, read_lines, summarise, table, write_report
from p3b.session import PRODUCTS, explained
from p3b.settings import command_line
from p3b.train.display import Display
from p3b.train.distributed import Processes, gather, in_group, process_group, wait_for_all
from p3b.train.interruption import SIGNALS
from p3b.train.run_folder import StageFolder
from p3b.vit.architecture import describe_dense
from p3b.vit.layout import read_layout
from p3b.vit.smaller import cut_evenly, smaller_architecture

DENSE, SMALLER = "dense", "smaller"
"""The rows that are no method."""
SETTINGS = "compare.json"
SPEED_BATCHES = (1, 32)
SECONDS_OF_SPEED = 3.0
"""That each model is measured for, about, at each batch size."""


@dataclass(frozen=True)
class Run:
    """One run of the comparison: a row of the table, at a prune ratio (None for dense), with a seed."""

    row: str
    ratio: float | None
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its lines."""
        return "-".join([self.row, *([] if self.ratio is None else [str(self.ratio)]), f"seed{self.seed}"])

    @property
    def stage(self) -> str:
        """Command that carries it out."""
        return "train" if self.row in (DENSE, SMALLER) else "prune"

    def __str__(self) -> str:
        goes = "" if self.ratio is None else f", {100 * self.ratio:g} % of the parameters go"
        return f"{self.row}{goes}, seed {self.seed}"


def plan(config: CompareConfig) -> list[Run]:
    """All runs in their order: seed by seed, and for each seed the dense one first, so that a table of use is there early.

    Raises:
        ConfigError: an unknown method (with the nearest known ones), a ratio or a seed out of range or given twice.
    """
    asked = config.compare
    methods = [PUBLISHED_NAMES.get(name, name) for name in asked.methods] or list(METHODS)
    for name in methods:
        method_options(name)  # refuses an unknown one
    for ratio in asked.prune_ratios:
        if not 0 <= ratio < 1:
            raise ConfigError(f"--prune-ratios must lie in [0, 1), got {ratio}: each is the share of parameters that goes.")
    for flag, values in (("methods", methods), ("prune-ratios", asked.prune_ratios), ("seeds", asked.seeds)):
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"--{flag} is {' '.join(map(str, values)) or 'empty'}; expected at least one, each once.")
    rows = ([SMALLER] if asked.smaller else []) + methods
    return [
        run
        for seed in asked.seeds
        for run in (Run(DENSE, None, seed), *(Run(row, ratio, seed) for ratio in asked.prune_ratios for row in rows))
    ]


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
    pruning = PruneOptions(**shared, prune_method=run.row, prune_ratio=run.ratio)
    return PruneConfig(config.data, config.model, config.training, config.augment, options, pruning)


def compare(config: CompareConfig) -> list[Path]:
    """Carry out what is not done yet, measure the speed of all models, and write the tables; returns the files of these.

    Raises:
        UserError: settings that cannot be used, before anything is written.
        ComparisonError: some runs failed; all others are done.
        Stopped: a signal asked for it; the same call goes on.
    """
    out = config.run.output_dir
    if out is None:
        raise ConfigError("--output-dir is missing: the folder that everything is written to.")
    if config.compare.table_only:
        return _report(out, config.run.figure_format, Display(int(os.environ.get("RANK", 0)) == 0))
    runs = plan(config)
    _require_taken(config, runs)
    for run in runs:
        check(config_of(config, run))
    folder = StageFolder(out, "compare")  # for its lock
    with (
        _stopped_by_signals(),
        process_group(config.run.device, config.run.timeout_minutes) as (processes, device),
        explained(processes, out, lambda: False),
    ):
        lines = gather(read_lines(out) if processes.is_main else None)[0]
        if {run.name for run in runs} - _done(lines):
            _require_inputs(config, processes)
        _require_same_settings(config, processes, gather(_read_settings(out) if processes.is_main else None)[0])
        display = Display(processes.is_main)
        folder.claim_for_all(processes.is_main, display.say, resume=True, overwrite=False)
        try:
            return _Comparison(config, runs, processes, device, display).carry_out()
        finally:
            folder.release()


class _Comparison:
    """The runs of a comparison, on every rank; only the main one writes."""

    def __init__(
        self, config: CompareConfig, runs: Sequence[Run], processes: Processes, device: torch.device, display: Display
    ) -> None:
        assert config.run.output_dir is not None
        self._config, self._runs, self._out = config, runs, config.run.output_dir
        self._processes, self._device, self._display = processes, device, display
        # Of its own, so that a rank that has failed alone does not answer what the others ask of one another in training.
        timeout = timedelta(minutes=config.run.timeout_minutes)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if in_group() else None

    def carry_out(self) -> list[Path]:
        lines: list[dict[str, Any]] = gather(read_lines(self._out) if self._processes.is_main else None)[0]
        if self._processes.is_main:
            _write_json(self._out / SETTINGS, _comparable(self._config, self._processes.world_size))
        done = _done(lines)
        failed = []
        try:
            for number, run in enumerate(self._runs, start=1):
                heading = f"run {number} of {len(self._runs)}: {run}"
                if run.name in done:
                    self._display.say(f"{heading}: done before")
                    continue
                self._display.say(f"\n{heading}")
                line = self._carry_out(run)
                if line["status"] == "failed":
                    failed.append(run.name)
                    self._display.say(f"{run.name} failed: {line['message']}")
                lines = self._add(lines, line)
            self._measure_speed(lines)
        finally:
            written = self._tables()
        if failed:
            raise ComparisonError(
                f"{len(failed)} of {len(self._runs)} runs failed: {', '.join(failed)}. What each met with stands in "
                f"{self._out / 'compare.md'}; the others are done. The same command tries them again."
            )
        return written

    def _carry_out(self, run: Run) -> dict[str, Any]:
        """The line of a run that has come to its end, well or not."""
        config = config_of(self._config, run)
        line = {
            "kind": "run",
            "name": run.name,
            "row": run.row,
            "ratio": run.ratio,
            "seed": run.seed,
            "command": command_line(run.stage, config, leave_out=("resume",)),
        }
        summary: dict[str, Any] = {}
        failure: UserError | None = None
        try:
            if run.row == SMALLER:
                self._make_start(run, config)
            summary = prune(config) if isinstance(config, PruneConfig) else train(config)
        except UserError as error:
            failure = error
        message = self._agree(failure)
        if message is None and self._processes.is_main:
            assert config.run.output_dir is not None
            line |= {"status": "done", **_results(summary, config.run.output_dir / run.stage)}
        elif message is not None:
            line |= {"status": "failed", "message": message}
        told: dict[str, Any] = gather({**line, **_circumstances()} if self._processes.is_main else None)[0]
        return told

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

    def _add(self, lines: list[dict[str, Any]], line: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines with one more, in the file too. What fails again as before, and nothing since, is not said again."""
        told = ("name", "command", "status", "message")
        if any(all(before.get(key) == line.get(key) for key in told) for before in lines if line.get("status") == "failed"):
            return lines
        lines = [*lines, line]
        if self._processes.is_main:
            text = "".join(json.dumps(each) + "\n" for each in lines)
            write_atomically(self._out / LINES, lambda path: path.write_text(text))
        return lines

    def _measure_speed(self, lines: list[dict[str, Any]]) -> None:
        """Images per second of all models that are done, measured in one go; again where one has come in since."""
        comparison = summarise(lines)
        names = [line["name"] for line in comparison.runs]
        known = {line["batch_size"]: line for line in comparison.speeds}
        due = [size for size in SPEED_BATCHES if size not in known or set(known[size]["images_per_second"]) != set(names)]
        if not names or not due:
            return
        self._display.say(f"\nimages per second of {len(names)} models, side by side")
        if self._processes.is_main:
            folders = [self._out / "runs" / run["name"] / _product(run["row"]) for run in comparison.runs]
            models = [artifact.load(folder, self._device) for folder in folders]
            shape = models[0].patch_embed.proj.in_channels, *models[0].patch_embed.img_size  # type: ignore[union-attr, misc]
            # The other ranks wait for the end of it, and do not wait for ever.
            seconds = min(SECONDS_OF_SPEED * len(models), 60 * self._config.run.timeout_minutes / 4)
            for size in due:
                speeds = images_per_second(models, shape, batch_size=size, device=self._device, seconds=seconds)
                line = {
                    "kind": "speed",
                    "batch_size": size,
                    "images_per_second": dict(zip(names, speeds, strict=True)),
                    "device": _device_name(self._device),
                    "precision": "float32",
                    "threads": torch.get_num_threads(),
                    "versions": _versions(),
                    **_circumstances(),
                }
                lines = self._add(lines, line)
        wait_for_all()

    def _tables(self) -> list[Path]:
        if not self._processes.is_main or not read_lines(self._out):
            return []
        return _report(self._out, self._config.run.figure_format, self._display)


def _report(out: Path, fmt: str, display: Display) -> list[Path]:
    """Write the tables and show them."""
    written = write_report(out, fmt)
    head, cells = table(summarise(read_lines(out)))
    shown = [head.index(name) for name in ("model", "goes", "top-1 (%)", "parameters", "of dense")]
    shown += [index for index, name in enumerate(head) if name.startswith("images/s")][-1:]
    display.table("comparison", [head[i] for i in shown], [[row[i] for i in shown] for row in cells])
    for file in written:
        display.say(f"table:   {file}" if file.suffix in (".md", ".html") else f"figure:  {file}")
    return written


def _done(lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the runs that are not run again."""
    return {line["name"] for line in lines if line["kind"] == "run" and line["status"] == "done"}


def _require_inputs(config: CompareConfig, processes: Processes) -> None:
    """Open data and model once, so that a mistake in what all rows share is refused and not met with by each of them."""
    seed = config.compare.seeds[0]
    splits = open_splits(config.data, seed, processes)
    model = open_model(config.model, len(splits.class_names), seed).model
    read_layout(model)
    artifact.model_config(model)


def _results(summary: Mapping[str, Any], stage: Path) -> dict[str, Any]:
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


def _circumstances() -> dict[str, Any]:
    """Where, when and by which code."""
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
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


def _require_taken(config: CompareConfig, runs: Sequence[Run]) -> None:
    """Refuse a setting that none of the methods takes: it would be ignored."""
    defaults = PhaseOptions()
    taken = {option for run in runs if run.stage == "prune" for option in method_options(run.row)}
    for setting, option in METHOD_OPTIONS.items():
        value = getattr(config.prune, setting, None)
        if option not in taken and value is not None and value != getattr(defaults, setting):
            takers = [name for name in METHODS if option in method_options(name)]
            raise ConfigError(
                f"--{setting.replace('_', '-')} {value} means nothing to the methods that are compared, only to "
                f"{', '.join(takers)}; leave it out."
            )


def _comparable(config: CompareConfig, processes: int) -> dict[str, Any]:
    """What must stay as it is from one call to the next, or the rows would not compare. More rows may always come in."""
    plain = to_plain(config)
    free = {"output_dir", "device", "figure_format", "checkpoint_minutes", "timeout_minutes", "num_workers"}
    places = {"data_path", "val_path", "test_path", "model_path", "teacher_path"}
    settings = {
        key: value
        for group, values in plain.items()
        if group != "compare"
        for key, value in values.items()
        if key not in free | places
    }
    return {**settings, "number of processes": processes}  # it decides how large a batch is


def _read_settings(out: Path) -> dict[str, Any] | None:
    """Settings that a comparison was begun with in this folder."""
    try:
        content: dict[str, Any] = json.loads((out / SETTINGS).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out / SETTINGS} cannot be read: {error}. Choose another --output-dir.") from error
    return content


def _require_same_settings(config: CompareConfig, processes: Processes, before: Mapping[str, Any] | None) -> None:
    if before is None:
        return
    now = _comparable(config, processes.world_size)
    changed = [
        f"{key.replace('_', '-')} was {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{config.run.output_dir} holds a comparison with other settings: {'; '.join(changed)}. Its rows would not agree; "
            "choose another --output-dir. (Methods, prune ratios and seeds may be added.)"
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
