"""Images that have been decoded once are kept in memory, where they fit: every later epoch finds them there.

What is kept are the RGB pixels before any augmentation, so that a batch is the same bit for bit with and without. Full-size
pixels only: a random crop takes a part of the full image and resizes that, so a copy of reduced size would give other images.

All worker processes and the main one share one piece of memory (memfd_create: no file system, hence no limit of /dev/shm). It
begins with a table, one number an image: where its pixels lie, 0 while nothing is kept. Whoever decodes an image first appends
it, under a lock of the file, which the system releases should the process be killed; the number in the table comes last.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from p3b.data.datasets import DataSplits
from p3b.data.stores import ArrayStore, ImageStore
from p3b.errors import ConfigError

MEMORY_SHARE = 0.25
"""The share of the free memory that may be taken unasked."""
SAMPLED = 32
"""Images that are decoded to tell how much room all of them need."""
_WORD = 8
_CGROUPS = (
    ("", "", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Versions 2 and 1 of control groups: controller, folder, files of limit and use, and what memory.stat calls pages of files."""


def keep_decoded(splits: DataSplits, budget: str, local_world_size: int = 1) -> str:
    """Let all parts of a data set keep their images once they are decoded, if they fit.

    Args:
        splits: whose stores are replaced, before any loader is made.
        budget: "auto": all images must fit a quarter of the free memory; "off"; or gigabytes: as many as fit those.
        local_world_size: processes on this machine. Each keeps its own and may take its share of the budget.

    Returns:
        A line for the log: what is kept, or why nothing is.

    Raises:
        ConfigError: more gigabytes than are free.
    """
    again = "images are decoded each time they are shown"
    if budget == "off":
        return f"{again} (--cache off)"
    parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    stores = {id(part.store): part.store for part in parts if not isinstance(part.store, ArrayStore)}
    if not stores:
        return "images lie in memory, decoded"
    if not hasattr(os, "memfd_create"):
        return f"{again}: this system has no memory that all workers could share"
    images = sum(len(part) for part in parts if id(part.store) in stores)
    free, asked = available_memory(), None if budget == "auto" else int(float(budget) * 1e9)
    if asked is not None and asked > free:
        raise ConfigError(
            f"--cache {budget} asks for {_gigabytes(asked)}, but {_gigabytes(free)} are free. Ask for less, or auto."
        )
    room = (int(MEMORY_SHARE * free) if asked is None else asked) // max(1, local_world_size)
    sampled = [mean_bytes(part.store, len(part)) * len(part) for part in parts if id(part.store) in stores]
    needed = int(sum(sampled))
    if needed > room and asked is None:
        return (
            f"{again}: decoded, the {images:,} images would take about {_gigabytes(needed)}, and a quarter of the free memory, "
            f"over the processes of this machine, is {_gigabytes(room)}; --cache 8 would keep as many as fit 8 GB"
        )
    tables = sum(len(store) for store in stores.values())
    try:
        kept = DecodedImages(tables, room)
    except OSError as error:
        return f"{again}: no memory to keep them in could be had ({error})"
    cached: dict[int, ImageStore] = {}
    first = 0
    for key, store in stores.items():
        cached[key] = CachedStore(store, kept, first)
        first += len(store)
    for part in parts:
        part.store = cached.get(id(part.store), part.store)
    how_many = f"{images:,} images" if needed <= room else f"as many of {images:,} images as fit {_gigabytes(room)}"
    return f"images are decoded once and kept in memory: {how_many}, about {needed / 1e6:,.0f} MB in all"


@final
class DecodedImages:
    """Pixels of numbered images in memory that processes share, forked and spawned ones.

    Args:
        images: how many there may be.
        room: bytes that their pixels may take; nothing is kept beyond. Memory is taken as it is filled.

    Raises:
        OSError: there is no such memory.
    """

    def __init__(self, images: int, room: int) -> None:
        self._images = images
        self._map(os.memfd_create("p3b-images"), _WORD * (images + 1) + room)
        self._table[0] = _WORD * (images + 1)  # where the next image goes

    def _map(self, file: int, size: int) -> None:
        self._file, self._size = file, size
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        self._memory = mmap.mmap(file, size)
        self._table = np.ndarray(self._images + 1, np.int64, self._memory)

    def get(self, number: int) -> Image.Image | None:
        """An image of its own, RGB; None where it is not kept."""
        place = int(self._table[number + 1])
        if place == 0:
            return None
        width, height = (int(side) for side in np.ndarray(2, np.int32, self._memory, place))
        pixels = memoryview(self._memory)[place + _WORD : place + _WORD + 3 * width * height]
        return Image.frombytes("RGB", (width, height), pixels)

    def put(self, number: int, image: Image.Image) -> None:
        """Keep an RGB image, if it is new and there is room."""
        width, height = image.size
        taken = -(-(_WORD + 3 * width * height) // _WORD) * _WORD
        import fcntl  # comes with every system that has memfd_create, and not with Windows

        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            place = int(self._table[0])
            if self._table[number + 1] or place + taken > self._size:
                return
            np.ndarray(2, np.int32, self._memory, place)[:] = width, height
            pixels = np.ndarray(3 * width * height, np.uint8, self._memory, place + _WORD)
            pixels[:] = np.frombuffer(image.tobytes(), np.uint8)
            self._table[0] = place + taken
            self._table[number + 1] = place
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def __len__(self) -> int:
        """Images that are kept."""
        return int(np.count_nonzero(self._table[1:]))

    def __getstate__(self) -> dict[str, Any]:
        return {"images": self._images, "file": reduction.DupFd(self._file), "size": self._size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._images = state["images"]
        self._map(state["file"].detach(), state["size"])

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)  # the memory itself is let go of with its last map


@final
class CachedStore:
    """A store that decodes each image once.

    Args:
        store: where an image comes from the first time, and after it what is wrong with it.
        kept: may be shared with other stores.
        first: number of this store's first image in `kept`.
    """

    def __init__(self, store: ImageStore, kept: DecodedImages, first: int = 0) -> None:
        self._store, self.kept, self._first = store, kept, first

    def __len__(self) -> int:
        return len(self._store)

    def open(self, index: int) -> Image.Image:
        image = self.kept.get(self._first + index)
        if image is None:
            image = self._store.open(index)
            self.kept.put(self._first + index, image)
        return image

    def name(self, index: int) -> str:
        return self._store.name(index)


def mean_bytes(store: ImageStore, images: int) -> float:
    """Bytes of an image decoded, the mean over a sample; 0 where none of it can be read, which a run will tell."""
    sizes = []
    for index in sorted(set(np.linspace(0, len(store) - 1, min(SAMPLED, images, len(store))).astype(int).tolist())):
        try:
            width, height = store.open(index).size
        except Exception:  # whatever is wrong with an image is told when it is its turn
            continue
        sizes.append(3 * width * height + 2 * _WORD)
    return float(np.mean(sizes)) if sizes else 0.0


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may still be taken: what the machine has free, or what a container or job has left; 0 if unknown."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    return min([free, *_left_of_limits(proc, cgroup)])


def _left_of_limits(proc: Path, cgroup: Path) -> Iterator[int]:
    """What is left of each memory limit that this process lies under: of its own control group and of all around it.

    In a container the own group is the root of what is mounted; in a job of Slurm or systemd it lies below. Pages of files that
    were read and are not in use count as used, and are given back as soon as somebody wants memory.
    """
    try:
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    for controller, folder, limit, used, given_back in _CGROUPS:
        root = cgroup / folder
        own = next((path for _, names, path in groups if controller in names.split(",")), "/")
        below = root / own.strip("/")
        for place in (below, *(parent for parent in below.parents if parent.is_relative_to(root))):
            try:
                left = int((place / limit).read_text()) - int((place / used).read_text())
            except (OSError, ValueError):  # no such file, or "max": no limit
                continue
            yield max(0, left + _memory_stat(place, given_back))


def _memory_stat(place: Path, name: str) -> int:
    """A figure of a control group's memory.stat; 0 where it is not told."""
    try:
        figures = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        return int(figures.get(name, 0))
    except (OSError, ValueError):
        return 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
