"""What a run shows: a progress bar on a terminal, lines elsewhere, all lines in log.txt. Silent on all but one rank."""

from __future__ import annotations

import enum
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from p3b.run.options import MachineOptions

logger = logging.getLogger("p3b")


class Level(enum.IntEnum):
    """How much is shown on the screen."""

    QUIET = 0
    """Warnings and final tables."""
    NORMAL = 1
    """How the run goes, too."""
    VERBOSE = 2
    """Details, too."""


class Screen:
    """Screen and log file of one process.

    Args:
        is_main: the other processes show and log nothing.
        level: of the screen; the log file gets everything.
    """

    def __init__(self, is_main: bool, level: Level = Level.NORMAL) -> None:
        self.console = Console(file=sys.stdout, quiet=not is_main, highlight=False)
        self._is_main, self._level = is_main, level
        self._bar: Progress | None = None
        self._log: Path | None = None

    def log_to(self, file: Path) -> None:
        """Write every line to this file, too."""
        self._log = file if self._is_main else None

    def say(self, line: str = "") -> None:
        """A line on how the run goes."""
        self._show(line, Level.NORMAL)

    def detail(self, line: str) -> None:
        """A line for those who want to know more."""
        self._show(line, Level.VERBOSE)

    def warn(self, line: str) -> None:
        """A line that nobody should miss; it is always shown."""
        self._show(line, Level.QUIET)

    def result(self, line: str) -> None:
        """A line of what came out in the end; it is always shown."""
        self._show(line, Level.QUIET)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A final table under its title; the first column is text, the others are figures. It is always shown."""
        table = Table()
        for position, column in enumerate(columns):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.result(title)
        self.console.print(table)
        plain = Console(width=120, color_system=None, file=None, record=True, quiet=False, force_terminal=False)
        with plain.capture() as text:
            plain.print(table)
        self._to_log(text.get())

    @contextmanager
    def progress(self, total_steps: int, done_steps: int) -> Iterator[None]:
        """A bar over the steps of a training, as wide as the terminal leaves it; only on a terminal."""
        if self._level is Level.QUIET or not (self._is_main and self.console.is_terminal):
            yield
            return
        whole = Column(no_wrap=True)  # what must be read is never cut; the bar takes what is left
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TimeRemainingColumn(table_column=whole),
            TextColumn("left", table_column=whole),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as bar:
            self._bar, self._task = bar, bar.add_task("starting", total=total_steps, completed=done_steps)
            try:
                yield
            finally:
                self._bar = None

    def advance(self, done_steps: int, text: str) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done_steps, description=text)

    @contextmanager
    def library_messages(self) -> Iterator[None]:
        """Show warnings of our own rooms (such as skipped images) on the screen and in the log."""
        handlers: list[logging.Handler] = [RichHandler(console=self.console, show_time=False, show_path=False)]
        if self._log is not None:
            handlers.append(logging.FileHandler(self._log))
        for handler in handlers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()

    def _show(self, line: str, level: Level) -> None:
        if level <= self._level:
            self.console.print(line, markup=False, soft_wrap=True)
        self._to_log(line)

    def _to_log(self, text: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(text.rstrip("\n") + "\n")


def open_screen(run: MachineOptions, is_main: bool) -> Screen:
    """The screen of a run, at the level that its options ask for."""
    level = Level.VERBOSE if run.verbose else Level.QUIET if run.quiet else Level.NORMAL
    return Screen(is_main, level)
