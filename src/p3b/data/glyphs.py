"""The demo's source domain: printed letters, rendered here, so that a transfer can be shown without any download.

A small ViT is pretrained on these images (`scripts/pretrain_glyphs.py`) and then moves to scikit-learn's handwritten
digits. The source domain holds letters only: no image of a digit, printed or written, is ever seen before the transfer.
What carries over is what carries over between real domains too: strokes, corners, loops, and that a shape means the
same wherever it stands. A few letters do look like digits (O and 0, Z and 2), as neighbouring domains do.

How an image comes about: a letter is drawn with Pillow in one of the fonts that matplotlib and Pillow bundle and in one
of several stroke weights, and cut to its bounding box; then numpy samples it through a random affine map (size, aspect,
rotation, shear, shift) with a gentle wave (so that print looks a little like handwriting), averages it down to the
wanted size, blurs it, and sets contrast and noise. Strokes are bright on a dark ground, as in the handwritten digits.

Reproducibility: every random number comes from one `numpy.random.Generator`, so images depend on (num_images, seed,
size) and, where rasterisation changes, on the versions of Pillow (FreeType) and matplotlib (fonts), on nothing else.

Legend: G images, S side of an image, C side of an atlas cell, F font and stroke weight, K classes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from p3b.errors import ConfigError

CLASS_NAMES: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijmnqrty")
"""The classes: all capitals, and those small letters whose shape differs from their capital's. The others (c and C, o
and O, ... and l, which many fonts draw like I) cannot be told apart once size is random."""

_MATPLOTLIB_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
_FONT_SIZE = 96  # pixels; letters are drawn large once and sampled down
_STROKE_WIDTHS = (0, 2, 5)  # pixels added around a stroke at that size
_CELL = 64  # side of an atlas cell, pixels
_GLYPH = 48  # longer side of a letter inside its cell; the rest is a dark margin
_OVERSAMPLE = 2  # samples per pixel and axis
_CHUNK = 2048  # images at a time: bounds the memory, and does not influence the images


def render_glyphs(num_images: int, seed: int, size: int = 16) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render letters in random order, every class as often as every other (to one image).

    Args:
        num_images: how many, >= 1.
        seed: of the one random generator, >= 0; other seeds give other images.
        size: side S in pixels, >= 4.

    Returns:
        images (G, S, S) uint8, grey, bright strokes on a dark ground; labels (G,) int64, indices into `CLASS_NAMES`.

    Raises:
        ConfigError: a number outside its range.
    """
    for name, got, least in (("num_images", num_images, 1), ("seed", seed, 0), ("size", size, 4)):
        if got < least:
            raise ConfigError(f"{name} is {got}; expected an integer of at least {least}. Give a larger one.")
    generator = np.random.default_rng(seed)
    labels_G = generator.permutation(np.arange(num_images, dtype=np.int64) % len(CLASS_NAMES))
    atlas_FKCC = _atlas()
    images_GSS = np.empty((num_images, size, size), dtype=np.uint8)
    for start in range(0, num_images, _CHUNK):
        chosen = labels_G[start : start + _CHUNK]
        cells_GCC = atlas_FKCC[generator.integers(len(atlas_FKCC), size=len(chosen)), chosen]
        sampled_GSS = _sample(cells_GCC, size, generator)
        images_GSS[start : start + _CHUNK] = _expose(sampled_GSS, generator)
    return images_GSS, labels_G


@functools.cache
def _atlas() -> NDArray[np.uint8]:
    """Every letter in every font and stroke weight, centred in its cell: (F, K, C, C) uint8."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [folder / f"{name}.ttf" for name in _MATPLOTLIB_FONTS]
    fonts = [ImageFont.truetype(file, _FONT_SIZE) for file in files if file.is_file()]  # older matplotlibs have one less
    pillows_own = ImageFont.load_default(_FONT_SIZE)
    cells = [
        [_cell(letter, font, stroke_width) for letter in CLASS_NAMES]
        for font in (*fonts, pillows_own)
        for stroke_width in _STROKE_WIDTHS
    ]
    return np.array(cells, dtype=np.uint8)


def _cell(letter: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, stroke_width: int) -> NDArray[np.uint8]:
    """One letter, cut to its bounding box and centred with its longer side at `_GLYPH` pixels: (C, C) uint8."""
    canvas = Image.new("L", (3 * _FONT_SIZE, 3 * _FONT_SIZE))
    draw = ImageDraw.Draw(canvas)
    draw.text((_FONT_SIZE, _FONT_SIZE // 2), letter, fill=255, font=font, stroke_width=stroke_width)
    glyph = canvas.crop(canvas.getbbox())
    scale = _GLYPH / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    cell = Image.new("L", (_CELL, _CELL))
    corner = ((_CELL - width) // 2, (_CELL - height) // 2)
    cell.paste(glyph.resize((width, height), Image.Resampling.BOX), corner)
    return np.asarray(cell)


def _sample(cells_GCC: NDArray[np.uint8], size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """See each cell through a random affine map and a gentle wave: (G, S, S) in 0..1."""
    num = len(cells_GCC)

    def draw(low: float, high: float) -> NDArray[np.float32]:
        return generator.uniform(low, high, size=(num, 1, 1)).astype(np.float32)

    share, log_aspect, angle, shear = draw(0.65, 1.05), draw(-0.2, 0.2), draw(-0.3, 0.3), draw(-0.35, 0.35)
    shift_x, shift_y = draw(-0.1, 0.1), draw(-0.1, 0.1)
    amplitude_x, amplitude_y = draw(-0.05, 0.05), draw(-0.05, 0.05)
    phase_x, phase_y = draw(0, 2 * np.pi), draw(0, 2 * np.pi)
    waves_x, waves_y = draw(0.5, 1.5), draw(0.5, 1.5)

    # Positions in the image, -0.5..0.5, are traced back to positions in the cell: what is asked of the output, undone.
    side = size * _OVERSAMPLE
    line = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5)[None]
    x, y = line[:, None, :] - shift_x, line[:, :, None] - shift_y
    wave_x = amplitude_x * np.sin(2 * np.pi * waves_x * y + phase_x)
    wave_y = amplitude_y * np.sin(2 * np.pi * waves_y * x + phase_y)
    x, y = x + wave_x, y + wave_y
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = cosine * x + sine * y, cosine * y - sine * x
    x = x + shear * y
    column = x * np.exp(log_aspect) * (_GLYPH / share) + (_CELL - 1) / 2
    row = y * np.exp(-log_aspect) * (_GLYPH / share) + (_CELL - 1) / 2
    fine = _bilinear(cells_GCC, row, column).reshape(num, size, _OVERSAMPLE, size, _OVERSAMPLE)
    sampled_GSS: NDArray[np.float32] = fine.mean(axis=(2, 4), dtype=np.float32)
    return sampled_GSS


def _bilinear(cells_GCC: NDArray[np.uint8], row: NDArray[Any], column: NDArray[Any]) -> NDArray[np.float32]:
    """Values of each cell at fractional (row, column), in 0..1; outside a cell its dark margin goes on."""
    row, column = np.clip(row, 0, _CELL - 1.001), np.clip(column, 0, _CELL - 1.001)
    top, left = row.astype(np.int64), column.astype(np.int64)
    down, right = row - top, column - left
    flat = cells_GCC.reshape(-1)
    corner = top * _CELL + left + np.arange(len(cells_GCC))[:, None, None] * _CELL**2
    above = flat[corner] * (1 - right) + flat[corner + 1] * right
    below = flat[corner + _CELL] * (1 - right) + flat[corner + _CELL + 1] * right
    values: NDArray[np.float32] = ((above * (1 - down) + below * down) / 255).astype(np.float32)
    return values


def _expose(images_GSS: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Blur, contrast, ground and noise, as a camera would add them: (G, S, S) uint8."""
    num, size, _ = images_GSS.shape
    sigma = generator.uniform(0.2, 1.1, size=(num, 1, 1)) * size / 16  # pixels
    distance = np.arange(size)[:, None] - np.arange(size)
    kernel_GSS = np.exp(-0.5 * (distance / sigma) ** 2)
    kernel_GSS = (kernel_GSS / kernel_GSS.sum(axis=2, keepdims=True)).astype(np.float32)
    blurred_GSS = kernel_GSS @ images_GSS @ kernel_GSS.transpose(0, 2, 1)
    peak = np.maximum(blurred_GSS.max(axis=(1, 2), keepdims=True), 1e-3)
    brightness = generator.uniform(0.75, 1.0, size=(num, 1, 1))
    exponent = generator.uniform(0.6, 1.4, size=(num, 1, 1))  # < 1 makes strokes bolder, > 1 finer
    noise = generator.normal(0.0, 1.0, size=images_GSS.shape) * generator.uniform(0.0, 0.06, size=(num, 1, 1))
    exposed_GSS = brightness * (blurred_GSS / peak) ** exponent + noise
    bytes_GSS: NDArray[np.uint8] = np.clip(np.rint(exposed_GSS * 255), 0, 255).astype(np.uint8)
    return bytes_GSS
