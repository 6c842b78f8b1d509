"""What each command leaves behind, and how one goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import p3b
import p3b.run.training
import runs
from p3b.commands.command_line import INTERRUPTED
from p3b.run.folder import StageFolder
from p3b.storage.artifact import read_config
from p3b.train.checkpoint import Checkpoints
from processes import SparePython
from runs import everything_in, finished, flags, last_checkpoint, lines, read, run, same_tensors, weights, without_seconds
from tiny import parameters_of

STEPS_PER_EPOCH = runs.SIZES["train"] * len(runs.COLOURS) // 4
LARGEST_ELEMENT = 3 * 3 * (24 + 1) + 3 * 24
"""Parameters of one channel of all heads in q, k, v and proj: no element has more."""


@pytest.fixture(scope="module")
def pruned_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of `p3b prune` with fine-tuning in one go, never changed by a test."""
    return finished("prune", data, tmp_path_factory.mktemp("pruned"), *runs.PHASES, "--finetune-epochs", "2", figures=True)


@pytest.fixture(scope="module")
def unfinetuned_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of `p3b prune` alone, never changed by a test."""
    return finished("prune", data, tmp_path_factory.mktemp("unfinetuned"), "--epochs", "2", "--prune-start-epoch", "0")


# --- what lies there --------------------------------------------------------------------------------------------------


def test_prune_leaves_its_run_folder(pruned_run: Path) -> None:
    stage = pruned_run / "prune"
    assert {file.name for file in stage.iterdir()} == {
        "config.json", "log.txt", "metrics.jsonl", "blocks.jsonl", "checkpoints", "best.pth", "summary.json",
        "benefit.png", "keep_ratio.png", "predictions.csv", "examples",
    }  # fmt: skip
    assert {file.name for file in pruned_run.iterdir()} == {".lock", "prune", "pruned", "first_sparse_checkpoint.pth"}
    assert {file.name for file in (pruned_run / "pruned").iterdir()} == {
        "config.json", "model.safetensors", "README.md", "keep_ratio.png"
    }  # fmt: skip
    assert "| top-1 (%) |" in (pruned_run / "pruned" / "README.md").read_text()
    log = (stage / "log.txt").read_text()
    for said in (
        "19,347 parameters",
        "pruning starts at 3, reaches its target at 5, ends at 9",
        "epoch   5/5",
        "images per second",
        str(stage),
    ):
        assert said in log


def test_config_says_every_setting_resolved(pruned_run: Path, data: Path) -> None:
    config = read(pruned_run / "prune" / "config.json")
    assert config["data"]["data_path"] == str(data)
    assert config["model"]["model_kwargs"] == list(runs.SHAPE)
    assert config["training"]["epochs"] == 3 and config["prune"]["finetune_epochs"] == 2
    assert config["augment"]["aa"] == "rand-m9-mstd0.5-inc1"
    resolved = config["resolved"]
    assert resolved["params"] == 19347 and resolved["classes"] == 3 and resolved["processes"] == 1
    assert resolved["steps_per_epoch"] == STEPS_PER_EPOCH and resolved["global_batch"] == 4
    assert resolved["lr"] == 5e-4 * 4 / 512 and resolved["precision"] == "float32"


def test_metrics_have_one_line_an_epoch(pruned_run: Path) -> None:
    metrics = lines(pruned_run / "prune" / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics] == [STEPS_PER_EPOCH * epoch for epoch in range(1, 6)]
    assert [line["phase"] for line in metrics] == ["warm-up", "sparsify", "sharpen", "fine-tune", "fine-tune"]
    kept = [line["kept_params"] for line in metrics]
    assert kept[0] == 19347 > kept[1] and kept[3] == kept[4] == parameters_of(p3b.load(pruned_run / "pruned"))
    constant = 5e-4 * 4 / 512
    assert [line["lr"] for line in metrics[:3]] == [constant] * 3, "no schedule while pruning"
    for line in metrics:
        assert 0 <= line["val_top1"] <= line["val_top5"] <= 100
        assert 0 < line["train_seconds"] <= line["seconds"] and line["processor_seconds"] > 0


def test_blocks_have_one_line_a_mask_update_and_the_last(pruned_run: Path) -> None:
    updates = lines(pruned_run / "prune" / "blocks.jsonl")
    # three updates an epoch of three steps, from step 3 on; the last step leaves the masks to finalizing
    assert [line["step"] for line in updates] == [4, 5, 6, 7, 8, 9]
    assert [line["phase"] for line in updates] == ["sparsify"] * 2 + ["sharpen"] * 3 + ["finalize"]
    others = 19347 - sum(block["params"] for block in updates[0]["blocks"])
    for line in updates:
        assert [block["kind"] for block in line["blocks"]] == ["attn", "mlp"] * (runs.BLOCKS // 2)
        for block in line["blocks"]:
            assert set(block) == {
                "name", "kind", "benefit_cls", "benefit_patch", "importance", "keep_ratio_goal", "keep_ratio", "kept_params",
                "params", "pruned", "returned",
            }  # fmt: skip
            assert block["keep_ratio_goal"] <= block["keep_ratio"] + 1e-9
            assert abs(block["kept_params"] - block["keep_ratio"] * block["params"]) <= LARGEST_ELEMENT
        assert line["kept_params"] - sum(block["kept_params"] for block in line["blocks"]) == others
    blocks = [block for line in updates for block in line["blocks"]]
    assert read(pruned_run / "prune" / "summary.json")["returned"] == {
        "elements": sum(block["returned"] for block in blocks),
        "updates": len(updates),
        "chances": sum(block["pruned"] for block in blocks[: -runs.BLOCKS]),
    }
    assert sum(block["pruned"] for block in blocks[: -runs.BLOCKS]) > 0
    assert f"in {len(updates)} mask updates" in (pruned_run / "prune" / "log.txt").read_text()
    progress = [line["progress"] for line in updates]
    assert progress == sorted(progress) and progress[-1] == 1 and updates[-1]["tau"] == 0


def test_budget_is_reached(pruned_run: Path) -> None:
    summary = read(pruned_run / "prune" / "summary.json")
    small, dense = parameters_of(p3b.load(pruned_run / "pruned")), 19347
    assert abs(small - dense / 2) <= max(0.001 * dense, LARGEST_ELEMENT)
    assert summary["dense"]["params"] == dense and summary["pruned"]["params"] == small
    assert summary["reached_prune_ratio"] == pytest.approx(1 - small / dense)
    assert summary["pruned"]["macs"] < summary["dense"]["macs"] and summary["pruned"]["bytes"] < summary["dense"]["bytes"]
    assert summary["pruned"]["images_per_second"] > 0
    assert all(Path(figure).stat().st_size > 1000 for figure in summary["figures"])


def test_pruned_model_says_classes_preprocessing_and_origin(pruned_run: Path) -> None:
    config = read_config(pruned_run / "pruned")
    assert config["class_names"] == list(runs.COLOURS)
    assert config["preprocessing"]["input_size"] == [3, 16, 16] and config["preprocessing"]["crop_pct"] == 0.875
    assert config["provenance"]["stage"] == "prune" and config["provenance"]["seed"] == 0
    sparse = read_config(pruned_run / "first_sparse_checkpoint.pth")
    assert sparse["blocks"] == config["blocks"], "fine-tuning changes no shape"
    assert not same_tensors(weights(pruned_run / "first_sparse_checkpoint.pth"), weights(pruned_run / "pruned"))


def test_evaluate_repeats_what_the_summary_states(pruned_run: Path, data: Path) -> None:
    summary = read(pruned_run / "prune" / "summary.json")
    again = evaluated(data, pruned_run / "pruned")
    assert set(again["accuracy"]) == {"val", "test"}
    for part, stated in summary["accuracy"].items():
        assert again["accuracy"][part]["images"] == stated["images"] == runs.SIZES[part] * len(runs.COLOURS)
        for figure in ("top1", "top5", "loss"):
            assert again["accuracy"][part][figure] == pytest.approx(stated[figure], abs=1e-5)
    assert again["model"]["params"] == summary["pruned"]["params"]


def test_evaluate_crops_as_the_saved_model_was_trained(data: Path, tmp_path: Path) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "1", "--crop-pct", "0.5", "--mean", "0.1", "0.2", "0.3")) == 0
    assert read_config(tmp_path / "dense")["preprocessing"]["crop_pct"] == 0.5
    stated = read(tmp_path / "train" / "summary.json")["accuracy"]["test"]["loss"]
    assert evaluated(data, tmp_path / "dense")["accuracy"]["test"]["loss"] == pytest.approx(stated, abs=1e-5)


def test_pruned_model_loads_in_another_process(pruned_run: Path, python: SparePython) -> None:
    script = (
        "import sys, json, torch, p3b\n"
        "model = p3b.load(sys.argv[1])\n"
        "images = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) / 1536 - 0.5\n"
        "with torch.no_grad(): print(json.dumps(model(images).tolist()))"
    )
    answer = python.run(script, pruned_run / "pruned")
    assert answer.status == 0, answer.errors
    images = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) / 1536 - 0.5
    with torch.no_grad():
        here = p3b.load(pruned_run / "pruned")(images)
    assert torch.equal(torch.tensor(json.loads(answer.output)), here)


def test_train_leaves_its_run_folder_and_the_best_epoch(data: Path, tmp_path: Path) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "3", "--lr", "0.1")) == 0
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "train", "dense"}
    assert {file.name for file in (tmp_path / "train").iterdir()} == {
        "config.json", "log.txt", "metrics.jsonl", "checkpoints", "best.pth", "summary.json", "predictions.csv", "examples"
    }  # fmt: skip
    metrics, summary = lines(tmp_path / "train" / "metrics.jsonl"), read(tmp_path / "train" / "summary.json")
    assert summary["accuracy"]["val"]["top1"] == max(line["val_top1"] for line in metrics)
    assert same_tensors(weights(tmp_path / "train" / "best.pth"), weights(tmp_path / "dense"))
    assert metrics[-1]["lr"] == pytest.approx(1e-5), "the cosine schedule ends at --min-lr"


def test_without_a_val_part_the_last_epoch_stays_and_test_chooses_nothing(data: Path, tmp_path: Path) -> None:
    parts = ("--test-path", str(data / "test"), "--val-share", "0")
    assert run("train", *flags(data / "train", tmp_path, *parts, "--epochs", "2", "--lr", "0.1")) == 0
    assert not (tmp_path / "train" / "best.pth").exists()
    assert same_tensors(last_checkpoint(tmp_path / "train")["model"], weights(tmp_path / "dense"))
    assert set(lines(tmp_path / "train" / "metrics.jsonl")[0]) >= {"test_top1", "test_top5", "test_loss"}


@pytest.mark.parametrize("start_from", ["pruned", "first_sparse_checkpoint.pth"])
def test_finetune_works_into_the_folder_of_the_pruning(
    data: Path, unfinetuned_run: Path, tmp_path: Path, start_from: str
) -> None:
    out = tmp_path / "run"
    copy_tree(unfinetuned_run, out)
    before = everything_in(out)
    start = ("--model-path", str(out / start_from))
    assert run("finetune", *flags(data, out, *start, "--epochs", "2", "--lr", "0.1", model=())) == 0
    after = everything_in(out)
    assert {name: after[name] for name in before} == before, "each stage has its own place"
    small = read_config(out / "finetuned")
    assert small["blocks"] == read_config(out / "pruned")["blocks"] and small["provenance"]["stage"] == "finetune"
    assert not same_tensors(weights(out / "finetuned"), weights(out / "pruned"))
    metrics = lines(out / "finetune" / "metrics.jsonl")
    assert [line["kept_params"] for line in metrics] == [small["params"]] * 2
    assert set(read(out / "finetune" / "summary.json")["accuracy"]) == {"val", "test"}


def test_the_dense_run_stands_beside_the_pruned_one(data: Path, tmp_path: Path) -> None:
    dense, out = tmp_path / "dense-run", tmp_path / "pruned-run"
    assert run("train", *flags(data, dense, "--epochs", "1")) == 0
    assert run("prune", *flags(data, out, "--epochs", "1", "--prune-start-epoch", "0", "--dense-run", str(dense))) == 0
    stated = read(dense / "train" / "summary.json")["accuracy"]["test"]
    summary = read(out / "prune" / "summary.json")
    assert (summary["dense"]["top1"], summary["dense"]["top5"]) == (stated["top1"], stated["top5"])
    assert f"dense accuracy: from {dense}" in (out / "prune" / "log.txt").read_text()


def test_svg_figures_where_asked(data: Path, tmp_path: Path) -> None:
    assert (
        run(
            "prune", *flags(data, tmp_path, "--epochs", "1", "--prune-start-epoch", "0", "--figure-format", "svg"), figures=True
        )
        == 0
    )
    assert (tmp_path / "prune" / "benefit.svg").read_text().lstrip().startswith("<?xml")
    assert not list((tmp_path / "prune").glob("*.png"))


# --- going on ---------------------------------------------------------------------------------------------------------


def kill_at(patch: pytest.MonkeyPatch, event: str, count: int) -> None:
    """Die right after the `count`-th checkpoint, or right before it ("unsaved": its lines are written, it is not)."""
    save = p3b.run.training.save_checkpoint
    calls = 0

    def saving(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if event == "saved":
            save(*args, **kwargs)
        if calls == count:
            raise KeyboardInterrupt
        if event == "unsaved":
            save(*args, **kwargs)

    patch.setattr(p3b.run.training, "save_checkpoint", saving)


LONG = ("--epochs", "4", "--prune-start-epoch", "1", "--finetune-epochs", "3", "--drop-path", "0.3", "--lr", "0.05")


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("prune", data, tmp_path_factory.mktemp("uninterrupted"), *LONG)


@pytest.mark.parametrize(
    ("event", "epoch"),
    [
        pytest.param("saved", 1, id="after the warm-up"),
        pytest.param("unsaved", 1, id="before the first checkpoint"),
        pytest.param("unsaved", 3, id="while sparsifying"),
        pytest.param("unsaved", 5, id="in the first epoch of fine-tuning"),
        pytest.param("unsaved", 7, id="in the last epoch of fine-tuning"),
    ],
)
def test_stopping_and_resuming_equals_never_stopping(
    data: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, epoch: int
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, event, epoch)
        assert run("prune", *flags(data, tmp_path, *LONG)) == INTERRUPTED
    assert not (tmp_path / "prune" / "summary.json").exists()
    torch.manual_seed(12345)  # a fresh process would not have our generator's state either
    assert run("prune", *flags(data, tmp_path, *LONG, "--resume")) == 0
    for saved in ("pruned", "first_sparse_checkpoint.pth", "prune/best.pth"):
        assert same_tensors(weights(tmp_path / saved), weights(uninterrupted / saved)), saved
    for file in ("metrics.jsonl", "blocks.jsonl"):
        assert without_seconds(tmp_path / "prune" / file) == without_seconds(uninterrupted / "prune" / file)


def test_resuming_equals_never_stopping_with_everything_that_has_a_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distilled student, its moving average, fp16's loss scale and a warmed-up schedule."""
    assert run("train", *flags(data, tmp_path / "teacher", "--epochs", "1")) == 0
    given = (
        *("--epochs", "2", "--prune-start-epoch", "0", "--finetune-epochs", "2"),
        *("--precision", "fp16", "--grad-accum-steps", "2"),
        *("--model-ema", "--model-ema-decay", "0.5", "--warmup-epochs", "1", "--clip-grad", "1", "--lr", "0.05"),
        *("--distillation-type", "soft", "--teacher-model", "vit_tiny_patch16_224"),
        *("--teacher-path", str(tmp_path / "teacher" / "dense")),
    )
    assert run("prune", *flags(data, tmp_path / "whole", *given, model=runs.TWO_HEADS)) == 0
    for event, epoch in (("saved", 1), ("saved", 3)):
        out = tmp_path / f"{event}{epoch}"
        with monkeypatch.context() as patch:
            kill_at(patch, event, epoch)
            assert run("prune", *flags(data, out, *given, model=runs.TWO_HEADS)) == INTERRUPTED
        assert run("prune", *flags(data, out, *given, "--resume", model=runs.TWO_HEADS)) == 0
        assert same_tensors(weights(out / "pruned"), weights(tmp_path / "whole" / "pruned"))
        for file in ("metrics.jsonl", "blocks.jsonl"):
            assert without_seconds(out / "prune" / file) == without_seconds(tmp_path / "whole" / "prune" / file)


def trained_for_one_of_two_epochs(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "saved", 1)
        assert run("train", *flags(data, out, "--epochs", "2")) == INTERRUPTED


def test_resume_is_told_the_same_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_for_one_of_two_epochs(data, tmp_path, monkeypatch)
    before = everything_in(tmp_path)
    capsys.readouterr()
    assert run("train", *flags(data, tmp_path, "--epochs", "3", "--lr", "0.1", "--resume")) == 2
    said = capsys.readouterr().err
    assert "--epochs was 2, now 3" in said and "--lr was 0.0005, now 0.1" in said
    assert everything_in(tmp_path) == before
    more = runs.colour_folders(tmp_path / "more", {"train": 9, "val": 3})  # where data lie may change, what they are may not
    assert run("train", *flags(more, tmp_path, "--epochs", "2", "--resume")) == 2
    assert "steps_per_epoch was 3, now 6" in capsys.readouterr().err, "other data or another number of processes"


def test_a_run_of_an_earlier_version_goes_on_with_its_optimizer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that came later are in their default; AdamW was not fused, and stays as it was."""
    trained_for_one_of_two_epochs(data, tmp_path, monkeypatch)
    file = tmp_path / "train" / "config.json"
    config = read(file)
    del config["training"]["compile"], config["data"]["cache"]
    file.write_text(json.dumps(config))
    checkpoints = Checkpoints(tmp_path / "train" / "checkpoints")
    newest = checkpoints.newest()
    assert newest is not None
    for group in newest.content["optimizer"]["param_groups"]:
        group["fused"] = None
    checkpoints.write(newest.content)
    capsys.readouterr()
    assert run("train", *flags(data, tmp_path, "--epochs", "2", "--compile", "--resume")) == 2
    assert "--compile was False, now True" in capsys.readouterr().err
    assert run("train", *flags(data, tmp_path, "--epochs", "2", "--resume")) == 0
    last = checkpoints.newest()
    assert last is not None and all(group["fused"] is None for group in last.content["optimizer"]["param_groups"])


def test_resuming_a_finished_run_does_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(data, tmp_path, "--epochs", "1")
    assert run("train", *given) == 0
    before = everything_in(tmp_path)
    assert run("train", *given, "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert everything_in(tmp_path) == before


def test_a_finished_run_is_not_taken_for_one_with_other_settings(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "1")) == 0
    before = everything_in(tmp_path)
    elsewhere = runs.colour_folders(tmp_path.parent / "elsewhere")
    for changed, told in (
        (flags(data, tmp_path, "--epochs", "2", "--lr", "0.1"), ("--epochs was 1, now 2", "--lr was 0.0005, now 0.1")),
        (flags(elsewhere, tmp_path, "--epochs", "1"), ("--data-path was", str(elsewhere))),
    ):
        for more in ((), ("--resume",)):
            capsys.readouterr()
            assert run("train", *changed, *more) == 2
            said = capsys.readouterr().err
            assert "finished run with other settings" in said and all(words in said for words in told), said
    assert everything_in(tmp_path) == before
    same = data / ".." / data.name
    assert run("train", *flags(same, tmp_path, "--epochs", "1", "--verbose", "--resume")) == 0, "the same place, and the screen"
    assert run("train", *flags(data, tmp_path, "--epochs", "2", "--overwrite")) == 0


def test_tables_and_summaries_name_the_part_and_leave_top5_of_few_classes_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "1")) == 0
    said = capsys.readouterr().out
    images = runs.SIZES["test"] * len(runs.COLOURS)
    assert "test top-1 (%)" in said and f"accuracy on {images} test images" in said and "top-5" not in said
    summary = read(tmp_path / "train" / "summary.json")
    assert summary["part"] == "test" and summary["classes"] == len(runs.COLOURS)
    assert summary["chance"] == pytest.approx({"val": 100 / 3, "test": 100 / 3})
    assert run("evaluate", *flags(data, tmp_path, "--model-path", str(tmp_path / "dense"), model=(), recipe=())) == 0
    assert "top-5" not in capsys.readouterr().out


def test_a_dense_run_on_other_images_is_no_comparison(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = runs.colour_folders(tmp_path / "other", {"train": 4, "val": 3})
    assert run("train", *flags(other, tmp_path / "dense", "--epochs", "1")) == 0
    capsys.readouterr()
    assert run("prune", *flags(data, tmp_path / "out", *runs.PHASES, "--dense-run", str(tmp_path / "dense"))) == 2
    assert "was measured on 0 test images, the pruned models will be on 9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resume_where_nothing_is_starts(data: Path, tmp_path: Path) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "1", "--resume")) == 0
    assert len(lines(tmp_path / "train" / "metrics.jsonl")) == 1


def test_overwrite_removes_its_own_stage_only(data: Path, tmp_path: Path) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "2")) == 0
    assert run("prune", *flags(data, tmp_path, "--epochs", "1", "--prune-start-epoch", "0")) == 0
    (tmp_path / "train" / "notes.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    before = everything_in(tmp_path)
    assert run("train", *flags(data, tmp_path, "--epochs", "1", "--overwrite")) == 0
    after = everything_in(tmp_path)
    others = {name: content for name, content in before.items() if not name.startswith(("train/", "dense/"))}
    assert {name: after[name] for name in others} == others
    assert "train/notes.txt" in after, "what is not of the run stays"
    assert len(lines(tmp_path / "train" / "metrics.jsonl")) == 1


# --- the folder itself ------------------------------------------------------------------------------------------------


def test_lines_after_the_checkpoint_and_half_lines_are_cut(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path, "prune")
    folder.begin({}, overwrite=False)
    for step in (3, 6):
        folder.append_line("metrics.jsonl", {"step": step})
        folder.append_line("blocks.jsonl", {"step": step})
        folder.append_line("blocks.jsonl", {"step": step + 1})
    at_checkpoint = dict(folder.lines)
    folder.append_line("blocks.jsonl", {"step": 9})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "tr')
    again = StageFolder(tmp_path, "prune")
    again.cut_lines(at_checkpoint)
    again.append_line("metrics.jsonl", {"step": 9})
    assert [line["step"] for line in lines(folder.path / "metrics.jsonl")] == [3, 6, 9]
    assert [line["step"] for line in lines(folder.path / "blocks.jsonl")] == [3, 4, 6, 7]
    assert again.lines == {"metrics.jsonl": 3, "blocks.jsonl": 4}


def evaluated(data: Path, saved: Path, *more: str) -> dict[str, Any]:
    """What `p3b evaluate` finds, from its record in an output folder."""
    out = saved.parent / f"evaluation-{saved.name}"
    given = ("--data-path", str(data), "--model-path", str(saved), "--num-workers", "0", "--device", "cpu", "--batch-size", "5")
    assert run("evaluate", *given, "--output-dir", str(out), "--overwrite", *more) == 0
    return read(out / "evaluate" / "summary.json")


def copy_tree(source: Path, target: Path) -> None:
    for name, content in everything_in(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def test_small_model_is_named_in_the_log_of_its_fine_tuning(data: Path, unfinetuned_run: Path, tmp_path: Path) -> None:
    start = unfinetuned_run / "pruned"
    assert run("finetune", *flags(data, tmp_path, "--model-path", str(start), "--epochs", "1", model=runs.MODEL)) == 0
    log = (tmp_path / "finetune" / "log.txt").read_text()
    assert f"{start} (saved by p3b)" in log and f"{parameters_of(p3b.load(start)):,} parameters" in log
