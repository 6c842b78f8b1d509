"""The campaign of faults: laws on random examples, other numbers of processes, damaged files, killed runs.

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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # a script finds its own folder only, not its package and not the builders of the tests
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from p3b.storage.files import write_atomically  # noqa: E402
from records import (  # noqa: E402 (the path comes first)
    RESULTS,
    add_line,
    circumstances,
    machine_of,
    packages_of,
    read_lines,
    replace_part,
    revision_of,
    versions,
)

LINES = RESULTS / "faults.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- made from docs/results/faults.jsonl by `python benchmarks/faults/campaign.py table`; do not edit -->"
END = "<!-- end of what is made from the lines -->"
MOST_GROUPS = 40
"""A table of kinds has at most so many rows; a part of more is told in the first table alone."""


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
    "laws": Part("faults.laws", 10_000, 100, "Laws of the mathematics and of shrinking", "random examples"),
    "ranks": Part("faults.ranks", 12, 3, "The same run in 1, 2 and 4 processes"),
    "damage": Part("faults.damage", 200, 20, "Damaged files and folders"),
    "kills": Part("faults.kills", 50, 3, "Runs killed and resumed", "runs"),
}


def main(
    arguments: Sequence[str] | None = None, *, parts: Mapping[str, Part] = PARTS, lines: Path = LINES, page: Path = PAGE
) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--part", choices=tuple(parts), help="this one alone")
    parser.add_argument("--small", action="store_true", help="a few cases of each part, recorded in the work folder alone")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults", help="folder for the runs")
    given = parser.parse_args(arguments)
    failed: list[dict[str, Any]] = []
    if given.action == "run":
        record = given.work / "faults.jsonl" if given.small else lines
        for name in [given.part] if given.part else parts:
            failed += run_part(name, parts[name], given.small, given.seed, given.work, record)
    if not given.small:
        write_page(page, read_lines(lines), parts)
    for line in failed:
        print(f"FAILED {line['part']}: {line['case']}: {line['detail']}", file=sys.stderr)
    return 1 if failed else 0


def run_part(name: str, part: Part, small: bool, seed: int, work: Path, record: Path) -> list[dict[str, Any]]:
    """Run one part, replace its lines in the record, and return the cases that failed."""
    folder, so_far = work.resolve() / name, work.resolve() / f"{name}.jsonl"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    so_far.unlink(missing_ok=True)
    made_by = circumstances()  # before the run: whoever works on in the meantime does not change what has run
    began = time.monotonic()
    for case in importlib.import_module(part.module).cases(part.small if small else part.full, seed, folder):
        told = json.loads(json.dumps(case).replace(str(folder), "WORK").replace(str(ROOT), "HERE"))  # no paths of this machine
        add_line(so_far, told)
        print(f"{'ok    ' if told['ok'] else 'FAILED'} {name}: {told['case']}: {told['detail']}"[:200], flush=True)
    certificate = {
        "command": f"python benchmarks/faults/campaign.py run --part {name}" + (" --small" if small else ""),
        "seed": seed,
        **made_by,
        "versions": versions("torch", "timm", "numpy", "hypothesis"),
        "seconds": round(time.monotonic() - began, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    add_line(so_far, {"part": name, "certificate": certificate})
    fresh = read_lines(so_far)
    kept = [line for line in read_lines(record) if line["part"] != name]
    text = "".join(json.dumps(line) + "\n" for line in kept + fresh)
    write_atomically(record, lambda file: file.write_text(text))
    so_far.unlink()
    return [line for line in fresh if not line.get("ok", True)]


def write_page(page: Path, lines: Sequence[dict[str, Any]], parts: Mapping[str, Part] = PARTS) -> None:
    """Put the tables between the markers of the page; what is written around them stays."""
    replace_part(page, BEGIN, END, tables(lines, parts))


def tables(lines: Sequence[dict[str, Any]], parts: Mapping[str, Part] = PARTS) -> str:
    """All tables, made from the lines alone."""
    cases = {name: [line for line in lines if line["part"] == name and "certificate" not in line] for name in parts}
    certificates = {line["part"]: line["certificate"] for line in lines if "certificate" in line}
    text = ["| what is tried | cases | failures | what was seen |", "|---|---:|---:|---|"]
    for name, part in parts.items():
        if name in certificates:
            tried, failures = _tried(cases[name]), sum(not line["ok"] for line in cases[name])
            text.append(f"| {part.title} | {tried:,} {part.unit} | {failures} | {_seen(cases[name])} |")
        else:
            text.append(f"| {part.title} | | | no run is recorded |")
    for name, part in parts.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in cases[name]:
            groups.setdefault(line.get("kind", line["case"]), []).append(line)
        if groups and len(groups) <= MOST_GROUPS:
            text += ["", f"### {part.title}", "", f"| what was tried | {part.unit} | failures |", "|---|---:|---:|"]
            for kind, members in groups.items():
                text.append(f"| {_cell(kind)} | {_tried(members):,} | {sum(not line['ok'] for line in members)} |")
    failed = [line for name in parts for line in cases[name] if not line["ok"]]
    if failed:
        text += ["", "### What failed", ""]
        text += [f"- {parts[line['part']].title}: {_cell(line['case'])}: {_cell(line['detail'])}" for line in failed]
    text += ["", "### How it was run", ""]
    text += [f"- {_certificate(certificates[name])}" for name in parts if name in certificates]
    return "\n".join(text) + "\n"


def _tried(cases: Sequence[dict[str, Any]]) -> int:
    """A line of the laws stands for many examples, any other for one case."""
    return sum(line.get("cases", 1) for line in cases)


def _seen(cases: Sequence[dict[str, Any]]) -> str:
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
    return _cell("; ".join(told))


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


def _certificate(made_by: Mapping[str, Any]) -> str:
    return (
        f"`{made_by['command']}`: {made_by['date'][:10]}, {revision_of(made_by)}, seed {made_by['seed']}, "
        f"{made_by['seconds'] / 60:.1f} minutes on {machine_of(made_by)}; {packages_of(made_by)}"
    )


def _cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
