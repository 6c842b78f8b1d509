"""Pretrain the demo's small ViT on printed letters and write the weights that travel with the package.

    python scripts/pretrain_glyphs.py

takes a few minutes on two CPU cores and writes `glyph_vit.safetensors` and `glyph_vit.json` into `src/p3b/data`.
Every training image is rendered for one step and never comes back, so there are no epochs and nothing to memorise;
accuracy is measured on renders of another seed. The same seed on the same machine, with the same number of threads and
the same versions, gives the same weights to the last bit.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
import timm
import torch
import tyro
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from p3b.data.glyphs import CLASS_NAMES, render_glyphs

SIZE = 16
MODEL_NAME = "vit_tiny_patch16_224"
MODEL_KWARGS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "num_classes": len(CLASS_NAMES),
}
MEAN, STD = 0.5, 0.5
HELD_OUT_IMAGES = 4100
DEMO_FOLDER = Path(__file__).resolve().parents[1] / "src" / "p3b" / "data"


def main(
    seed: int = 0,
    steps: int = 2400,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    threads: int = 2,
    out: Path = DEMO_FOLDER,
) -> None:
    """Pretrain the demo's ViT on rendered letters.

    Args:
        seed: of the weights and of the renders; held-out images are rendered with seed + 1.
        steps: optimizer steps, each on fresh images.
        batch_size: images a step.
        learning_rate: the highest; a linear warm-up over a tenth of the steps leads there, a cosine leads to 0.
        threads: CPU threads; part of what makes a run reproducible.
        out: folder for the two files.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    started = time.monotonic()

    model = timm.create_model(MODEL_NAME, **MODEL_KWARGS)
    train(model, seed, steps, batch_size, learning_rate)
    accuracy = held_out_accuracy(model, seed + 1)
    seconds = time.monotonic() - started
    print(f"top-1 on {HELD_OUT_IMAGES} fresh renders: {accuracy:.4f} after {steps} steps, {seconds:.0f} s")

    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "glyph_vit.safetensors")
    description = {
        "timm_model": MODEL_NAME,
        "model_kwargs": MODEL_KWARGS,
        "params": sum(p.numel() for p in model.parameters()),
        "classes": CLASS_NAMES,
        "normalization": {"mean": [MEAN] * 3, "std": [STD] * 3},
        "trained_on": f"{steps * batch_size} letters rendered by p3b.data.glyphs, grey repeated to RGB, each seen once",
        "training": {"optimizer": "adamw", "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate},
        "seed": seed,
        "command": shlex.join(["python", "scripts/pretrain_glyphs.py", *sys.argv[1:]]),
        "top1_on_fresh_renders": round(accuracy, 4),
        "fresh_renders": {"images": HELD_OUT_IMAGES, "seed": seed + 1},
        "wall_time_s": round(seconds),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "timm": timm.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "matplotlib": matplotlib.__version__,
        },
    }
    (out / "glyph_vit.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def train(model: nn.Module, seed: int, steps: int, batch_size: int, learning_rate: float) -> None:
    """One pass over fresh renders with AdamW, warm-up and cosine; the model is changed in place."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=learning_rate, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=learning_rate / 100, t_in_epochs=False
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    images_GSS, labels_G = render_glyphs(steps * batch_size, seed, SIZE)
    model.train()
    scheduler.step_update(0)
    for step in range(steps):
        batch = slice(step * batch_size, (step + 1) * batch_size)
        loss = criterion(model(network_input(images_GSS[batch])), torch.from_numpy(labels_G[batch]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(step + 1)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)


def held_out_accuracy(model: nn.Module, seed: int) -> float:
    """Share of fresh renders that the model names rightly, 0..1."""
    images_GSS, labels_G = render_glyphs(HELD_OUT_IMAGES, seed, SIZE)
    model.eval()
    with torch.inference_mode():
        predicted_G = model(network_input(images_GSS)).argmax(dim=1)
    return float((predicted_G == torch.from_numpy(labels_G)).double().mean())


def network_input(images_GSS: NDArray[np.uint8]) -> Tensor:
    """Grey bytes (G, S, S) to normalised RGB floats (G, 3, S, S)."""
    grey_GSS = (torch.from_numpy(images_GSS).float() / 255 - MEAN) / STD
    return grey_GSS.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


if __name__ == "__main__":
    tyro.cli(main)
