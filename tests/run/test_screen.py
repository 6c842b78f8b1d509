"""What is said, where, and by whom."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from p3b.run.options import RunOptions
from p3b.run.screen import Screen, open_screen


def say_everything(screen: Screen, log: Path) -> None:
    screen.log_to(log)
    screen.say("loss [3/4] 0.5")
    screen.table("small against dense", ("", "dense"), [("parameters", "1,234")])
    with screen.progress(10, 0), screen.library_messages():
        screen.advance(3, "sparsify")
        logging.getLogger("p3b.data").warning("Skipped an image")


def test_the_main_rank_says_it_on_screen_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Screen(is_main=True), tmp_path / "log.txt")
    screen, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for text in (screen, log):
        assert "loss [3/4] 0.5" in text and "1,234" in text and "small against dense" in text and "Skipped an image" in text
    assert "\x1b" not in log, "no colours in a file"


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Screen(is_main=False), tmp_path / "log.txt")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (RunOptions(), "progress warning table"),
        (RunOptions(quiet=True), "warning table"),
        (RunOptions(verbose=True), "detail progress warning table"),
    ],
)
def test_the_level_decides_what_is_shown_and_the_log_has_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: RunOptions, shown: str
) -> None:
    screen = open_screen(options, is_main=True)
    screen.log_to(tmp_path / "log.txt")
    screen.detail("detail")
    screen.say("progress")
    screen.warn("warning")
    screen.table("table", ("", "dense"), [("parameters", "1,234")])
    logged = (tmp_path / "log.txt").read_text()
    kinds = ("detail", "progress", "warning", "table")
    assert all(kind in logged for kind in kinds) and "1,234" in logged
    found = capsys.readouterr().out
    assert " ".join(kind for kind in kinds if kind in found) == shown


def test_the_bar_of_80_columns_cuts_nothing_that_must_be_read() -> None:
    screen, frames = Screen(is_main=True), io.StringIO()
    screen.console = Console(file=frames, force_terminal=True, width=80, highlight=False)
    with screen.progress(90_000, 0):
        screen.advance(45_000, "fine-tune epoch 299/300, loss 12.345, 86.6 M params")
    last = next(line for line in reversed(Text.from_ansi(frames.getvalue()).plain.splitlines()) if "left" in line)
    assert "fine-tune epoch 299/300, loss 12.345, 86.6 M params" in last and "━" in last and "…" not in last
    assert last.rstrip().endswith("left") and len(last.rstrip()) <= 80


def test_library_messages_end_with_their_block(tmp_path: Path) -> None:
    logger = logging.getLogger("p3b")
    before = list(logger.handlers)
    with pytest.raises(KeyError), Screen(is_main=True).library_messages():
        assert len(logger.handlers) == len(before) + 1
        raise KeyError
    assert logger.handlers == before
