"""Laws of images kept in memory: batches are the same bit for bit, decoding happens once, and what does not fit is not kept."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from p3b.data import Augmentation, Preprocessing, eval_batches, keep_decoded, open_data, train_batches
from p3b.data.cache import CachedStore, DecodedImages, available_memory
from p3b.data.images import LabelledImages
from p3b.data.prepare import prepare_image
from p3b.data.stores import FileStore
from p3b.errors import ConfigError, DataError

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memory that processes share")

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
MODES = ("RGB", "L", "P", "RGBA", "I;16", "tRNS")


def write(file: Path, mode: str, size: tuple[int, int], seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    if mode == "I;16":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 200).save(file)
    elif mode == "tRNS":  # RGB of which one colour is transparent
        Image.fromarray(noise[..., :3]).save(file, transparency=(255, 0, 0))
    else:
        Image.fromarray(noise).convert(mode).save(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all modes and sizes in three parts."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "val", "test"):
        for number, name in enumerate(("a", "b")):
            (root / part / name).mkdir(parents=True)
            for image, mode in enumerate(MODES):
                write(root / part / name / f"{image}.png", mode, (17 + 5 * image, 30 - 2 * image), 10 * number + image)
    return root


def everything(folder: Path, budget: str, workers: int) -> list[torch.Tensor]:
    """All batches of two epochs and of an evaluation after each."""
    splits = open_data("FOLDER", folder)
    keep_decoded(splits, budget)
    batches = train_batches(splits.train, PREPROCESSING, Augmentation(), batch_size=4, num_workers=workers, device=CPU, seed=3)
    assert splits.val is not None
    watched = eval_batches(splits.val, PREPROCESSING, batch_size=5, num_workers=workers, device=CPU)
    made: list[torch.Tensor] = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        made += [tensor for loader in (batches, watched) for batch in loader for tensor in batch]
    return made


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_bit_for_bit(folder: Path, workers: int) -> None:
    plain, cached = everything(folder, "off", 0), everything(folder, "auto", workers)
    assert len(plain) == len(cached) > 8 and all(map(torch.equal, plain, cached))


def test_what_one_worker_has_decoded_nobody_decodes_again(tmp_path: Path, folder: Path) -> None:
    copy = shutil.copytree(folder / "train", tmp_path / "train")
    splits = open_data("FOLDER", tmp_path, val_share=0.0)
    assert "images are decoded once and kept in memory: 12 images" in keep_decoded(splits, "auto")
    store = splits.train.store
    assert isinstance(store, CachedStore)
    before = [prepare_image(Image.open(file)).tobytes() for file in sorted(copy.rglob("*.png"))]
    list(eval_batches(splits.train, PREPROCESSING, batch_size=4, num_workers=2, device=CPU))
    assert len(store.kept) == 12
    for file in copy.rglob("*.png"):
        file.unlink()
    assert [image.tobytes() for image, _ in splits.train] == before


def test_an_image_handed_out_is_a_copy(tmp_path: Path) -> None:
    write(tmp_path / "a.png", "RGB", (9, 7), 0)
    store = CachedStore(FileStore([str(tmp_path / "a.png")]), DecodedImages(1, 10_000))
    before = store.open(0).tobytes()
    store.open(0).paste((0, 0, 0), (0, 0, 9, 7))
    assert store.open(0).tobytes() == before


def test_an_image_that_cannot_be_read_is_told_as_ever(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    write(tmp_path / "good.png", "RGB", (9, 7), 0)
    store = CachedStore(FileStore([str(tmp_path / "bad.png"), str(tmp_path / "good.png")]), DecodedImages(2, 10_000))
    skipping = LabelledImages(store, [0, 1], skip_unreadable=True)
    assert skipping[0][1] == 1 and skipping.unreadable == (str(tmp_path / "bad.png"),)
    with pytest.raises(DataError, match=r"Cannot read the image .*bad\.png"):
        _ = LabelledImages(store, [0, 1])[0]


def test_no_more_is_kept_than_there_is_room_for() -> None:
    kept = DecodedImages(5, 3 * (8 + 192))
    pictures = [Image.fromarray(np.full((8, 8, 3), 50 * number, np.uint8)) for number in range(5)]
    for number in (4, 2, 2, 0, 1, 3):
        kept.put(number, pictures[number])
    assert len(kept) == 3 and kept.get(1) is None and kept.get(3) is None
    for number in (4, 2, 0):
        found = kept.get(number)
        assert found is not None and found.tobytes() == pictures[number].tobytes()


def _put(kept: DecodedImages, number: int) -> None:
    kept.put(number, Image.fromarray(np.full((3, 5, 3), number, np.uint8)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_shares_it_however_it_begins(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    kept = DecodedImages(8, 10_000)
    process = context.Process(target=kept.put, args=(6, Image.fromarray(np.full((3, 5, 3), 6, np.uint8))))
    process.start()
    process.join(60)
    assert len(kept) == 1
    image = kept.get(6)
    assert image is not None and image.tobytes() == bytes([6]) * 45


def _die_with_the_lock(kept: DecodedImages) -> None:
    import fcntl

    fcntl.lockf(kept._file, fcntl.LOCK_EX)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_that_is_killed_takes_no_lock_with_it() -> None:
    kept = DecodedImages(2, 10_000)
    process = multiprocessing.get_context("fork").Process(target=_die_with_the_lock, args=(kept,))
    process.start()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    _put(kept, 1)
    assert kept.get(1) is not None


def test_a_data_set_that_does_not_fit_is_left_alone_and_the_log_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 images of about 2 kB: they fit a quarter of 1 MB, but not the share of the eighth process."""
    monkeypatch.setattr("p3b.data.cache.available_memory", lambda: 1_000_000)
    for processes, fits in ((1, True), (8, False)):
        splits = open_data("FOLDER", folder)
        said = keep_decoded(splits, "auto", processes)
        assert isinstance(splits.train.store, CachedStore) == fits
        assert ("decoded once" in said) == fits and ("36 images would take" in said) != fits
    assert "as many of 36 images as fit" in keep_decoded(open_data("FOLDER", folder), "0.00001")
    with pytest.raises(ConfigError, match=r"--cache 7 asks for 7.0 GB, but 1.0 MB are free"):
        keep_decoded(open_data("FOLDER", folder), "7")
    assert "--cache off" in keep_decoded(open_data("FOLDER", folder), "off")


def test_what_is_asked_for_is_the_most_that_is_taken(folder: Path) -> None:
    """36 images of about 2 kB, and 10 kB that they may take."""
    splits = open_data("FOLDER", folder)
    keep_decoded(splits, "0.00001")
    store = splits.train.store
    assert isinstance(store, CachedStore)
    for part in (splits.train, splits.val, splits.test):
        assert part is not None
        pixels = [part[position][0].tobytes() for position in range(len(part))]
        assert pixels == [part[position][0].tobytes() for position in range(len(part))]
    assert 0 < len(store.kept) < 10
    assert sum(3 * image.width * image.height for n in range(36) if (image := store.kept.get(n)) is not None) <= 10_000


def test_a_system_without_memory_that_workers_share_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    for budget in ("auto", "1"):
        splits = open_data("FOLDER", folder)
        assert "this system has no memory that all workers could share" in keep_decoded(splits, budget)
        assert isinstance(splits.train.store, FileStore)


def test_pixels_that_lie_in_memory_are_not_kept_twice() -> None:
    splits = open_data("DIGITS", None)
    store = splits.train.store
    assert keep_decoded(splits, "auto") == "images lie in memory, decoded" and splits.train.store is store


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    assert available_memory(proc, cgroup) == 0
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal:       4000 kB\nMemAvailable:   3000 kB\n")
    assert available_memory(proc, cgroup) == 3000 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("5000\n")
    assert available_memory(proc, cgroup) == 3000 * 1024
    (cgroup / "memory.max").write_text("9000\n")
    assert available_memory(proc, cgroup) == 4000
    (cgroup / "memory.stat").write_text("anon 100\ninactive_file 1500\nactive_file 300\n")
    assert available_memory(proc, cgroup) == 5500, "pages of files that were read are given back"


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_job_around_the_process_count(tmp_path: Path, version: int) -> None:
    """Outside a container the own control group lies below the mounted root; the limit may lie between."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable:   3000 kB\n")
    (proc / "self" / "cgroup").write_text({1: "9:cpu:/\n4:memory:/job_7/step_0\n0::/\n", 2: "0::/job_7/step_0\n"}[version])
    root = cgroup / "memory" if version == 1 else cgroup
    limit, used = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    none = {1: "9223372036854771712", 2: "max"}[version]
    step = root / "job_7" / "step_0"
    step.mkdir(parents=True)
    for place, most in ((step, none), (step.parent, "7000"), (root, none)):
        (place / limit).write_text(most)
        (place / used).write_text("6000")
    assert available_memory(proc, cgroup) == 1000
    (proc / "self" / "cgroup").write_text("4:memory:/docker/abc\n0::/docker/abc\n")  # as the machine sees it, from within
    (root / limit).write_text("6500")
    assert available_memory(proc, cgroup) == 500
