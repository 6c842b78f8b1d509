"""From an image to a network's input: `Preprocessing` (always; it travels with the model) and `Augmentation` (training).

Both are plain values; the transforms themselves are timm's. Normalisation and random erasing happen later, on the
device (`loaders`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose

from p3b.errors import ConfigError, unknown_name

_EVAL_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_TRAIN_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "random")
_ERASING_MODES = ("const", "rand", "pixel")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input: resize, center-crop, scale to [0, 1], normalise.

    Attributes:
        input_size: (channels, height, width); 1 channel (grey) or 3 (RGB).
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units, > 0.
        interpolation: of the resize.
        crop_pct: side of the crop / side of the resized image, in (0, 1]; 0.875 is 224 / 256.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        sizes = self.input_size
        if len(sizes) != 3 or sizes[0] not in (1, 3) or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ConfigError(f"input_size is {sizes}; expected (channels, height, width) with 1 or 3 channels.")
        if len(self.mean) != sizes[0] or len(self.std) != sizes[0] or not all(value > 0 for value in self.std):
            raise ConfigError(
                f"mean is {self.mean} and std is {self.std}; expected {sizes[0]} numbers each, one for a channel, std above 0."
            )
        if self.interpolation not in _EVAL_INTERPOLATIONS:
            raise ConfigError(unknown_name("interpolation", self.interpolation, _EVAL_INTERPOLATIONS))
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct is {self.crop_pct}; expected a share in (0, 1], such as 0.875.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the way back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From what `to_dict` gave. Raises `ConfigError` on a missing or unknown key or a value out of range."""
        known = {field.name for field in fields(cls)}
        missing = {"input_size", "mean", "std"} - set(values)
        if missing or set(values) - known:
            raise ConfigError(
                f"Preprocessing with the keys {', '.join(sorted(values))}: missing {', '.join(sorted(missing)) or 'none'}, "
                f"unknown {', '.join(sorted(set(values) - known)) or 'none'}. Expected {', '.join(sorted(known))}."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"Preprocessing has a value of the wrong type ({error}): {dict(values)}") from error


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images; the defaults are the recipe of the published runs (method.md, section 8).

    Attributes:
        auto_augment: a policy in timm's notation, such as rand-m9-mstd0.5-inc1; None for none.
        color_jitter: strength of brightness, contrast and saturation changes; used where there is no `auto_augment`,
            as in timm.
        erasing_probability: share of images in which a rectangle is erased, in [0, 1].
        erasing_mode: with what: const (mean colour), rand (one random colour), pixel (a random colour for each pixel).
        erasing_count: at most so many rectangles in an image.
        interpolation: of random resizes; `random` takes bilinear or bicubic.
        scale: range of the random crop's area as a share of the image.
        ratio: range of the random crop's width / height.
        horizontal_flip: probability, in [0, 1].
        repeats: repeated augmentation: every chosen image comes so many times in an epoch, each time changed anew,
            and as many times fewer images are chosen, so that an epoch keeps its length. 0 or 1: off.
        enabled: False: nothing random at all; images are resized and cropped as in evaluation, and none is repeated.
    """

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.3
    erasing_probability: float = 0.25
    erasing_mode: str = "pixel"
    erasing_count: int = 1
    interpolation: str = "bicubic"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    repeats: int = 3
    enabled: bool = True

    def __post_init__(self) -> None:
        for name in ("erasing_probability", "horizontal_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a probability in [0, 1].")
        if self.erasing_mode not in _ERASING_MODES:
            raise ConfigError(unknown_name("erasing mode", self.erasing_mode, _ERASING_MODES))
        if self.interpolation not in _TRAIN_INTERPOLATIONS:
            raise ConfigError(unknown_name("training interpolation", self.interpolation, _TRAIN_INTERPOLATIONS))
        if self.erasing_count < 1 or self.repeats < 0 or not 0 <= self.color_jitter < math.inf:
            raise ConfigError(
                f"erasing_count is {self.erasing_count}, repeats {self.repeats}, color_jitter {self.color_jitter}; "
                "expected at least 1, 0 and 0."
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(
                f"scale is {self.scale} and ratio {self.ratio}; expected (low, high) with 0 < low <= high, scale at most 1."
            )


def eval_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """PIL image -> uint8 (C, H, W): shorter side to side / crop_pct, then center crop. Not yet normalised."""
    return create_transform(
        preprocessing.input_size,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        normalize=False,
    )


def train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
    """PIL image -> uint8 (C, H, W), changed at random by the global generators of Python, NumPy and torch. Not yet
    normalised.

    Raises:
        ConfigError: an `auto_augment` that timm does not understand.
    """
    if not augmentation.enabled:
        return eval_transform(preprocessing)
    try:
        transform = create_transform(
            preprocessing.input_size,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.horizontal_flip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            mean=preprocessing.mean,
            normalize=False,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"auto_augment is {augmentation.auto_augment!r}, which timm does not understand ({error}). Expected for "
            "instance rand-m9-mstd0.5-inc1, original, v0, augmix-m3-w3, or none."
        ) from error
    for operation in _operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Compose) -> Iterator[AugmentOp]:
    for step in transform.transforms:
        if isinstance(step, RandAugment | AugMixAugment):
            yield from step.ops
        elif isinstance(step, AutoAugment):
            yield from itertools.chain.from_iterable(step.policy)


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize. At its strongest it keeps no bit, which made black and which Pillow >= 13 refuses."""
    return posterize(image, bits_to_keep, **options) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def mixup(
    num_classes: int, *, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, label_smoothing: float = 0.1
) -> Mixup | None:
    """timm's Mixup for batches of even size: (images, int64 targets) -> (mixed images, (S, num_classes) soft targets).

    None where both alphas are 0. It draws from NumPy's global generator and smooths the labels itself.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return None
    return Mixup(mixup_alpha, cutmix_alpha, label_smoothing=label_smoothing, num_classes=num_classes)
