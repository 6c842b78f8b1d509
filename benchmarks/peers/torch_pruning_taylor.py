"""Torch-Pruning from its own package: Taylor importance, isomorphic groups, one cut after the first epochs.

    pip install torch-pruning     # 1.6; not a dependency of p3b

What is called is its public API, in the order of its example for timm's ViTs: gradients of some batches, `BasePruner` with
`GroupTaylorImportance`, `isomorphic=True` and `global_pruning=True` (Fang et al., ECCV 2024), one `step()`, then the heads' new
numbers are written into timm's attention. It narrows the residual stream, the heads and the hidden layers together, each to
a share of its channels; the share that meets a budget of parameters is found by bisection on copies. Images, batches,
augmentation, optimizer, learning rate, number format and evaluation are those of `p3b prune`; epochs before the cut have a
constant rate, those after it a cosine schedule, and the best of these is chosen on the validation images, as p3b does it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.errors import BudgetError, ConfigError
from p3b.run.distillation import TAU
from p3b.run.options import TrainConfig
from p3b.run.stage import Stage, open_stage
from p3b.storage import artifact
from p3b.storage.files import write_atomically
from p3b.train.loop import EpochProgress, Learner, NoPruning, StepPruner, train_epoch
from p3b.train.losses import TrainingLoss
from p3b.train.optim import build_optimizer, cosine_schedule, scaled_lr
from p3b.train.teacher import Teacher
from p3b.vit.cost import count_parameters

TAYLOR_BATCHES = 10
"""Batches whose gradients are added up before the cut, as in its example."""
ROUND_TO = 2
"""Widths are multiples of it, as in its example."""
NEAR = 0.005
"""By how much the share of parameters that stays may miss the one that was asked for."""
NEAR_ENOUGH, TRIALS = 0.001, 12
"""Of the search: where it ends, at the latest after so many cuts."""
MODEL, SUMMARY = "pruned.pt", "summary.json"


@dataclass(frozen=True)
class Phases:
    """Epochs before the cut, and after it."""

    before: int
    after: int


def run(config: TrainConfig, phases: Phases, prune_ratio: float, teacher: Path | None = None) -> dict[str, Any]:
    """Train, cut, train the small model; returns the summary, which is written last. A run that was stopped starts again.

    Args:
        config: of the training, with the output folder.
        phases: its epochs; those of the config play no part.
        prune_ratio: share of all parameters that goes, in [0, 1).
        teacher: saved model that the small one learns from, too.

    Raises:
        ConfigError: the package is not installed. BudgetError: no ratio of channels comes near the budget.
    """
    folder = config.run.output_dir
    assert folder is not None
    if (folder / SUMMARY).exists():
        found: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
        return found
    require_package()
    with open_stage(config, "train") as stage:
        folder.mkdir(parents=True, exist_ok=True)
        curve: list[tuple[float, float]] = []
        dense = count_parameters(stage.model)
        _train(stage, stage.model, config, phases.before, 0, curve, loss=stage.recipe.loss, constant=True)
        began = time.process_time()
        take_gradients(stage.model, _some_batches(stage, phases.before), stage.recipe.loss.task)
        scored = time.process_time() - began
        ratio, model = cut_to(stage.model, prune_ratio)  # the search for the ratio is ours, and does not count
        loss = stage.recipe.loss if teacher is None else distilling(stage, config, teacher)
        best = _train(stage, model, config, phases.after, phases.before, curve, loss=loss, constant=False)
        model.load_state_dict(best)
        accuracies = stage.evaluation.final(model)
        assert stage.evaluation.answers is not None
        part, answers = stage.evaluation.answers
        torch.save(model, folder / MODEL)
        summary = {
            "accuracy": {name: asdict(found) for name, found in accuracies.items()},
            "part": part,
            "params": count_parameters(model),
            "dense_params": dense,
            "channel_ratio": ratio,
            "epochs": asdict(phases),
            "processor_seconds": scored + sum(seconds for seconds, _ in curve),
            "curve": [[round(seconds, 1), round(top1, 2)] for seconds, top1 in curve],
            "provenance": stage.provenance,
            "correct": [int(said == so) for said, so in zip(answers.predicted, answers.target, strict=True)],
        }
        text = json.dumps(summary)
        write_atomically(folder / SUMMARY, lambda path: path.write_text(text))
        return summary


def require_package() -> None:
    """Raises:
    ConfigError: torch-pruning is not installed.
    """
    try:
        import torch_pruning  # noqa: F401
    except ImportError as error:
        raise ConfigError("This row needs the package torch-pruning: pip install torch-pruning") from error


def take_gradients(model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]], loss: nn.Module) -> None:
    """Add up the gradients of some batches of (images, targets), in evaluation mode; Taylor scores are made of them."""
    model.eval()
    model.zero_grad()
    for images, targets in batches:
        loss(model(images).float(), targets).backward()


def cut_to(model: VisionTransformer, prune_ratio: float) -> tuple[float, VisionTransformer]:
    """A copy of the model that is cut to a budget of parameters.

    Args:
        model: dense, with gradients.
        prune_ratio: share of all parameters that goes.

    Returns:
        The ratio of channels that was asked of Torch-Pruning, and the small model.

    Raises:
        BudgetError: no ratio comes near the budget.
    """
    dense, low, high = count_parameters(model), 0.0, 1.0
    best: tuple[float, float, VisionTransformer] | None = None
    for _ in range(TRIALS):
        ratio = (low + high) / 2
        small = cut(model, ratio)
        kept = count_parameters(small) / dense
        miss = abs(kept - (1 - prune_ratio))
        if best is None or miss < best[0]:
            best = miss, ratio, small
        if best[0] < NEAR_ENOUGH:
            break
        low, high = (ratio, high) if kept > 1 - prune_ratio else (low, ratio)
    assert best is not None
    if best[0] > NEAR:
        raise BudgetError(f"Torch-Pruning misses the budget of {1 - prune_ratio:.1%} of the parameters by {best[0]:.2%}.")
    return best[1:]


def cut(model: VisionTransformer, channel_ratio: float) -> VisionTransformer:
    """A copy of the model without a share of its channels, by the gradients that the model has."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    for ours, theirs in zip(small.parameters(), model.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.clone()
    attentions = [module for module in small.modules() if isinstance(module, Attention)]
    pruner = tp.pruner.BasePruner(
        small,
        torch.randn(1, small.patch_embed.proj.in_channels, *small.patch_embed.img_size),
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=channel_ratio,
        global_pruning=True,
        isomorphic=True,
        ignored_layers=[small.head],
        num_heads={attention.qkv: attention.num_heads for attention in attentions},
        unwrapped_parameters=[(small.cls_token, 2), (small.pos_embed, 2)],  # cut along their channels, as it would guess
        round_to=ROUND_TO,
    )
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
        attention.scale = attention.head_dim**-0.5
    small.zero_grad()
    return small


def learner_of(
    stage: Stage, model: VisionTransformer, config: TrainConfig, *, cosine: int | None = None, pruner: StepPruner | None = None
) -> Learner:
    """What moves in training, by the recipe of p3b.

    Args:
        stage, config: whose recipe it is.
        model: on the device.
        cosine: epochs of a cosine schedule; None: the rate is constant.
        pruner: attached to the model, where it is being pruned.
    """
    recipe, precision = stage.recipe, stage.machine.precision
    rate = scaled_lr(config.training.lr, recipe.global_batch)
    optimizer = build_optimizer(model, recipe.options.opt, rate, recipe.options.weight_decay)
    scheduler = None
    if cosine is not None:
        scheduler = cosine_schedule(optimizer, cosine, recipe.steps_per_epoch, min(recipe.options.min_lr, rate), 0)
    pruning = pruner or NoPruning("train", count_parameters(model))
    return Learner(model, optimizer, recipe.loss, precision, precision.scaler(), pruning, scheduler)


def distilling(stage: Stage, config: TrainConfig, teacher: Path) -> TrainingLoss:
    """The loss of a model that learns from a saved one, as p3b's own rows do."""
    training, machine = config.training, stage.machine
    tau = TAU if training.distillation_tau is None else training.distillation_tau
    frozen = Teacher(machine.put(artifact.load(teacher)), machine.precision)
    return TrainingLoss(stage.recipe.loss.task, frozen, "soft", training.distillation_alpha, tau)


def _train(
    stage: Stage,
    model: VisionTransformer,
    config: TrainConfig,
    epochs: int,
    first: int,
    curve: list[tuple[float, float]],
    *,
    loss: TrainingLoss,
    constant: bool,
) -> dict[str, Tensor]:
    """Train for some epochs, the stage having `first` behind it; returns the weights of the best by validation accuracy.

    The processor seconds of each epoch's training and the top-1 after it are appended to `curve`.
    """
    learner = learner_of(stage, model, config, cosine=None if constant else epochs)
    learner.loss = loss
    best, weights = -1.0, model.state_dict()
    for epoch in range(first, first + epochs):
        stage.recipe.batches.set_epoch(epoch)
        began = time.process_time()
        train_epoch(learner, stage.recipe.batches, EpochProgress("train", stage.machine.device), nothing, nothing)
        seconds = time.process_time() - began
        part, accuracy = stage.evaluation.watched(model)
        print(f"torch-pruning: epoch {epoch + 1}, {part} top-1 {accuracy.top1:.2f} %, {seconds:.0f} s", flush=True)
        curve.append((seconds, accuracy.top1))
        if accuracy.top1 > best:
            best, weights = accuracy.top1, copy.deepcopy(model.state_dict())
    return weights


def nothing(*_: object) -> None:
    """Hears of mask updates and of the ends of steps."""


def _some_batches(stage: Stage, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches of an epoch that scores are made of."""
    stage.recipe.batches.set_epoch(epoch)
    for number, batch in enumerate(stage.recipe.batches):
        if number == TAYLOR_BATCHES:
            return
        yield batch
