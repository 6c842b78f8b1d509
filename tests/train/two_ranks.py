"""Laws that two gloo processes carry out together, as `test_distributed` has them do."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import p3b
import p3b.run.training
from p3b.data import Preprocessing, open_data
from p3b.errors import TrainingError
from p3b.methods import METHODS
from p3b.run.evaluation import evaluate_part
from p3b.run.machine import Machine
from p3b.train.distributed import Processes, all_reduce_mean, all_reduce_sum, gather, process_group, wait_for_all
from p3b.train.loop import EpochProgress, Learner, train_epoch
from p3b.train.losses import TrainingLoss
from p3b.train.optim import Precision
from processes import forked, status_of
from runs import colour_folders, flags, run, same_tensors, weights
from tiny import images, labels, tiny_vit

RANKS = 2
FP32 = Precision(torch.device("cpu"), None)


def collectives(out: Path) -> None:
    with process_group("cpu") as (processes, device):
        assert (processes.world_size, device.type) == (RANKS, "cpu")
        mine = torch.tensor([1.0, 10.0]) * (processes.rank + 1)
        assert all_reduce_mean(mine).tolist() == [1.5, 15.0] and all_reduce_sum(mine).tolist() == [3.0, 30.0]
        assert mine.tolist() == [processes.rank + 1, 10 * (processes.rank + 1)], "the tensor itself stays"
        assert gather({"rank": processes.rank}) == [{"rank": 0}, {"rank": 1}]


def evaluation(out: Path) -> None:
    """Nine images and one image, neither divisible by the ranks: each counts once, shared or not."""
    model = tiny_vit(img_size=16, num_classes=3)
    preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    test = open_data("FOLDER", out / "data").test
    assert test is not None
    with process_group("cpu") as (processes, _):
        for part in (test, test.subset(torch.tensor([4]).numpy())):
            found = [
                evaluate_part(
                    model, part, preprocessing, Machine(ranks, FP32.device, FP32), batch_size=2, num_workers=0, shared=shared
                )
                for ranks, shared in ((processes, True), (processes, False), (Processes(), False))
            ]
            assert {accuracy.images for accuracy in found} == {len(part)}
            assert len({(accuracy.top1, accuracy.top5) for accuracy in found}) == 1
            assert max(accuracy.loss for accuracy in found) - min(accuracy.loss for accuracy in found) < 1e-6


def train(
    model: nn.Module, wrapped: nn.Module, batches: list[tuple[Tensor, Tensor]], method: str, options: dict[str, Any]
) -> p3b.Pruner:
    pruner = p3b.Pruner(model, 0.5, method, p3b.Schedule(1, 3, 6, 1), **options)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = Learner(wrapped, optimizer, TrainingLoss(nn.CrossEntropyLoss()), FP32, scaler, pruner, grad_accum_steps=2)
    train_epoch(learner, batches, EpochProgress(pruner.phase, FP32.device), lambda *_: None, lambda: None)
    pruner.decide_last()
    return pruner


def pruning(out: Path) -> None:
    """Ranks see other images and hold the same weights, probes and masks; together they see what one process would."""
    x, y = images(48, size=16), labels(48)
    with process_group("cpu") as (processes, _):
        own = slice(processes.rank, None, RANKS)
        shares = [(a[own], b[own]) for a, b in zip(x.split(4), y.split(4), strict=True)]
        for method, options in (
            ("block_benefit", {}),
            ("block_benefit", {"keep_ratios": [0.9, 0.3, 0.6, 0.5], "compute": "active"}),
            ("block_benefit", {"estimator": "linear", "stream": 0.3, "compute": "active"}),
            *((method, {}) for method in METHODS if method != "block_benefit"),
        ):
            model = tiny_vit(img_size=16)
            pruner = train(model, DistributedDataParallel(model), shares, method, options)
            state = pruner.state_dict()
            for tensors in (state["masks"], model.state_dict(), state["method"].get("probes", {}), sums_of(state)):
                assert all(same_tensors(tensors, others) for others in gather(tensors))
            assert any((mask == 0).any() for mask in state["masks"].values())
            alone = tiny_vit(img_size=16)
            pruner_alone = train(alone, alone, list(zip(x.split(4), y.split(4), strict=True)), method, options)
            assert same_tensors(pruner_alone.gates.masks, state["masks"])
            for one, other in ((alone.state_dict(), model.state_dict()), (sums_of(pruner_alone.state_dict()), sums_of(state))):
                assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)


def sums_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """What the method has summed up over its intervals: a checkpoint keeps the main rank's, so all ranks must hold the same."""
    method = state["method"]
    intervals = enumerate(method.get("meter", method.get("scores", {})).get("intervals", []))  # some methods keep no sums
    return {f"{number} {name}": total for number, interval in intervals for name, (total, _) in interval.items()}


def one_step(pruner: p3b.Pruner, wrapped: nn.Module, batch: Tensor, targets: Tensor, spoil: bool = False) -> None:
    """Forward, backward and the pruner's part of a step; `spoil` makes this rank's loss infinite."""
    wrapped.zero_grad()
    loss = nn.functional.cross_entropy(wrapped(batch), targets) + pruner.loss(nn.functional.cross_entropy, targets)
    (loss * float("inf") if spoil else loss).backward()
    pruner.step()


def one_shot(out: Path) -> None:
    """Ranks measure and compensate on images of their own; what they cut, and what they fit, is the same."""
    x, y = images(32, size=16), labels(32)
    ways: list[tuple[str, dict[str, Any]]] = [(method, {}) for method in METHODS if method != "wdpruning"]
    with process_group("cpu") as (processes, _):
        own = slice(processes.rank, None, RANKS)
        batches = list(zip(x[own].split(4), y[own].split(4), strict=True))
        for method, options in (*ways, ("block_benefit", {"estimator": "ridge"}), ("block_benefit", {"stream": "auto"})):
            model = tiny_vit(img_size=16)
            pruner = p3b.Pruner(model, 0.5, method, **options)
            pruner.calibrate(batches, nn.functional.cross_entropy)
            small = pruner.finalize([batch for batch, _ in batches])
            assert all(same_tensors(small.state_dict(), other) for other in gather(small.state_dict())), (method, options)


def disagreeing(out: Path) -> None:
    """One rank has come by another importance of the blocks: all ranks stop, at a mask update and at the last decision."""
    with process_group("cpu") as (processes, _):
        for final in (5, 3):  # the decision that follows is an update, or the last one
            model = tiny_vit(img_size=16)
            wrapped = DistributedDataParallel(model)
            pruner = p3b.Pruner(wrapped, 0.5, schedule=p3b.Schedule(0, 1, final, 2))
            for seed in (0, 1):
                one_step(pruner, wrapped, images(4, size=16, seed=seed), labels(4, seed=seed))
            state = pruner.state_dict()
            assert all(same_tensors(state["masks"], others) for others in gather(state["masks"]))
            if processes.rank == 1:
                importance = [torch.tensor([9.0, 0.1, 0.1, 9.0], dtype=torch.float64)] * 2
                pruner.load_state_dict({**state, "method": {**state["method"], "importance": importance}})
            one_step(pruner, wrapped, images(4, size=16), labels(4))
            told = ""
            try:
                if final == 5:
                    one_step(pruner, wrapped, images(4, size=16), labels(4))
                else:
                    pruner.decide_last()
            except TrainingError as error:
                told = str(error)
            assert "disagree on the masks (rank 0: " in told and ", rank 1: " in told, told
            assert len(set(gather(told))) == 1
            assert same_tensors(pruner.gates.masks, state["masks"]), "what is not agreed on is not put in place"


def a_step_that_is_not_finite_on_one_rank(out: Path) -> None:
    """It counts on none: no sum, no probe moves, on any rank."""
    with process_group("cpu") as (processes, _):
        model = tiny_vit(img_size=16)
        wrapped = DistributedDataParallel(model)
        pruner = p3b.Pruner(wrapped, 0.5, schedule=p3b.Schedule(0, 5, 9, 9))
        seen = []
        for spoil in (False, processes.rank == 1):
            one_step(pruner, wrapped, images(4, size=16), labels(4), spoil)
            state = pruner.state_dict()
            seen.append({name: tensor.clone() for name, tensor in {**state["method"]["probes"], **sums_of(state)}.items()})
        assert same_tensors(*seen)
        assert all(count == 1 for _, count in state["method"]["meter"]["intervals"][-1].values())


def resuming(out: Path) -> None:
    """With the random states of both ranks and their one teacher, stopping and going on equals never stopping."""
    save = p3b.run.training.save_checkpoint

    def save_and_stop(*given: Any, **progress: Any) -> None:
        save(*given, **progress)
        raise KeyboardInterrupt

    given = ("--epochs", "2", "--drop-path", "0.3", "--batch-size", "2", "--lr", "0.1", "--prune-start-epoch", "2steps")
    given = (*given, "--distill-from", "warm-up")
    at_once = ("--prune-schedule", "at-once", "--prune-stream", "auto", "--align", "4")
    # All runs in one group: with one each, a rank that is early for the next would join the store of the last.
    with process_group("cpu"):
        for kind, more in (("gradual", ()), ("at once", at_once)):
            whole, stopped = out / f"{kind}, whole", out / f"{kind}, stopped"
            assert run("prune", *flags(out / "data", whole, *given, *more)) == 0
            p3b.run.training.save_checkpoint = save_and_stop
            with contextlib.suppress(KeyboardInterrupt):
                run("prune", *flags(out / "data", stopped, *given, *more))
            p3b.run.training.save_checkpoint = save
            wait_for_all()
            assert not (stopped / "pruned").exists()
            assert run("prune", *flags(out / "data", stopped, *given, *more, "--resume")) == 0
            wait_for_all()
            assert same_tensors(weights(whole / "pruned"), weights(stopped / "pruned"))


def one_rank_alone_fails(out: Path) -> None:
    """An image in the share of the other rank cannot be read: that rank says so."""
    data = colour_folders(out / f"broken{os.environ['RANK']}")
    (data / "test" / "blue" / "1.png").write_bytes(b"not an image")  # the second image is the second rank's
    given = ("--epochs", "1", "--val-share", "0", "--test-path", str(data / "test"))
    try:
        status = run("train", *flags(data / "train", out / "run", *given))
    except RuntimeError as error:  # the main rank waits for a rank that has gone
        assert os.environ["RANK"] == "0" and "Connection" in str(error), error
        status = 2
    assert status == 2


LAWS = (
    collectives,
    evaluation,
    pruning,
    one_shot,
    disagreeing,
    a_step_that_is_not_finite_on_one_rank,
    resuming,
    one_rank_alone_fails,
)


def in_two_processes(act: Callable[[Path], None], out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank_of(rank: int) -> int:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        try:
            act(out)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stderr.flush()
        return 0

    processes = [forked(partial(rank_of, rank)) for rank in range(RANKS)]
    assert [status_of(process) for process in processes] == [0] * RANKS
