"""Training behind torch.compile: the same steps, and a model that knows nothing of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import p3b
from p3b.methods.base import Decision
from p3b.train.compiled import compiled, require_compiler
from p3b.train.loop import EpochProgress, Learner, train_epoch
from p3b.train.losses import TrainingLoss
from p3b.train.optim import Precision
from p3b.vit.wrappers import unwrap
from processes import SparePython
from runs import flags
from tiny import images, labels, tiny_vit

CPU = torch.device("cpu")
has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def pruned(compile_it: bool, precision: Precision) -> tuple[list[float], list[Decision], nn.Module, nn.Module]:
    """Losses, decisions, the model and its moving average, after warm-up, soft and hard masks with linear probes."""
    torch.manual_seed(0)
    model = tiny_vit(img_size=16, depth=1)
    pruner = p3b.Pruner(model, 0.5, schedule=p3b.Schedule(1, 3, 6, 1), estimator="linear")
    wrapped = compiled(model, backend="aot_eager") if compile_it else model
    learner = Learner(
        model=wrapped,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        loss=TrainingLoss(nn.CrossEntropyLoss()),
        precision=precision,
        scaler=precision.scaler(),
        pruner=pruner,
        ema=ModelEmaV3(model, decay=0.75),
    )
    batches = [(images(4, size=16, seed=step), labels(4, seed=step)) for step in range(6)]
    losses: list[float] = []
    decisions: list[Decision] = []
    progress = EpochProgress("prune", CPU)
    train_epoch(
        learner, batches, progress, lambda decision, _: decisions.append(decision), lambda: losses.append(progress.mean_loss())
    )
    assert unwrap(wrapped) is model and learner.ema is not None
    return losses, decisions, model, learner.ema.module


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_pruning_is_the_same_pruning(dtype: torch.dtype | None) -> None:
    """With gates, taps, probes and a moving average; what is saved does not know that it was compiled."""
    torch._dynamo.utils.counters.clear()
    losses, decisions, model, average = pruned(False, Precision(CPU, dtype))
    assert not torch._dynamo.utils.counters["stats"]
    losses_c, decisions_c, model_c, average_c = pruned(True, Precision(CPU, dtype))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one before the gates close, one after"
    assert not torch._dynamo.utils.counters["graph_break"]
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6} if dtype is None else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(losses_c, losses, **tolerance)
    assert len(decisions) == len(decisions_c) == 4
    for left, right in ((model, model_c), (average, average_c)):
        assert list(left.state_dict()) == list(right.state_dict()) and type(left) is type(right)
        for one, other in zip(left.parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(other, one, **tolerance)


def test_gates_that_come_after_the_first_compiled_pass_are_seen() -> None:
    model, x = tiny_vit(img_size=16, depth=1), images(2, size=16)
    wrapped = compiled(model, backend="aot_eager")
    before = wrapped(x)
    pruner = p3b.Pruner(model, 0.5, schedule=p3b.Schedule(0, 3, 6, 1), keep_ratios=[0.5, 0.5])
    pruner.gates.set({name: torch.full_like(mask, 0.5) for name, mask in pruner.gates.masks.items()})
    torch.testing.assert_close(wrapped(x), model(x))
    assert not torch.allclose(before, model(x))
    pruner.gates.detach()
    torch.testing.assert_close(wrapped(x), before)


@has_compiler
def test_a_compiler_that_is_there_is_found() -> None:
    """Compiled for real, but without what torch does for larger networks: trying vector units, and preparing its headers."""
    with torch._inductor.config.patch({"cpp.simdlen": 1, "cpp_cache_precompile_headers": False}):
        require_compiler(CPU)


def test_without_a_compiler_nothing_begins(data: Path, tmp_path: Path, python: SparePython) -> None:
    script = """
import sys, warnings
from p3b.commands.command_line import main
warnings.resetwarnings()
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "empty").mkdir()
    nowhere = {"PATH": str(tmp_path / "empty"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = python.run(script, "train", *flags(data, tmp_path / "run", "--compile"), **nowhere)
    assert done.status == 2, done.errors
    assert "--compile does not work here" in done.errors and "leave --compile out" in done.errors
    assert not (tmp_path / "run" / "train" / "config.json").exists()
