"""One epoch of training: accumulation, clipping, loss scale, moving average, and what is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import p3b
from p3b.errors import TrainingError
from p3b.methods.base import Decision
from p3b.train.loop import Learner, NoPruning, StepReport, steps_per_epoch, train_epoch
from p3b.train.losses import TrainingLoss
from p3b.train.optim import Precision
from tiny import images, labels, tiny_vit

CPU = torch.device("cpu")


def batches_of(count: int, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x, y = images(count * size, size=16, seed=seed), labels(count * size, seed=seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def learner(lr: float = 0.1, **changed: Any) -> Learner:
    model = changed.pop("model", None) or tiny_vit(img_size=16)
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "loss": TrainingLoss(nn.CrossEntropyLoss()),
        "precision": Precision(CPU, None),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "pruner": NoPruning("train", 0),
        **changed,
    }
    return Learner(**parts)


def train(given: Learner, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, list[tuple[Decision, str]], list[StepReport]]:
    decisions: list[tuple[Decision, str]] = []
    reports: list[StepReport] = []
    loss = train_epoch(given, batches, lambda *decided: decisions.append(decided), reports.append)
    return loss, decisions, reports


def difference(left: nn.Module, right: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_accumulated_batches_are_one_bigger_batch() -> None:
    """At the end of the epoch as well, where fewer are left than are accumulated."""
    small, large = learner(grad_accum_steps=2), learner()
    accumulated = batches_of(5, 2)
    joined = [tuple(map(torch.cat, zip(*accumulated[i : i + 2], strict=True))) for i in (0, 2, 4)]
    train(small, accumulated)
    train(large, joined)  # type: ignore[arg-type]
    assert small.steps_done == large.steps_done == steps_per_epoch(accumulated, 2) == 3
    assert difference(small.model, large.model) < 1e-6
    assert difference(small.model, tiny_vit(img_size=16)) > 1e-3


def pruned(scaler: torch.amp.GradScaler) -> tuple[nn.Module, p3b.Pruner, list[Decision]]:
    model = tiny_vit(img_size=16)
    pruner = p3b.Pruner(model, 0.5, schedule=p3b.Schedule(1, 3, 6, 1))
    _, decisions, _ = train(learner(model=model, scaler=scaler, pruner=pruner), batches_of(6, 4))
    return model, pruner, [decision for decision, _ in decisions]


def test_scores_and_weights_are_those_without_a_loss_scale() -> None:
    """A power of two scales exactly, so everything that is read unscaled is the same bit for bit."""
    plain, pruner, decided = pruned(torch.amp.GradScaler("cpu", enabled=False))
    scaled, pruner_scaled, decided_scaled = pruned(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert decided and difference(plain, scaled) == 0
    measured, measured_scaled = (p.state_dict()["method"]["meter"]["intervals"] for p in (pruner, pruner_scaled))
    for interval, interval_scaled in zip(measured, measured_scaled, strict=True):
        assert {"benefits", "blocks.0.attn.in"} <= interval.keys()
        for name, sums in interval.items():
            assert all(map(torch.equal, sums, interval_scaled[name])), name
    for one, other in zip(decided, decided_scaled, strict=True):
        assert one.blocks == other.blocks
        assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)


def test_a_decision_comes_with_the_phase_of_its_step() -> None:
    model = tiny_vit(img_size=16)
    given = learner(model=model, pruner=p3b.Pruner(model, 0.5, schedule=p3b.Schedule(1, 3, 6, 1)))
    _, decisions, _ = train(given, batches_of(6, 4))
    assert [phase for _, phase in decisions] == ["sparsify", "sparsify", "sharpen", "sharpen"]
    assert [decision.progress for decision, _ in decisions] == [0.5, 1.0, 1.0, 1.0]


def test_a_step_with_infinite_gradients_moves_nothing() -> None:
    model = tiny_vit(img_size=16)
    pruner = p3b.Pruner(model, 0.5, schedule=p3b.Schedule(0, 3, 6, 1))
    probes = pruner.state_dict()["method"]["probes"]
    before = {name: tensor.clone() for name, tensor in probes.items() if "weight" in name}
    overflowing = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    given = learner(model=model, pruner=pruner, scaler=overflowing)
    train(given, batches_of(1, 4))
    assert difference(model, tiny_vit(img_size=16)) == 0
    after = pruner.state_dict()["method"]["probes"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_gradients_are_clipped_to_their_norm() -> None:
    given = learner(lr=1.0, clip_grad=1e-3)
    before = [parameter.detach().clone() for parameter in given.model.parameters()]
    train(given, batches_of(1, 4))
    moved = torch.stack([(a.detach() - b).norm() for a, b in zip(given.model.parameters(), before, strict=True)]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-2)


def test_the_moving_average_follows_every_step() -> None:
    model = tiny_vit(img_size=16)
    given = learner(model=model, ema=ModelEmaV3(model, decay=0.75))
    first, *later = batches_of(4, 4)
    train(given, [first])
    average = [parameter.detach().clone() for parameter in model.parameters()]  # timm's average begins after the first step
    for batch in later:
        train(given, [batch])
        average = [0.75 * old + 0.25 * new.detach() for old, new in zip(average, model.parameters(), strict=True)]
    assert given.ema is not None
    for kept, expected in zip(given.ema.module.parameters(), average, strict=True):
        torch.testing.assert_close(kept, expected)


def test_the_loss_is_the_mean_over_batches_and_is_looked_at() -> None:
    batches = batches_of(20, 2)
    given = learner(lr=0.0)
    loss, _, reports = train(given, batches)
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(given.model(x), y)) for x, y in batches]
    assert loss == pytest.approx(sum(losses) / 20, rel=1e-5)
    assert [report.steps for report in reports] == [10, 20]
    assert reports[0].loss == pytest.approx(sum(losses[:10]) / 10, rel=1e-5)


def test_a_loss_that_is_not_finite_says_its_step() -> None:
    batches = batches_of(15, 2)
    batches[4] = (batches[4][0] * float("nan"), batches[4][1])
    with pytest.raises(TrainingError, match=r"loss is not finite at optimizer step 4.*--lr"):
        train(learner(), batches)


def test_weights_that_the_last_step_has_ruined_are_told_before_a_checkpoint_is_made() -> None:
    with pytest.raises(TrainingError, match="A weight is not finite at optimizer step 0"):
        train(learner(lr=float("inf")), batches_of(1, 4))


def test_the_model_trains_in_training_mode_and_stays_so() -> None:
    given = learner()
    given.model.eval()
    train(given, batches_of(1, 2))
    assert given.model.training
