"""The help that fits a screen: what a command is for, the flags that matter, an example. All flags: --help-all."""

from __future__ import annotations

from dataclasses import dataclass

_TEXTS = {
    "--keep": "share of the parameters that stays, such as 0.5",
    "--prune-ratios": "shares of the parameters that go: 0.3 0.5 0.7",
    "--max-loss": "find the largest share that loses at most so many points",
    "--methods": "methods to compare: block_benefit uniform magnitude ...",
    "--seeds": "seeds, one run with each: 0 1 2",
    "--output-dir": "where everything is written; default: runs/<images>",
    "--model": "a timm model; default: deit_small_patch16_224",
    "--model-path": "weights in a file; by default timm's are fetched",
    "--from-scratch": "start from random weights",
    "--recipe": "what chooses the rest: auto (the data), small, paper",
    "--epochs": "epochs of training or pruning",
    "--finetune-epochs": "epochs of the small model after pruning",
    "--batch-size": "images of a step",
    "--lr": "learning rate for 512 images a step",
    "--val-path": "images to choose the best epoch on",
    "--budgets": "prune ratios to show size and speed of: 0.25 0.5 0.75",
    "--measured-steps": "training steps that the time is measured on",
    "--look-at": "images of each part that are opened, at most",
    "--test-path": "images for the final figures",
    "--val-share": "share of the training images cut off for validation",
    "--data-set": "a data set by name: CIFAR100, DIGITS, hfds/...",
    "--device": "auto, cpu, cuda, cuda:1",
    "--resume": "go on with the run in the output folder",
    "--config": "settings from YAML or a run's config.json",
    "--layout": "how a small model is carried out: auto measures",
    "--precision": "fp32, bf16, fp16 or auto",
    "--dense-run": "output folder of a p3b train to compare with",
}


@dataclass(frozen=True)
class FirstHelp:
    """What the first help of a command shows.

    Attributes:
        flags: that matter, most important first.
        example: a command line.
        path: whether images come first.
    """

    flags: tuple[str, ...]
    example: str
    path: bool = True


_TRAINING = ("--model", "--model-path", "--from-scratch", "--recipe", "--epochs")
_HELP = {
    "prune": FirstHelp(
        ("--keep", "--output-dir", *_TRAINING, "--finetune-epochs", "--resume", "--config"),
        "p3b prune photos --keep 0.5 --output-dir run",
    ),
    "train": FirstHelp(
        ("--output-dir", *_TRAINING, "--batch-size", "--lr", "--resume", "--config"), "p3b train photos --output-dir run"
    ),
    "finetune": FirstHelp(
        ("--model-path", "--output-dir", "--recipe", "--epochs", "--batch-size", "--lr", "--val-path", "--device", "--resume",
         "--config"),
        "p3b finetune photos --model-path run/pruned --output-dir further",
    ),
    "compare": FirstHelp(
        ("--methods", "--prune-ratios", "--seeds", "--output-dir", *_TRAINING, "--config"),
        "p3b compare photos --methods block_benefit uniform --output-dir table",
    ),
    "sweep": FirstHelp(
        ("--max-loss", "--prune-ratios", "--output-dir", "--dense-run", *_TRAINING, "--config"),
        "p3b sweep photos --max-loss 1 --output-dir sweep",
    ),
    "plan": FirstHelp(
        ("--keep", "--budgets", *_TRAINING, "--finetune-epochs", "--measured-steps", "--config"),
        "p3b plan photos --keep 0.5",
    ),
    "data": FirstHelp(
        ("--data-set", "--val-path", "--test-path", "--val-share", "--look-at", "--config"), "p3b data photos"
    ),
    "evaluate": FirstHelp(
        ("--model-path", "--data-set", "--batch-size", "--layout", "--precision", "--device", "--output-dir", "--config"),
        "p3b evaluate photos --model-path run/pruned",
    ),
}  # fmt: skip


def first_help(name: str, purpose: str) -> str | None:
    """The help of a command in at most 24 lines; None for a command whose flags all fit a screen anyway.

    Args:
        name: of the command.
        purpose: in a few words.
    """
    if name not in _HELP:
        return None
    shown = _HELP[name]
    width = max(map(len, shown.flags))
    path = " PHOTOS" if shown.path else ""
    return "\n".join(
        [
            f"p3b {name}: {purpose}.",
            "",
            f"usage: p3b {name}{path} [flags]",
            *(["       PHOTOS: a folder or tar with a folder of images for each class"] if shown.path else []),
            "",
            *(f"  {flag:{width}}  {_TEXTS[flag]}" for flag in shown.flags),
            "",
            f"example: {shown.example}",
            f"all flags: p3b {name} --help-all",
        ]
    )


def all_flags_head(name: str) -> str | None:
    """What stands above the list of all flags: what may be said in other ways. None where there is nothing to say."""
    if name not in _HELP:
        return None
    lines = [f"p3b {name} photos is p3b {name} --data-path photos."]
    if "--keep" in _HELP[name].flags:
        lines.append("--keep 0.3 is --prune-ratio 0.7.")
    if "--from-scratch" in _HELP[name].flags:
        lines.append(
            "--from-scratch is --no-model-pretrained. What is not given is chosen by --recipe, whatever default is shown;"
        )
        lines.append("with --recipe paper the defaults that are shown count.")
    lines.append("--config FILE gives settings: YAML with one 'name: value' a line, or the config.json of a run.")
    return "\n".join([*lines, ""])
