"""Laws of batches: exact, reproducible, and without a trace in the generators of the training loop."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from p3b.data.images import ArrayStore, LabelledImages
from p3b.data.loaders import TrainBatches, default_num_workers, eval_batches, train_batches
from p3b.data.transforms import Augmentation, Preprocessing
from p3b.errors import ConfigError, DataError

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop_pct=1.0)
PLAIN = Augmentation(enabled=False)
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def images(count: int) -> LabelledImages:
    """Noise; the label says which image it is."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return LabelledImages(ArrayStore(pixels, "noise"), np.arange(count))


def training(dataset: LabelledImages, augmentation: Augmentation, batch_size: int = 4, **options: int) -> TrainBatches:
    defaults = {"num_workers": 0, "seed": 0}
    return train_batches(dataset, PREPROCESSING, augmentation, batch_size=batch_size, device=CPU, **{**defaults, **options})


def epoch(batches: TrainBatches, number: int) -> Batches:
    batches.set_epoch(number)
    return list(batches)


def same(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def labels(batches: Batches) -> list[int]:
    return [label for _, targets in batches for label in targets.tolist()]


def test_an_epoch_depends_on_its_number_alone_with_any_number_of_workers() -> None:
    augmentation = Augmentation(erasing_probability=0.5)
    resumed = epoch(training(images(12), augmentation), 1)
    for num_workers in (0, 1, 2):
        batches = training(images(12), augmentation, num_workers=num_workers)
        first, second = epoch(batches, 0), epoch(batches, 1)
        assert same(second, resumed)
        assert not same(first, second)
        batches.set_epoch(0)
        next(iter(batches))  # an epoch that was left early does not show in the next one
        assert same(epoch(batches, 1), resumed)
    assert not same(epoch(training(images(12), augmentation, seed=1), 1), resumed)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_generators_as_they_were(num_workers: int) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    undisturbed = (random.random(), float(np.random.rand()), torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    batches = training(images(8), Augmentation(erasing_probability=1.0), num_workers=num_workers)
    assert len(list(batches)) == 2
    list(eval_batches(images(8), PREPROCESSING, batch_size=3, num_workers=num_workers, device=CPU))
    assert (random.random(), float(np.random.rand()), torch.rand(1).item()) == undisturbed


def test_the_training_loop_may_draw_and_seed_between_batches() -> None:
    quiet = epoch(training(images(12), Augmentation()), 0)
    noisy = []
    for batch in training(images(12), Augmentation()):
        noisy.append(batch)
        torch.manual_seed(len(noisy))
        random.random()
    assert same(quiet, noisy)


def test_batches_are_normalised_floats_with_integer_targets() -> None:
    dataset = images(4)
    preprocessing = Preprocessing((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=1.0)
    ((pixels, targets),) = eval_batches(dataset, preprocessing, batch_size=8, num_workers=0, device=CPU)
    assert (pixels.dtype, targets.dtype) == (torch.float32, torch.int64)
    raw = torch.tensor(np.stack([np.asarray(image) for image, _ in dataset])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    assert torch.allclose(pixels, (raw - mean) / std, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_image_exactly_once_over_all_ranks(count: int, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        batches = eval_batches(
            images(count), PREPROCESSING, batch_size=4, num_workers=0, device=CPU, rank=rank, world_size=world_size
        )
        once, again = list(batches), list(batches)
        assert len(batches) == len(once)
        assert same(once, again)
        seen += labels(once)
    assert sorted(seen) == list(range(count))


def test_training_without_repeats_sees_every_image_once_over_all_ranks() -> None:
    for augmentation in (PLAIN, Augmentation(repeats=0), Augmentation(repeats=1)):
        seen = [
            label
            for rank in range(2)
            for label in labels(epoch(training(images(24), augmentation, rank=rank, world_size=2), 0))
        ]
        assert sorted(seen) == list(range(24))
        assert seen != sorted(seen)


def test_repeated_augmentation_changes_each_copy_anew_and_keeps_the_epochs_length() -> None:
    for world_size in (1, 3):
        ranks = [
            epoch(training(images(24), Augmentation(), batch_size=8, rank=rank, world_size=world_size), 0)
            for rank in range(world_size)
        ]
        everything = [label for batches in ranks for label in labels(batches)]
        assert len(everything) == 24
        assert Counter(Counter(everything).values()) == {3: 8}
    assert all(len(set(labels(batches))) == 8 for batches in ranks)  # with three ranks, each has one copy of an image
    copies: dict[int, list[torch.Tensor]] = {}
    for batches in ranks:
        for pixels, targets in batches:
            for image, label in zip(pixels, targets.tolist(), strict=True):
                copies.setdefault(label, []).append(image)
    assert all(not torch.equal(a, b) for a, b, _ in copies.values())


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 31, 300])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_all_ranks_make_the_same_number_of_batches_and_at_least_one(count: int, world_size: int, repeats: int) -> None:
    sizes = []
    for rank in range(world_size):
        batches = training(
            images(count),
            Augmentation(auto_augment=None, repeats=repeats),
            batch_size=8,
            rank=rank,
            world_size=world_size,
        )
        made = [len(targets) for _, targets in batches]
        assert len(made) == len(batches) >= 1
        assert set(made) == {batches.batch_size}
        sizes.append(made)
    assert all(made == sizes[0] for made in sizes)
    per_rank = -(-count // world_size)
    if per_rank >= 8:
        assert sizes[0] == [8] * (per_rank // 8)
    else:
        assert sizes[0] == [max(1, per_rank // 2 * 2)]


def test_erasing_touches_about_its_share_of_the_images() -> None:
    dataset = LabelledImages(ArrayStore(np.full((200, 8, 8, 3), 51, dtype=np.uint8), "flat"), np.zeros(200, dtype=int))
    flat = Augmentation(auto_augment=None, color_jitter=0.0, erasing_probability=0.25)
    erased = sum(int((image != image[0, 0, 0]).any()) for pixels, _ in training(dataset, flat) for image in pixels)
    assert 25 <= erased <= 75


def test_grey_networks_get_one_channel() -> None:
    grey = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    ((pixels, _),) = eval_batches(images(2), grey, batch_size=2, num_workers=0, device=CPU)
    assert pixels.shape == (2, 1, 8, 8)


class BrokenStore:
    """Three images, the middle one of which cannot be read."""

    def __len__(self) -> int:
        return 3

    def open(self, index: int) -> Image.Image:
        if index == 1:
            raise OSError("image file is truncated")
        return Image.new("RGB", (8, 8))

    def name(self, index: int) -> str:
        return f"image-{index}.jpg"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_told_without_a_traceback_in_the_message(num_workers: int) -> None:
    batches = training(LabelledImages(BrokenStore(), [0, 1, 2]), PLAIN, batch_size=1, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^Cannot read the image image-1\.jpg") as raised:
        list(batches)
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_replaces_a_skipped_image_and_evaluation_leaves_it_out(num_workers: int) -> None:
    dataset = LabelledImages(BrokenStore(), [0, 1, 2], skip_unreadable=True)
    for batch_size in (1, 3):
        batches = eval_batches(dataset, PREPROCESSING, batch_size=batch_size, num_workers=num_workers, device=CPU)
        assert labels(list(batches)) == [0, 2]
    assert dataset.unreadable == ("image-1.jpg",)
    assert sorted(labels(list(training(dataset, PLAIN, batch_size=1, num_workers=num_workers)))) == [0, 2, 2]


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="no image"):
        training(images(0), PLAIN)
    with pytest.raises(ConfigError, match="batch size"):
        training(images(2), PLAIN, batch_size=0)
    with pytest.raises(ConfigError, match="rank"):
        training(images(2), PLAIN, rank=2, world_size=2)


def test_default_workers_fit_the_machine() -> None:
    assert 0 <= default_num_workers() <= 4
    assert 1 <= default_num_workers(on_cpu=False) <= 16
    assert default_num_workers(10**6, on_cpu=True) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_an_epoch_is_reproducible_too_and_leaves_its_generator_alone() -> None:
    cuda = torch.device("cuda")
    epochs = []
    for num_workers in (0, 1):
        batches = train_batches(
            images(12),
            PREPROCESSING,
            Augmentation(erasing_probability=1.0),
            batch_size=4,
            num_workers=num_workers,
            device=cuda,
            seed=0,
        )
        before = torch.cuda.get_rng_state(cuda)
        epochs.append(epoch(batches, 3))
        assert torch.equal(torch.cuda.get_rng_state(cuda), before)
        torch.cuda.manual_seed(num_workers)
    assert same(*epochs)
    assert epochs[0][0][0].device.type == epochs[0][0][1].device.type == "cuda"
