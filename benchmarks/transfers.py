"""The transfers that models are compared on at equal processor time: what is learned, from which weights, by which recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import glyph_images
from harness.records import RESULTS
from measured import FINETUNE_EPOCHS, IMAGES, PRUNE_EPOCHS, SETTINGS


@dataclass(frozen=True)
class Transfer:
    """A source model and the images that it is moved to.

    Attributes:
        name: of the transfer.
        settings: of `p3b compare`, with SHARED for the folder of images and weights.
        classes: of the images.
        images: of the training set.
        precision: of the runs whose times count.
        shared: folder that holds data/ with images and weights.
        record: file of the JSON lines.
    """

    name: str
    settings: str
    classes: int
    images: int
    precision: str
    shared: Path
    record: Path

    @property
    def asked(self) -> list[str]:
        """Arguments of `equal_time.py` that ask for it; the animals need none."""
        return [] if self.name == USUAL else ["--transfer", self.name]

    def flags(self, pixels: int, images: int) -> str:
        """Of `p3b compare`, for images of this size, and so many of them; layouts are measured afterwards, in turns."""
        given = f"{self.settings} --layout index".replace(f"img_size={_PIXELS}", f"img_size={pixels}")
        return given.replace(f"--max-train-images {self.images}", f"--max-train-images {images}")


USUAL = "animals"
"""The transfer that is meant where none is named."""
_PIXELS = 32
_SYLLABLES = glyph_images.CLASSES * glyph_images.parts()["train"].images

TRANSFERS: Mapping[str, Transfer] = {
    transfer.name: transfer
    for transfer in (
        Transfer(USUAL, SETTINGS, 6, IMAGES, "bfloat16", Path("../shared"), RESULTS / "equal_time.jsonl"),
        Transfer(
            "syllables",
            "--data-set FOLDER --data-path SHARED/train.tar --test-path SHARED/test.tar --val-share 0.05 --num-workers 0 "
            f"--max-train-images {_SYLLABLES} {glyph_images.MODEL} --model-path SHARED/{glyph_images.WEIGHTS} "
            f"{glyph_images.AUGMENTATION} --precision fp32 --batch-size 64 --lr 8e-3 "
            # Rows have epochs of their own. Masks are updated as often in an epoch as on the animals with batches of 32.
            f"--epochs {PRUNE_EPOCHS} --finetune-epochs {FINETUNE_EPOCHS} --prune-start-epoch 1 --prune-steps-update-mask 15",
            glyph_images.CLASSES,
            _SYLLABLES,
            "float32",
            Path("runs/glyphs"),
            RESULTS / "equal_time_syllables.jsonl",
        ),
    )
}
"""By name."""
