"""What a run leaves behind: one folder a stage, readable by people and programs.

    <output_dir>/<stage>/   config.json     every setting, resolved
                            log.txt         what was said on screen
                            metrics.jsonl   one line an epoch
                            blocks.jsonl    one line a mask update
                            last.pth        everything needed to go on
                            best.pth        the best epoch's model, by validation accuracy
                            summary.json    written last: the stage is finished

Every file but the two logs of lines is replaced as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p3b.errors import RunFolderError
from p3b.files import write_atomically


class StageFolder:
    """The place of one stage in an output folder.

    Args:
        root: the output folder.
        stage: "train", "prune", "finetune" or "evaluate".
        products: what the stage writes outside its own folder, relative to `root`; removed with it on `overwrite`.
    """

    def __init__(self, root: Path, stage: str, products: tuple[str, ...] = ()) -> None:
        self.root, self.stage, self.path, self._products = root, stage, root / stage, products

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
        if (self.path / "config.json").exists() and not resume and not overwrite:
            state = "a finished run" if self.finished else "an unfinished run"
            raise RunFolderError(
                f"{self.path} holds {state} of this stage. Give --resume to go on with it, --overwrite to replace it, or "
                "another --output-dir."
            )

    def begin(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder and write the resolved config; with `overwrite` remove what the stage left before."""
        if overwrite:
            for path in (self.path, *(self.root / product for product in self._products)):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", config)

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

    def cut_lines(self, last_step: int, without_phase: str | None = None) -> None:
        """Drop what the run that goes on from `last_step` will write again: the lines of later steps, and those of a phase."""
        for name in ("metrics.jsonl", "blocks.jsonl"):
            file = self.path / name
            if file.exists():
                kept = [
                    line
                    for line in file.read_text().splitlines()
                    if (content := _content_of(line)) and content["step"] <= last_step and content["phase"] != without_phase
                ]
                text = "".join(f"{line}\n" for line in kept)
                write_atomically(file, lambda path, text=text: path.write_text(text))  # type: ignore[misc]

    def _check_writable(self) -> None:
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                return
        except OSError as error:
            raise RunFolderError(f"{self.root} cannot be written: {error}. Choose another --output-dir.") from error


def _content_of(line: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(line)
    except ValueError:
        return None  # cut off in the middle by a kill: not a line
    return content
