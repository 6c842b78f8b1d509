"""What is said, where, and by whom."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import struct
import sys
import termios
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from p3b.core.schedule import Schedule
from p3b.methods.base import BlockDecision
from p3b.run.live import LiveView
from p3b.run.options import RunOptions
from p3b.run.pace import Course, Moment, Pace, Phase
from p3b.run.prune_plan import PrunePlan, phases_of
from p3b.run.screen import Level, Screen, open_screen
from processes import forked, status_of
from runs import PHASES, flags, run

COURSE = Course(
    (Phase("warm-up", 100), Phase("sparsify", 500), Phase("sharpen", 1000), Phase("fine-tune", 2000)), 2_400_000, 1_200_000
)
MOMENT = Moment(step=400, epoch=4, epochs=300, loss=12.345678, accuracy=("test", 100.0), kept_params=2_000_000)
EPOCH_LINE = "epoch   3/300  sparsify  loss 1.0986  val top-1  41.67 %  2.00 M params  8.3 s"


class Clock:
    """Says what it is told."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def say_everything(screen: Screen, log: Path) -> None:
    screen.log_to(log)
    screen.say("loss [3/4] 0.5")
    screen.table("small against dense", ("", "dense"), [("parameters", "1,234")])
    screen.follow(COURSE)
    with screen.progress(100), screen.library_messages():
        screen.advance(MOMENT)
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


def blocks(depth: int, *, measured: bool = True) -> list[BlockDecision]:
    return [
        BlockDecision(
            f"blocks.{number}.{kind}", kind, 0.1 * number if measured else None, None, None, 0.5, 0.5, 10 * number, 10 * depth
        )
        for number in range(depth)
        for kind in ("attn", "mlp")
    ]


def drawn(width: int, height: int, depth: int = 12, *, measured: bool = True, ascii_only: bool = False) -> list[str]:
    pace = Pace(100, now := Clock())
    pace.mark(300)
    now.seconds = 30.0
    pace.mark(400)
    view = LiveView(COURSE, pace)
    view.moment, view.blocks = MOMENT, blocks(depth, measured=measured)
    return [line.plain for line in view.lines(width, height, ascii_only=ascii_only)]


@pytest.mark.parametrize("width", [50, 80, 120])
@pytest.mark.parametrize("depth", [1, 12, 40])
@pytest.mark.parametrize("measured", [True, False])
def test_the_view_fits_any_terminal(width: int, depth: int, measured: bool) -> None:
    for height in (6, 19):
        for ascii_only in (False, True):
            found = drawn(width, height, depth, measured=measured, ascii_only=ascii_only)
            assert max(map(len, found)) <= width and len(found) <= max(height, 8)
            assert not ascii_only or "".join(found).isascii()
            assert "epoch 4/300" in found[0] and "0:0" not in "".join(found)


def test_the_view_says_phase_time_loss_accuracy_budget_and_each_block() -> None:
    """At 0.3 s a step: 100 steps of the phase and 1,600 of the run are left."""
    found = drawn(80, 24)
    assert found[0] == "sparsify   epoch 4/300  loss 12.35  test top-1 100.00 %"
    assert found[1].startswith("run ") and found[1].endswith("8m00s left")
    assert found[2].startswith("sparsify ") and found[2].endswith("30.0 s left")
    assert found[3].startswith("kept") and found[3].endswith("2.00 M parameters, goal 1.20 M")
    assert found[3].index("┃") == pytest.approx(11 + 0.5 * (80 - 11 - 32), abs=1), "half of the dense parameters are the goal"
    rows = found[5:]
    assert len(rows) == 12 and all(row.count("%") == 2 for row in rows)
    assert rows[11].count("█") > rows[6].count("█") > rows[0].count("█") == 0, "bars grow with what they stand for"
    assert "92 %" in rows[11] and "1.1000" in rows[11]


def test_blocks_that_have_no_room_for_rows_are_a_character_each() -> None:
    found = drawn(80, 12, depth=24)
    assert [line[:18].strip() for line in found[4:]] == [
        "kept     attention",
        "benefit  attention",
        "kept     MLP",
        "benefit  MLP",
    ]
    assert all(len(line) == 19 + 24 for line in found[4:])


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_whole_lines_and_nothing_stays_of_the_view(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal emulator holds while a run trains, and after it."""
    pyte = pytest.importorskip("pyte")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    written = io.StringIO()
    screen = Screen(is_main=True, console=Console(file=written, force_terminal=True, width=width, height=24, highlight=False))
    terminal = pyte.Screen(width, 24)
    stream = pyte.Stream(terminal)
    screen.follow(COURSE)
    assert screen.is_live
    with screen.progress(100):
        screen.advance(MOMENT)
        screen.show_blocks(blocks(12))
        screen.say("data: " + "a folder of photos " * 7)
        screen.say(EPOCH_LINE)
        during = written.getvalue()
    stream.feed(during.replace("\n", "\r\n"))
    shown = [line.rstrip() for line in terminal.display]
    assert EPOCH_LINE in shown and "sparsify   epoch 4/300  loss 12.35  test top-1 100.00 %" in shown
    assert sum(line.count("%") == 2 for line in shown) == 12, "a row for each depth"
    assert any(line.startswith("    ") and line.endswith("photos") for line in shown), "what is broken off is indented"
    stream.feed(written.getvalue()[len(during) :].replace("\n", "\r\n"))
    assert not [line for line in terminal.display if "━" in line or "█" in line]


def test_elsewhere_it_says_in_lines_how_a_long_epoch_goes(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    screen = Screen(is_main=True, now=clock)
    screen.follow(COURSE)
    with screen.progress(100):
        for step in range(0, 500, 10):
            screen.advance(replace(MOMENT, step=step))
            clock.seconds += 2.5
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "  sparsify, epoch 4/300, step 240 of 2,000, loss 12.35, 7m20s left",
        "  sparsify, epoch 4/300, step 480 of 2,000, loss 12.35, 6m20s left",
    ]


def test_there_is_no_view_in_ci_in_a_pipe_and_where_it_is_to_be_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert Screen(is_main=True, console=terminal).is_live
    assert not Screen(is_main=False, console=terminal).is_live
    assert not Screen(is_main=True, level=Level.QUIET, console=terminal).is_live
    monkeypatch.setenv("CI", "true")
    assert not Screen(is_main=True, console=terminal).is_live
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen(is_main=True, console=Console(file=io.StringIO(), force_terminal=True)).is_live
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not Screen(is_main=True).is_live, "FORCE_COLOR makes no terminal of a pipe"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_run_in_a_terminal_of_80_columns(data: Path, tmp_path: Path) -> None:
    """The real thing, once: every line that is said fits, and the view names the epoch."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def act() -> int:
        for number in (0, 1, 2):
            os.dup2(theirs, number)
        os.environ.update(TERM="xterm", COLUMNS="80", LINES="24")
        os.environ.pop("CI", None)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
        return run("prune", *flags(data, tmp_path / "out", *PHASES))

    process = forked(act)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # how Linux says that nobody holds the other end any more
        while more := os.read(ours, 1 << 16):
            shown += more
    os.close(ours)
    assert status_of(process) == 0, shown.decode()
    text = Text.from_ansi(shown.decode().replace("\r\n", "\n")).plain
    said = [line for line in text.splitlines() if line.startswith("epoch")]
    assert len(said) == 3 and all(len(line) <= 80 for line in said)
    assert "epoch 1/3" in text and "goal" in text and "0:0" not in text


@pytest.mark.parametrize(
    ("marks", "left"),
    [([], None), ([(0, 0.0)], None), ([(0, 0.0), (10, 20.0)], 180.0), ([(0, 0.0), (10, 1.0), (20, 2.0), (30, 22.0)], 73.5)],
)
def test_time_left_by_the_pace_of_the_last_epoch(marks: list[tuple[int, float]], left: float | None) -> None:
    """An epoch is 20 steps: the third case is too short for one, the fourth forgets its first mark."""
    pace = Pace(20, clock := Clock())
    for step, seconds in marks:
        clock.seconds = seconds
        pace.mark(step)
    to_do = 100 - (marks[-1][0] if marks else 0)
    assert pace.seconds_for(to_do) == (None if left is None else pytest.approx(left))
    clock.seconds += 5000.0
    assert not pace.seconds_for(to_do)


def test_phases_without_a_step_are_left_out() -> None:
    plan = PrunePlan(Schedule(start=0, sparse=5, final=20, update_every=5), epochs=2, finetune_epochs=0)
    assert phases_of(plan, 10) == (Phase("sparsify", 5), Phase("sharpen", 20))
    assert phases_of(replace(plan, epochs=0, finetune_epochs=2), 10) == (Phase("fine-tune", 20),), "one shot"
    course = Course(phases_of(replace(plan, finetune_epochs=1), 10), 100)
    assert [course.phase_at(step) for step in (0, 5, 20, 30)] == [
        (0, Phase("sparsify", 5)), (5, Phase("sharpen", 20)), (20, Phase("fine-tune", 30)), (20, Phase("fine-tune", 30)),
    ]  # fmt: skip


def test_what_a_cut_leaves_out_of_its_epoch_is_not_waited_for() -> None:
    """A warm-up of 4 steps in epochs of 10, and two epochs of the small model: steps 4 to 9 are counted and not done."""
    plan = PrunePlan(Schedule(start=4, sparse=5, final=5, update_every=1), epochs=1, finetune_epochs=2, at_once=True)
    course = Course(phases_of(plan, 10), 100)
    assert course.phases == (Phase("warm-up", 4), Phase("fine-tune", 30, skipped=6)) and course.steps == 30
    assert [course.phase_at(step)[0] for step in (0, 4, 10, 30)] == [0, 10, 10, 10]
    assert [course.to_do(step, 30) for step in (0, 4, 10, 29)] == [24, 20, 20, 1] and course.to_do(0, 4) == 4
    assert phases_of(replace(plan, finetune_epochs=0), 10) == (Phase("warm-up", 4),)


def test_library_messages_end_with_their_block(tmp_path: Path) -> None:
    logger = logging.getLogger("p3b")
    before = list(logger.handlers)
    with pytest.raises(KeyError), Screen(is_main=True).library_messages():
        assert len(logger.handlers) == len(before) + 1
        raise KeyError
    assert logger.handlers == before
