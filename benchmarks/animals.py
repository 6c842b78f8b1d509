"""The recorded real run: a ViT trained on CIFAR-10's vehicles moves to its animals, dense and pruned by P3B.

    python benchmarks/animals.py run --work runs/animals      # about twelve minutes a run on 2 cores that do nothing else
    python benchmarks/animals.py speed --work runs/animals    # throughput of the saved models, side by side
    python benchmarks/animals.py table                        # docs/results/animals.md from the JSON lines

Each run adds one JSON line to docs/results/animals.jsonl: command, commit, seed, hardware, wall time, results; so does a
measurement of speed. The table is made from these lines alone. A run that is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from records import RESULTS, add_line, circumstances, read_lines

LINES = RESULTS / "animals.jsonl"
SEED = 0
PRUNE_EPOCHS, FINETUNE_EPOCHS, IMAGES = 6, 8, 3000

MODEL = (
    "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=4 embed_dim=128 num_heads=4 "
    "--model-path SHARED/source_vit.safetensors"
)
NORMALIZATION = "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
DATA = (
    "--data-set FOLDER --data-path SHARED/cifar10-animals-train.tar --test-path SHARED/cifar10-animals-test.tar "
    f"--val-share 0.05 --max-train-images {IMAGES}"
)
AUGMENTATION = "--mixup 0 --cutmix 0 --aa None --reprob 0 --no-repeated-aug --crop-scale 0.6 1.0"
RECIPE = f"--batch-size 64 --lr 4e-3 {AUGMENTATION}"
COMMON = f"{DATA} {MODEL} {NORMALIZATION} {RECIPE} --seed {SEED}"
PRUNE = f"--epochs {PRUNE_EPOCHS} --prune-start-epoch 1 --prune-sparse-epoch 3 --finetune-epochs {FINETUNE_EPOCHS}"
RUNS = {
    "dense": f"train --output-dir WORK/dense --epochs {PRUNE_EPOCHS + FINETUNE_EPOCHS} {COMMON}",
    "P3B, 50 % pruned": f"prune --output-dir WORK/p3b-50 --prune-ratio 0.5 {PRUNE} --dense-run WORK/dense {COMMON}",
    "P3B, 75 % pruned": f"prune --output-dir WORK/p3b-75 --prune-ratio 0.75 {PRUNE} --dense-run WORK/dense {COMMON}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "speed", "table"))
    parser.add_argument("--only", choices=sorted(RUNS), help="run this one alone")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that holds data/ with the images")
    parser.add_argument("--work", type=Path, default=Path("runs/animals"), help="folder for the run folders")
    given = parser.parse_args()
    if given.action == "run":
        for name, command in RUNS.items():
            if given.only in (None, name) and name not in {line["name"] for line in read_lines(LINES)}:
                run(name, command, given.shared / "data", given.work)
    if given.action == "speed":
        measure_speed(given.work)
    (RESULTS / "animals.md").write_text(table(read_lines(LINES)))


def run(name: str, command: str, shared: Path, work: Path) -> None:
    """Run one command and add its line."""
    words = shlex.split(command.replace("SHARED", str(shared)).replace("WORK", str(work)))
    stage, output = words[0], Path(words[words.index("--output-dir") + 1])
    subprocess.run([sys.executable, "-m", "p3b", *words, "--resume"], check=True)
    summary = json.loads((output / stage / "summary.json").read_text())
    metrics = [json.loads(line) for line in (output / stage / "metrics.jsonl").read_text().splitlines()]
    line = {
        "name": name,
        "command": f"p3b {command}",
        **circumstances(),
        "seed": SEED,
        "provenance": summary["provenance"],
        "seconds": round(sum(epoch["seconds"] for epoch in metrics), 1),
        "results": {key: summary[key] for key in ("model", "dense", "pruned", "accuracy") if key in summary},
    }
    add_line(LINES, json.loads(json.dumps(line).replace(str(shared), "SHARED")))  # where the images lay is nobody's business
    for figure in summary.get("figures", []):
        shutil.copy(figure, RESULTS / f"animals-{output.name}-{Path(figure).name}")


def measure_speed(work: Path) -> None:
    """Images per second of the saved models, taking turns in one run, at batch 1 and 32; adds a line for each batch size."""
    import torch

    import p3b
    from p3b.deploy.speed import images_per_second

    folders = {"dense": "dense/dense", "P3B, 50 % pruned": "p3b-50/pruned", "P3B, 75 % pruned": "p3b-75/pruned"}
    models = [p3b.load(work / folder) for folder in folders.values()]
    for batch_size in (1, 32):
        speeds = images_per_second(models, (3, 32, 32), batch_size=batch_size, device=torch.device("cpu"), rounds=15)
        add_line(
            LINES,
            {
                "name": "speed",
                "command": "python benchmarks/animals.py speed",
                **circumstances(),
                "batch_size": batch_size,
                "precision": "float32",
                "threads": torch.get_num_threads(),
                "images_per_second": dict(zip(folders, speeds, strict=True)),
            },
        )


def table(lines: list[dict[str, Any]]) -> str:
    """The page of results, made from the lines."""
    runs = sorted((line for line in lines if line["name"] in RUNS), key=lambda line: list(RUNS).index(line["name"]))
    speeds = {line["batch_size"]: line["images_per_second"] for line in lines if line["name"] == "speed"}
    columns = ["model", "parameters", "of dense", "MACs (M)", "of dense", "test top-1 (%)"]
    columns += [f"images/s, batch {size}" for size in speeds]
    epochs = PRUNE_EPOCHS + FINETUNE_EPOCHS
    text = [
        "# Vehicles to animals: a recorded run",
        "",
        "Generated by `python benchmarks/animals.py table` from `animals.jsonl`; do not edit.",
        "",
        "`source_vit`, a ViT of 12 blocks and width 128 that was trained on CIFAR-10's vehicles, moves to its six animals:",
        f"{IMAGES:,} training images, 1,500 for",
        f"validation (they choose the epoch), and all 6,000 test images for the figures below. {epochs} epochs for each row; a",
        f"pruned row spends {PRUNE_EPOCHS} of them pruning and {FINETUNE_EPOCHS} fine-tuning the small model. One seed: with",
        "6,000 test images the standard error of a top-1 figure is about 0.6 points, and the spread over seeds is not in it.",
        "Throughput is that of all models in one run, taking turns, in PyTorch eager on the CPU.",
        "",
        f"| {' | '.join(columns)} |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    dense = next((line["results"]["model"] for line in runs if line["name"] == "dense"), None)
    for line in runs:
        figures = line["results"].get("pruned") or line["results"]["model"]
        shares = [f"{figures[key] / dense[key]:.1%}" if dense else "-" for key in ("params", "macs")]
        cells = [f"{figures['params']:,}", shares[0], f"{figures['macs'] / 1e6:.1f}", shares[1], f"{figures['top1']:.2f}"]
        cells += [f"{speed[line['name']]:,.0f} (x {speed[line['name']] / speed['dense']:.2f})" for speed in speeds.values()]
        text.append(f"| {line['name']} | " + " | ".join(cells) + " |")
    text += ["", "The commands (SHARED is the folder with the images, WORK one for the runs):", ""]
    text += [f"    {line['command']}" for line in runs]
    text.append("")
    for line in runs:
        hardware, provenance, versions = line["hardware"], line["provenance"], line["provenance"]["versions"]
        text.append(
            f"- {line['name']}: commit {line['commit'][:12]}, seed {line['seed']}, {line['seconds'] / 60:.0f} minutes on "
            f"{hardware['cores']} cores {hardware['machine']} that did other work too, {provenance['precision']} autocast, "
            f"torch {versions['torch']}, timm {versions['timm']}"
        )
    for figure in sorted(path.name for path in RESULTS.glob("animals-*.png")):
        text += ["", f"![{figure.removesuffix('.png').replace('-', ' ')}]({figure})"]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
