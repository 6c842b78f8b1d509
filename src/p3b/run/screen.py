"""What a run shows: a live view on a terminal, lines in a pipe, notebook or CI, all lines in log.txt.

Silent on all ranks but one.
"""

from __future__ import annotations

import enum
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table

from p3b.methods.base import BlockDecision
from p3b.run.live import LiveView
from p3b.run.options import MachineOptions
from p3b.run.pace import Course, Moment, Pace

logger = logging.getLogger("p3b")

SECONDS_BETWEEN_LINES = 60.0
"""Where there is no live view, how a long epoch goes is said so often."""
_FRAMES_PER_SECOND = 4


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
        console: to write to; by default standard output.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        is_main: bool,
        level: Level = Level.NORMAL,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        # A notebook takes lines as a pipe does; FORCE_COLOR, which CI often sets, makes no terminal of a pipe.
        self.console = console or Console(
            file=sys.stdout, quiet=not is_main, highlight=False, force_terminal=sys.stdout.isatty(), force_jupyter=False
        )
        self._is_main, self._level, self._now = is_main, level, now
        self._course: Course | None = None
        self._view: LiveView | None = None
        self._pace = Pace(1, now)
        self._blocks: Sequence[BlockDecision] = ()
        self._log: Path | None = None
        self._said_at = now()

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

    @property
    def is_live(self) -> bool:
        """Whether there is a view that is drawn again and again: on a terminal, but for CI and --quiet."""
        interactive = self.console.is_interactive and not os.environ.get("CI")
        return self._is_main and self._level is not Level.QUIET and interactive

    def follow(self, course: Course) -> None:
        """What the stage is going to do; known before its first training."""
        self._course = course

    @contextmanager
    def progress(self, steps_per_epoch: int) -> Iterator[None]:
        """Show how a training of the stage goes, from here to the end of the block."""
        assert self._course is not None, "follow() comes first"
        self._pace = Pace(steps_per_epoch, self._now)
        self._view = LiveView(self._course, self._pace)
        self._view.blocks = self._blocks
        try:
            if self.is_live:
                with Live(self._view, console=self.console, transient=True, refresh_per_second=_FRAMES_PER_SECOND):
                    yield
            else:
                yield
        finally:
            self._view = None

    def advance(self, moment: Moment) -> None:
        """Show how the training stands."""
        if self._view is None or not self._is_main:
            return
        self._pace.mark(moment.step)
        self._view.moment = moment
        if self.is_live:
            return
        if self._now() - self._said_at >= SECONDS_BETWEEN_LINES:
            self.say(self._view.said())

    def show_blocks(self, blocks: Sequence[BlockDecision]) -> None:
        """What a mask update has decided, a bar for each block."""
        self._blocks = blocks
        if self._view is not None:
            self._view.blocks = blocks

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
        if level <= Level.NORMAL:
            self._said_at = self._now()
        if level <= self._level:
            shown = wrapped(line, self.console.width) if self.console.is_terminal else line
            self.console.print(shown, markup=False, soft_wrap=True)
        self._to_log(line)

    def _to_log(self, text: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(text.rstrip("\n") + "\n")


def wrapped(line: str, width: int) -> str:
    """A line broken between words where it is longer than a terminal is wide; what is broken off is indented.

    A word that is longer, such as a path, stays whole.
    """
    fill = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False).fill
    return "\n".join(map(fill, line.split("\n")))


def open_screen(run: MachineOptions, is_main: bool) -> Screen:
    """The screen of a run, at the level that its options ask for."""
    level = Level.VERBOSE if run.verbose else Level.QUIET if run.quiet else Level.NORMAL
    return Screen(is_main, level)
