"""Pages made from records: markdown tables, folded blocks, and how each line was measured, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.records import Line, read_lines
from p3b.storage.files import write_atomically

END = "<!-- end of what is made from the lines -->"
NOTHING = "No run is recorded yet."


class Tables(Protocol):
    def __call__(self, lines: Sequence[Line], /) -> list[str]: ...


@dataclass(frozen=True)
class Part:
    """The part of a page that is made from a record; what is written around it stays.

    Attributes:
        script: of `benchmarks/`, e.g. "bench.py"; its action `table` makes the part.
        lines: the record.
        page: the page.
        tables: the lines of the part, from those of the record.
    """

    script: str
    lines: Path
    page: Path
    tables: Tables

    @property
    def begin(self) -> str:
        return f"<!-- made from docs/results/{self.lines.name} by `python benchmarks/{self.script} table`; do not edit -->"

    def text(self) -> str:
        """The whole page with the part made anew; the part alone where there is no page yet."""
        page = self.page.read_text() if self.page.exists() else ""
        before, _, rest = page.partition(self.begin)
        _, _, after = rest.partition(END)
        lines = read_lines(self.lines)
        made = self.tables(lines) if lines else [NOTHING, ""]
        return "\n".join([f"{before}{self.begin}", "", *made, f"{END}{after}"])

    def write(self) -> None:
        text = self.text()
        write_atomically(self.page, lambda file: file.write_text(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> list[str]:
    """A table and an empty line; the first `text` columns are aligned to the left, the others to the right."""
    align = ["---"] * text + ["---:"] * (len(head) - text)
    return [f"| {' | '.join(head)} |", f"|{'|'.join(align)}|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """A block that opens on a click, and an empty line."""
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "</details>", ""]


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def how_it_was_run(lines: Sequence[Line], *facts: str) -> list[str]:
    """A folded block: the command of each line, those that were run under the same circumstances together.

    Args:
        lines: with birth certificates.
        facts: more that is told of each command, one text a line.
    """
    groups: dict[str, list[str]] = {}
    for line, fact in zip(lines, facts or [""] * len(lines), strict=True):
        more = ", ".join(filter(None, [fact, duration(line["seconds"]) if "seconds" in line else ""]))
        command = f"- `{line['command']}`" + (f": {more}" if more else "")
        commands = groups.setdefault(circumstances(line), [])
        commands += [] if command in commands else [command]
    text = [each for group, commands in groups.items() for each in (f"{group}:", "", *commands, "")]
    return folded("Commands and circumstances of the runs", text)


def circumstances(line: Line) -> str:
    """Date, commit, machine and versions of a line, in words."""
    machine = line["hardware"]
    changed = " with changes that were not committed" if line.get("changed_since") or line["commit"].endswith("+") else ""
    threads = machine.get("threads", line.get("threads"))
    cores = f"{threads} of {machine['cores']} cores" if threads else f"{machine['cores']} cores"
    told = [
        line.get("date", "")[:10],
        f"commit {line['commit'][:12]}{changed}",
        f"{cores} {machine['machine']}",
        *([machine["instructions"]] if "instructions" in machine else []),
        machine["accelerator"] or "no accelerator",
        *(f"{package} {version}" for package, version in line.get("versions", {}).items()),
    ]
    return ", ".join(filter(None, told))


def counted(number: int, unit: str) -> str:
    """ "1 round", "2 rounds"."""
    return f"{number} {unit}" + ("s" if number != 1 else "")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
