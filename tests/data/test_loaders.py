"""Laws of batches: exact, reproducible, and without a trace in the generators of the training loop."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from p3b.data.images import LabelledImages
from p3b.data.loaders import TrainBatches, default_num_workers, eval_batches, train_batches
from p3b.data.stores import ArrayStore
from p3b.data.transforms import Augmentation, Preprocessing, mixup
from p3b.errors import ConfigError, DataError
from thinning import thinned

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


def begun_at(batches: TrainBatches, number: int, start: int) -> Batches:
    batches.set_epoch(number, start)
    return list(batches)


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


@pytest.mark.parametrize(("world_size", "count"), thinned([4, 1, 2, 3, 6], [1, 2, 3, 7, 8, 9, 31, 32, 300], 3))
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
    if count >= 8 * world_size:
        assert sizes[0] == [8] * (count // (8 * world_size))
    else:
        (size,) = sizes[0]
        assert size % 2 == 0 and size <= 8
        assert count <= size * world_size < count + math.lcm(8, 2 * world_size)


GLOBAL_BATCH = 16


def shared_by(world_size: int, count: int, repeats: int, number: int) -> Batches:
    """The global batches of an epoch, put together from the shares of its ranks."""
    shares = [
        epoch(
            training(
                images(count),
                Augmentation(repeats=repeats, erasing_probability=0.5),
                batch_size=GLOBAL_BATCH // world_size,
                rank=rank,
                world_size=world_size,
            ),
            number,
        )
        for rank in range(world_size)
    ]
    return [
        (torch.stack(pixels, dim=1).flatten(0, 1), torch.stack(targets, dim=1).flatten())
        for pixels, targets in (zip(*batch, strict=True) for batch in zip(*shares, strict=True))
    ]


@pytest.mark.parametrize(("repeats", "count"), thinned([3, 1], [*range(1, 20), 23, 31, 32, 33, 47, 48, 50], 3))
def test_a_global_batch_is_the_same_for_any_number_of_ranks(count: int, repeats: int) -> None:
    """The same samples, each augmented and erased alike, in as many batches, whatever the data set's size."""
    alone = shared_by(1, count, repeats, 2)
    assert len(alone) == max(1, count // GLOBAL_BATCH)
    for world_size in (2, 4):
        assert same(shared_by(world_size, count, repeats, 2), alone)
    if count >= GLOBAL_BATCH:
        assert same(shared_by(8, count, repeats, 2), alone)


def test_a_data_set_smaller_than_a_global_batch_is_in_it_whole_and_no_image_is_augmented_twice_alike() -> None:
    ((pixels, targets),) = epoch(training(images(5), Augmentation(repeats=1), batch_size=64), 0)
    assert Counter(Counter(targets.tolist()).values()) == {2: 3, 1: 2}
    assert len({image.numpy().tobytes() for image in pixels}) == 8


class CountingStore(ArrayStore):
    """Counts how often each image is read, in this process and in workers."""

    def open(self, index: int) -> Image.Image:
        self.reads[index] += 1
        return super().open(index)


@pytest.mark.parametrize(("num_workers", "rank", "world_size"), [(0, 0, 1), (0, 1, 2), (2, 1, 2)])
def test_an_epoch_begun_at_any_batch_is_the_rest_of_the_whole_one(num_workers: int, rank: int, world_size: int) -> None:
    """Bit for bit, with erasing and repeats, under a mixup that draws beside; what is left out is not read."""
    count, number = 21 * world_size, 5
    store = CountingStore(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), "noise")
    object.__setattr__(store, "reads", torch.zeros(count, dtype=torch.int64).share_memory_())
    batches = training(
        LabelledImages(store, np.arange(count)),
        Augmentation(erasing_probability=0.5),
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
    )
    mix = mixup(count)
    assert mix is not None
    np.random.seed(3)
    generators, whole, plain = [], [], []
    batches.set_epoch(number)
    for images_, targets in batches:
        generators.append(np.random.get_state())
        plain.append((images_.clone(), targets))
        whole.append(mix(images_, targets))
    generators.append(np.random.get_state())
    assert len(whole) == len(batches) == 5
    epoch(batches, 1)  # another epoch in between leaves no trace
    for start in range(len(batches) + 1):
        store.reads.zero_()
        assert same(begun_at(batches, number, start), plain[start:])
        assert int(store.reads.sum()) == 4 * (5 - start)
        assert len(batches) == 5
        np.random.set_state(generators[start])
        batches.set_epoch(number, start)
        assert same([mix(images_, targets) for images_, targets in batches], whole[start:])
    assert same(epoch(batches, number), plain)


@pytest.mark.parametrize("start", [-1, 4])
def test_an_epoch_cannot_begin_outside_itself(start: int) -> None:
    with pytest.raises(ConfigError, match=f"at batch {start}: it has 3"):
        training(images(12), PLAIN).set_epoch(0, start)


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
        assert same(begun_at(batches, 3, 1), epochs[-1][1:])
        assert torch.equal(torch.cuda.get_rng_state(cuda), before)
        torch.cuda.manual_seed(num_workers)
    assert same(*epochs)
    assert epochs[0][0][0].device.type == epochs[0][0][1].device.type == "cuda"
