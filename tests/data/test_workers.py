"""Worker processes: signals, deaths and ends, with real processes and real signals."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from p3b.data import worker_death
from p3b.data.images import LabelledImages
from p3b.data.loaders import EvalBatches, TrainBatches, eval_batches, train_batches
from p3b.data.transforms import Augmentation, Preprocessing
from p3b.errors import DataError
from processes import MainProcess, SparePython

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop_pct=1.0)
PROMPTLY_S = 4.0
"""Sooner than torch's own look at its workers and parents, every five seconds, would notice."""


class Store:
    """Images of one grey each; reading number `deadly` ends the worker that does it by a signal, if a signal is given."""

    def __init__(self, count: int, deadly: int = -1, end: signal.Signals | None = None, seconds: float = 0.0) -> None:
        self.count, self.deadly, self.end, self.seconds = count, deadly, end, seconds

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> Image.Image:
        time.sleep(self.seconds)
        if index == self.deadly:
            if self.end is None:
                os._exit(3)
            os.kill(os.getpid(), self.end)
        return Image.new("RGB", (8, 8), (index % 256,) * 3)

    def name(self, index: int) -> str:
        return f"image {index}"


def training(store: Store, num_workers: int = 2) -> TrainBatches:
    dataset = LabelledImages(store, [0] * len(store))
    plain = Augmentation(enabled=False)
    return train_batches(dataset, PREPROCESSING, plain, batch_size=2, num_workers=num_workers, device=CPU, seed=0)


def evaluation(store: Store) -> EvalBatches:
    return eval_batches(LabelledImages(store, [0] * len(store)), PREPROCESSING, batch_size=2, num_workers=2, device=CPU)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to ask does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """The processes that are still there after so many seconds."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


# Where a worker's connection breaks, torch opens files to see if there are too many; its own signal handler may raise there.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make", [training, evaluation])
@pytest.mark.parametrize(
    ("end", "told"),
    [(signal.SIGKILL, "too little memory"), (signal.SIGSEGV, "crash in a library"), (None, "died")],
)
def test_a_worker_that_dies_is_told_with_advice_and_takes_the_others_along(
    make: type, end: signal.Signals | None, told: str
) -> None:
    batches = make(Store(40, deadly=21, end=end))
    with pytest.raises(DataError, match=told) as raised:
        list(batches)
    assert "--num-workers" in str(raised.value)
    assert multiprocessing.active_children() == []  # though the error and its traceback are still held


def test_a_death_that_shows_elsewhere_is_recognised() -> None:
    """torch's signal handler raises wherever the main process is: here, in the loop's own body."""
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
        for _ in training(Store(40, deadly=0, end=signal.SIGKILL, seconds=0.1)):
            while time.monotonic() < began + 30:
                time.sleep(0.01)
    death = worker_death(raised.value)
    assert isinstance(death, DataError)
    assert "'Killed'" in str(death)
    wrapped = ValueError("later")
    wrapped.__cause__ = raised.value
    assert str(worker_death(wrapped)) == str(death)
    assert multiprocessing.active_children() == []


def test_other_errors_are_no_deaths() -> None:
    told = DataError("told already")
    told.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    for error in (RuntimeError("CUDA error"), ValueError("DataLoader worker (pid 7) exited unexpectedly"), told):
        assert worker_death(error) is None
    for text in ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "Pin memory thread exited unexpectedly"):
        assert "--num-workers" in str(worker_death(RuntimeError(text)))


@pytest.mark.parametrize("make", [training, evaluation])
def test_leaving_early_leaves_no_worker_behind(make: type, recwarn: pytest.WarningsRecorder) -> None:
    began = time.monotonic()
    batches = make(Store(400, seconds=0.005))
    for round_ in range(3):
        for number, _ in enumerate(batches):
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            if number == round_:
                break
        assert multiprocessing.active_children() == []
        assert not any(alive(worker.pid) for worker in workers if worker.pid)
    assert time.monotonic() - began < PROMPTLY_S
    assert not recwarn.list


def test_an_error_in_the_loop_leaves_no_worker_behind() -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in training(Store(400)):
            1 / 0  # noqa: B018
    assert multiprocessing.active_children() == []


def test_a_bug_in_a_worker_keeps_its_type_and_leaves_no_worker_behind() -> None:
    batches = training(Store(40))
    batches._loader.loader._loader.dataset._dataset.transform = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError, match="DataLoader worker"):
        list(batches)
    assert multiprocessing.active_children() == []


SCRIPT = """
import multiprocessing, os, signal, sys, time
sys.path[:0] = {folders!r}
from test_workers import Store, training

def workers():
    return [child.pid for child in multiprocessing.active_children()]
"""

Start = Callable[[str], MainProcess]


@pytest.fixture
def start(python: SparePython) -> Start:
    """A main process of its own, with its own process group, warnings as errors."""
    script = SCRIPT.format(folders=[str(folder) for folder in Path(__file__).parents[:2]])
    return lambda body: python.start(script + body)


def read_line(process: MainProcess) -> list[str]:
    words = process.stdout.readline().split()
    assert words, process.stderr.read()
    return words


def read_pids(process: MainProcess) -> list[int]:
    first, second = read_line(process)
    return [int(first), int(second)]


def test_stop_signals_to_the_whole_job_cost_no_batch(start: Start) -> None:
    """At any moment, also while workers start, as from a batch system or Ctrl-C: all go on; the main process hears each."""
    process = start("""
heard = {}
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(name, lambda number, frame: heard.update({number: heard.get(number, 0) + 1}))
print("ready", flush=True)
sys.stdin.readline()
count = 0
for epoch in range(8):
    batches = training(Store(24, seconds=0.002))
    batches.set_epoch(epoch)
    count += sum(len(targets) for _, targets in batches)
print(count, len(heard), workers(), flush=True)
sys.stdin.readline()
""")
    read_line(process)
    process.stdin.write("\n")
    process.stdin.flush()
    sent, end = 0, time.monotonic() + 60
    while not select.select([process.stdout], [], [], 0.003)[0] and time.monotonic() < end:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.killpg(process.pid, number)
        sent += 1
    process.finish()
    assert process.output == f"{24 * 8} 3 []\n", process.errors
    assert (process.status, process.errors) == (0, "")
    assert sent > 20


def test_workers_end_when_the_main_process_is_killed(start: Start) -> None:
    process = start("""
batches = iter(training(Store(100000, seconds=0.01)))
next(batches)
print(*workers(), flush=True)
for _ in batches:
    pass
""")
    pids = read_pids(process)
    assert all(alive(pid) for pid in pids)
    os.kill(process.pid, signal.SIGKILL)
    process.finish()
    assert wait_until_gone(pids, PROMPTLY_S) == []


@pytest.mark.parametrize(
    ("ending", "status"),
    [("", 0), ("raise ValueError('boom')", 1), ("os._exit(6)", 6)],
)
def test_a_main_process_that_ends_in_the_middle_of_an_epoch_takes_its_workers_along(
    start: Start, ending: str, status: int
) -> None:
    process = start(f"""
batches = iter(training(Store(100000, seconds=0.001)))
next(batches)
print(*workers(), flush=True)
{ending}
""")
    pids = read_pids(process)
    began = time.monotonic()
    process.finish()
    assert wait_until_gone(pids, PROMPTLY_S) == []
    assert time.monotonic() - began < PROMPTLY_S
    assert process.status == status
    assert process.errors.count("Traceback") == (status == 1) and "Exception ignored" not in process.errors


def test_a_bug_in_a_worker_does_not_keep_the_main_process_from_ending(start: Start) -> None:
    process = start("""
batches = training(Store(40))
batches._loader.loader._loader.dataset._dataset.transform = lambda _: 1 / 0
batches = iter(batches)
next(batches)
""")
    process.finish()
    assert process.status == 1
    assert "ZeroDivisionError" in process.errors and "Exception ignored" not in process.errors


def test_a_worker_that_hangs_does_not_keep_the_others_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores SIGTERM, so that torch's own last resort does not reach it: that waits half a second here instead of five."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    store = Store(40, seconds=0.0)
    batches = iter(training(store))
    next(batches)
    hung = multiprocessing.active_children()[0]
    assert hung.pid is not None
    os.kill(hung.pid, signal.SIGSTOP)
    began = time.monotonic()
    del batches
    assert multiprocessing.active_children() == []
    assert not alive(hung.pid)
    assert time.monotonic() - began < 25


def test_workers_that_cannot_start_are_told_and_those_that_could_are_gone(start: Start) -> None:
    process = start("""
import resource
in_use = {int(name) for name in os.listdir("/proc/self/fd")}
free = [number for number in range(1000) if number not in in_use]
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
batches = training(Store(40))
resource.setrlimit(resource.RLIMIT_NOFILE, (free[8], hard))
try:
    list(batches)
except Exception as error:
    told = error
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(type(told).__name__, told, workers(), len(list(batches)))
""")
    process.finish()
    assert process.output.startswith("DataError Cannot start 2 data workers ([Errno 24] Too many open files")
    assert process.output.endswith("[] 20\n")
    assert process.status == 0
