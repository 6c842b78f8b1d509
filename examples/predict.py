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
    if config["preprocessing"] is None:
        raise SystemExit(
            f"{folder} does not say how its images are prepared. Save it with what it was trained with:\n"
            "    p3b.save(model, folder, preprocessing={'input_size': [3, 224, 224], 'mean': [...], 'std': [...], ...})"
        )
    prepare = create_transform(**{key: tuple(v) if isinstance(v, list) else v for key, v in config["preprocessing"].items()})
    channels, classes = config["preprocessing"]["input_size"][0], config["class_names"]
    names = classes or [f"class {number}" for number in range(model.num_classes)]
    with torch.inference_mode():
        for file in files:
            image = prepare(read_image(file, channels)).to(next(model.parameters()).dtype)  # a model may be saved in half
            chances = model(image[None]).float().softmax(1)[0]
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
