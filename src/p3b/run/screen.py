"""What a run shows: a progress bar on a terminal, lines elsewhere, the same lines in log.txt. Silent on all but one rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

logger = logging.getLogger("p3b")


class Display:
    """Screen and log file of one process."""

    def __init__(self, is_main: bool) -> None:
        self.console = Console(file=sys.stdout, quiet=not is_main, highlight=False)
        self._is_main = is_main
        self._bar: Progress | None = None
        self._log: Path | None = None

    def log_to(self, file: Path) -> None:
        """Write every line to this file, too."""
        self._log = file if self._is_main else None

    def say(self, line: str = "") -> None:
        """One line for the screen and the log."""
        self.console.print(line, markup=False, soft_wrap=True)
        self._to_log(line)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for the screen and the log; the first column is text, the others are figures."""
        table = Table(title=title, title_justify="left")
        for position, column in enumerate(columns):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        plain = Console(width=120, color_system=None, file=None, record=True, quiet=False, force_terminal=False)
        with plain.capture() as text:
            plain.print(table)
        self._to_log(text.get())

    @contextmanager
    def progress(self, total_steps: int, done_steps: int) -> Iterator[None]:
        """A bar over the steps of a stage; only on a terminal."""
        if not (self._is_main and self.console.is_terminal):
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bar:
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

    def _to_log(self, text: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(text.rstrip("\n") + "\n")
