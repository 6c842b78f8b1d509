"""Images of random format, mode, orientation and transparency: the model gets what a person sees, or is told why not.

Each case begins with the pixels that a person is to see or that follow from the stored ones by arithmetic, done here in numpy
alone. A file is made of them, put into class folders, opened as a data set, and compared with what comes out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features

from p3b.data import Preprocessing, eval_batches, open_data, prepare_image
from p3b.errors import UserError

Pixels = NDArray[np.uint8]

EXACT, LOSSY = 1.5, 14.0
"""Grey levels that a pixel may be off after a lossless format, and the mean over pixels after a lossy one."""
REFUSED = None
"""In place of pixels: nobody can say how this file looks, so it has to be refused."""


@dataclass(frozen=True)
class Drawn:
    """An image to store and what is to be seen of it.

    Attributes:
        image: as Pillow is to save it.
        seen: (H, W, 3) what a person sees, before any orientation; None where it must be refused.
        options: of `Image.save`.
    """

    image: Image.Image
    seen: Pixels | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A file format: its name in Pillow, usual endings, the kinds of pixels that it stores, and what else it can carry."""

    name: str
    endings: tuple[str, ...]
    kinds: tuple[str, ...]
    lossy: bool = False
    exif: bool = False
    frames: bool = False
    options: tuple[tuple[str, Any], ...] = ()


_PNG = (
    "rgb",
    "grey",
    "bits",
    "palette",
    "alpha",
    "grey alpha",
    "16 bits",
    "colour key",
    "grey key",
    "16-bit key",
    "palette alpha",
)
_TIFF = ("rgb", "grey", "bits", "palette", "alpha", "16 bits", "cmyk", "float", "integers")
_LOSSLESS_WEBP = (("lossless", True), ("exact", True))
FORMATS = (
    Format("PNG", (".png", ".PNG"), _PNG, exif=True, frames=True),
    Format("TIFF", (".tif", ".TIFF"), _TIFF, exif=True, frames=True),
    Format(
        "JPEG", (".jpg", ".JPG", ".jfif", ".jpe"), ("rgb", "grey", "cmyk"), lossy=True, exif=True, options=(("quality", 97),)
    ),
    Format("WEBP", (".webp",), ("rgb", "alpha"), exif=True, frames=True, options=_LOSSLESS_WEBP),
    Format("GIF", (".gif",), ("palette", "grey", "palette key"), frames=True),
    Format("BMP", (".bmp", ".dib"), ("rgb", "grey", "palette", "bits")),
    Format("TGA", (".tga",), ("rgb", "grey", "alpha", "palette")),
    Format("PPM", (".ppm", ".pgm", ".pnm"), ("rgb", "grey", "16 bits")),
    Format("JPEG2000", (".jp2", ".j2k"), ("rgb", "grey", "alpha", "16 bits")),
    Format("PCX", (".pcx",), ("rgb", "grey", "palette", "bits")),
    Format("SGI", (".sgi", ".rgb"), ("rgb", "grey")),
    Format("QOI", (".qoi",), ("rgb", "alpha")),
    Format("AVIF", (".avif",), ("rgb",), lossy=True, options=(("quality", 95),)),
)
"""What is tried; AVIF where this Pillow has it."""


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """Try so many images; one dict each.

    Args:
        count: images; every format comes up in turn.
        seed: the same seed draws the same images.
        work: an empty folder for the files.
    """
    torch.set_num_threads(1)
    known = [entry for entry in FORMATS if entry.name != "AVIF" or features.check("avif")]
    for number in range(count):
        yield try_image(known[number % len(known)], random.Random(f"{seed}/{number}"), work / str(number))


def try_image(entry: Format, draw: random.Random, folder: Path) -> dict[str, Any]:
    """Make one file, open it as a data set and compare."""
    kind, side = draw.choice(entry.kinds), draw.choice((16, 24))
    square = draw.random() < 0.5
    drawn = KINDS[kind](np.random.default_rng(draw.getrandbits(32)), side, side if square else side + 8, entry.lossy)
    orientation = draw.randint(1, 8) if entry.exif else 1
    frames = entry.frames and draw.random() < 0.3 and kind in ("rgb", "palette")
    ending, channels = draw.choice(entry.endings), draw.choice((1, 3))
    told = f"{entry.name} {kind}{f', turned {orientation}' if orientation > 1 else ''}{', frames' if frames else ''}"
    case = {"part": "images", "case": f"{told}, {channels} channels", "kind": f"{entry.name} {kind}", "ok": True, "detail": ""}
    try:
        file = folder / "a" / f"x{ending}"
        _write(file, entry, drawn, orientation, frames)
        Image.new("RGB", drawn.image.size).save(_made(folder / "b" / "y.png"))
        case["detail"] = _difference(folder, drawn, orientation, channels, entry.lossy, frames)
        case["ok"] = not case["detail"]
    except UserError as error:
        case["ok"], case["detail"] = drawn.seen is REFUSED and "white" in str(error), f"refused: {error}"
    except Exception as error:
        case["ok"], case["detail"] = False, f"{type(error).__name__}: {error}"
    return case


def _difference(folder: Path, drawn: Drawn, orientation: int, channels: int, lossy: bool, frames: bool) -> str:
    """What is wrong with what comes out; "" where nothing is."""
    splits = open_data("FOLDER", folder, val_share=0.0)
    if frames and "frames" not in splits.description:
        return f"several frames, and not a word: {splits.description}"
    image, label = splits.train[0]
    if label != 0 or len(splits.train) != 2:
        return f"label {label} of {len(splits.train)} images"
    if drawn.seen is REFUSED:
        return "it should have been refused"
    expected = turned(drawn.seen, orientation).astype(float)
    if channels == 1:
        expected = (expected @ (0.299, 0.587, 0.114))[..., None]
    got = np.asarray(prepare_image(image, channels), dtype=float).reshape(*image.size[::-1], -1)
    if got.shape != expected.shape:
        return f"shape {got.shape}, a person sees {expected.shape}"
    if (problem := _too_far(got, expected, lossy)) or expected.shape[0] != expected.shape[1]:
        return problem
    size = (channels, *expected.shape[:2])
    preprocessing = Preprocessing(size, (0.0,) * channels, (1.0,) * channels, interpolation="nearest", crop_pct=1.0)
    batches = eval_batches(splits.train, preprocessing, batch_size=1, num_workers=0, device=torch.device("cpu"))
    tensor = next(iter(batches))[0][0].permute(1, 2, 0).double().numpy() * 255
    return _too_far(tensor, expected, lossy)


def _too_far(got: NDArray[Any], expected: NDArray[Any], lossy: bool) -> str:
    off = np.abs(got - expected)
    figure = off.mean() if lossy else off.max()
    return "" if figure <= (LOSSY if lossy else EXACT) else f"off by {figure:.1f} grey levels"


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """What a viewer shows of stored pixels under an EXIF orientation of 1 to 8 (the EXIF standard's table, in numpy)."""
    ways: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p[::-1].swapaxes(0, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: p[:, ::-1].swapaxes(0, 1),
    }
    return ways[orientation](pixels)


def _write(file: Path, entry: Format, drawn: Drawn, orientation: int, frames: bool) -> None:
    options = {**dict(entry.options), **drawn.options}
    if orientation > 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if frames:
        options |= {"save_all": True, "append_images": [Image.eval(drawn.image, lambda value: 255 - value)]}
    drawn.image.save(_made(file), entry.name, **options)


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


# --- kinds of pixels --------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, height: int, width: int, smooth: bool, channels: int = 3) -> Pixels:
    """Random pixels; smooth ones, with no symmetry, for formats that lose detail."""
    if not smooth:
        return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    down, right = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    low, by_row, by_column = rng.uniform(0, 60, channels), rng.uniform(60, 120, channels), rng.uniform(10, 50, channels)
    return (low + by_row * down + by_column * right).astype(np.uint8)


def _on_white(colour: NDArray[Any], alpha: NDArray[Any]) -> Pixels:
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def _grey_to_rgb(grey: NDArray[Any]) -> Pixels:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _rgb(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    pixels = _noise(rng, height, width, smooth)
    return Drawn(Image.fromarray(pixels), pixels, {})


def _grey(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    pixels = _noise(rng, height, width, smooth, 1)[..., 0]
    return Drawn(Image.fromarray(pixels), _grey_to_rgb(pixels), {})


def _bits(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    pixels = rng.random((height, width)) < 0.5
    return Drawn(Image.fromarray(pixels), _grey_to_rgb(255 * pixels), {})


def _palette(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    colours, numbers = rng.integers(0, 256, (200, 3), dtype=np.uint8), rng.integers(0, 200, (height, width), dtype=np.uint8)
    image = Image.fromarray(numbers)
    image.putpalette(colours.tobytes())
    return Drawn(image, colours[numbers], {})


def _palette_key(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    drawn = _palette(rng, height, width, smooth)
    numbers, key = np.asarray(drawn.image), 7
    assert drawn.seen is not None
    return Drawn(drawn.image, np.where((numbers == key)[..., None], np.uint8(255), drawn.seen), {"transparency": key})


def _palette_alpha(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    drawn = _palette(rng, height, width, smooth)
    alphas = rng.integers(0, 256, 200, dtype=np.uint8)
    assert drawn.seen is not None
    return Drawn(drawn.image, _on_white(drawn.seen, alphas[np.asarray(drawn.image)]), {"transparency": alphas.tobytes()})


def _alpha(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    pixels = _noise(rng, height, width, smooth, 4)
    pixels[: height // 4, :, 3] = 0  # colours that are hidden altogether
    return Drawn(Image.fromarray(pixels), _on_white(pixels[..., :3], pixels[..., 3]), {})


def _grey_alpha(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    pixels = _noise(rng, height, width, smooth, 2)
    return Drawn(Image.fromarray(pixels), _on_white(_grey_to_rgb(pixels[..., 0]), pixels[..., 1]), {})


def _sixteen(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    values = rng.integers(0, rng.choice((200, 5_000, 65_536)), (height, width)).astype(np.uint16)
    return Drawn(Image.fromarray(values), _grey_to_rgb(values / 65_535 * 255), {})


def _sixteen_key(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    values = rng.integers(0, 65_536, (height, width)).astype(np.uint16)
    key = int(values[2, 3])
    seen = np.where((values == key)[..., None], np.uint8(255), _grey_to_rgb(values / 65_535 * 255))
    return Drawn(Image.fromarray(values), seen, {"transparency": key})


def _colour_key(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    pixels = _noise(rng, height, width, smooth)
    pixels[2:6, 3:9] = pixels[0, 0]
    hidden = (pixels == pixels[0, 0]).all(axis=2, keepdims=True)
    return Drawn(
        Image.fromarray(pixels), np.where(hidden, np.uint8(255), pixels), {"transparency": tuple(pixels[0, 0].tolist())}
    )


def _grey_key(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    pixels = _noise(rng, height, width, smooth, 1)[..., 0]
    key = int(pixels[2, 3])
    return Drawn(Image.fromarray(pixels), _grey_to_rgb(np.where(pixels == key, 255, pixels)), {"transparency": key})


def _cmyk(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    inks = _noise(rng, height, width, smooth, 4)
    colour, black = 255.0 - inks[..., :3], 255.0 - inks[..., 3:]
    return Drawn(Image.fromarray(inks, "CMYK"), np.rint(colour * black / 255).astype(np.uint8), {})


def _float(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    return Drawn(Image.fromarray(rng.random((height, width)).astype(np.float32)), REFUSED, {})


def _integers(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Drawn:
    return Drawn(Image.fromarray(rng.integers(0, 100_000, (height, width)).astype(np.int32)), REFUSED, {})


KINDS: dict[str, Callable[[np.random.Generator, int, int, bool], Drawn]] = {
    "rgb": _rgb,
    "grey": _grey,
    "bits": _bits,
    "palette": _palette,
    "palette key": _palette_key,
    "palette alpha": _palette_alpha,
    "alpha": _alpha,
    "grey alpha": _grey_alpha,
    "16 bits": _sixteen,
    "16-bit key": _sixteen_key,
    "colour key": _colour_key,
    "grey key": _grey_key,
    "cmyk": _cmyk,
    "float": _float,
    "integers": _integers,
}
