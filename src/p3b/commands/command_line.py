"""The command line: `p3b <command>`, and the published `main.py`. Torch is imported only when a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3b.errors import ConfigError, Stopped, UserError, unknown_name
from p3b.run.none_values import with_one_none

USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130
"""75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, try again."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        settings: class of its settings, "module:class"; loaded when the command runs, as the target is.
        purpose: what it is for, in a few words.
        target: function that carries it out, "module:function".
        to_continue: how it is continued after a stop; empty where there is nothing to continue.
        reads_file: whether `--config FILE` gives settings.
        by_recipe: whether a recipe chooses settings that are not given; the target then takes the data that it has opened.
    """

    settings: str
    purpose: str
    target: str
    to_continue: str = "continue with --resume"
    reads_file: bool = False
    by_recipe: bool = False


_OPTIONS, _LOOK, _HERE = "p3b.run.options", "p3b.run.look_options", "p3b.commands"
_DEPLOY = "p3b.run.deploy_options"
_NOTHING = ""
_AGAIN = "run the same command again to continue"

COMMANDS: dict[str, Command] = {
    "demo": Command(f"{_OPTIONS}:DemoConfig", "the whole job on embedded data, in minutes", f"{_HERE}.demo:run_demo"),
    "train": Command(
        f"{_OPTIONS}:TrainConfig",
        "transfer a dense model to a data set",
        f"{_HERE}.train:train",
        reads_file=True,
        by_recipe=True,
    ),
    "prune": Command(
        f"{_OPTIONS}:PruneConfig",
        "transfer and prune on the way, and fine-tune",
        f"{_HERE}.prune:prune",
        reads_file=True,
        by_recipe=True,
    ),
    "finetune": Command(
        f"{_OPTIONS}:FinetuneConfig",
        "train a small model further",
        f"{_HERE}.finetune:finetune",
        reads_file=True,
        by_recipe=True,
    ),
    "plan": Command(
        f"{_OPTIONS}:PlanConfig",
        "what p3b prune would do, how long it takes, what budgets give",
        f"{_HERE}.plan:show_plan",
        "nothing is lost",
        reads_file=True,
        by_recipe=True,
    ),
    "data": Command(
        f"{_OPTIONS}:DataConfig",
        "what is in a folder of images",
        f"{_HERE}.data:show_data",
        "nothing is lost",
        reads_file=True,
    ),
    "compare": Command(
        f"{_OPTIONS}:CompareConfig",
        "methods x prune ratios x seeds, in one table",
        f"{_HERE}.compare:compare",
        _AGAIN,
        reads_file=True,
        by_recipe=True,
    ),
    "sweep": Command(
        f"{_OPTIONS}:SweepConfig",
        "several budgets, or the largest that loses little",
        f"{_HERE}.sweep:sweep",
        _AGAIN,
        reads_file=True,
        by_recipe=True,
    ),
    "evaluate": Command(
        f"{_OPTIONS}:EvaluateConfig",
        "accuracy, size and speed of a saved model",
        f"{_HERE}.evaluate:evaluate",
        reads_file=True,
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
    "serve": Command(
        f"{_DEPLOY}:ServeConfig", "try a model on a web page, the dense one beside it", f"{_HERE}.serve:serve", _NOTHING
    ),
    "push": Command(f"{_DEPLOY}:PushConfig", "put a model on the Hugging Face hub", f"{_HERE}.push:push_saved", _NOTHING),
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
    if name == "completion":
        return _complete(flags)
    if name not in COMMANDS:
        print(f"p3b: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    return run_command(name, flags, prog=f"p3b {name}")


def published_main(arguments: Sequence[str] | None = None) -> int:
    """The published command line (main.py): the flags say which command is meant."""
    flags = list(sys.argv[1:] if arguments is None else arguments)
    given = {flag.split("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    if "--eval" in given:
        return run_command("evaluate", [flag for flag in flags if flag != "--eval"], prog="main.py --eval", published=True)
    if "--prune-method" in given:
        return run_command("prune", flags, prog="main.py --prune-method ...", published=True)
    name = "finetune" if "--resize-model-by-checkpoint" in given else "train"
    return run_command(name, flags, prog="main.py", published=True)


def run_command(name: str, words: Sequence[str], prog: str, *, published: bool = False) -> int:
    """Parse the words behind a command and carry it out; on the published command line nothing is chosen unasked."""
    command = COMMANDS[name]
    if "-h" in words or "--help" in words:
        from p3b.commands.first_help import first_help

        if (said := first_help(name, command.purpose)) is not None:
            print(said)
            return 0
    try:
        config, given = _parse(name, words, prog, published=published)
        carry_out = _load(command.target)
        if command.by_recipe and not published:
            from p3b.commands.settled import with_recipe

            with with_recipe(name, config, given) as (settled, splits):
                carry_out(settled, splits=splits)
        else:
            carry_out(config)
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


def _parse(name: str, words: Sequence[str], prog: str, *, published: bool) -> tuple[Any, frozenset[str]]:
    """The settings that the words behind a command come to, and the names of those that are given.

    Raises:
        UserError: words that cannot be understood. SystemExit: help was asked for, or a flag is not known; it has been said.
    """
    import tyro

    from p3b.commands.words import understand

    command = COMMANDS[name]
    settings = _load(command.settings)
    if "--help-all" in words:
        from p3b.commands.first_help import all_flags_head

        print(all_flags_head(name) or "")
        words = ["--help"]
    files, rest = _files(words) if command.reads_file else ([], words)
    of_files = [word for file in files for word in _flags_of_file(settings, file)]
    understood = understand(settings, rest)
    recipe = [] if published or not command.by_recipe else ["--recipe", "auto"]
    args = with_one_none(settings, [*recipe, *of_files, *understood.flags])
    config = tyro.cli(settings, args=args, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    return config, understood.given | understand(settings, of_files).given


def _files(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that --config names, and the other words."""
    files, rest = [], []
    waits = False
    for word in words:
        if waits or word.startswith("--config="):
            files.append(Path(word.removeprefix("--config=")))
            waits = False
        elif word == "--config":
            waits = True
        else:
            rest.append(word)
    if waits:
        raise ConfigError("--config is given no file; expected a YAML file or the config.json of a run.")
    return files, rest


def _flags_of_file(settings: type, file: Path) -> list[str]:
    from p3b.commands.settings import flags_of_file

    return flags_of_file(settings, file)


def _complete(words: Sequence[str]) -> int:
    """`p3b completion SHELL`: print the script."""
    from p3b.commands.completion import SHELLS, print_completion

    if len(words) != 1 or words[0] not in SHELLS:
        print(f"p3b completion: expected one of {', '.join(SHELLS)}: p3b completion bash > p3b.bash", file=sys.stderr)
        return USER_ERROR
    print_completion({name: _load(command.settings) for name, command in COMMANDS.items()}, words[0])
    return 0


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
            "usage: p3b <command> [flags]      p3b <command> --help shows the flags that matter, --help-all shows all",
            "",
            *lines,
            "",
            "example: p3b prune photos --keep 0.5 --output-dir run      (photos: a folder of images for each class)",
            "p3b completion bash prints a script that completes commands and flags (bash, zsh, fish); p3b --version",
        ]
    )
