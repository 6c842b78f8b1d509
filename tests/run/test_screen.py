"""What is said, where, and by whom."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from p3b.run.screen import Display


def say_everything(display: Display, log: Path) -> None:
    display.log_to(log)
    display.say("loss [3/4] 0.5")
    display.table("small against dense", ("", "dense"), [("parameters", "1,234")])
    with display.progress(10, 0), display.library_messages():
        display.advance(3, "sparsify")
        logging.getLogger("p3b.data").warning("Skipped an image")


def test_the_main_rank_says_it_on_screen_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Display(is_main=True), tmp_path / "log.txt")
    screen, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for text in (screen, log):
        assert "loss [3/4] 0.5" in text and "1,234" in text and "small against dense" in text and "Skipped an image" in text
    assert "\x1b" not in log, "no colours in a file"


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Display(is_main=False), tmp_path / "log.txt")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "log.txt").exists()


def test_library_messages_end_with_their_block(tmp_path: Path) -> None:
    logger = logging.getLogger("p3b")
    before = list(logger.handlers)
    with pytest.raises(KeyError), Display(is_main=True).library_messages():
        assert len(logger.handlers) == len(before) + 1
        raise KeyError
    assert logger.handlers == before
