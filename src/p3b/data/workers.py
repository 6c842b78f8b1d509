"""Worker processes of a DataLoader: how they begin, which signals they hear, how they end, and what the death of one means.

The main process alone decides when to stop. A batch system sends its signals to every process of a job; the main one
then finishes the step that is running, for which the workers must still answer. So they ignore SIGTERM, SIGINT and
SIGUSR1 from their first moment on, and end when the main process lets them go, when it ends, and when it is killed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

from p3b.errors import DataError, UserError

T = TypeVar("T")

LAST_RESORT_S = 5.0
"""How long to wait for a worker that had to be killed (it may hang in the kernel, beyond any signal)."""
DEATH_SHOWS_WITHIN_S = 1.0
"""A worker that dies tears its connections first; so long after that it is known to be dead, or the fault is another."""

_STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# torch's own words, from its SIGCHLD handler or from its look at the workers every few seconds.
_DEATH = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\) (?:is killed by signal: (?P<signal>[^.(]*\w)|exited unexpectedly)"
    r"|Pin memory thread exited unexpectedly"
)
_LIKELY_CAUSES = {
    "Killed": "most often the system's answer to too little memory",
    "Bus error": "most often too little shared memory (/dev/shm; in a container, --shm-size)",
    "Segmentation fault": "a crash in a library that decodes images",
}
_running: WeakKeyDictionary[Generator[Any, None, None], int] = WeakKeyDictionary()  # each with the process that began it


def worker_death(error: BaseException) -> DataError | None:
    """What a user should read where a data worker died; None for every other error.

    torch raises a RuntimeError for it, much of the time from a signal handler: then at whatever line the main process is
    just carrying out, also far from any batch. Iterating over batches translates by itself what it meets; this is for
    the rest.

    Args:
        error: is looked through together with the errors that it came from.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen and not isinstance(link, UserError):
        seen.add(id(link))
        if isinstance(link, RuntimeError) and (found := _DEATH.search(str(link))):
            return _told(found["pid"], found["signal"])
        link = link.__cause__ or link.__context__
    return None


def _told(pid: str | int | None, signal_name: str | None) -> DataError:
    who = "A data worker" if pid is None else f"A data worker (process {pid})"
    how = "died" if signal_name is None else f"was ended by the signal '{signal_name}'"
    cause = _LIKELY_CAUSES.get(signal_name or "", "the lines above may say why; too little memory is the most frequent cause")
    return DataError(
        f"{who} {how}: {cause}. Give the run more memory or fewer workers (--num-workers; with 0 the main process "
        "reads the images itself), and start again."
    )


def _death_behind(error: BaseException, workers: Sequence[BaseProcess]) -> DataError | None:
    """As `worker_death`, and more: a broken connection to a worker that is dead a moment later, and how it ended."""
    death = worker_death(error)
    if death is None and not isinstance(error, OSError | EOFError):
        return None
    end = time.monotonic() + DEATH_SHOWS_WITHIN_S
    while (patience := end - time.monotonic()) > 0:
        try:
            ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], patience)
            for worker in (worker for worker in workers if worker.sentinel in ended):
                worker.join(patience)
                if worker.exitcode:
                    return _told(worker.pid, signal.strsignal(-worker.exitcode) if worker.exitcode < 0 else None)
            break
        except RuntimeError as late:  # torch's signal handler, at this line
            death = worker_death(late) or death
    return death


def told_of_deaths(batches: Iterable[T]) -> Iterator[T]:
    """Go over batches; where torch reports a worker's death while the next one is made, that is a `DataError`."""
    try:
        yield from batches
    except Exception as error:
        death = worker_death(error)
        if death is None:
            raise
        forget_variables(error)
        raise death from error


def run_workers(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """Everything a DataLoader yields. Its workers are gone when this ends: at the end, early, or by an error.

    Raises:
        DataError: workers cannot be started, or one died.
    """
    batches = _run_workers(loader)
    _running[batches] = os.getpid()
    return batches


def _run_workers(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    others = set(multiprocessing.active_children())
    batches: Iterator[Any] | None = None
    workers: list[BaseProcess] | None = None
    try:
        with _stop_signals_held_back(), warnings.catch_warnings():
            # torch has threads of its own, and Python >= 3.12 warns of any fork beside threads; workers use none of them.
            warnings.filterwarnings("ignore", message=r".*use of fork\(\)", category=DeprecationWarning)
            batches = iter(loader)
        workers = _children_beside(others)
        yield from batches
    except BaseException as error:
        forget_variables(error)
        if death := _death_behind(error, _children_beside(others) if workers is None else workers):
            raise death from error
        if workers is None and isinstance(error, OSError):
            raise DataError(
                f"Cannot start {loader.num_workers} data workers ({error}). Give fewer (--num-workers; with 0 the main process "
                "reads the images itself), or allow the run more memory, processes or open files."
            ) from error
        raise
    finally:
        with suppress(RuntimeError):  # torch's signal handler, at this line: no news any more
            del batches  # the last reference: torch sends its workers home
        _see_off(_children_beside(others) if workers is None else workers)


def _children_beside(others: set[BaseProcess]) -> list[BaseProcess]:
    return [child for child in multiprocessing.active_children() if child not in others]


def _see_off(workers: Sequence[BaseProcess]) -> None:
    """End what is left once torch has asked its workers to end, and has waited for them."""
    for worker in (*workers, *workers):  # twice: torch's signal handler may break in once
        with suppress(RuntimeError):
            if worker.is_alive():  # it did not answer for seconds, and ignores torch's SIGTERM
                worker.kill()
            worker.join(LAST_RESORT_S)


def forget_variables(error: BaseException) -> None:
    """Clear the variables of the functions that an error has left: they would keep workers alive as long as the error is."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


@atexit.register
def _end_what_still_runs() -> None:
    """multiprocessing, which comes after this, sends SIGTERM to the workers that are left and waits for them to heed it."""
    for batches, process in list(_running.items()):
        if process == os.getpid():  # a forked worker has copies of the main process's iterations
            batches.close()


@contextmanager
def _stop_signals_held_back() -> Iterator[None]:
    """Signals that come while workers start reach them when they ignore these, and this process afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(worker_id: int) -> None:
    """The first thing that a worker does (DataLoader's `worker_init_fn`)."""
    for stop in _STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    # torch's worker looks every few seconds whether its parent has changed; one that was orphaned before its first look
    # would wait for ever.
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
