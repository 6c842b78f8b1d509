"""A model as a `.pt2`: what torch.export makes of it, which runs with torch alone.

torch unpickles parts of such a file. `ProgramRunner` lets it read tensors only, so that a file of unknown origin cannot run
code: torch.load is held to its weights-only mode, and a file that brings objects is refused before it is opened.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim
from torch.export.pt2_archive.constants import CUSTOM_OBJ_FILENAME_PREFIX, OPAQUE_OBJ_FILENAME_PREFIX

from p3b.deploy.agreement import Logits
from p3b.deploy.metadata import Metadata
from p3b.errors import WeightsError
from p3b.storage.untrusted import first_line, parse_json

DESCRIPTION = "p3b.json"
_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def write_program(model: nn.Module, example: Tensor, file: Path, metadata: Metadata) -> None:
    """Export a model with a dynamic number of images (and, for uint8 images, a dynamic height and width).

    Args:
        model: in evaluation mode.
        example: (2 or more, C, H, W) images that it takes.
        file: written in one piece, weights and description included.
        metadata: the description.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=(dynamic_axes(example),))
        with file.open("wb") as opened:  # by name torch wants the ending .pt2
            torch.export.save(program, opened, extra_files={DESCRIPTION: json.dumps(metadata.to_text())})


def dynamic_axes(example: Tensor) -> dict[int, Any]:
    """Which axes of the images an export leaves open: how many there are, and how large they are where it resizes them."""
    open_axes: dict[int, Any] = {0: Dim("batch")}
    return open_axes if example.is_floating_point() else {**open_axes, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


class ProgramRunner:
    """A `.pt2` in torch.

    Args:
        file: that `p3b export` wrote.
        device: where it computes.
        compiled: by torch.compile.

    Raises:
        WeightsError: the file is damaged, brings objects, or was not written by `p3b export`.
    """

    def __init__(self, file: Path, device: torch.device | str = "cpu", *, compiled: bool = False) -> None:
        extra = {DESCRIPTION: ""}
        try:
            _refuse_objects(file)
            with _tensors_only(), warnings.catch_warnings(), file.open("rb") as opened:
                warnings.simplefilter("ignore")
                program = torch.export.load(opened, extra_files=extra)
            texts = parse_json(extra[DESCRIPTION]) if extra[DESCRIPTION] else {}
        except WeightsError:
            raise
        except Exception as error:  # torch's reader raises whatever the first thing that does not fit raises
            raise WeightsError(f"{file} is no .pt2 that torch can read ({first_line(error)}).") from error
        self.metadata = Metadata.from_text(texts if isinstance(texts, dict) else {}, str(file))
        self._device = torch.device(device)
        self._model: nn.Module = program.module().to(self._device)
        if compiled:
            self._model.compile()

    @torch.inference_mode()
    def __call__(self, images: NDArray[Any]) -> Logits:
        """(N, C, H, W) images, as the metadata says, to (N, classes) logits."""
        logits: Logits = self._model(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return logits


def _refuse_objects(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = [Path(name).name for name in archive.namelist()]
    if objects := [name for name in names if name.startswith((CUSTOM_OBJ_FILENAME_PREFIX, OPAQUE_OBJ_FILENAME_PREFIX))]:
        raise WeightsError(f"{file} brings pickled objects ({objects[0]}), which could run code. An export of p3b has none.")


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Hold torch.load to its weights-only mode, whatever its caller asks for."""
    before = os.environ.get(_TENSORS_ONLY)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TENSORS_ONLY]
        else:
            os.environ[_TENSORS_ONLY] = before
