"""Name what is on images with a model that p3b saved: no training code, no pickled class.

python examples/predict.py run/pruned photo.jpg another.png
"""

import argparse
import json
from pathlib import Path

import torch
from timm.data import create_transform

import p3b
from p3b.data import read_image


def main(folder: Path, files: list[Path], top: int) -> None:
    model = p3b.load(folder)
    config = json.loads((folder / "config.json").read_text())
    prepare = create_transform(**{key: tuple(v) if isinstance(v, list) else v for key, v in config["preprocessing"].items()})
    channels, names = config["preprocessing"]["input_size"][0], config["class_names"]
    with torch.inference_mode():
        for file in files:
            image = prepare(read_image(file, channels))
            chances = model(image[None]).softmax(1)[0]
            best = chances.topk(min(top, len(names)))
            listed = ", ".join(f"{names[i]} {chance:.1%}" for chance, i in zip(best.values, best.indices, strict=True))
            print(f"{file}: {listed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--top", type=int, default=3)
    given = parser.parse_args()
    main(given.folder, given.files, given.top)
