"""Processes that begin with everything imported: what they do may end, kill or starve them, and costs no start of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SPARE = """
import gc, json, os, socket, sys
import p3b, p3b.commands.prune, p3b.data.loaders, timm, torch  # what all of them need, and all that is done beforehand
torch.set_num_threads(1)
gc.freeze()  # forks share all this, also when they end
channel = socket.socket(fileno=int(sys.argv[1]))
while True:
    asked, streams, _, _ = socket.recv_fds(channel, 1 << 20, 3)
    if not asked:
        os._exit(0)
    asked = json.loads(asked)
    if "wait" in asked:
        answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
    elif (answer := os.fork()) == 0:
        break
    for stream in streams:
        os.close(stream)
    channel.send(b"%d" % answer)
channel.close()
os.setsid()
os.chdir(asked["folder"])
os.environ.update(asked["environment"])
for number, stream in enumerate(streams):
    os.dup2(stream, number)
    os.close(stream)
sys.argv = ["-c", *asked["arguments"]]
sys.path.insert(0, "")
exec(compile(asked["script"], "<string>", "exec"))
"""
"""Forks on request. The fork carries out a script as `python -W error -c` does, its end included: the interpreter's own."""


class SparePython:
    """A Python that has imported torch, timm and p3b, and whose forks are main processes in groups of their own."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-W", "error", "-c", SPARE, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(self, script: str, *arguments: object, folder: Path | None = None, **environment: str) -> MainProcess:
        """`python -W error -c script arguments`, in a working folder and with changes to the environment."""
        asked = {
            "script": script,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder or Path.cwd()),
            "environment": environment,
        }
        pipes = [os.pipe() for _ in range(3)]
        ours, theirs = zip(*(reversed(pipe) if number == 0 else pipe for number, pipe in enumerate(pipes)), strict=True)
        socket.send_fds(self._channel, [json.dumps(asked).encode()], theirs)
        pid = int(self._channel.recv(100))
        for stream in theirs:
            os.close(stream)
        return MainProcess(self, pid, *ours)

    def run(self, script: str, *arguments: object, folder: Path | None = None, **environment: str) -> MainProcess:
        """The same, carried out to its end."""
        process = self.start(script, *arguments, folder=folder, **environment)
        process.finish(timeout=300)
        return process

    def status_of(self, pid: int) -> int:
        self._channel.send(json.dumps({"wait": pid}).encode())
        return int(self._channel.recv(100))

    def close(self) -> None:
        self._channel.close()
        self._process.wait(10)


class MainProcess:
    """A script that runs; after `finish` its exit status and all that it said that had not been read."""

    def __init__(self, spare: SparePython, pid: int, stdin: int, stdout: int, stderr: int) -> None:
        self._spare, self.pid = spare, pid
        self.stdin, self.stdout, self.stderr = open(stdin, "w"), open(stdout), open(stderr)  # noqa: SIM115
        self.output = self.errors = ""
        self.status: int | None = None

    def finish(self, timeout: float = 30) -> None:
        """Wait until nobody holds its streams any more, its own children included; after so many seconds it is killed."""
        self.stdin.close()
        with ThreadPoolExecutor(2) as readers:
            reading = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.output, self.errors = (text.result(timeout) for text in reading)
            except TimeoutError:
                os.killpg(self.pid, signal.SIGKILL)
                raise
        self.stdout.close()
        self.stderr.close()
        self.status = self._spare.status_of(self.pid)


def on_agent(processes: int, act: Callable[..., object], *given: object, restarts: int = 0) -> None:
    """`act(*given)` in so many ranks of torch's elastic agent, which torchrun runs; here they are forks of this process.

    The agent starts all of them again where one dies, at most `restarts` times.

    Raises:
        ChildFailedError: of torch, where a rank has died and was not started again.
    """
    place = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=restarts
    )
    elastic_launch(place, act)(*given)


RANKS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from processes import on_agent
from runs import run
on_agent(int(sys.argv[1]), run, *sys.argv[2:])
"""


def on_ranks(python: SparePython, processes: int, command: str, *given: str) -> MainProcess:
    """`runs.run(command, *given)` on so many ranks, in a main process of their own."""
    return python.run(RANKS, processes, command, *given, OMP_NUM_THREADS="1")


def forked(act: Callable[[], int]) -> BaseProcess:
    """A process whose exit status is what `act` answers: a fork of this one, with all that has been built."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(act()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python >= 3.12, where there are threads: those of xdist
        process.start()
    return process


def status_of(process: BaseProcess) -> int | None:
    """Exit status; None of a process that does not end in two minutes and is killed, so that it holds nothing open."""
    process.join(120)
    if (status := process.exitcode) is None:
        process.kill()
        process.join()
    return status
