"""Batches on the device.

Every random choice depends on (seed, epoch, place in the epoch) alone: the order comes from a generator seeded for the
epoch, and each sample travels with seeds of its own to whichever worker makes it and to the device. So an epoch is the
same bit for bit whether it is gone through from its beginning or from any batch on, with any number of workers, and,
all ranks taken together, with any number of ranks. The global generators of Python, NumPy and torch, from which
timm's transforms draw, are put back as they were: loading disturbs no randomness of the training loop.

Legend: S samples of a batch, K batches, C channels, H and W height and width.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from p3b.data.images import LabelledImages
from p3b.data.prepare import prepare_image
from p3b.data.transforms import Augmentation, Preprocessing, eval_transform, train_transform
from p3b.data.workers import begin_worker, run_workers, told_of_deaths
from p3b.errors import ConfigError, DataError

_SampleKey = tuple[int, int, int]  # position in the data set, seeds of this sample's augmentation and of its erasing
_EVEN_SHARES_OF = 8  # every one of 1, 2 and 4 ranks has an even share of so many samples


def train_batches(
    dataset: Dataset[tuple[Any, int]],
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> TrainBatches:
    """Shuffled, augmented, normalised batches of this rank; see `TrainBatches`.

    Args:
        dataset: map style, (PIL image, class index). Its own `transform`, if set, comes before ours and must answer
            with a PIL image.
        preprocessing: size, mean and std.
        augmentation: what is random.
        batch_size: images of a batch on this rank. Mixup needs an even one.
        num_workers: processes that decode and augment; 0: this process does it.
        device: where the batches go.
        seed: of order and augmentation.
        rank, world_size: this process among those that share an epoch; every rank gets the same number of batches.
            `batch_size` and `seed` must be the same on all of them.

    Raises:
        DataError: an empty data set. ConfigError: a batch size below 1, a rank outside 0 .. world_size - 1, an
        unknown policy.
    """
    _check_counts(_length(dataset), batch_size, rank, world_size)
    repeats = max(1, augmentation.repeats) if augmentation.enabled else 1
    order = _EpochOrder(dataset, repeats, batch_size, seed, rank, world_size)
    samples = _Samples(dataset, train_transform(preprocessing, augmentation), preprocessing.input_size)
    return TrainBatches(order, _on_device(samples, order, num_workers, device, preprocessing, augmentation))


def eval_batches(
    dataset: Dataset[tuple[Any, int]],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> EvalBatches:
    """Batches in order, resized, cropped and normalised; every image exactly once over all ranks; see `EvalBatches`.

    Arguments and errors as for `train_batches`.
    """
    _check_counts(_length(dataset), batch_size, rank, world_size)
    keys = _chunks([(index, 0, 0) for index in range(rank, _length(dataset), world_size)], batch_size)
    samples = _Samples(dataset, eval_transform(preprocessing), preprocessing.input_size, replace_unreadable=False)
    return EvalBatches(_on_device(samples, keys, num_workers, device, preprocessing, Augmentation(enabled=False)))


@final
class TrainBatches:
    """One epoch of training batches at each iteration: images (S, C, H, W) float32 normalised, targets (S,) int64, on
    the device.

    A global batch is what all ranks get in their batch of the same number: batch_size * world_size samples, of which rank
    r has every world_size-th from the r-th on. An epoch is cut into global batches, so which samples are in one, and
    how each is augmented and erased, does not depend on how many ranks share it. (The device's generator makes the
    pixels that are erased with: they are the same on devices of one kind.)

    All batches are full, and what does not fill one is left out; an epoch has len(dataset) samples at most, repeats
    included. A data set smaller than one global batch makes one smaller one: all its images, and as many of them again as
    it takes to fill a multiple of 8 (of 2 * world_size, too), so that the law above holds for 1, 2 and 4 ranks here
    as well and an even batch size stays even; but never more than the global batch that was asked for.

    Call `set_epoch` before each epoch; without it every epoch is epoch 0. One iteration at a time. Where an iteration
    ends, by itself, by `break` or by an error, its workers end, too.

    Iterating raises:
        DataError: an image cannot be read, its folder is gone, a worker died.
    """

    def __init__(self, order: _EpochOrder, loader: PrefetchLoader) -> None:
        self._order, self._loader = order, loader

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, wherever the iteration begins; the same on every rank."""
        return len(self._order)

    @property
    def batch_size(self) -> int:
        """Samples of each batch; smaller than asked for only if the data set is smaller than one global batch."""
        return self._order.batch_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose which epoch the next iteration is, and at which of its batches it begins.

        Args:
            epoch: from 0.
            start: in 0 .. len(self). The batches before are not read; those from there on are bit for bit what they are
                in the whole epoch.

        Raises:
            ConfigError: `start` is outside its range.
        """
        if not 0 <= start <= len(self):
            raise ConfigError(
                f"An epoch cannot begin at batch {start}: it has {len(self)}. Are data set, batch size and number of processes "
                "those that the run began with?"
            )
        self._order.epoch, self._order.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return told_of_deaths(self._loader)


@final
class EvalBatches:
    """Images (S, C, H, W) float32 normalised and targets (S,) int64 on the device, in the order of the data set.

    Rank r has images r, r + world_size, ...: no image is repeated to make ranks even, so ranks may differ by one
    image, hence by one batch, and may have none. An unreadable image that is skipped is left out, not replaced. Can
    be iterated any number of times, one iteration at a time; raises what `TrainBatches` raises.
    """

    def __init__(self, loader: PrefetchLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        """Batches on this rank (fewer come where all images of one cannot be read and are skipped)."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return told_of_deaths(self._loader)


def default_num_workers(local_world_size: int = 1, on_cpu: bool = True) -> int:
    """Worker processes for one of `local_world_size` processes on this machine.

    Beside an accelerator: all cores but one, at most 16. Training on the CPU: the cores belong to the training; one
    worker for every four cores, at most 4, none on a small machine.
    """
    # The cores this process may use: fewer than the machine has, in a container or a batch job.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    own_cores = cores // max(1, local_world_size)
    return min(4, own_cores // 4) if on_cpu else max(1, min(16, own_cores - 1))


# --- how many, and which ----------------------------------------------------------------------------------------------


def _check_counts(num_images: int, batch_size: int, rank: int, world_size: int) -> None:
    if num_images < 1:
        raise DataError("The data set has no image.")
    if batch_size < 1:
        raise ConfigError(f"The batch size is {batch_size}; expected at least 1.")
    if not 0 <= rank < world_size:
        raise ConfigError(f"The rank is {rank} of {world_size} processes; expected 0 to {world_size - 1}.")


def _chunks(keys: Sequence[_SampleKey], size: int) -> list[list[_SampleKey]]:
    return [list(keys[start : start + size]) for start in range(0, len(keys), size)]


def _length(dataset: Dataset[Any]) -> int:
    if not isinstance(dataset, Sized):
        raise DataError(f"{type(dataset).__name__} has no length; expected a map-style data set.")
    return len(dataset)


@final
class _EpochOrder:
    """What DataLoader takes as batch sampler: this rank's batches, from `start` on, of the epoch that is current when an
    iteration starts."""

    def __init__(self, dataset: Dataset[Any], repeats: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.epoch, self.start = 0, 0
        self._seed, self._rank, self._world_size = seed, rank, world_size
        # Shuffling and repeats for all ranks at once: timm's shares would depend on how many there are, through the
        # rounding of each. It also leaves out up to 255 images to make the epoch a multiple of 256 (selected_round);
        # whole batches are enough.
        self._sampler = RepeatAugSampler(dataset, num_replicas=1, rank=0, num_repeats=repeats, selected_round=0)
        self._places = len(self._sampler)
        even_shares = math.lcm(_EVEN_SHARES_OF, 2 * world_size)
        self._global_batch = min(batch_size * world_size, math.ceil(self._places / even_shares) * even_shares)
        self._count = max(1, self._places // self._global_batch)
        self.batch_size = self._global_batch // world_size

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[_SampleKey]]:
        self._sampler.set_epoch(int(self._stream(0).integers(2**63)))
        order = np.fromiter(self._sampler, np.int64, self._places)
        first, end = self.start * self._global_batch, self._count * self._global_batch
        share = np.arange(first + self._rank, end, self._world_size).reshape(-1, self.batch_size)
        augmentation, erasing = (self._stream(purpose).integers(2**32, size=end)[share] for purpose in (1, 2))
        positions = order[share % self._places]  # a data set smaller than its batch begins again
        return (
            list(zip(*(part.tolist() for part in batch), strict=True))
            for batch in zip(positions, augmentation, erasing, strict=True)
        )

    def _stream(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.epoch, purpose])


# --- in the workers ---------------------------------------------------------------------------------------------------


@final
class _Samples(Dataset[Any]):
    """Samples by key, ready to be collated: (uint8 (C, H, W), class index, seed of the erasing)."""

    def __init__(
        self,
        dataset: Dataset[tuple[Any, int]],
        transform: Callable[[Image.Image], Tensor],
        input_size: tuple[int, int, int],
        replace_unreadable: bool = True,
    ) -> None:
        self._dataset = dataset
        self._transform = transform
        self._channels = input_size[0]
        self._replace_unreadable = replace_unreadable

    def __getitems__(self, keys: list[_SampleKey]) -> list[tuple[Tensor, int, int]] | DataError:
        """A whole batch. A `DataError` is returned, not raised: on its way to the main process it would grow a traceback."""
        cpu = torch.device("cpu")
        samples = []
        with _generators_kept(cpu):
            for position, augmentation_seed, erasing_seed in keys:
                _seed_generators(augmentation_seed, cpu)
                try:
                    sample = self._read(position)
                except DataError as error:
                    return DataError(str(error))
                if sample is not None:
                    image, label = sample
                    samples.append((self._transform(prepare_image(image, self._channels)), label, erasing_seed))
        return samples

    def _read(self, position: int) -> tuple[Image.Image, int] | None:
        if not self._replace_unreadable and isinstance(self._dataset, LabelledImages):
            return self._dataset.get_readable(position)
        return self._dataset[position]


def _collate(samples: list[tuple[Tensor, int, int]] | DataError) -> tuple[tuple[Tensor, Tensor], list[int]] | DataError | None:
    if isinstance(samples, DataError):
        return samples
    if not samples:
        return None
    return fast_collate([(image, label) for image, label, _ in samples]), [seed for _, _, seed in samples]


@final
class _Batches:
    """uint8 batches from a DataLoader; errors that came as values are raised, empty batches are left out."""

    def __init__(self, samples: _Samples, batch_keys: Any, num_workers: int, device: torch.device) -> None:
        self.erasing_seeds: list[int] = []  # of the batch that was last handed out
        self._loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=batch_keys,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # DataLoader draws a seed for its workers; not from the global generator
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for made in run_workers(self._loader):
            if isinstance(made, DataError):
                raise DataError(str(made))
            if made is not None:
                batch, self.erasing_seeds = made
                yield batch


@final
class _Erasing:
    """timm's random erasing, each image under a seed of its own. PrefetchLoader calls it right after it took a batch."""

    def __init__(self, erase: RandomErasing, batches: _Batches, device: torch.device) -> None:
        self._erase, self._batches, self._device = erase, batches, device

    def __call__(self, images: Tensor) -> Tensor:
        with _generators_kept(self._device):
            for image, seed in zip(images, self._batches.erasing_seeds, strict=True):
                _seed_generators(seed, self._device)
                self._erase(image)
        return images


def _on_device(
    samples: _Samples,
    batch_keys: _EpochOrder | list[list[_SampleKey]],
    num_workers: int,
    device: torch.device,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
) -> PrefetchLoader:
    batches: Any = _Batches(samples, batch_keys, num_workers, device)
    loader = PrefetchLoader(
        batches,
        mean=preprocessing.mean,
        std=preprocessing.std,
        channels=preprocessing.input_size[0],
        device=device,
        re_prob=augmentation.erasing_probability if augmentation.enabled else 0.0,
        re_mode=augmentation.erasing_mode,
        re_count=augmentation.erasing_count,
    )
    if loader.random_erasing is not None:
        erasing: Any = _Erasing(loader.random_erasing, batches, device)
        loader.random_erasing = erasing
    return loader


# --- randomness -------------------------------------------------------------------------------------------------------


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch (CPU and, if it is CUDA, `device`) back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators; seed in [0, 2**32). torch.manual_seed would seed every accelerator too, each time."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
