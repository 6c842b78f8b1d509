"""A process that opens one file after the other, and tells time, memory and what was done on the way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import p3b
from hostile import pruned
from p3b.errors import UserError
from p3b.storage.artifact import save_checkpoint
from p3b.storage.weights import read_weights
from p3b.train.checkpoint import Checkpoints

SECONDS = 10.0
"""What opening a file may take at most, all of the networks here being tiny."""
_STATUS = Path("/proc/self/status")


def open_any(path: Path) -> Any:
    """Open a file or folder as p3b does: checkpoints to resume from, a saved model, or weights of any origin."""
    if path.name == "checkpoints":
        found = Checkpoints(path).newest()
        return None if found is None else found.content
    if path.name.startswith("weights"):
        return read_weights(path)
    return p3b.load(path)


class Opener:
    """A process that opens one file after the other; a new one where it dies or takes too long."""

    def __enter__(self) -> Opener:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def open(self, path: Path) -> dict[str, Any]:
        begun = time.perf_counter()
        self._ours.send(path)
        seen = self._answer(3 * SECONDS)
        if seen is not None:
            return seen
        self._process.join(1.0)
        code = self._process.exitcode
        self._stop()
        self._start()
        died = f"the process died with {code}" if code is not None else "the process did not come to an end"
        return {"outcome": died, "seconds": time.perf_counter() - begun}

    def _start(self) -> None:
        torch.set_num_threads(1)  # before the fork: threads do not survive one
        fork = multiprocessing.get_context("fork")
        self._ours, theirs = fork.Pipe()
        self._process = fork.Process(target=answer, args=(theirs, self._ours), daemon=True)
        self._process.start()
        theirs.close()
        self._answer(120.0)

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._ours.close()

    def _answer(self, limit: float) -> Any:
        try:
            return self._ours.recv() if self._ours.poll(limit) else None
        except (EOFError, ConnectionError):
            return None


def answer(ours: Connection, theirs: Connection) -> None:
    """Open what is asked for, path by path, and tell what came of it."""
    theirs.close()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    actions: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in _WATCHED or writes:
            actions.append(f"{event} {arguments[0]}")

    with tempfile.TemporaryDirectory() as folder:  # once done, everything that the first opening brings along is there
        for path in (p3b.save(pruned(), folder), save_checkpoint(pruned(), Path(folder) / "weights.pth")):
            fingerprint(open_any(path))
    sys.addaudithook(watch)
    ours.send("ready")
    while True:
        ours.send(_opened(ours.recv(), actions))


_WATCHED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.remove", "os.rename")


def _opened(path: Path, actions: list[str]) -> dict[str, Any]:
    before = _reset_peak()
    actions.clear()
    begun = time.perf_counter()
    seen: dict[str, Any]
    try:
        content = open_any(path)
    except UserError as error:
        seen = {"outcome": type(error).__name__, "user_error": True, "message": str(error)}
    except BaseException as error:  # what is no error of ours is what is looked for
        seen = {"outcome": f"NO CLEAR ERROR, {type(error).__name__}", "message": str(error)[:1000]}
    else:
        seen = {"outcome": "loaded", "content": fingerprint(content)}
    done, peak = list(actions), _peak()
    return {**seen, "seconds": time.perf_counter() - begun, "megabytes": (peak - before) / 1e6, "actions": done}


def _reset_peak() -> int:
    if _STATUS.exists():
        _STATUS.with_name("clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Most resident bytes since the last reset; 0 where the system does not tell."""
    status = _STATUS.read_text() if _STATUS.exists() else "VmHWM: 0 kB"
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def fingerprint(content: Any) -> str:
    """SHA-256 of everything that a loaded thing is: a model's tensors, channels and shape; a checkpoint's values."""
    digest = hashlib.sha256()
    if isinstance(content, nn.Module):
        digest.update(str(content).encode())
        content = {**content.state_dict(), **dict(content.named_buffers())}
    waiting = [content]
    while waiting:
        item = waiting.pop()
        digest.update(type(item).__name__.encode())
        if isinstance(item, Mapping):
            digest.update(repr(list(item)).encode())
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            digest.update(str(len(item)).encode())
            waiting.extend(item)
        elif isinstance(item, Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            digest.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(item).encode())
    return digest.hexdigest()
