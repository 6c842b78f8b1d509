"""One way from an image file to pixels, for training, evaluation, prediction and export: what a person sees in a viewer.

The rules, which docs/images.md tells users:

1. The EXIF (or XMP) orientation is applied.
2. Transparent pixels are laid on white. Colours that are hidden below full transparency never reach the model.
3. Palettes become their colours, grey becomes R = G = B, black and white become 0 and 255.
4. 16-bit grey keeps its upper 8 bits, as 16-bit colour does: 65535 is white, whatever else the image holds.
5. CMYK, YCbCr, Lab and HSV become RGB by Pillow's formulas. Colour profiles are not applied.
6. 32-bit integers and floats are refused: such a file does not say which value is white.
7. Of several frames or pages the first is used.
8. A grey network gets the luma of the RGB pixels: 0.299 R + 0.587 G + 0.114 B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from p3b.data.formats import load_plugins
from p3b.errors import ConfigError

BACKGROUND = (255, 255, 255)
"""What transparent pixels are laid on."""
_ORIENTATION_CARRIERS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
"""Formats whose mode I is 16 bits wide: Pillow has scaled them to 0 .. 65535."""
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258
"""Tags of TIFF."""


class UnclearPixelsError(ValueError):
    """An image that can be decoded and does not say how bright its pixels are."""


def read_image(file: str | Path | BinaryIO, channels: int = 3) -> Image.Image:
    """Decode an image file and prepare it.

    Args:
        file: its path, or the file opened for reading.
        channels: of the network, 1 or 3.

    Returns:
        RGB, or L for one channel; of the size that a viewer shows.

    Raises:
        OSError, ValueError, SyntaxError and whatever else Pillow's decoders raise for a damaged file; `UnclearPixelsError`;
        ConfigError: other than 1 or 3 channels.
    """
    load_plugins()
    if isinstance(file, str | Path):
        with Path(file).open("rb") as opened:
            return prepare_image(Image.open(opened), channels)
    return prepare_image(Image.open(file), channels)


def prepare_image(image: Image.Image, channels: int = 3) -> Image.Image:
    """The pixels of an image as a person sees them. An image that has been prepared stays as it is.

    Args:
        image: of any mode. Its file must still be open if it has not been decoded yet.
        channels: of the network, 1 or 3.

    Returns:
        RGB, or L for one channel.

    Raises:
        As `read_image`.
    """
    if channels not in (1, 3):
        raise ConfigError(
            f"The network takes images of {channels} channels; pictures are prepared with 3 (RGB) or 1 (grey). Build it with "
            "in_chans=3 or in_chans=1."
        )
    image.load()
    if channels == 1 and image.mode == "L" and not image.info:
        return image
    rgb = _to_rgb(_upright(image))
    return rgb.convert("L") if channels == 1 else rgb


def holds_several_frames(image: Image.Image) -> bool:
    """Whether an opened image is animated or has pages, of which `prepare_image` uses the first.

    Layers of a Photoshop file and the previews that cameras add to a JPEG are no frames: the first is the picture.
    """
    return image.format not in ("PSD", "MPO") and bool(getattr(image, "is_animated", False))


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as the orientation tag says; a tag that cannot be read says nothing, as in viewers."""
    if not any(carrier in image.info for carrier in _ORIENTATION_CARRIERS):
        return image
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except Exception:  # damaged EXIF data raise OSError, ValueError, SyntaxError, struct.error ...
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        return _from_sixteen_bits(image)
    if image.mode.startswith(("I", "F")):
        raise UnclearPixelsError(
            f"its pixels are {'32-bit floats' if image.mode == 'F' else '32-bit integers'}, and which value is white is not "
            "said in the file; save it with 8 or 16 bits"
        )
    if image.mode in _WITH_ALPHA or "transparency" in image.info or _palette_mode(image) == "RGBA":
        return _on_background(_with_alpha(image))
    return image.convert("RGB")


def _palette_mode(image: Image.Image) -> str | None:
    return image.palette.mode if image.mode == "P" and image.palette is not None else None


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGBA")


def _on_background(image: Image.Image) -> Image.Image:
    """An RGBA image laid on the background."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow alone would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    tags: Any = getattr(image, "tag_v2", {})  # TIFF says how many bits are used, and whether 0 is white
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    grey = (values >> (min(bits, 16) - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    hidden = image.info.get("transparency")
    if hidden is None:
        return Image.fromarray(grey).convert("RGB")
    alpha = np.where(values == hidden, 0, 255).astype(np.uint8)
    return _on_background(Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))).convert("RGBA"))
