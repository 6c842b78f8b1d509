"""What a run leaves behind: one folder a stage, readable by people and programs.

    <output_dir>/<stage>/   config.json     every setting, resolved
                            log.txt         what was said on screen
                            metrics.jsonl   one line an epoch
                            blocks.jsonl    one line a mask update
                            checkpoints/    the newest two, everything needed to go on
                            best.pth        the best epoch's model, by validation accuracy
                            predictions.csv one line an evaluated image; examples/ has small copies of mistakes
                            teacher.pth     what a run with --distill-from warm-up learns from, besides its labels
                            tracking.json   how far TensorBoard and others have been told (p3b.run.tracking)
                            summary.json    written last: the stage is finished

Every file but the two logs of lines is replaced as a whole or not at all. A lock on the output folder (`.lock`) is held from
the first write to the end, so that two runs cannot be in it at once. Files of other origin are never touched.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from p3b.errors import RunFolderError
from p3b.report.record import EXAMPLES_FOLDER
from p3b.storage.files import is_unfinished, remove_unfinished, write_atomically
from p3b.train.distributed import gather

WAIT_FOR_LOCK = 10.0
"""Seconds: the data workers of a killed run hold its lock until they notice that it is gone."""
LINE_FILES = ("metrics.jsonl", "blocks.jsonl")
_OWN_FILES = (
    "config.json",
    "log.txt",
    *LINE_FILES,
    "checkpoints",
    "best.pth",
    "teacher.pth",
    "summary.json",
    "benefit.*",
    "keep_ratio.*",
    "predictions.csv",
    EXAMPLES_FOLDER,
    "tracking.json",
)
_PRODUCT_FILES = ("config.json*", "model.safetensors")


class StageFolder:
    """The place of one stage in an output folder.

    Args:
        root: the output folder.
        stage: "train", "prune", "finetune", "evaluate", "warm-up", ...
        products: what the stage writes outside its own folder, relative to `root`; removed with it on `overwrite`.
    """

    def __init__(self, root: Path, stage: str, products: tuple[str, ...] = ()) -> None:
        self.root, self.stage, self.path, self._products = root, stage, root / stage, products
        self.lines = dict.fromkeys(LINE_FILES, 0)
        """Lines that metrics.jsonl and blocks.jsonl have; part of every checkpoint."""
        self.in_use = False
        """Whether this run works in it: until then every rank meets the same errors."""
        self._lock = FileLock(root / ".lock")

    def claim(self, say: Callable[[str], object] = print) -> None:
        """Take the lock of the output folder, which is made if absent; hold it until `release` or the process's end.

        Args:
            say: is told when there is something to wait for.

        Raises:
            RunFolderError: another run holds it, or the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                say(f"{self.root} is in use; waiting up to {WAIT_FOR_LOCK:.0f} seconds for it")
                self._lock.acquire(timeout=WAIT_FOR_LOCK)
            Path(self._lock.lock_file).write_text(f"process {os.getpid()} on {platform.node()}, {time.strftime('%F %T')}\n")
        except Timeout as error:
            holder = Path(self._lock.lock_file).read_text().strip()
            raise RunFolderError(
                f"{self.root} is in use by another run ({holder or 'unknown'}). Wait for it, stop it, or choose another "
                "--output-dir."
            ) from error
        except NotImplementedError:
            say(f"{self.root} is on a file system without locks: make sure that no other run writes there")
        except OSError as error:
            raise RunFolderError(f"{self.root} cannot be written: {error}. Choose another --output-dir.") from error

    def claim_for_all(self, is_main: bool, say: Callable[[str], object], *, resume: bool, overwrite: bool) -> None:
        """Let the main rank take the lock and look again, since another run may have been here after the first look.

        Raises:
            RunFolderError: it could not, or the folder cannot be used any more; on every rank, so that none waits for another.
        """
        refusal: RunFolderError | None = None
        if is_main:
            try:
                self.claim(say)
                self.check(resume, overwrite)
            except RunFolderError as error:
                refusal = error
        if (refused := gather(refusal)[0]) is not None:
            raise refused

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        self._lock.release()

    @property
    def has_begun(self) -> bool:
        """Whether a run of this stage has begun here, finished or not."""
        return (self.path / "config.json").exists()

    def begun_by(self, launch: str | None) -> bool:
        """Whether the run that has begun here is one of this launch (see `launch_name`); never for None."""
        return launch is not None and self.has_begun and self.read_json("config.json").get("launch") == launch

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that cannot be used as asked, before anything is written.

        Raises:
            RunFolderError: an earlier run of this stage is there and neither flag was given, or the folder cannot be written.
        """
        self._check_writable()
        for place in (self.root / product for product in self._products):
            if place.exists() and place.is_dir() == bool(place.suffix):
                found, expected = ("folder", "file") if place.suffix else ("file", "folder")
                raise RunFolderError(f"{place} is a {found}; the {expected} of that name cannot be written. Move it away.")
        foreign = [] if self.has_begun or not self.path.is_dir() else self._foreign_files()
        if foreign:
            raise RunFolderError(
                f"{self.path} holds files that are not of a run ({', '.join(foreign[:3])}, {len(foreign)} in all); choose "
                "another --output-dir, such as a new folder."
            )
        if self.has_begun and not resume and not overwrite:
            state = "a finished run" if self.finished else "an unfinished run"
            raise RunFolderError(
                f"{self.path} holds {state} of this stage. Give --resume to continue it, --overwrite to replace it, or "
                "another --output-dir."
            )

    def begin(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder and write the resolved config; with `overwrite` the stage's products go, too.

        Nothing of an earlier run of the stage stays. The config goes first: a run that dies in here leaves no folder that looks
        like one to go on with.
        """
        _remove(self.path, _OWN_FILES)
        for product in (self.root / name for name in self._products) if overwrite else ():
            if product.is_dir():
                _remove(product, _PRODUCT_FILES)
            else:
                product.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.tidy()
        self.write_json("config.json", config)

    def tidy(self) -> None:
        """Remove what writers that were killed have left half done."""
        products = (self.root / product for product in self._products)
        for folder in (self.root, self.path, self.path / EXAMPLES_FOLDER, *products):
            if folder.is_dir():
                remove_unfinished(folder)

    @property
    def finished(self) -> bool:
        """Whether the stage has come to its end here."""
        return (self.path / "summary.json").exists()

    def read_json(self, name: str) -> dict[str, Any]:
        """Content of one of the stage's JSON files.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path / name} cannot be read: {error}") from error
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace one of the stage's JSON files."""
        write_atomically(self.path / name, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))

    def append_line(self, name: str, content: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl or blocks.jsonl; it is on disk when this returns."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[name] += 1

    def cut_lines(self, lines: Mapping[str, int]) -> None:
        """Keep the first so many lines of metrics.jsonl and blocks.jsonl: the run that goes on will write the others again."""
        for name, count in lines.items():
            file = self.path / name
            if file.exists():
                kept = file.read_text().splitlines(keepends=True)[:count]
                write_atomically(file, lambda path, kept=kept: path.write_text("".join(kept)))  # type: ignore[misc]
        self.lines = dict(lines)

    def take_lines(self, other: StageFolder, lines: Mapping[str, int]) -> None:
        """Begin metrics.jsonl and blocks.jsonl with the first so many lines of another stage's, in the place of what is there.

        Raises:
            RunFolderError: they cannot be read.
        """
        for name, count in lines.items():
            if count:
                try:
                    kept = (other.path / name).read_text().splitlines(keepends=True)[:count]
                except OSError as error:
                    raise RunFolderError(f"{other.path / name} cannot be read: {error}") from error
                write_atomically(self.path / name, lambda path, kept=kept: path.write_text("".join(kept)))  # type: ignore[misc]
        self.lines = dict(lines)

    def _foreign_files(self) -> list[str]:
        entries = (path for path in sorted(self.path.iterdir()) if not is_unfinished(path))
        return [path.name for path in entries if not any(path.match(own) for own in _OWN_FILES)]

    def _check_writable(self) -> None:
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                return
        except OSError as error:
            raise RunFolderError(f"{self.root} cannot be written: {error}. Choose another --output-dir.") from error


def _remove(folder: Path, patterns: Sequence[str]) -> None:
    """Remove what is ours in a folder, and the folder itself where nothing else is in it."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def launch_name() -> str:
    """Names the launch that this process belongs to: one command of a launcher, with all its restarts."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{platform.node()}:{os.getppid()}"


def restarted_by() -> str | None:
    """The launch that has started this process again after a failure (torchrun --max-restarts); None at a first start."""
    return launch_name() if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 else None
