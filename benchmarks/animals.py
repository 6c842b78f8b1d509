"""What does a whole run on real images give: a ViT trained on CIFAR-10's vehicles, moved to its animals, dense and pruned?

    python benchmarks/animals.py table      # the part of docs/results/animals.md made from the JSON lines

The runs are those of the commands on the page; each line of docs/results/animals.jsonl is one of them, or the throughput of
the three models in turns. What follows here is the recipe, which the other studies on these images share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from harness.pages import Part, folded, how_it_was_run, table
from harness.records import RESULTS, Line

MODEL = (
    "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=4 embed_dim=128 num_heads=4 "
    "--model-path SHARED/source_vit.safetensors"
)
NORMALIZATION = "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
AUGMENTATION = "--mixup 0 --cutmix 0 --aa None --reprob 0 --no-repeated-aug --crop-scale 0.6 1.0"
RECIPE = f"--batch-size 64 --lr 4e-3 {AUGMENTATION}"
TARS = "--data-path SHARED/cifar10-animals-train.tar --test-path SHARED/cifar10-animals-test.tar"
"""SHARED is the folder with the images and the weights."""


def tables(lines: Sequence[Line]) -> list[str]:
    """The results, and folded how they came about; made from the lines alone."""
    runs = sorted((line for line in lines if line["name"] != "speed"), key=lambda line: (line["name"] != "dense", line["name"]))
    speeds = {line["batch_size"]: line["images_per_second"] for line in lines if line["name"] == "speed"}
    head = ["model", "parameters", "of dense", "MACs (M)", "of dense", "test top-1 (%)"]
    head += [f"images/s, batch {size}" for size in speeds]
    rows = list(_rows(runs, list(speeds.values())))
    precision = [f"seed {line['seed']}, {line['provenance']['precision']} autocast" for line in runs]
    versions = [{**line, "versions": line["provenance"]["versions"]} for line in runs]
    figures = sorted(path.name for path in RESULTS.glob("animals-*.png"))
    drawn = [f"![{figure.removesuffix('.png').replace('-', ' ')}]({figure})\n" for figure in figures]
    return [
        *table(head, rows),
        *how_it_was_run(versions, *precision),
        *folded("Benefit and keep ratio of each block, epoch by epoch", drawn),
    ]


def _rows(runs: Sequence[Line], speeds: Sequence[Line]) -> Iterator[list[str]]:
    dense = next(line["results"]["model"] for line in runs if line["name"] == "dense")
    for line in runs:
        figures = line["results"].get("pruned") or line["results"]["model"]
        params, macs = (f"{figures[key] / dense[key]:.1%}" for key in ("params", "macs"))
        cells = [f"{figures['params']:,}", params, f"{figures['macs'] / 1e6:.1f}", macs, f"{figures['top1']:.2f}"]
        cells += [f"{speed[line['name']]:,.0f} (x {speed[line['name']] / speed['dense']:.2f})" for speed in speeds]
        yield [line["name"], *cells]


PART = Part("animals.py", RESULTS / "animals.jsonl", RESULTS / "animals.md", tables)

if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        sys.exit(__doc__)
    PART.write()
