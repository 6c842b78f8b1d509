"""The command line of a benchmark: `run` measures what has a name and records it, `table` makes the page from the record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.pages import Part
from harness.records import Line, certified, read_lines, write_lines

Given = argparse.Namespace
"""The flags, as argparse reads them."""


def name_of(line: Line) -> Any:
    """By which a line replaces another: name, and device where one is recorded."""
    return line["name"], line.get("device", "cpu")


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        about: of the script: the question that it answers, and how it is run.
        part: the record and the part of the page made from it.
        names: of all measurements, in the order of the record.
        measure: what the line of a name says beside its birth certificate.
        flags: adds flags of its own.
        packages: whose versions are recorded.
        keeps: a name that is in the record is not measured again; else the new line replaces it.
        key: what two lines of the same measurement have in common.
    """

    about: str
    part: Part
    names: Sequence[str]
    measure: Callable[[str, Given], Mapping[str, Any]]
    flags: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    packages: tuple[str, ...] = ("torch", "timm")
    keeps: bool = False
    key: Callable[[Line], Any] = name_of


def main(bench: Bench, arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=bench.about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", metavar="NAME", help='this one alone; a name that ends in "-": all that begin so')
    bench.flags(parser)
    given = parser.parse_args(arguments)
    torch.set_num_threads(getattr(given, "threads", torch.get_num_threads()))
    if given.action == "run":
        chosen = [name for name in bench.names if asked_for(name, given.only)]
        if not chosen:
            parser.error(f"unknown name '{given.only}'; known: {', '.join(bench.names)}")
        for name in chosen:
            if not (bench.keeps and name in {line["name"] for line in read_lines(bench.part.lines)}):
                record(bench, name, given)
    bench.part.write()
    return 0


def asked_for(name: str, only: str | None) -> bool:
    return only is None or name == only or (only.endswith("-") and name.startswith(only))


def record(bench: Bench, name: str, given: Given) -> None:
    """Measure what has a name; its line replaces an earlier one of the same key."""
    flags = "".join(f" --{flag} {value}" for flag in ("device", "threads", "clock") if (value := getattr(given, flag, None)))
    command = f"python benchmarks/{bench.part.script} run --only {name}{flags}"
    line = {"name": name, **certified(lambda: bench.measure(name, given), command, *bench.packages)}
    kept = [old for old in read_lines(bench.part.lines) if bench.key(old) != bench.key(line)]
    write_lines(bench.part.lines, [*kept, line])
    print(f"{name}: {json.dumps(line)}", flush=True)


def machine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of what is timed in turns."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; threads that wait for each other burn its time")
    parser.add_argument("--rounds", type=int, help="rounds of every measurement, in place of its own number")


def device_of(given: Given) -> str:
    """What a line calls the device: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(given.device) if torch.device(given.device).type == "cuda" else "cpu"
