"""The live part of the screen: phase, time left, loss, accuracy, kept against goal, and a bar for each block.

Rendered for a width and a height: nothing wraps, and what does not fit is drawn smaller. One bar is a row where the terminal is
high enough, else a character.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from p3b.methods.base import BlockDecision
from p3b.run.pace import Course, Moment, Pace
from p3b.run.short_figures import duration, short_count, short_loss

_TITLES = {"attn": "attention", "mlp": "MLP"}
_EIGHTHS, _RISING = " ▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█"
_LOG_LINES = 5
"""Lines of the terminal that are left to what is said."""
_LEFT = len("12d04h left")
_NAME = len("fine-tune")
_WIDEST_BAR = 40


class LiveView:
    """What a training shows of itself.

    Args:
        course: of the stage.
        pace: of the training.

    Attributes:
        moment: how it stands.
        blocks: of the last mask update; empty before the first.
    """

    def __init__(self, course: Course, pace: Pace) -> None:
        self._course, self._pace = course, pace
        self.moment: Moment | None = None
        self.blocks: Sequence[BlockDecision] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = console.height - _LOG_LINES
        plain = options.ascii_only
        for line in self.lines(options.max_width, height, ascii_only=plain):
            line.no_wrap = True
            yield line

    def lines(self, width: int, height: int, *, ascii_only: bool = False) -> Iterator[Text]:
        """The lines, each at most `width` columns wide, and at most 8 or `height` of them, whichever is more."""
        for line in self._drawn(width, height, ascii_only):
            line.truncate(width)
            yield line

    def _drawn(self, width: int, height: int, ascii_only: bool) -> Iterator[Text]:
        moment = self.moment
        if moment is None:
            yield Text("starting")
            return
        start, phase = self._course.phase_at(moment.step)
        yield self._headline(phase.name, moment)
        for name, first, end in (("run", 0, self._course.steps), (phase.name, start, phase.end)):
            yield self._way(name, (moment.step - first) / max(end - first, 1), self._left(moment, end), width, ascii_only)
        yield self._budget(moment.kept_params, width, ascii_only)
        if self.blocks:
            depth = max(len(blocks) for blocks in _by_kind(self.blocks).values())
            draw = _rows if depth + 5 <= height else _columns
            yield from draw(_by_kind(self.blocks), width, ascii_only)

    def said(self) -> str:
        """The same in one line, without bars."""
        moment = self.moment
        assert moment is not None
        loss = "" if moment.loss is None else f", loss {short_loss(moment.loss)}"
        left = self._left(moment, self._course.steps)
        rest = "" if left is None else f", {duration(left)} left"
        return (
            f"  {self._course.phase_at(moment.step)[1].name}, epoch {moment.epoch}/{moment.epochs}, step {moment.step:,} of "
            f"{self._course.steps:,}{loss}{rest}"
        )

    def _headline(self, phase: str, moment: Moment) -> Text:
        line = Text.assemble((f"{phase:<{_NAME}}", "bold"), f"  epoch {moment.epoch}/{moment.epochs}")
        if moment.loss is not None:
            line.append(f"  loss {short_loss(moment.loss)}")
        if moment.accuracy is not None:
            line.append(f"  {moment.accuracy[0]} top-1 {moment.accuracy[1]:.2f} %")
        return line

    def _left(self, moment: Moment, end: int) -> float | None:
        """Seconds until so many steps of the stage are done."""
        return self._pace.seconds_for(self._course.to_do(moment.step, end))

    def _way(self, name: str, done: float, left: float | None, width: int, ascii_only: bool) -> Text:
        """A bar of the share that is done, and the time that is left."""
        told = "measuring" if left is None else f"{duration(left)} left"
        line = Text(f"{name:<{_NAME}}  ")
        room = width - len(line) - _LEFT - 2
        line.append_text(_line_bar(done, room, "cyan", ascii_only))
        return line.append(f"  {told:>{_LEFT}}")

    def _budget(self, kept: int, width: int, ascii_only: bool) -> Text:
        """Parameters that stay, of those of the dense model, with a mark where they are to end."""
        dense, goal = self._course.dense_params, self._course.goal_params
        told = f"{short_count(kept)} parameters" + ("" if goal is None else f", goal {short_count(goal)}")
        line = Text(f"{'kept':<{_NAME}}  ")
        room = width - len(line) - len(told) - 2
        bar = _line_bar(kept / dense, room, "green", ascii_only)
        if goal is not None and len(bar):
            place = min(len(bar) - 1, round(goal / dense * len(bar)))
            bar = Text.assemble(bar[:place], ("|" if ascii_only else "┃", "bold"), bar[place + 1 :])
        return line.append_text(bar).append(f"  {told}")


def _by_kind(blocks: Sequence[BlockDecision]) -> dict[str, list[BlockDecision]]:
    found: dict[str, list[BlockDecision]] = {}
    for block in blocks:
        found.setdefault(block.kind, []).append(block)
    return found


def _kept(block: BlockDecision) -> float:
    return block.kept_params / block.params if block.params else 0.0


def _benefit(block: BlockDecision) -> float | None:
    """Of class token and patches, the mean of what is measured."""
    known = [value for value in (block.benefit_cls, block.benefit_patch) if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _largest_benefit(kinds: dict[str, list[BlockDecision]]) -> float:
    """That a bar of full length stands for; 0 where none is positive or measured."""
    return max((value for blocks in kinds.values() for block in blocks if (value := _benefit(block)) is not None), default=0.0)


def _rows(kinds: dict[str, list[BlockDecision]], width: int, ascii_only: bool) -> Iterator[Text]:
    """A row for each depth: bars of its attention and of its MLP beside each other."""
    largest = _largest_benefit(kinds)
    measured = any(_benefit(block) is not None for blocks in kinds.values() for block in blocks)
    room = (width - 5) // len(kinds) - 2 - len(" 100 %")
    benefit_room = min(_WIDEST_BAR, (room - len("  -0.0000")) * 2 // 5) if measured else 0
    kept_room = min(_WIDEST_BAR, room - benefit_room - len("  -0.0000") if measured else room)
    if kept_room < 4:
        yield from _columns(kinds, width, ascii_only)
        return
    head = Text(f"{'block':<5}", style="dim")
    for kind in kinds:
        head.append(f"  {_TITLES.get(kind, kind) + ': kept':<{kept_room + 6}}")
        head.append(f" {'benefit':<{benefit_room + 8}}" if measured else "")
    head.rstrip()
    yield head
    for depth in range(max(map(len, kinds.values()))):
        line = Text(f"{depth:>5}", style="")
        for blocks in kinds.values():
            if depth < len(blocks):
                line.append("  ")
                line.append_text(_row(blocks[depth], kept_room, benefit_room, largest, measured, ascii_only))
        yield line


def _row(block: BlockDecision, kept_room: int, benefit_room: int, largest: float, measured: bool, ascii_only: bool) -> Text:
    bars = _bar(_kept(block), kept_room, "green", ascii_only).append(f"{_kept(block):>6.0%}".replace("%", " %")[-6:])
    value = _benefit(block)
    if value is None:
        return bars.append(" " * (benefit_room + 9) if measured else "")
    share = max(0.0, value / largest) if largest > 0 else 0.0
    return bars.append(" ").append_text(_bar(share, benefit_room, "blue", ascii_only)).append(f" {value:>7.4f}"[:8])


def _columns(kinds: dict[str, list[BlockDecision]], width: int, ascii_only: bool) -> Iterator[Text]:
    """A character for each block, where there is no room for rows."""
    largest = _largest_benefit(kinds)
    rising = "0123456789" if ascii_only else _RISING
    for kind, blocks in kinds.items():
        title = _TITLES.get(kind, kind)
        yield Text(f"kept     {title:<9} ").append(_letters(map(_kept, blocks), rising), "green")
        values = [_benefit(block) for block in blocks]
        if any(value is not None for value in values):
            shares = ((value or 0.0) / largest if largest > 0 else 0.0 for value in values)
            yield Text(f"benefit  {title:<9} ").append(_letters(shares, rising), "blue")


def _letters(shares: Iterator[float] | map[float], rising: str) -> str:
    return "".join(rising[min(len(rising) - 1, max(0, round(share * (len(rising) - 1))))] for share in shares)


def _bar(share: float, room: int, style: str, ascii_only: bool) -> Text:
    """A bar of so many columns, filled by a share of [0, 1], to an eighth of a column."""
    share = min(1.0, max(0.0, share))
    if ascii_only:
        whole = round(share * room)
        return Text.assemble(("#" * whole, style), ("." * (room - whole), "dim"))
    eighths = round(8 * share * room)
    filled = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return Text.assemble((filled, style), ("·" * (room - len(filled)), "dim"))


def _line_bar(share: float, room: int, style: str, ascii_only: bool) -> Text:
    """A line of so many columns, the first part of it in colour."""
    room = max(0, room)
    whole = round(min(1.0, max(0.0, share)) * room)
    done, rest = ("=", "-") if ascii_only else ("━", "─")
    return Text.assemble((done * whole, style), (rest * (room - whole), "dim"))
