"""A transfer to many classes: a ViT that learned Chinese characters is moved to 512 printed Hangul syllables.

    apt-get install fonts-nanum fonts-nanum-extra fonts-baekmuk fonts-unfonts-core fonts-unfonts-extra fonts-noto-cjk-extra \\
        fonts-arphic-ukai fonts-arphic-uming fonts-wqy-zenhei fonts-wqy-microhei fonts-ipafont fonts-vlgothic
    python benchmarks/glyph_images.py render      # runs/glyphs/data/*.tar: a minute
    python benchmarks/glyph_images.py pretrain    # runs/glyphs/data/source_glyphs.safetensors: half an hour of one core

`equal_time.py --transfer syllables` trains on them. Every fourth syllable of KS X 1001 is a class; 20 images of each are for
training, drawn with the typefaces of Nanum and Baekmuk, 8 for testing, with those of the Un project. The source task has 128
characters that both JIS X 0208 and GB 2312 have, in 14 typefaces of neither. Each image is drawn large, moved, turned and
scaled a little, and averaged down to 32 pixels. Nothing of the fonts is part of the project: images are made where it runs.
"""

from __future__ import annotations

import argparse
import io
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from p3b.commands.command_line import main as p3b
from p3b.errors import ConfigError, UserError
from p3b.run.products import PRODUCTS
from p3b.storage.files import write_atomically

CLASSES, SIDE, EVERY = 512, 32, 4
"""Syllables, pixels of an image, and of the 2,350 syllables of KS X 1001, in its order, every so many-th is a class."""
SOURCE_CLASSES = 128
WEIGHTS = "source_glyphs.safetensors"
_DRAWN, _CANVAS = 96, 144
"""Pixels: size of the font, and side of the image that is scaled down."""
MODEL = (
    "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 embed_dim=128 num_heads=4 "
    "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
)
AUGMENTATION = "--mixup 0 --cutmix 0 --aa None --reprob 0 --no-repeated-aug --crop-scale 0.8 1.0 --hflip 0"
PRETRAINING = (
    f"--data-set FOLDER --num-workers 0 --val-share 0.02 --from-scratch --recipe paper {MODEL} {AUGMENTATION} --precision fp32 "
    "--batch-size 64 --lr 8e-3 --epochs 12 --warmup-epochs 1 --drop-path 0 --smoothing 0 --clip-grad 1 --no-report"
)
"""Of `p3b train`, for the source task."""

TRAIN_FONTS = (
    *("NanumGothic", "NanumGothicBold", "NanumBarunGothic", "NanumBarunGothicLight", "NanumMyeongjo", "NanumMyeongjoBold"),
    *("NanumBarunpenR", "NanumPen", "NanumBrush", "NanumSquareRoundR", "NanumSquareEB", "NanumGothicEcoR"),
    *("batang", "dotum", "gulim", "hline"),
)
TEST_FONTS = ("UnBatang", "UnDotum", "UnGraphic", "UnDinaru", "UnGungseo", "UnPilgi", "UnShinmun", "UnVada")
SOURCE_FONTS = (
    *("NotoSansCJK-Light", "NotoSansCJK-Medium", "NotoSansCJK-Bold", "NotoSansCJK-Black", "NotoSerifCJK-Light"),
    *("NotoSerifCJK-Medium", "NotoSerifCJK-Black", "ukai", "uming", "wqy-microhei", "wqy-zenhei", "ipag", "ipam"),
    "VL-Gothic-Regular",
)


def syllables() -> list[str]:
    """The classes of the transfer."""
    return _characters(range(0xB0, 0xC9), "euc_kr")[::EVERY][:CLASSES]


def source_characters() -> list[str]:
    """The classes that the model is pretrained on: common kanji of JIS X 0208 that are simplified Chinese as well."""
    both = [character for character in _characters(range(0xB0, 0xD0), "euc_jp") if _has("gb2312", character)]
    return both[:: len(both) // SOURCE_CLASSES][:SOURCE_CLASSES]


def _characters(rows: range, encoding: str) -> list[str]:
    codes = (bytes([row, column]) for row in rows for column in range(0xA1, 0xFF))
    return [character for code in codes if (character := code.decode(encoding, errors="ignore"))]


def _has(encoding: str, character: str) -> bool:
    return bool(character.encode(encoding, errors="ignore"))


@dataclass(frozen=True)
class Part:
    """Images of one tar.

    Attributes:
        characters: its classes.
        fonts: names of its typefaces, which take turns.
        images: of each class.
    """

    characters: Sequence[str]
    fonts: Sequence[str]
    images: int


def parts() -> Mapping[str, Part]:
    """By the name of the tar."""
    return {
        "source-train": Part(source_characters(), SOURCE_FONTS, 120),
        "source-test": Part(source_characters(), SOURCE_FONTS, 3),
        "train": Part(syllables(), TRAIN_FONTS, 20),
        "test": Part(syllables(), TEST_FONTS, 8),
    }


def render(fonts: Path, out: Path) -> None:
    """Write all tars, images in class folders.

    Args:
        fonts: folder that is searched for the typefaces.
        out: folder.

    Raises:
        ConfigError: typefaces are missing.
    """
    faces = {name: find_fonts(fonts, part.fonts) for name, part in parts().items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts().items():
        generator = np.random.default_rng(len(name))
        with tarfile.open(out / f"{name}.tar", "w") as tar:
            for member, drawn in _images(part, [ImageFont.truetype(file, _DRAWN) for file in faces[name]], generator):
                _add(tar, f"{name}/{member}", drawn)


def _images(
    part: Part, faces: Sequence[ImageFont.FreeTypeFont], generator: np.random.Generator
) -> Iterator[tuple[str, Image.Image]]:
    for number, character in enumerate(part.characters):
        for image in range(part.images):
            drawn = draw_character(character, faces[(number + image) % len(faces)], generator)
            yield f"U{ord(character):04X}/{image:03}.png", drawn


def find_fonts(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of typefaces, by name.

    Raises:
        ConfigError: some are not there.
    """
    there = {file.stem: file for ending in ("otf", "ttc", "ttf") for file in sorted(folder.rglob(f"*.{ending}"))}
    if missing := [name for name in names if name not in there]:
        raise ConfigError(
            f"{folder} has no typeface {', '.join(missing)}. Debian has them: apt-get install fonts-nanum fonts-nanum-extra "
            "fonts-baekmuk fonts-unfonts-core fonts-unfonts-extra fonts-noto-cjk-extra fonts-arphic-ukai fonts-arphic-uming "
            "fonts-wqy-zenhei fonts-wqy-microhei fonts-ipafont fonts-vlgothic; --fonts names another folder."
        )
    return [there[name] for name in names]


def draw_character(character: str, font: ImageFont.FreeTypeFont, generator: np.random.Generator) -> Image.Image:
    """One image: bright on dark, the character cut to its bounding box, then scaled, turned and moved at random."""
    canvas = Image.new("L", (3 * _DRAWN, 3 * _DRAWN))
    ImageDraw.Draw(canvas).text((_DRAWN, _DRAWN), character, fill=255, font=font)
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


def pretrain(data: Path) -> int:
    """Train the source model on its images and put its weights beside them; a run that was stopped goes on.

    Returns:
        The exit status of `p3b train`.
    """
    run = data.with_name("pretrain")
    where = ["--data-path", str(data / "source-train.tar"), "--test-path", str(data / "source-test.tar")]
    status = p3b(["train", *shlex.split(PRETRAINING), *where, "--output-dir", str(run), "--resume"])
    if status == 0:
        write_atomically(data / WEIGHTS, partial(shutil.copyfile, run / PRODUCTS["train"] / "model.safetensors"))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 typefaces are missing or the training was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("render", "pretrain"))
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder of the typefaces")
    parser.add_argument("--out", type=Path, default=Path("runs/glyphs/data"), help="folder for the images and the weights")
    given = parser.parse_args(arguments)
    try:
        if given.action == "pretrain":
            return pretrain(given.out)
        render(given.fonts, given.out)
    except UserError as error:
        print(f"glyph_images: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
