"""Image files on their way into a runner: found in folders, decoded, prepared as the model says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from timm.utils.misc import natural_key

from p3b.data.prepare import prepare_image, read_image
from p3b.data.scan import scan
from p3b.data.transforms import Preprocessing, eval_transform
from p3b.deploy.agreement import Logits
from p3b.deploy.metadata import Metadata
from p3b.deploy.runners import Runner
from p3b.errors import DataError
from p3b.vit.families import images_of


def find_files(folder: Path) -> list[Path]:
    """All image files under a folder, at any depth, in natural order; what counts as one is said in `p3b.data.scan`."""
    found = [folder.joinpath(*below, leaf.name) for below, leaves in scan(folder).images.items() for leaf in leaves]
    return sorted(found, key=lambda path: natural_key(str(path)))


def read_some(folder: Path, count: int) -> list[Image.Image]:
    """So many images of a folder, taken evenly from all that are there.

    Raises:
        DataError: there is no such folder, it has no image, or one cannot be read.
    """
    files = find_files(folder) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder} has no image. Expected a folder of images, at any depth.")
    return [read(file) for file in evenly(files, count)]


def photo_crops(count: int) -> list[Image.Image]:
    """Square crops of a photo that comes with matplotlib, of many places and sizes: real pixels where no images are given."""
    file = get_sample_data("grace_hopper.jpg", asfileobj=False)
    photo = Image.open(str(file)).convert("RGB")
    generator = np.random.default_rng(0)
    crops = []
    for _ in range(count):
        side = int(generator.integers(min(photo.size) // 8, min(photo.size)))
        left, top = (int(generator.integers(extent - side)) for extent in photo.size)
        crops.append(photo.crop((left, top, left + side, top + side)))
    return crops


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """So many items, or all, spread over the whole sequence."""
    chosen = min(count, len(items))
    return [items[index * len(items) // chosen] for index in range(chosen)]


def read(file: Path) -> Image.Image:
    """An image as a person sees it; DataError where it cannot be read."""
    try:
        return read_image(file)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise DataError(f"Cannot read the image {file} ({type(error).__name__}: {error}).") from error


def stand_in(model: VisionTransformer) -> Preprocessing:
    """How images are prepared where the model does not say: for checks and measurements alone."""
    shape = images_of(model).shape
    channels = shape[0]
    return Preprocessing(shape, IMAGENET_DEFAULT_MEAN[:channels], IMAGENET_DEFAULT_STD[:channels])


class Preparation:
    """Decoded images to what a model takes: the one way from an image to a runner's input.

    Args:
        metadata: of the model; it says how images are prepared, and whether that happens inside.

    Raises:
        DataError: the model does not say how images are prepared.
    """

    def __init__(self, metadata: Metadata) -> None:
        if metadata.preprocessing is None:
            raise DataError(
                "The model does not say how its images are prepared. Save it again with what it was trained with: "
                "p3b.save(model, folder, preprocessing={'input_size': [3, 224, 224], 'mean': [...], 'std': [...], "
                "'interpolation': 'bicubic', 'crop_pct': 0.875})."
            )
        self._inside = metadata.takes == "images"
        self._preprocessing: Preprocessing = metadata.preprocessing
        self._transform = eval_transform(metadata.preprocessing)
        self._mean, self._std = (
            torch.tensor(values).mul(255).view(-1, 1, 1) for values in (metadata.preprocessing.mean, metadata.preprocessing.std)
        )

    def __call__(self, image: Image.Image) -> NDArray[Any]:
        """A decoded image of any mode to (C, H, W): uint8 as it is, or float32, resized, cropped and normalised."""
        image = prepare_image(image, self._preprocessing.input_size[0])
        if self._inside:
            pixels = np.asarray(image)
            return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        prepared: NDArray[Any] = self._transform(image).float().sub(self._mean).div(self._std).numpy()
        return prepared


def logits_of(runner: Runner, images: Iterable[NDArray[Any]], batch_size: int = 32) -> Logits:
    """(S, classes) logits of prepared images, those of one size together."""
    return np.concatenate([runner(batch) for batch in batches(images, batch_size)])


def batches(images: Iterable[NDArray[Any]], batch_size: int) -> Iterator[NDArray[Any]]:
    """Neighbours of the same shape, stacked: (up to batch_size, C, H, W)."""
    waiting: list[NDArray[Any]] = []
    for image in images:
        if waiting and (len(waiting) == batch_size or waiting[0].shape != image.shape):
            yield np.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield np.stack(waiting)
