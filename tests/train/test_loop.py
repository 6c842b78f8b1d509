"""One epoch of training: accumulation, clipping, loss scale, moving average, and what is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import p3b
from p3b.core.finite import all_finite, step_where
from p3b.errors import Stopped, TrainingError
from p3b.methods.base import Decision
from p3b.train.loop import MOST_SKIPPED_IN_A_ROW, EpochProgress, Learner, NoPruning, steps_per_epoch, train_epoch
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


def train(given: Learner, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, list[tuple[Decision, str]], list[float]]:
    """The loss, the decisions with their phases, and the mean loss after each step."""
    decisions: list[tuple[Decision, str]] = []
    means: list[float] = []
    progress = EpochProgress("train", CPU)
    loss = train_epoch(
        given, batches, progress, lambda *decided: decisions.append(decided), lambda: means.append(progress.mean_loss())
    )
    return loss, decisions, means


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
        assert interval.keys() == {"benefits", "scores"}
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


def test_the_loss_is_the_mean_over_batches_at_every_step() -> None:
    batches = batches_of(20, 2)
    given = learner(lr=0.0, grad_accum_steps=2)
    loss, _, means = train(given, batches)
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(given.model(x), y)) for x, y in batches]
    assert loss == pytest.approx(sum(losses) / 20, rel=1e-5)
    assert means == pytest.approx([sum(losses[:seen]) / seen for seen in range(2, 21, 2)], rel=1e-5)


class FromPlace(list[tuple[Tensor, Tensor]]):
    """Batches of an epoch of which the first ones have been used."""

    used = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self[self.used :])


def test_an_epoch_that_is_left_and_gone_on_with_ends_as_if_it_had_never_stopped() -> None:
    """After any of its steps, with accumulation and an odd number of batches; `on_step` ends it by what it raises."""
    batches, whole = FromPlace(batches_of(7, 2)), learner(grad_accum_steps=2)
    loss, _, _ = train(whole, batches)
    for last_step in range(1, 5):
        given, before, after = learner(grad_accum_steps=2), EpochProgress("train", CPU), EpochProgress("other", CPU)

        def leave(given: Learner = given, last_step: int = last_step) -> None:
            if given.steps_done == last_step:
                raise Stopped

        batches.used = 0
        with pytest.raises(Stopped):
            train_epoch(given, batches, before, lambda *_: None, leave)
        after.load_state_dict(before.state_dict())
        batches.used = after.micro_steps
        assert (after.phase, after.micro_steps) == ("train", min(7, 2 * last_step))
        assert train_epoch(given, batches, after, lambda *_: None, lambda: None) == loss
        assert given.steps_done == whole.steps_done and difference(given.model, whole.model) == 0


def test_a_loss_that_is_not_finite_says_its_step() -> None:
    batches = batches_of(15, 2)
    batches[4] = (batches[4][0] * float("nan"), batches[4][1])
    with pytest.raises(TrainingError, match=r"loss is not finite at optimizer step 4.*--lr"):
        train(learner(), batches)


def test_weights_that_the_last_step_has_ruined_are_told() -> None:
    given = learner(lr=float("inf"))
    train(given, batches_of(1, 4))
    with pytest.raises(TrainingError, match="A weight is not finite at optimizer step 0"):
        given.require_finite_weights()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_skips_a_step_that_is_not_finite_and_counts_it(dtype: torch.dtype) -> None:
    """Weights, probes, scores and the mean loss are as if the batch had not been there; the step counts as done."""
    batches, model = batches_of(3, 4), tiny_vit(img_size=16)
    pruner = p3b.Pruner(model, 0.5, schedule=p3b.Schedule(0, 8, 9, 8))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=dtype is torch.float16)
    given = learner(model=model, precision=Precision(CPU, dtype), scaler=scaler, pruner=pruner)
    train(given, batches[:1])
    sums = {name: total.clone() for name, (total, _) in pruner.state_dict()["method"]["meter"]["intervals"][-1].items()}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss, _, _ = train(given, [(batches[1][0] * float("nan"), batches[1][1])])
    assert all(map(torch.equal, model.parameters(), before)) and loss == 0.0
    assert (given.steps_done, given.skipped.steps, given.skipped.in_a_row) == (2, 1, 1)
    now = pruner.state_dict()["method"]["meter"]["intervals"][-1]
    assert all(torch.equal(now[name][0], total) for name, total in sums.items())
    if scaler.is_enabled():
        assert scaler.get_scale() == 1.0, "the scale comes down"
    loss, _, _ = train(given, batches[2:])
    assert loss > 0 and not any(map(torch.equal, model.parameters(), before))
    assert (given.steps_done, given.skipped.steps, given.skipped.in_a_row) == (3, 1, 0)


def test_steps_that_are_skipped_again_and_again_end_the_run() -> None:
    bad = [(x * float("nan"), y) for x, y in batches_of(MOST_SKIPPED_IN_A_ROW + 1, 1)]
    given = learner(precision=Precision(CPU, torch.bfloat16))
    with pytest.raises(TrainingError, match=f"{MOST_SKIPPED_IN_A_ROW}th time in a row.*--lr"):
        train(given, bad)
    assert given.steps_done == given.skipped.steps == MOST_SKIPPED_IN_A_ROW


def test_the_model_trains_in_training_mode_and_stays_so() -> None:
    given = learner()
    given.model.eval()
    train(given, batches_of(1, 2))
    assert given.model.training


@pytest.mark.parametrize(("dtype", "looks"), [(None, 1), (torch.bfloat16, 1), (torch.float16, 1)])
def test_gradients_are_looked_at_once_a_step(dtype: torch.dtype | None, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop hands its answer to the pruner; in float32 the pruner looks alone."""
    import p3b.pruner
    import p3b.train.loop

    seen: list[int] = []

    def counted(tensors: list[Tensor]) -> Tensor:
        seen.append(len(tensors))
        return all_finite(tensors)

    for module in (p3b.train.loop, p3b.pruner):
        monkeypatch.setattr(module, "all_finite", counted)
    model = tiny_vit(img_size=16)
    pruner = p3b.Pruner(model, 0.5, schedule=p3b.Schedule(0, 3, 6, 3))
    precision = Precision(CPU, dtype)
    train(learner(model=model, precision=precision, scaler=precision.scaler(), pruner=pruner), batches_of(4, 2))
    assert len(seen) == 4 * looks


def test_a_fused_step_that_is_left_out_leaves_the_optimizer_as_it_was_and_asks_nobody() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for finite, gradient in ((True, 1.0), (False, float("nan")), (True, 2.0)):
        weight.grad = torch.full((3,), gradient)
        step_where(optimizer, torch.tensor(finite))
    expected = nn.Parameter(torch.ones(3))
    usual = torch.optim.AdamW([expected], lr=0.1)
    for gradient in (1.0, 2.0):
        expected.grad = torch.full((3,), gradient)
        usual.step()
    torch.testing.assert_close(weight, expected)
    assert float(optimizer.state[weight]["step"]) == 2


def test_a_fused_optimizer_asks_the_host_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the answer waits for the device: others have to, fused ones decide there."""

    def read(_tensor: Tensor) -> bool:
        raise AssertionError("read by the host")

    weight, finite = nn.Parameter(torch.ones(3)), torch.tensor(True)
    weight.grad = torch.ones(3)
    fused, other = torch.optim.AdamW([weight], lr=0.1, fused=True), torch.optim.SGD([weight], lr=0.1)
    monkeypatch.setattr(Tensor, "__bool__", read)
    step_where(fused, finite)
    with pytest.raises(AssertionError, match="read by the host"):
        step_where(other, finite)
