"""The command line: `p3b <command>`, and the published `main.py`. Torch is imported only when a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from p3b.errors import Stopped, UserError, unknown_name
from p3b.run.none_values import with_one_none

USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130
"""75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, try again."""


PUBLISHED_FLAGS = {"--classifiers": "--wd-classifiers", "--classifier-choose": "--wd-classifier-choose"}
"""Flags of other methods' published command lines, and what they are called here."""
SHORT_FLAGS = {"-v": "--verbose", "-q": "--quiet"}


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        settings: class of its settings, "module:class"; loaded when the command runs, as the target is.
        purpose: what it is for, in a few words.
        target: function that carries it out, "module:function".
        to_continue: how it is continued after a stop; empty where there is nothing to continue.
        reads_file: whether `--config FILE` gives settings.
    """

    settings: str
    purpose: str
    target: str
    to_continue: str = "continue with --resume"
    reads_file: bool = False


_OPTIONS, _LOOK, _HERE = "p3b.run.options", "p3b.run.look_options", "p3b.commands"
_DEPLOY = "p3b.run.deploy_options"
_NOTHING = ""
_AGAIN = "run the same command again to continue"

COMMANDS: dict[str, Command] = {
    "demo": Command(f"{_OPTIONS}:DemoConfig", "the whole job on embedded data, in minutes", f"{_HERE}.demo:run_demo"),
    "train": Command(f"{_OPTIONS}:TrainConfig", "transfer a dense model to a data set", f"{_HERE}.train:train"),
    "prune": Command(f"{_OPTIONS}:PruneConfig", "transfer and prune on the way, and fine-tune", f"{_HERE}.prune:prune"),
    "finetune": Command(f"{_OPTIONS}:FinetuneConfig", "train a small model further", f"{_HERE}.finetune:finetune"),
    "compare": Command(
        f"{_OPTIONS}:CompareConfig",
        "methods x prune ratios x seeds, in one table",
        f"{_HERE}.compare:compare",
        _AGAIN,
        reads_file=True,
    ),
    "sweep": Command(
        f"{_OPTIONS}:SweepConfig", "several budgets, or the largest that loses little", f"{_HERE}.sweep:sweep", _AGAIN
    ),
    "evaluate": Command(
        f"{_OPTIONS}:EvaluateConfig", "accuracy, size and speed of a saved model", f"{_HERE}.evaluate:evaluate"
    ),
    "report": Command(f"{_LOOK}:ReportConfig", "one page of a run, or of several side by side", f"{_HERE}.report:report"),
    "doctor": Command(f"{_LOOK}:DoctorConfig", "why a run's accuracy is lower than it could be", f"{_HERE}.doctor:doctor"),
    "runs": Command(f"{_LOOK}:RunsConfig", "list and compare the runs below a folder", f"{_HERE}.runs:runs"),
    "models": Command(
        "p3b.run.model_options:ModelsConfig",
        "which of timm's models can be pruned, and how far",
        f"{_HERE}.models:models",
        _NOTHING,
    ),
    "inspect": Command(f"{_LOOK}:InspectConfig", "the architecture of a saved model", f"{_HERE}.inspect:inspect"),
    "export": Command(
        f"{_DEPLOY}:ExportConfig",
        "an ONNX or .pt2 file that runs without p3b, checked",
        f"{_HERE}.export:export_saved",
        _NOTHING,
    ),
    "predict": Command(f"{_DEPLOY}:PredictConfig", "name what is on images", f"{_HERE}.predict:predict_images", _NOTHING),
    "bench": Command(
        f"{_DEPLOY}:BenchConfig", "speed, memory and size of models side by side", f"{_HERE}.bench:bench", _NOTHING
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`p3b <command> [flags]`: returns the exit status; 0 done, 2 what a user can mend, 75 stopped and saved, 130 cut short."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if given[0] == "--version":
        from p3b import __version__

        print(f"p3b {__version__}")
        return 0
    name, *flags = given
    if name not in COMMANDS:
        print(f"p3b: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    return run_command(name, flags, prog=f"p3b {name}")


def published_main(arguments: Sequence[str] | None = None) -> int:
    """The published command line (main.py): the flags say which command is meant."""
    flags = list(sys.argv[1:] if arguments is None else arguments)
    given = {flag.split("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    if "--eval" in given:
        return run_command("evaluate", [flag for flag in flags if flag != "--eval"], prog="main.py --eval")
    if "--prune-method" in given:
        return run_command("prune", flags, prog="main.py --prune-method ...")
    name = "finetune" if "--resize-model-by-checkpoint" in given else "train"
    return run_command(name, flags, prog="main.py")


def run_command(name: str, flags: Sequence[str], prog: str) -> int:
    """Parse the flags of a command and carry it out."""
    import tyro

    command = COMMANDS[name]
    try:
        settings = _load(command.settings)
        given = with_one_none(settings, [*_flags_of_file(command, settings, flags), *map(_our_name, flags)])
        config: Any = tyro.cli(settings, args=given, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
        _load(command.target)(config)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # every rank meets the same mistake; one says so
            print(f"p3b {name}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except Stopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"p3b {name}: {stop}; {command.to_continue}.", file=sys.stderr, flush=True)
        return STOPPED
    except KeyboardInterrupt:
        kept = f"; the last checkpoint is kept; {command.to_continue}" if command.to_continue else ""
        print(f"p3b {name}: interrupted{kept}.", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


def _our_name(word: str) -> str:
    """A word of the command line, with the name that a published or short flag has here."""
    if word in SHORT_FLAGS:
        return SHORT_FLAGS[word]
    flag, equals, value = word.partition("=")
    name = flag.replace("_", "-")
    return PUBLISHED_FLAGS[name] + equals + value if name in PUBLISHED_FLAGS else word


def _flags_of_file(command: Command, settings: type, flags: Sequence[str]) -> list[str]:
    """The settings in the file that --config names, as flags; nothing for a command without that flag.

    Raises:
        ConfigError: the file cannot be used.
    """
    if not command.reads_file:
        return []
    from p3b.commands.settings import flags_of_file

    files = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--config=")]
    files += [file for flag, file in pairwise(flags) if flag == "--config"]
    return [word for file in files for word in flags_of_file(settings, Path(file))]


def _load(target: str) -> Any:
    import importlib

    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _usage() -> str:
    lines = [f"  {name:<9} {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "P3B: make a pretrained Vision Transformer small while it moves to your images.",
            "",
            "usage: p3b <command> [flags]      p3b <command> --help shows the flags",
            "",
            *lines,
        ]
    )
