"""Runs that are stopped, killed, started twice, or robbed of their disk: what can be gone on with is."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import child, kills
from p3b.commands.command_line import STOPPED, USER_ERROR
from p3b.run.failures import explain
from p3b.run.folder import StageFolder
from p3b.train.distributed import lost_process
from processes import SparePython, forked, status_of
from runs import MODEL, everything_in, finished, flags, last_checkpoint, lines, run, same_tensors, weights

RANDOM = ("--epochs", "3", "--prune-start-epoch", "1", "--finetune-epochs", "2", "--drop-path", "0.3", "--lr", "0.05")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("prune", data, tmp_path_factory.mktemp("undisturbed"), *RANDOM)


def wait_for(condition: Callable[[], Any]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.01)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGUSR1, 0)])
def test_a_signal_finishes_the_step_saves_and_has_a_status_of_its_own(
    data: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    """No checkpoint within epochs was asked for; the stop makes one, and going on from it equals never stopping."""
    given = flags(data, tmp_path, *RANDOM, "--checkpoint-minutes", "0", "--num-workers", str(workers))

    def signalled() -> int:
        real, calls = kills.p3b.pruner.Pruner.step, 0

        def step(self: Any, *more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:  # in the middle of the second epoch of three steps
                os.kill(os.getpid(), number)
            return real(self, *more)

        kills.p3b.pruner.Pruner.step = step  # type: ignore[method-assign]
        return run("prune", *given)

    assert status_of(forked(signalled)) == STOPPED
    place = last_checkpoint(tmp_path / "prune")["progress"]["place"]
    assert place["step"] == 5 and place["epoch"] == 1 and place["within_epoch"]["progress"]["micro_steps"] == 2
    assert f"stopped by {number.name} after step 5" in (tmp_path / "prune" / "log.txt").read_text()
    assert run("prune", *given, "--resume") == 0
    assert not kills._differences(undisturbed, tmp_path)


def test_checkpoints_come_by_the_clock_within_an_epoch(data: Path, tmp_path: Path) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "1", "--checkpoint-minutes", "1e-6")) == 0
    names = sorted(file.name for file in (tmp_path / "train" / "checkpoints").iterdir())
    assert [name[:6] for name in names] == ["000003", "000004"], "one a step, and one at the end of the epoch"


# --- kills ------------------------------------------------------------------------------------------------------------


def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign of `make faults` in small: any moment, a checkpoint half written, finalizing, torchrun's restart."""
    monkeypatch.setattr(kills, "RUN", (*kills.RUN, "--no-report"))  # drawing it would take half of the time
    done = list(kills.cases(2, seed=3, work=tmp_path, images={"train": 8, "val": 3, "test": 3}))
    assert [case for case in done if not case["ok"]] == []
    assert all(case["kills"] > 0 for case in done)
    assert any("two processes" in case["case"] for case in done)


@pytest.mark.parametrize("trap", ["write:5", "rename:6", "renamed:5", "call:p3b.pruner.Pruner.shrink"])
def test_killed_while_something_is_written(data: Path, undisturbed: Path, tmp_path: Path, trap: str) -> None:
    given = flags(data, tmp_path, *RANDOM)

    def trapped() -> int:
        child.set_trap(trap)
        return run("prune", *given)

    assert status_of(forked(trapped)) == -signal.SIGKILL
    assert run("prune", *given, "--resume") == 0
    assert not kills._differences(undisturbed, tmp_path)


def test_killed_while_a_mistake_is_copied(data: Path, tmp_path: Path) -> None:
    given = flags(data, tmp_path, "--epochs", "1", "--lr", "1e-9")  # it learns nothing, so that there are mistakes

    def trapped() -> int:
        child.set_trap("call:PIL.Image.Image.save:2")
        return run("train", *given)

    assert status_of(forked(trapped)) == -signal.SIGKILL
    examples = tmp_path / "train" / "examples"
    assert len(list(examples.glob(".*.part"))) == 1
    assert run("train", *given, "--resume") == 0
    assert len(list(examples.glob("*.png"))) > 1 and not list(tmp_path.rglob(".*.part"))


def test_a_damaged_checkpoint_is_passed_over_and_said_so(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    given = flags(data, tmp_path, *RANDOM)

    def trapped() -> int:
        child.set_trap("call:p3b.pruner.Pruner.shrink")
        return run("prune", *given)

    assert status_of(forked(trapped)) == -signal.SIGKILL
    newest = sorted((tmp_path / "prune" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert run("prune", *given, "--resume") == 0
    assert f"skipped a damaged checkpoint: {newest.name} has changed" in (tmp_path / "prune" / "log.txt").read_text()
    assert not kills._differences(undisturbed, tmp_path)


# --- who starts it ----------------------------------------------------------------------------------------------------


def restarted(monkeypatch: pytest.MonkeyPatch, run_id: str, count: int) -> None:
    """What torchrun tells its processes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_a_restart_by_the_launcher_goes_on_whatever_the_flags_say(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: tuple[str, ...]
) -> None:
    given = flags(data, tmp_path, *RANDOM, *flag)
    restarted(monkeypatch, "job 7", 0)

    def trapped() -> int:
        child.set_trap("write:6")
        return run("prune", *given)

    assert status_of(forked(trapped)) == -signal.SIGKILL
    restarted(monkeypatch, "job 7", 1)
    assert run("prune", *given) == 0
    assert "resumed after" in (tmp_path / "prune" / "log.txt").read_text()
    assert not kills._differences(undisturbed, tmp_path)


def test_a_restart_goes_on_with_no_other_launchs_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that was refused at its first start is refused at its second, and an overwriting one overwrites."""
    given = flags(data, tmp_path, "--epochs", "1")
    assert run("train", *given) == 0
    before = everything_in(tmp_path)
    restarted(monkeypatch, "another job", 1)
    assert run("train", *given) == USER_ERROR
    assert everything_in(tmp_path) == before
    assert run("train", *given, "--overwrite", "--seed", "1") == 0
    assert not same_tensors(weights(tmp_path / "dense"), torch_weights(before, tmp_path))


def torch_weights(files: dict[str, bytes], work: Path) -> dict[str, torch.Tensor]:
    (work / "before").mkdir()
    for name in ("config.json", "model.safetensors"):
        (work / "before" / name).write_bytes(files[f"dense/{name}"])
    return weights(work / "before")


def test_two_runs_are_kept_out_of_one_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first holds the lock until it is gone, however it goes; the second leaves everything as it is."""
    import p3b.run.folder

    monkeypatch.setattr(p3b.run.folder, "WAIT_FOR_LOCK", 0.1)

    def hold() -> int:
        folder = StageFolder(tmp_path, "train")
        folder.claim()
        (tmp_path / "held").touch()
        time.sleep(600)
        folder.release()
        return 0

    holder = forked(hold)
    try:
        wait_for((tmp_path / "held").exists)
        (tmp_path / "held").unlink()
        assert run("train", *flags(data, tmp_path, "--epochs", "1")) == USER_ERROR
        told = capsys.readouterr()
        assert f"in use by another run (process {holder.pid} on" in told.err and "--output-dir" in told.err
        assert "waiting up to" in told.out
        assert not (tmp_path / "train").exists()
    finally:
        os.kill(holder.pid or 0, signal.SIGKILL)
        holder.join()
    assert run("train", *flags(data, tmp_path, "--epochs", "1")) == 0


def test_a_folder_of_other_files_is_not_taken_for_a_run(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--output-dir given the data's own folder: its train part has the name of a stage."""
    before = everything_in(data)
    for flag in ((), ("--overwrite",), ("--resume",)):
        assert run("train", *flags(data, data, "--epochs", "1", *flag)) == USER_ERROR
        assert "files that are not of a run" in capsys.readouterr().err
    assert everything_in(data) == before


# --- health -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_with_its_cause_and_keeps_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    """The system refuses files beyond a size: the lines still fit, the next checkpoint does not."""
    out, told = tmp_path / "out", tmp_path / "told.txt"
    assert run("train", *flags(data, out, "--epochs", "1")) == 0
    size = max(file.stat().st_size for file in (out / "train" / "checkpoints").iterdir())
    given = flags(data, out, "--epochs", "2", "--overwrite")

    def starved() -> int:
        sys.stderr = told.open("w")
        real, calls = kills.p3b.storage.files.flush_to_disk, 0

        def fills(path: Path) -> None:
            nonlocal calls
            calls += ".unnamed" in path.name
            real(path)
            if calls == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

        kills.p3b.storage.files.flush_to_disk = fills
        status = run("train", *given)
        sys.stderr.flush()
        return status

    assert status_of(forked(starved)) == USER_ERROR
    assert "cannot be written" in told.read_text() and "--resume" in told.read_text()
    assert last_checkpoint(out / "train")["progress"]["place"]["epoch"] == 1
    assert run("train", *given[:-1], "--resume") == 0
    assert [line["epoch"] for line in lines(out / "train" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "--batch-size",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "--batch-size"),
        (OSError(28, "No space left on device", "run/train/log.txt"), "No space left.*log.txt.*--resume"),
        (OSError(30, "Read-only file system", "run/train/metrics.jsonl"), "Read-only.*--resume"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), "--max-restarts"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), "--max-restarts"),
    ],
)
def test_the_machines_errors_are_explained(error: OSError | RuntimeError, said: str) -> None:
    cause = explain(error)
    assert cause is not None
    with pytest.raises(type(cause), match=said):
        raise cause


def test_mistakes_of_ours_are_not_explained_away(tmp_path: Path) -> None:
    mine, other = (FileNotFoundError(2, "No such file or directory", str(place / "file")) for place in (tmp_path, Path("/")))
    assert "keeps its last checkpoint" in str(explain(mine, tmp_path))
    assert explain(other, tmp_path) is None and explain(mine) is None
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x24 and 25x24)")) is None
    assert lost_process(ValueError("timeout")) is None


def test_a_rank_that_dies_takes_the_run_down_and_it_can_be_gone_on_with(
    data: Path, tmp_path: Path, python: SparePython
) -> None:
    """Without restarts: the other rank ends soon, says why, and the checkpoint stays to go on from."""
    given = ["prune", "--data-path", str(data), "--output-dir", str(tmp_path / "out"), *MODEL, *RANDOM]
    more = ["--device", "cpu", "--num-workers", "0", "--batch-size", "2", "--timeout-minutes", "0.2"]
    trap = "rank:1:call:p3b.run.training.Training._end_epoch:2"
    script = f"""
import sys
sys.path[:0] = {[str(Path(file).parent) for file in (__file__, Path(kills.__file__).parent)]!r}
from processes import on_agent
from faults.kills import rank
on_agent(2, rank, sys.argv[1], sys.argv[2:])
"""
    began = time.monotonic()
    dead = python.run(script, trap, *given, *more)
    assert dead.status != 0 and "is gone or did not answer" in dead.errors and "--resume" in dead.errors
    assert time.monotonic() - began < 90
    assert last_checkpoint(tmp_path / "out" / "prune")["progress"]["place"]["epoch"] == 1
