"""When to save and when to stop: the clock's and the signals' wishes, agreed on by all ranks.

SIGTERM (a scheduler that needs the machine), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's early warning) do not end a run where it
stands: the step is finished and a checkpoint written. Ranks hear of a signal at different moments, yet have to stop after the
same step. So at the end of every optimizer step each rank says what it wishes, and acts on what all had wished at the end of
the step before: the exchange runs beside the step and costs no waiting.
"""

from __future__ import annotations

import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from p3b.errors import Stopped
from p3b.train.distributed import in_group

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
IMPATIENT_AFTER = 3.0
"""Seconds after which another Ctrl-C stops at once; sooner it may be the same one, passed on by a launcher."""


class Wish(enum.IntEnum):
    """What a rank wants at the end of a step; the greatest wish of all ranks is carried out."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class Interruption:
    """Collects wishes. Every rank makes one at the same place, and calls `agreed` equally often.

    Args:
        checkpoint_minutes: minutes between two wishes to save; 0: the clock wishes for nothing.
        is_main: the main rank's clock counts.
    """

    def __init__(self, checkpoint_minutes: float, is_main: bool) -> None:
        self._seconds = 60 * checkpoint_minutes if is_main and checkpoint_minutes > 0 else float("inf")
        self._signal: signal.Signals | None = None
        self._signalled_at = 0.0
        # A group of its own: its messages never stand in the queue of the gradients', and it reaches the CPU under NCCL.
        self._group: Any = dist.new_group(backend="gloo") if in_group() else None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._process = os.getpid()
        self.saved()

    @property
    def cause(self) -> str:
        """Name of the signal that asked this rank to stop; "a signal to another process" where it was not this one."""
        return "a signal to another process" if self._signal is None else self._signal.name

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals; afterwards they mean what they meant before."""
        if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread alone
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def saved(self) -> None:
        """Start the clock anew."""
        self._due = time.monotonic() + self._seconds

    def agreed(self) -> Wish:
        """What all ranks wished for at the end of the last step; in a single process what this one wishes now."""
        if self._group is None:
            return self._wish()
        before = self._settle()
        if before is not Wish.STOP:  # after a stop nobody comes to take an answer
            self._send()
        return before

    def agreed_now(self) -> Wish:
        """What all ranks wish for at this moment; waits for all of them."""
        if self._group is None:
            return self._wish()
        before = self._settle()
        self._send()
        return max(before, self._settle())

    def _wish(self) -> Wish:
        if self._signal is not None:
            return Wish.STOP
        if time.monotonic() < self._due:
            return Wish.GO_ON
        self.saved()  # wished for once; with many ranks it is carried out a step later
        return Wish.SAVE

    def _send(self) -> None:
        wish = torch.tensor([int(self._wish())])
        self._pending = wish, dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _settle(self) -> Wish:
        if self._pending is None:
            return Wish.GO_ON
        wish, work = self._pending
        self._pending = None
        work.wait()
        return Wish(int(wish))

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: the main process decides for it
            return
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled_at = signal.Signals(number), now
            # os.write, for the handler may have interrupted a print.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{self.cause}: {_WILL_STOP}\n".encode())
        elif number == signal.SIGINT and now - self._signalled_at > IMPATIENT_AFTER:
            raise KeyboardInterrupt


_WILL_STOP = "finishing the step and saving. (Ctrl-C once more stops at once.)"


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` at a signal, wherever the program is; while a run trains, it listens itself and ends its step first."""
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread alone
        yield
        return
    process, taken = os.getpid(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal taken
        if os.getpid() == process and not taken:  # a forked worker: the main process decides for it
            taken = True
            raise Stopped(f"stopped by {signal.Signals(number).name}; what is done is kept")

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
