"""The command line: help, names, and every way of training that it offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import p3b
import runs
from p3b.commands.command_line import COMMANDS, INTERRUPTED, main
from p3b.deploy.choice import CANDIDATES
from p3b.storage.artifact import read_config
from runs import colour_folders, flags, last_checkpoint, lines, read, run, same_tensors, weights
from tiny import parameters_of, tiny_vit

QUICK_PRUNE = ("--epochs", "2", "--prune-start-epoch", "0")


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    assert run("train", *flags(data, out, "--epochs", "1")) == 0
    return out / "dense"


# --- the command line itself ------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_no_torch() -> None:
    script = (
        "import sys\nfrom p3b.commands.command_line import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'timm', 'numpy', 'tyro', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    before = os.times()
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30).stdout
    after = os.times()  # the processor's seconds: the machine may be busy
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help-all") == 0
    said = capsys.readouterr().out
    runs = ("demo", "train", "prune", "finetune", "compare", "sweep", "evaluate", "plan")
    assert f"p3b {command}" in said and ("--output-dir" in said) == (command in runs)
    assert ("--prune-ratio" in said) == (command in ("prune", "compare", "sweep", "demo", "plan"))


def test_help_says_the_published_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--help-all") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for default in (
        "(default: 0.0005)",
        "(default: rand-m9-mstd0.5-inc1)",
        "(default: 0.5)",
        "(default: 1e-05)",
        "(default: 50)",
    ):
        assert default in said


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and p3b.__version__ in capsys.readouterr().out
    assert main([]) == 0 and "usage: p3b <command>" in capsys.readouterr().out


def test_flags_are_taken_with_hyphens_and_underscores(data: Path, tmp_path: Path) -> None:
    given = [
        flag.replace("--output-dir", "--output_dir").replace("--batch-size", "--batch_size") for flag in flags(data, tmp_path)
    ]
    assert run("train", *given, "--epochs", "1") == 0
    assert (tmp_path / "train" / "summary.json").exists()


def test_the_published_flags_say_which_command_is_meant(data: Path, tmp_path: Path) -> None:
    assert run("main.py", *flags(data, tmp_path, "--prune-method", "block_pr", *QUICK_PRUNE, "--dist-eval")) == 0
    assert read(tmp_path / "prune" / "config.json")["prune"]["prune_method"] == "block_pr"
    start = ("--model-path", str(tmp_path / "first_sparse_checkpoint.pth"), "--resize-model-by-checkpoint")
    assert run("main.py", *flags(data, tmp_path, *start, "--epochs", "1", "--dist-eval", model=())) == 0
    assert (tmp_path / "finetuned" / "model.safetensors").exists()
    assert run("main.py", *flags(data, tmp_path, "--epochs", "1")) == 0
    assert (tmp_path / "train" / "summary.json").exists()
    saved = ("--data-path", str(data), "--model-path", str(tmp_path / "finetuned"), "--num_workers", "0", "--device", "cpu")
    assert run("main.py", "--eval", *saved, "--output_dir", str(tmp_path)) == 0
    stated = read(tmp_path / "finetune" / "summary.json")["accuracy"]
    found = read(tmp_path / "evaluate" / "summary.json")["accuracy"]
    assert {part: found[part]["top1"] for part in found} == {part: stated[part]["top1"] for part in stated}


# --- ways of training -------------------------------------------------------------------------------------------------


def test_accumulated_batches_train_as_one_bigger_batch(data: Path, tmp_path: Path) -> None:
    """With plain SGD: Adam would blow the rounding of gradients near zero up to whole steps."""
    for name, batch in (("one", ("--batch-size", "4")), ("two", ("--batch-size", "2", "--grad-accum-steps", "2"))):
        given = ("--opt", "sgd", "--lr", "1", "--epochs", "2", *runs.CALM, *batch)
        assert run("train", *flags(data, tmp_path / name, *given)) == 0
    one, two = (weights(tmp_path / name / "dense") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
    first, second = (lines(tmp_path / name / "train" / "metrics.jsonl") for name in ("one", "two"))
    assert [line["train_loss"] for line in first] == pytest.approx([line["train_loss"] for line in second], rel=1e-4)
    assert first[-1]["train_loss"] != pytest.approx(first[0]["train_loss"], rel=1e-3)


def test_equal_seeds_give_equal_runs(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("train", *flags(data, tmp_path / name, "--epochs", "1", "--seed", seed)) == 0
    a, b, c = (weights(tmp_path / name / "dense") for name in "abc")
    assert same_tensors(a, b) and not same_tensors(a, c)


def test_the_moving_average_is_what_is_saved(data: Path, tmp_path: Path) -> None:
    parts = ("--test-path", str(data / "test"), "--val-share", "0")  # the last epoch stays
    given = ("--model-ema", "--model-ema-decay", "0.5", "--epochs", "2", "--lr", "0.05")
    assert run("train", *flags(data / "train", tmp_path, *parts, *given)) == 0
    last = last_checkpoint(tmp_path / "train")
    average = {key.removeprefix("module."): tensor for key, tensor in last["ema"].items()}
    assert same_tensors(weights(tmp_path / "dense"), average)
    assert not same_tensors(last["model"], average)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_of_a_distilled_student(data: Path, teacher: Path, tmp_path: Path, kind: str) -> None:
    taught = ("--distillation-type", kind, "--teacher-model", "vit_tiny_patch16_224", "--teacher-path", str(teacher))
    losses = {}
    for name, given in (("taught", taught), ("alone", ())):
        out = tmp_path / name
        assert run("prune", *flags(data, out, *QUICK_PRUNE, "--lr", "0.1", *given, model=runs.TWO_HEADS)) == 0
        model = p3b.load(out / "pruned")
        assert parameters_of(model) == read(out / "prune" / "summary.json")["pruned"]["params"]
        assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3), "one answer from both heads"
        losses[name] = lines(out / "prune" / "metrics.jsonl")[0]["train_loss"]
    assert losses["taught"] != losses["alone"]


def test_the_teacher_sees_the_students_images(data: Path, tmp_path: Path) -> None:
    """A teacher of another image size is built for the student's, its position embedding resampled."""
    import timm

    big = timm.create_model("test_vit", num_classes=3)
    torch.save(big.state_dict(), tmp_path / "big.pth")
    taught = ("--distillation-type", "soft", "--teacher-model", "test_vit", "--teacher-path", str(tmp_path / "big.pth"))
    student = ("--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", *runs.SHAPE[1:])
    assert run("train", *flags(data, tmp_path / "out", "--epochs", "1", *taught, model=student)) == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(data: Path, tmp_path: Path, precision: str) -> None:
    given = ("--precision", precision, *runs.PHASES, "--finetune-epochs", "1")
    assert run("prune", *flags(data, tmp_path, *given)) == 0
    last = last_checkpoint(tmp_path / "prune")
    assert bool(last["scaler"]) == (precision == "fp16"), "only fp16 scales its loss"
    config = read(tmp_path / "prune" / "config.json")
    assert config["resolved"]["precision"] == {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert {tensor.dtype for tensor in weights(tmp_path / "pruned").values() if tensor.is_floating_point()} == {torch.float32}
    updates = lines(tmp_path / "prune" / "blocks.jsonl")
    assert len({tuple(block["keep_ratio_goal"] for block in line["blocks"]) for line in updates}) > 1, "benefits are measured"
    saved = ("--data-path", str(data), "--model-path", str(tmp_path / "pruned"), "--num-workers", "0", "--device", "cpu")
    assert run("evaluate", *saved, "--precision", precision, "--output-dir", str(tmp_path)) == 0
    stated, found = (read(tmp_path / stage / "summary.json")["accuracy"]["test"] for stage in ("prune", "evaluate"))
    assert found["loss"] == pytest.approx(stated["loss"], rel=1e-2)


def test_keep_ratios_by_hand(data: Path, tmp_path: Path) -> None:
    asked = (0.9, 0.3, 0.6, 0.5)
    assert run("prune", *flags(data, tmp_path, *QUICK_PRUNE, "--prune-keep-ratios", *map(str, asked))) == 0
    updates = lines(tmp_path / "prune" / "blocks.jsonl")
    for line in updates:
        assert [block["keep_ratio_goal"] for block in line["blocks"]] == pytest.approx(asked)
        assert all(block["benefit_cls"] is None and block["importance"] is None for block in line["blocks"])
    for block, ratio in zip(updates[-1]["blocks"], asked, strict=True):
        assert abs(block["kept_params"] - ratio * block["params"]) < 300
    assert read_config(tmp_path / "pruned")["params"] < 19347


def test_the_budget_over_blocks_alone(data: Path, tmp_path: Path) -> None:
    for name, more in (("all", ()), ("blocks", ("--prune-blocks-only",))):
        assert run("prune", *flags(data, tmp_path / name, *QUICK_PRUNE, "--prune-ratio", "0.3", *more)) == 0
    kept = {}
    for name in ("all", "blocks"):
        last = lines(tmp_path / name / "prune" / "blocks.jsonl")[-1]["blocks"]
        blocks = sum(block["params"] for block in last)
        kept[name] = sum(block["kept_params"] for block in last)
    others = 19347 - blocks
    assert kept["blocks"] == pytest.approx(0.7 * blocks, abs=300)
    assert kept["all"] == pytest.approx(0.7 * 19347 - others, abs=300)
    assert "the prune ratio applies to the blocks only" in (tmp_path / "blocks" / "prune" / "log.txt").read_text()


def test_finalizing_before_the_last_epoch_leaves_the_rest_to_fine_tuning(data: Path, tmp_path: Path) -> None:
    given = ("--epochs", "4", "--prune-start-epoch", "0", "--prune-sparse-epoch", "1", "--prune-finalize-epoch", "2")
    assert run("prune", *flags(data, tmp_path, *given, "--finetune-lr", "0.1")) == 0
    metrics = lines(tmp_path / "prune" / "metrics.jsonl")
    assert [line["phase"] for line in metrics] == ["sparsify", "sharpen", "fine-tune", "fine-tune"]
    assert metrics[1]["lr"] == 5e-4 * 4 / 512 and metrics[2]["lr"] == pytest.approx((0.1 * 4 / 512 + 1e-5) / 2)


def test_quiet_shows_the_final_table_alone_and_the_log_has_everything(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(data, tmp_path, "--epochs", "1", "--prune-start-epoch", "0", *runs.CALM)
    assert run("prune", *given, "-q") == 0
    shown, log = capsys.readouterr().out, (tmp_path / "prune" / "log.txt").read_text()
    assert "images per second" in shown and "epoch   1/1" not in shown and "came back" not in shown
    assert "images per second" in log and "epoch   1/1" in log and "pruned elements that came back: " in log
    assert run("prune", *given, "-v", "--overwrite") == 0
    assert "pruned elements that came back: " in capsys.readouterr().out
    assert run("prune", *given, "-v", "--quiet") == 2
    assert "--verbose and --quiet contradict each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "sparse", "final", "schedule"),
    [
        ("25%", "75%", None, "starts at 3, reaches its target at 9, ends at 12"),
        ("2steps", "5 steps", "3", "starts at 2, reaches its target at 5, ends at 9"),
        ("0.5 epochs", "2", "10steps", "starts at 2, reaches its target at 6, ends at 12"),
    ],
)
def test_durations_in_percent_steps_and_epochs(
    data: Path, tmp_path: Path, start: str, sparse: str, final: str | None, schedule: str
) -> None:
    given = ("--epochs", "4", "--prune-start-epoch", start, "--prune-sparse-epoch", sparse)
    given += () if final is None else ("--prune-finalize-epoch", final)
    assert run("prune", *flags(data, tmp_path, *given)) == 0
    assert schedule in (tmp_path / "prune" / "log.txt").read_text()


def test_masks_that_are_hard_from_the_first_update_on(data: Path, tmp_path: Path) -> None:
    for masks in ("soft", "hard"):
        assert run("prune", *flags(data, tmp_path / masks, *runs.PHASES, "--prune-masks", masks)) == 0
    softness = {
        masks: [line["tau"] for line in lines(tmp_path / masks / "prune" / "blocks.jsonl")] for masks in ("soft", "hard")
    }
    assert softness["soft"][0] == 0.1 and softness["soft"][-1] == 0
    assert softness["hard"] == [0] * len(softness["soft"])
    assert read(tmp_path / "hard" / "prune" / "summary.json")["returned"]["updates"] == len(softness["hard"])


def test_mask_updates_are_counted_in_mini_batches(data: Path, tmp_path: Path) -> None:
    given = ("--epochs", "4", "--prune-start-epoch", "0", "--batch-size", "2", "--grad-accum-steps", "2")
    assert run("prune", *flags(data, tmp_path, *given, "--prune-steps-update-mask", "6")) == 0
    assert [line["step"] for line in lines(tmp_path / "prune" / "blocks.jsonl")] == [3, 6, 9, 12]


def test_fewer_training_images(data: Path, tmp_path: Path) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "1", "--max-train-images", "6", "--batch-size", "2")) == 0
    assert read(tmp_path / "train" / "config.json")["resolved"]["steps_per_epoch"] == 3
    assert "train 6 images of 3 classes" in (tmp_path / "train" / "log.txt").read_text()


def test_a_learning_rate_below_the_least_one_does_not_climb(data: Path, tmp_path: Path) -> None:
    assert run("train", *flags(data, tmp_path, "--epochs", "2", "--lr", "1e-4")) == 0
    assert {line["lr"] for line in lines(tmp_path / "train" / "metrics.jsonl")} == {1e-4 * 4 / 512}


def test_other_augmentations_and_workers(data: Path, tmp_path: Path) -> None:
    given = ("--aa", "None", "--color-jitter", "0.4", "--reprob", "0.5", "--remode", "const", "--train-interpolation", "random")
    more = ("--crop-scale", "0.5", "1.0", "--no-repeated-aug", "--hflip", "0", "--mixup", "0", "--num-workers", "1")
    assert run("train", *flags(data, tmp_path, "--epochs", "1", *given, *more)) == 0
    augment = read(tmp_path / "train" / "config.json")["augment"]
    assert augment["aa"] is None and augment["crop_scale"] == [0.5, 1.0] and augment["repeated_aug"] is False


def test_classes_travel_with_the_model_whatever_their_number(tmp_path: Path) -> None:
    two = colour_folders(tmp_path / "two", classes=("light", "dark"))
    assert run("prune", *flags(two, tmp_path / "out", *QUICK_PRUNE)) == 0
    assert read_config(tmp_path / "out" / "pruned")["class_names"] == ["dark", "light"]
    start = ("--model-path", str(tmp_path / "out" / "pruned"), "--epochs", "1")
    three = colour_folders(tmp_path / "three")
    assert run("finetune", *flags(three, tmp_path / "out", *start, model=())) == 0
    config = read_config(tmp_path / "out" / "finetuned")
    assert config["class_names"] == list(runs.COLOURS)
    assert "replaced head.weight" in (tmp_path / "out" / "finetune" / "log.txt").read_text()
    assert len(config["blocks"]) == runs.BLOCKS


def test_unreadable_images_are_skipped_and_counted_where_asked(tmp_path: Path) -> None:
    data = colour_folders(tmp_path / "data")
    for part in ("train", "val"):
        (data / part / "red" / "broken.png").write_bytes(b"not an image")
    given = ("--epochs", "2", "--skip-unreadable", "--no-repeated-aug", "--batch-size", "2")
    assert run("train", *flags(data, tmp_path / "out", *given)) == 0
    summary = read(tmp_path / "out" / "train" / "summary.json")
    assert summary["unreadable_images"] == 2 and summary["accuracy"]["val"]["images"] == 9
    log = (tmp_path / "out" / "train" / "log.txt").read_text()
    assert "broken.png" in log and "2 unreadable image(s) were skipped" in log


def test_model_of_whole_default_shape_is_named_by_flags_alone(data: Path, tmp_path: Path) -> None:
    """--input-size is --model-kwargs img_size."""
    small = ("--model", "vit_tiny_patch16_224", "--input-size", "16", "--model-kwargs", *runs.SHAPE[1:])
    assert run("train", *flags(data, tmp_path, "--epochs", "1", model=small)) == 0
    assert read_config(tmp_path / "dense")["preprocessing"]["input_size"] == [3, 16, 16]
    assert runs.MODEL[0] == small[0]


def test_an_interrupted_run_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import p3b.run.training

    real, epochs = p3b.run.training.train_epoch, []

    def interrupted(*given: object) -> float:
        epochs.append(given)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(p3b.run.training, "train_epoch", interrupted)
    assert run("train", *flags(data, tmp_path, "--epochs", "3")) == INTERRUPTED
    assert "--resume" in capsys.readouterr().err
    assert run("train", *flags(data, tmp_path, "--epochs", "3", "--resume")) == 0
    assert len((tmp_path / "train" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_model_saved_without_preprocessing_is_evaluated_by_defaults_that_are_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """p3b.save in one's own loop need not say how images are prepared."""
    p3b.save(tiny_vit(img_size=16, patch_size=8, num_classes=len(runs.COLOURS)), tmp_path / "own")
    assert read_config(tmp_path / "own")["preprocessing"] is None
    given = ("--data-path", str(data), "--model-path", str(tmp_path / "own"), "--num-workers", "0", "--device", "cpu")
    assert run("evaluate", *given, "--output-dir", str(tmp_path / "out"), "--quiet") == 0
    said = capsys.readouterr().out
    assert "does not say how its images are to be prepared; assumed is --mean 0.485 0.456 0.406" in said
    whole = ("--mean", "0.4", "0.4", "0.4", "--std", "0.2", "0.2", "0.2", "--crop-pct", "1.0")
    assert run("evaluate", *given, *whole) == 0
    assert "assumed" not in capsys.readouterr().out
    accuracy = read(tmp_path / "out" / "evaluate" / "summary.json")["accuracy"]
    assert accuracy["test"]["images"] == runs.SIZES["test"] * len(runs.COLOURS)


def test_aligned_widths_and_a_layout_from_the_command_line(data: Path, tmp_path: Path) -> None:
    assert run("prune", *flags(data, tmp_path, *QUICK_PRUNE, "--align", "4", "--prune-ratio", "0.4")) == 0
    config, summary = read_config(tmp_path / "pruned"), read(tmp_path / "prune" / "summary.json")
    for block in config["blocks"]:
        assert block["inner"] % 4 == len(block["inputs"]) % 4 == len(block["outputs"]) % 4 == 0
    assert lines(tmp_path / "prune" / "blocks.jsonl")[-1]["kept_params"] == config["params"]
    assert [choice["batch_size"] for choice in summary["layouts"]] == [1, 32]
    for choice in summary["layouts"]:
        assert choice["images_per_second"][choice["layout"]] > 0
    saved = ("--data-path", str(data), "--model-path", str(tmp_path / "pruned"), "--num-workers", "0", "--device", "cpu")
    for layout in ("balanced", "auto"):
        out = tmp_path / layout
        assert run("evaluate", *saved, "--layout", layout, "--output-dir", str(out)) == 0
        found = read(out / "evaluate" / "summary.json")
        assert found["layout"] == layout or (layout == "auto" and found["layout"] in CANDIDATES)
        assert found["accuracy"]["test"]["loss"] == pytest.approx(summary["accuracy"]["test"]["loss"], rel=1e-5)
        assert found["model"]["params"] == config["params"], "the parameters are those of the compact model"


def test_thin_heads_go_whole_from_the_command_line(data: Path, tmp_path: Path) -> None:
    """And what is left is fine-tuned, saved and evaluated like any small model."""
    given = (*QUICK_PRUNE, "--align", "2", "--prune-keep-ratios", "0.1", "0.5", "1", "0.5", "--finetune-epochs", "1")
    assert run("prune", *flags(data, tmp_path, *given)) == 0
    config, last = read_config(tmp_path / "pruned"), lines(tmp_path / "prune" / "blocks.jsonl")[-1]
    thin, _, wide, _ = config["blocks"]
    assert config["schema"] == 4 and 1 <= thin["heads"] < 3 and wide["form"] == "whole"
    assert last["kept_params"] == config["params"]
    saved = ("--data-path", str(data), "--model-path", str(tmp_path / "pruned"), "--num-workers", "0", "--device", "cpu")
    assert run("evaluate", *saved, "--layout", "balanced", "--output-dir", str(tmp_path / "out")) == 0
    assert read(tmp_path / "out" / "evaluate" / "summary.json")["model"]["params"] == config["params"]


def test_a_layout_by_name_is_not_measured_and_an_unknown_one_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prune", *flags(data, tmp_path / "named", *QUICK_PRUNE, "--layout", "folded")) == 0
    layouts = read(tmp_path / "named" / "prune" / "summary.json")["layouts"]
    assert [(choice["layout"], choice["images_per_second"]) for choice in layouts] == [("folded", {}), ("folded", {})]
    for command in ("prune", "evaluate"):
        given = flags(data, tmp_path / "out", *(QUICK_PRUNE if command == "prune" else ()))
        wrong = given if command == "prune" else ["--data-path", str(data), "--model-path", str(tmp_path / "named" / "pruned")]
        assert run(command, *wrong, "--layout", "foldet") == 2
        assert "folded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("prune", *flags(data, tmp_path / "out", *QUICK_PRUNE, "--align", "0")) == 2
    assert "--align must be above 0" in capsys.readouterr().err
