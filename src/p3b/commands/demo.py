"""The demo: a small ViT that reads printed letters moves to handwritten digits and loses half its parameters on the way.

Source: letters that the project renders itself (`p3b.data.glyphs`). Target: scikit-learn's bundled digits, real scans by 43
writers (Alpaydin and Kaynak, 1998). A dense transfer with the same number of epochs runs beside it. Nothing is downloaded.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from p3b.commands.prune import prune
from p3b.commands.train import train
from p3b.run import options
from p3b.run.augment_options import AugmentOptions
from p3b.run.options import DemoConfig, PruneConfig, TrainConfig

PRUNE_EPOCHS, FINETUNE_EPOCHS = 16, 16


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Dense transfer, then transfer with pruning; returns the summary of the latter."""
    dense, pruned = demo_configs(config)
    print("P3B demo, part 1 of 2: dense transfer from printed letters to handwritten digits\n", flush=True)
    train(dense)
    share = f"{config.prune_ratio:.0%}"
    print(f"\nP3B demo, part 2 of 2: the same transfer, losing {share} of the parameters on the way\n", flush=True)
    return prune(pruned)


def demo_configs(config: DemoConfig) -> tuple[TrainConfig, PruneConfig]:
    """Settings of the two runs; small images and few of them want a milder recipe than the published one."""
    package = resources.files("p3b.data")
    described = json.loads((package / "glyph_vit.json").read_text())
    weights = Path(str(package / "glyph_vit.safetensors"))
    kwargs = {key: value for key, value in described["model_kwargs"].items() if key != "num_classes"}
    data = options.DataOptions(data_set="DIGITS")
    model = options.ModelOptions(
        model=described["timm_model"],
        model_path=weights,
        model_kwargs=tuple(f"{key}={value}" for key, value in kwargs.items()),
        mean=tuple(described["normalization"]["mean"]),
        std=tuple(described["normalization"]["std"]),
        crop_pct=1.0,
        drop_path=0.0,
    )
    training = options.TrainingOptions(
        epochs=PRUNE_EPOCHS + FINETUNE_EPOCHS, batch_size=64, lr=8e-3, mixup=0.0, cutmix=0.0, precision="fp32"
    )
    augment = AugmentOptions(aa=None, color_jitter=0.0, reprob=0.0, crop_scale=(0.7, 1.0), hflip=0.0, repeated_aug=False)
    run = options.RunOptions(output_dir=config.output_dir / "dense", seed=config.seed, overwrite=True, device="cpu")
    dense = TrainConfig(data, model, training, augment, run)
    pruned = PruneConfig(
        data,
        model,
        replace(training, epochs=PRUNE_EPOCHS),
        augment,
        replace(run, output_dir=config.output_dir / "pruned"),
        options.PruneOptions(
            prune_ratio=config.prune_ratio,
            prune_start_epoch="3",
            finetune_epochs=FINETUNE_EPOCHS,
            dense_run=run.output_dir,
        ),
    )
    return dense, pruned
