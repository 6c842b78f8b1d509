"""Options: how training images are changed at random."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation of training images."""

    aa: str | None = "rand-m9-mstd0.5-inc1"
    """Auto-augment policy in timm's notation; None is off."""
    color_jitter: float = 0.3
    """Colour jitter, where no auto-augment policy is set."""
    reprob: float = 0.25
    """Random erasing probability."""
    remode: str = "pixel"
    """Random erasing mode: const, rand or pixel."""
    recount: int = 1
    """Rectangles erased at most."""
    train_interpolation: str = "bicubic"
    """Interpolation of random resizes: bilinear, bicubic or random."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of random crops as a share of the image."""
    hflip: float = 0.5
    """Probability of a horizontal flip; 0 for text and digits."""
    repeated_aug: bool = True
    """Show every chosen image three times an epoch, each time changed anew."""
    augment: bool = True
    """Off: no random change at all, images are resized as in evaluation."""
