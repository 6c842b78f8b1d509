"""The machine's errors (a full disk, full memory, a lost process), told to a user who can mend them."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from p3b.data import worker_death
from p3b.errors import RunFolderError, TrainingError, UserError
from p3b.train.distributed import Processes, lost_process


@contextmanager
def explained(processes: Processes, folder: Path | None, work_has_begun: Callable[[], bool]) -> Iterator[None]:
    """Turn the machine's errors into ones that a user can mend, and let a rank that meets one alone say so.

    Args:
        processes: this one among all.
        folder: where the run writes.
        work_has_begun: until then every rank meets the same errors, and the main one's word is enough.
    """
    try:
        yield
    except (UserError, OSError, RuntimeError) as error:
        cause = error if isinstance(error, UserError) else explain(error, folder)
        if cause is None:
            raise
        if work_has_begun() and not processes.is_main:
            print(f"p3b, process {processes.rank}: {cause}", file=sys.stderr, flush=True)
        if cause is error:
            raise
        raise cause from error


def explain(error: OSError | RuntimeError, folder: Path | None = None) -> UserError | None:
    """What went wrong with the machine, for a user who can mend it; None where it may be a mistake of ours.

    Args:
        error: some library's.
        folder: where the run writes: a file that is not there, or forbidden, is the user's to mend if it lies in it.
    """
    if (cause := worker_death(error) or lost_process(error)) is not None:
        return cause
    if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return TrainingError(
            f"Out of memory ({str(error).splitlines()[0][:200]}). Lower --batch-size and raise --grad-accum-steps by the "
            "same factor: the steps stay the same. --resume needs the same settings, so start again with --overwrite."
        )
    if isinstance(error, OSError) and (error.errno in _DISK_ERRORS or _lies_in(error.filename, folder)):
        return RunFolderError(f"{error}. The run stops and keeps its last checkpoint. Fix this, then continue with --resume.")
    return None


_OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
"""Full, read-only, broken, gone."""


def _lies_in(file: Any, folder: Path | None) -> bool:
    return (
        isinstance(file, (str, os.PathLike)) and folder is not None and Path(file).absolute().is_relative_to(folder.absolute())
    )
