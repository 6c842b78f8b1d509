"""What breaks it? Laws on random examples, other numbers of processes, damaged files, and killed runs.

    python benchmarks/faults/campaign.py run                        # all parts at full size; a quarter of an hour on 2 cores
    python benchmarks/faults/campaign.py run --part laws            # one part
    python benchmarks/faults/campaign.py run --small                # a few cases of every part; changes no record
    python benchmarks/faults/campaign.py table                      # the tables of docs/reliability.md from the JSON lines

Each case is one JSON line, written to the work folder as soon as it is known. When a part is complete its lines and its
birth certificate (command, commit, seed, hardware, versions, seconds, date) replace its old ones in
docs/results/faults.jsonl, all at once; a part that is interrupted changes nothing there. The exit status is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # a script finds its own folder only, not its package and not the builders of the tests
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from harness.pages import Part as PagePart  # noqa: E402 (the path comes first)
from harness.pages import cell, folded, how_it_was_run, table  # noqa: E402
from harness.records import RESULTS, Line, add_line, certified, read_lines, write_lines  # noqa: E402

MOST_GROUPS = 40
"""A part with more kinds of cases than this has no table of them."""
NO_RUN = "no run is recorded"


@dataclass(frozen=True)
class Part:
    """One part of the campaign.

    Attributes:
        module: offers `cases(count, seed, work)`.
        full: cases of the whole campaign.
        small: cases of the small version.
        title: what is tried, for the table.
        unit: what a case is called.
    """

    module: str
    full: int
    small: int
    title: str
    unit: str = "cases"


PARTS: Mapping[str, Part] = {
    "laws": Part("faults.laws", 10_000, 40, "Laws of the mathematics and of shrinking", "random examples"),
    "ranks": Part("faults.ranks", 12, 3, "The same run in 1, 2 and 4 processes"),
    "damage": Part("faults.damage", 200, 20, "Damaged files and folders"),
    "server": Part("faults.server", 100, 14, "What is sent to p3b serve and read by p3b predict"),
    "kills": Part("faults.kills", 50, 3, "Runs killed and resumed", "runs"),
    "images": Part("faults.images", 600, 26, "Images of every format and mode", "images"),
    "modules": Part(
        "faults.modules", 600, 12, "Models that people bring: odd layers, frozen parts, calls in any order", "models"
    ),
    "weights": Part("faults.weights", 600, 12, "Weights of any origin, under any name, into any model", "files"),
}


PAGE = PagePart("faults/campaign.py", RESULTS / "faults.jsonl", ROOT / "docs" / "reliability.md", lambda lines: tables(lines))


def main(arguments: Sequence[str] | None = None, *, parts: Mapping[str, Part] = PARTS, page: PagePart = PAGE) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--part", choices=tuple(parts), help="this one alone")
    parser.add_argument("--small", action="store_true", help="a few cases of each part, recorded in the work folder alone")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults", help="folder for the runs")
    given = parser.parse_args(arguments)
    failed: list[Line] = []
    if given.action == "run":
        record = given.work / "faults.jsonl" if given.small else page.lines
        for name in [given.part] if given.part else parts:
            failed += run_part(name, parts[name], given.small, given.seed, given.work.resolve(), record)
    if not given.small:
        replace(page, tables=lambda lines: tables(lines, parts)).write()
    for line in failed:
        print(f"FAILED {line['part']}: {line['case']}: {line['detail']}", file=sys.stderr)
    return 1 if failed else 0


def run_part(name: str, part: Part, small: bool, seed: int, work: Path, record: Path) -> list[Line]:
    """Run one part, replace its lines in the record, and return the cases that failed."""
    folder, so_far = work / name, work / f"{name}.jsonl"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    so_far.unlink(missing_ok=True)

    def run() -> dict[str, Any]:
        for case in importlib.import_module(part.module).cases(part.small if small else part.full, seed, folder):
            text = json.dumps(case).replace(str(folder), "WORK").replace(str(ROOT), "HERE")  # no paths of this machine
            told = json.loads(text)
            add_line(so_far, told)
            print(f"{'ok    ' if told['ok'] else 'FAILED'} {name}: {told['case']}: {told['detail']}"[:200], flush=True)
        return {"seed": seed}

    command = f"python benchmarks/faults/campaign.py run --part {name}" + (" --small" if small else "")
    certificate = certified(run, command, "torch", "timm", "numpy", "hypothesis")
    fresh = [*read_lines(so_far), {"part": name, "certificate": certificate}]
    write_lines(record, [*(line for line in read_lines(record) if line["part"] != name), *fresh])
    so_far.unlink()
    return [line for line in fresh if not line.get("ok", True)]


def tables(lines: Sequence[Line], parts: Mapping[str, Part] = PARTS) -> list[str]:
    """The result of each part, and folded what it is made of; from the lines alone."""
    cases = {name: [line for line in lines if line["part"] == name and "certificate" not in line] for name in parts}
    certificates = {line["part"]: line["certificate"] for line in lines if "certificate" in line}
    rows = []
    for name, part in parts.items():
        told = [_seen(cases[name]), f"{_tried(cases[name]):,} {part.unit}", _failures(cases[name])]
        rows.append([part.title, *(told if name in certificates else [NO_RUN, "", ""])])
    text = table(["what is tried", "result", "cases", "failures"], rows, text=2)
    failed = [line for name in parts for line in cases[name] if not line["ok"]]
    if failed:
        told = [f"- {parts[line['part']].title}: {cell(line['case'])}: {cell(line['detail'])}" for line in failed]
        text += ["### What failed", "", *told, ""]
    for name, part in parts.items():
        groups: dict[str, list[Line]] = {}
        for line in cases[name]:
            groups.setdefault(line.get("kind", line["case"]), []).append(line)
        if groups and len(groups) <= MOST_GROUPS:
            rows = [[cell(kind), f"{_tried(members):,}", _failures(members)] for kind, members in groups.items()]
            text += folded(part.title, table(["what was tried", part.unit, "failures"], rows))
    shown = [certificates[name] for name in parts if name in certificates]
    return text + how_it_was_run(shown, *(f"seed {line['seed']}" for line in shown))


def _failures(cases: Sequence[Line]) -> str:
    return str(sum(not line["ok"] for line in cases))


def _tried(cases: Sequence[Line]) -> int:
    """A line of the laws stands for many examples, any other for one case."""
    return sum(line.get("cases", 1) for line in cases)


def _seen(cases: Sequence[Line]) -> str:
    """The figures that the lines carry beside what every line has, each summed up by its type."""
    figures: dict[str, list[Any]] = {}
    for line in cases:
        for key, value in line.items():
            if key not in ("part", "case", "kind", "ok", "detail", "cases", "violations") and value is not None:
                figures.setdefault(key, []).append(value)
    told = [_summed_up(key.replace("_", " "), values) for key, values in figures.items()]
    laws = [line for line in cases if "violations" in line]
    if laws:
        held = sum(not line["violations"] for line in laws)
        told.insert(0, f"{held} of {len(laws)} laws held")
    return cell("; ".join(told))


def _summed_up(name: str, values: Sequence[Any]) -> str:
    first = values[0]
    if isinstance(first, bool):
        return f"{name}: {sum(values)} of {len(values)}"
    if isinstance(first, int):
        return f"{name}: {sum(values):,} in all, at most {max(values):,} a case"
    if isinstance(first, float):
        return f"{name}: at most {max(values):.3g}"
    if isinstance(first, list):
        return f"{name}: {sum(map(len, values)):,} in all"
    kinds = {str(value): values.count(value) for value in values}
    return f"{name}: " + ", ".join(f"{kind} ({count})" for kind, count in kinds.items())


if __name__ == "__main__":
    sys.exit(main())
