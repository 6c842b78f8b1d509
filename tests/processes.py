"""Acts that end, kill or starve their process: carried out in a fork, which has everything imported and built already."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def forked(act: Callable[[], int]) -> BaseProcess:
    """A process whose exit status is what `act` answers."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(act()))
    process.start()
    return process


def status_of(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode
