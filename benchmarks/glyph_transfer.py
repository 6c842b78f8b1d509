"""Many classes: printed Hangul syllables, 512 of them, by a ViT that has only seen Latin letters. Does sharing by benefit pay?

    apt-get install fonts-nanum fonts-nanum-extra fonts-baekmuk fonts-unfonts-core fonts-unfonts-extra
    python benchmarks/glyph_transfer.py render             # runs/glyphs/data/*.tar: some seconds
    python benchmarks/glyph_transfer.py run --only dense   # runs that are not in the record yet; resumable
    python benchmarks/glyph_transfer.py run --pixels 16 --work runs/glyphs-16 --record glyphs_16.jsonl   # a quick look
    python benchmarks/glyph_transfer.py table              # docs/results/glyph_transfer.md from glyph_transfer.jsonl

Every fourth syllable of KS X 1001 is a class. Training images are drawn with other typefaces than test images: those of Nanum
and Baekmuk against those of the Un project. Each is drawn large, moved, turned and scaled a little, and averaged down to 32
pixels. Nothing of the fonts is part of the project: images are made where the benchmark runs. The model is the one of the
demo (`p3b.data.glyphs`: 64 channels, 6 blocks, pretrained on letters of 16 pixels), whose positions are resampled to 32 pixels.

The study qualifies as one where capacity matters if uniform shares at 75 % lose at least 3 points to the dense model.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.pages import table
from harness.records import Line
from measured import DIFFERENCES, P3B, Study, difference, difference_cell, in_order, main, spread_cell
from p3b.commands.compare import plan
from p3b.errors import ConfigError, UserError
from p3b.run.options import CompareConfig
from p3b.run.series_plan import DENSE, SMALLER, Run

CLASSES, SIDE = 512, 32
EVERY = 4
"""Of the 2,350 syllables of KS X 1001, in its order, every so many-th is a class."""
TRAIN_FONTS = (
    *("NanumGothic", "NanumGothicBold", "NanumBarunGothic", "NanumBarunGothicLight", "NanumMyeongjo", "NanumMyeongjoBold"),
    *("NanumBarunpenR", "NanumPen", "NanumBrush", "NanumSquareRoundR", "NanumSquareEB", "NanumGothicEcoR"),
    *("batang", "dotum", "gulim", "hline"),
)
TEST_FONTS = ("UnBatang", "UnDotum", "UnGraphic", "UnDinaru", "UnGungseo", "UnPilgi", "UnShinmun", "UnVada")
IMAGES = {"train": 20, "test": 8}
"""Images of each class: typefaces take turns."""
_DRAWN, _CANVAS = 96, 144
"""Pixels: size of the font, and side of the image that is scaled down."""

MODEL = (
    "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=4 embed_dim=64 depth=6 num_heads=4 "
    "--model-path SHARED/glyph_vit.safetensors --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
)
SETTINGS = (
    f"--data-set FOLDER --data-path SHARED/train.tar --test-path SHARED/test.tar --val-share 0.05 --num-workers 0 {MODEL} "
    "--batch-size 32 --lr 1.6e-2 --mixup 0 --cutmix 0 --aa None --reprob 0 --no-repeated-aug --crop-scale 0.8 1.0 --hflip 0 "
    "--epochs 4 --prune-start-epoch 2 --finetune-epochs 4 --prune-benefit linear"
)
METHODS, RATIOS = ("uniform", P3B, "taylor"), (0.75, 0.9)


def syllables() -> list[str]:
    """The classes."""
    rows, columns = range(0xB0, 0xC9), range(0xA1, 0xFF)
    known = [bytes([row, column]).decode("euc_kr") for row in rows for column in columns]
    return known[::EVERY][:CLASSES]


def render(fonts: Path, out: Path) -> None:
    """Write train.tar and test.tar, images in class folders, and the weights that training starts from beside them.

    Args:
        fonts: folder that is searched for the typefaces.
        out: folder.

    Raises:
        ConfigError: typefaces are missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part, names in (("train", TRAIN_FONTS), ("test", TEST_FONTS)):
        faces = [ImageFont.truetype(file, _DRAWN) for file in find_fonts(fonts, names)]
        generator = np.random.default_rng(len(part))
        with tarfile.open(out / f"{part}.tar", "w") as tar:
            for number, syllable in enumerate(syllables()):
                for image in range(IMAGES[part]):
                    drawn = draw_syllable(syllable, faces[(number + image) % len(faces)], generator)
                    _add(tar, f"{part}/U{ord(syllable):04X}/{image:02}.png", drawn)
    import p3b.data.glyphs

    weights = Path(p3b.data.glyphs.__file__).with_name("glyph_vit.safetensors")
    (out / weights.name).write_bytes(weights.read_bytes())


def find_fonts(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of typefaces, by name.

    Raises:
        ConfigError: some are not there.
    """
    there = {file.stem: file for file in sorted(folder.rglob("*.ttf"))}
    if missing := [name for name in names if name not in there]:
        raise ConfigError(
            f"{folder} has no typeface {', '.join(missing)}. Debian has them: apt-get install fonts-nanum fonts-nanum-extra "
            "fonts-baekmuk fonts-unfonts-core fonts-unfonts-extra; --fonts names another folder."
        )
    return [there[name] for name in names]


def draw_syllable(syllable: str, font: ImageFont.FreeTypeFont, generator: np.random.Generator) -> Image.Image:
    """One image: bright on dark, the syllable cut to its bounding box, then scaled, turned and moved at random."""
    canvas = Image.new("L", (3 * _DRAWN, 3 * _DRAWN))
    ImageDraw.Draw(canvas).text((_DRAWN, _DRAWN), syllable, fill=255, font=font)
    glyph = canvas.crop(canvas.getbbox())
    scale = generator.uniform(0.68, 0.88) * _CANVAS / max(glyph.size)
    stretch = np.exp(generator.uniform(-0.08, 0.08))
    size = (max(1, round(glyph.width * scale * stretch)), max(1, round(glyph.height * scale / stretch)))
    glyph = glyph.resize(size).rotate(generator.uniform(-6, 6), Image.Resampling.BILINEAR, expand=True)
    image = Image.new("L", (_CANVAS, _CANVAS))
    shift = generator.uniform(-0.05, 0.05, size=2) * _CANVAS
    image.paste(glyph, tuple(int((_CANVAS - side) / 2 + by) for side, by in zip(glyph.size, shift, strict=True)))
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noisy = small * generator.uniform(0.75, 1.0) + generator.normal(0, generator.uniform(0, 12), size=small.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def _add(tar: tarfile.TarFile, name: str, image: Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, format="PNG")
    member = tarfile.TarInfo(name)
    member.size = file.tell()
    file.seek(0)
    tar.addfile(member, file)


def runs(config: CompareConfig) -> list[Run]:
    """All runs in their order."""
    return plan(replace(config, compare=replace(config.compare, methods=METHODS, prune_ratios=RATIOS, smaller=True)))


def tables(lines: Sequence[Line]) -> list[str]:
    """Top-1 of every row at every size."""
    text = []
    for ratio in RATIOS:
        found = [line for line in in_order(runs, lines) if line["ratio"] in (ratio, None)]
        rows = {row: [line for line in found if line["row"] == row] for row in (DENSE, SMALLER, *METHODS)}
        cells = [
            [row, spread_cell(there), difference_cell(difference(there, rows[P3B])) if row != P3B else ""]
            for row, there in rows.items()
            if there
        ]
        text += table([f"{ratio:.0%} of the parameters pruned", "top-1 (%)", "vs. P3B (points)"], cells)
    return [*text, DIFFERENCES, ""]


STUDY = Study("glyph_transfer", __doc__ or "", runs, tables)


def command(arguments: Sequence[str]) -> int:
    """The command line: `render` here, the rest by the machinery of the studies, in whose eyes the folder is the shared one."""
    if list(arguments[:1]) != ["render"]:
        sides = argparse.ArgumentParser(add_help=False)
        sides.add_argument("--pixels", type=int, default=SIDE)
        given, rest = sides.parse_known_args(arguments)
        flags = SETTINGS.replace(f"img_size={SIDE}", f"img_size={given.pixels}")
        return main(STUDY, ["--shared", "runs/glyphs", "--work", "runs/glyph-transfer", *rest], flags=flags)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("render",))
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder of the typefaces")
    parser.add_argument("--out", type=Path, default=Path("runs/glyphs/data"), help="folder for the images")
    given = parser.parse_args(arguments)
    try:
        render(given.fonts, given.out)
    except UserError as error:
        print(f"glyph_transfer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
