"""What a user can get wrong: a clear message on stderr, a non-zero exit, and nothing half written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import p3b
from refusals import Refusals
from runs import CALM, MACHINE, MODEL, PAPER, SHAPE, colour_folders, everything_in, finished, flags, lines, run, weights
from tiny import tiny_vit

QUICK_PRUNE = ("--epochs", "2", "--prune-start-epoch", "0")


@pytest.fixture(scope="module")
def pruned_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of `p3b prune`, never changed by a test."""
    return finished("prune", data, tmp_path_factory.mktemp("pruned"), "--epochs", "1", "--prune-start-epoch", "0")


# --- names and values -------------------------------------------------------------------------------------------------


def test_unknown_command(refused: Refusals) -> None:
    refused("prun", telling=("Unknown command 'prun'", "'prune'"))
    refused("frobnicate", telling=("Unknown command 'frobnicate'. Known: ", "compare, data, demo, ", "prune, ", "train."))


def test_unknown_flag(data: Path, refused: Refusals) -> None:
    refused("prune", *flags(data, refused.out, "--prune-ratoi", "0.5"), telling=("--prune-ratoi", "--prune-ratio"))
    refused("train", *flags(data, refused.out, "--prune-ratio", "0.5"), telling=("--prune-ratio",))


SETTINGS = {
    "--aa": [("ramd-m9", "ramd-m9"), ("rand-q9", "rand-q9")],
    "--batch-size": [("-4", "--batch-size must be above 0, got -4"), ("3", "even --batch-size")],
    "--cache": [(wrong, f"--cache must be auto, off or a number of gigabytes, got '{wrong}'") for wrong in ("0", "inf", "all")],
    "--clip-grad": [("0", "--clip-grad must be above 0")],
    "--crop-pct": [("1.5", "--crop-pct must lie in (0, 1], got 1.5"), ("0", "--crop-pct must lie in (0, 1]")],
    "--data-set": [("CIFAR1000", "Unknown data set 'CIFAR1000'. Did you mean 'CIFAR100'"), ("tfds/mnist", "read as a stream")],
    "--device": [("gpu", "Unknown device 'gpu'. Known: auto, cpu, cuda"), ("meta", "Device 'meta' is not covered")],
    "--distillation-type": [("soft", "needs both a teacher"), ("sofd", "needs both a teacher")],
    "--drop-path": [("1.0", "--drop-path must lie in [0, 1), got 1")],
    "--epochs": [("0", "--epochs must be above 0, got 0"), ("many", "invalid")],
    "--figure-format": [("jpeg", "png")],
    "--grad-accum-steps": [("0", "--grad-accum-steps must be above 0")],
    "--input-size": [("32", "--input-size 32 contradicts --model-kwargs img_size=16")],
    "--lr": [("0", "--lr must be above 0"), ("nan", "--lr must be above 0, got nan"), ("inf", "--lr must be finite")],
    "--max-train-images": [("0", "expected at least 1")],
    "--mean": [("123.675", "pixels are scaled to [0, 1] first"), ("nan", "--mean is nan")],
    "--min-lr": [("-1", "--min-lr must be 0 or more")],
    "--mixup": [("-1", "--mixup must be 0 or more")],
    "--model": [
        ("vit_tiny_patch16_242", "Unknown timm model 'vit_tiny_patch16_242'. Did you mean"),
        ("resnet50", "'resnet50' is a ResNet"),
    ],
    "--model-ema-decay": [("1", "--model-ema-decay must lie in (0, 1), got 1")],
    "--model-kwargs": [
        ("depth", "not of the form name=value"), ("deph=2", "'depth'"), ("num_heads=5", "not divisible by num_heads"),
    ],
    "--num-workers": [("-1", "--num-workers must be 0 or more")],
    "--opt": [("adamv", "Unknown optimizer 'adamv'. Did you mean"), ("adahessian", "second derivatives")],
    "--precision": [("fp8", "Unknown precision 'fp8'. Did you mean")],
    "--remode": [("pixl", "Unknown erasing mode 'pixl'. Did you mean 'pixel'")],
    "--reprob": [("2", "expected a probability in [0, 1]")],
    "--seed": [("-1", "--seed must lie in [0, 2**31), got -1")],
    "--smoothing": [("1", "--smoothing must lie in [0, 1), got 1")],
    "--std": [("58.4", "Divide values for pixels of 0 to 255 by 255"), ("0", "numbers from above 0 to 1")],
    "--teacher-model": [("vit_tiny_patch16_224", "needs both a teacher")],
    "--teacher-path": [("teacher.pth", "--teacher-path teacher.pth needs --teacher-model")],
    "--train-interpolation": [("bicubik", "Did you mean 'bicubic'")],
    "--val-share": [("1.5", "expected a share of the training images in [0, 1)"), ("0.2", "has a validation part")],
    "--warmup-epochs": [("2", "--warmup-epochs 2 leaves none of the 2 epochs"), ("-1", "--warmup-epochs must be 0 or more")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value", "said"), [(flag, value, said) for flag, values in SETTINGS.items() for value, said in values]
)
def test_settings_out_of_range_and_unknown_names(data: Path, refused: Refusals, flag: str, value: str, said: str) -> None:
    refused("train", *flags(data, refused.out, "--epochs", "2", flag, value), telling=(said,))


PRUNE_SETTINGS = {
    "--prune-method": [("blok_pr", "Unknown prune method 'blok_pr'. Did you mean 'block_pr'")],
    "--prune-ratio": [
        ("-0.1", "-0.1"), ("1", "[0, 1)"), ("1.5", "1.5"), ("0.99", "can be met"), ("half", "half"), ("nan", "nan"),
    ],
    "--prune-keep-ratios": [("0.5", "4"), ("1.5", "4")],
    "--prune-start-epoch": [
        ("2", "0 <= start < sparse <= finalize <= epochs"), ("200%", "The phases do not fit"),
        ("-1", "'-1' is not a duration"), ("soon", "'soon' is not a duration"),
    ],
    "--prune-sparse-epoch": [("0", "is sparse after 0 (--prune-sparse-epoch)"), ("3", "The phases do not fit")],
    "--prune-finalize-epoch": [
        ("3", "is finalized after 3 (--prune-finalize-epoch) of 2 (--epochs)"), ("0", "The phases do not fit"),
    ],
    "--prune-steps-update-mask": [("0", "--prune-steps-update-mask must be above 0")],
    "--prune-alpha": [("2", "alpha must lie in [0, 1], got 2")],
    "--prune-gamma": [("0", "gamma must lie in (0, 1], got 0")],
    "--prune-benefit-scale": [("0", "benefit_scale must lie in")],
    "--probe-lr": [("0", "probe_lr must lie in")],
    "--finetune-epochs": [("-1", "--finetune-epochs must be 0 or more")],
    "--finetune-lr": [("0", "--finetune-lr must be above 0")],
    "--dense-run": [("nowhere", "nowhere holds no finished `p3b train`")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value", "said"), [(flag, value, said) for flag, values in PRUNE_SETTINGS.items() for value, said in values]
)
def test_pruning_that_cannot_be_done_as_asked(data: Path, refused: Refusals, flag: str, value: str, said: str) -> None:
    refused("prune", *flags(data, refused.out, *QUICK_PRUNE, flag, value), telling=(said,))


def test_a_budget_beyond_reach_names_the_largest_ratio(data: Path, refused: Refusals) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3
    )
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    largest = blocks / sum(parameter.numel() for parameter in model.parameters())
    refused("prune", *flags(data, refused.out, *QUICK_PRUNE, "--prune-ratio", "0.99"), telling=(f"{largest:.3f}"[:4],))


def test_no_output_folder(data: Path, refused: Refusals) -> None:
    refused("train", "--data-path", str(data), *MODEL, *MACHINE, *PAPER, telling=("--output-dir is missing",))


def test_resume_and_overwrite_contradict_each_other(data: Path, refused: Refusals) -> None:
    refused("train", *flags(data, refused.out, "--resume", "--overwrite"), telling=("contradict each other",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(data: Path, refused: Refusals) -> None:
    refused("train", *flags(data, refused.out, "--device", "cuda"), telling=("torch finds no GPU", "--device cpu"))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_that_cannot_be_read(data: Path, refused: Refusals, tmp_path: Path) -> None:
    good = tmp_path / "good.pth"
    torch.save(tiny_vit(img_size=16).state_dict(), good)
    cases = {
        "missing.pth": (None, "There is no weights file"),
        "empty.pth": (b"", "is empty"),
        "truncated.pth": (good.read_bytes()[:2000], "is damaged"),
        "foreign.pth": (b"%PDF-1.7 something else entirely", "is damaged"),
        "foreign.safetensors": (b"%PDF-1.7 something else entirely", "is damaged or not a safetensors file"),
    }
    for name, (content, said) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refused("train", *flags(data, refused.out, "--model-path", str(tmp_path / name)), telling=(name, said))


def test_a_checkpoint_of_another_architecture(data: Path, refused: Refusals, tmp_path: Path) -> None:
    torch.save(tiny_vit(img_size=16, embed_dim=48).state_dict(), tmp_path / "wide.pth")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    for name, said in (("wide.pth", "embed_dim 48, the model's is 24"), ("resnet.pth", "a network of stages, such as ResNet")):
        refused("prune", *flags(data, refused.out, "--model-path", str(tmp_path / name)), telling=(name, said))


def test_a_shape_is_taken_only_from_what_p3b_saved(data: Path, refused: Refusals, tmp_path: Path, pruned_run: Path) -> None:
    torch.save(tiny_vit(img_size=16).state_dict(), tmp_path / "plain.pth")
    resize = "--resize-model-by-checkpoint"
    refused(
        "finetune",
        *flags(data, refused.out, resize, "--model-path", str(tmp_path / "plain.pth")),
        telling=("plain.pth is not a model that p3b saved", "leave --resize-model-by-checkpoint out"),
    )
    refused("train", *flags(data, refused.out, resize), telling=("--resize-model-by-checkpoint needs --model-path",))
    other = ("--model-path", str(pruned_run / "pruned"), "--model", "x", "--model-kwargs", "depth=12")
    refused("finetune", *flags(data, refused.out, *other), telling=("x",))


def test_damaged_models_of_ours(data: Path, refused: Refusals, tmp_path: Path, pruned_run: Path) -> None:
    for damage, said in (("config.json", "is not valid JSON"), ("model.safetensors", "damaged")):
        saved = tmp_path / f"damaged-{damage}"
        shutil.copytree(pruned_run / "pruned", saved)
        (saved / damage).write_bytes((saved / damage).read_bytes()[:100])
        refused("finetune", *flags(data, refused.out, "--model-path", str(saved), model=()), telling=(damage, said))
    (tmp_path / "empty").mkdir()
    refused(
        "finetune", *flags(data, refused.out, "--model-path", str(tmp_path / "empty")), telling=("is a folder without a model",)
    )


def test_a_small_model_is_not_pruned_again(data: Path, refused: Refusals, pruned_run: Path) -> None:
    saved = ("--model-path", str(pruned_run / "pruned"))
    refused("prune", *flags(data, refused.out, *saved, "--resize-model-by-checkpoint"), telling=("use `p3b finetune`",))
    refused("prune", *flags(data, refused.out, *QUICK_PRUNE, *saved, model=()), telling=("pruned",))


def test_commands_that_need_a_model(data: Path, refused: Refusals) -> None:
    refused("finetune", *flags(data, refused.out), telling=("--model-path is missing", "run/pruned"))
    refused("evaluate", *flags(data, refused.out, recipe=()), telling=("--model-path is missing", "run/pruned"))


def test_evaluation_refuses_other_classes(refused: Refusals, tmp_path: Path, pruned_run: Path) -> None:
    saved = ("--model-path", str(pruned_run / "pruned"))
    names = colour_folders(tmp_path / "names", classes=("blue", "green", "violet"))
    refused(
        "evaluate", *flags(names, refused.out, *saved, model=(), recipe=()), telling=("1 extra (violet)", "blue, green, red")
    )
    nameless = tmp_path / "nameless"
    p3b.save(p3b.load(pruned_run / "pruned"), nameless)
    count = colour_folders(tmp_path / "count", classes=("blue", "green"))
    given = flags(count, refused.out, "--model-path", str(nameless), model=(), recipe=())
    refused("evaluate", *given, telling=("not trained for these 2 classes", "head.weight", "class_names"))


def test_evaluation_refuses_weights_without_a_head(data: Path, refused: Refusals, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in tiny_vit(img_size=16, num_classes=3).state_dict().items() if "head" not in key}
    torch.save(state, tmp_path / "headless.pth")
    telling = ("not trained for these 3 classes", "head.weight")
    refused("evaluate", *flags(data, refused.out, "--model-path", str(tmp_path / "headless.pth"), recipe=()), telling=telling)


def test_evaluation_is_not_resumed_and_not_replaced_unasked(data: Path, refused: Refusals, pruned_run: Path) -> None:
    given = flags(data, refused.out, "--model-path", str(pruned_run / "pruned"), model=(), recipe=())
    refused("evaluate", *given, "--resume", telling=("nothing to resume",))
    refused("evaluate", *given, "--batch-size", "0", telling=("--batch-size must be above 0",))
    assert run("evaluate", *given) == 0
    refused("evaluate", *given, telling=("holds a finished run of this stage", "--overwrite"))
    assert run("evaluate", *given, "--overwrite") == 0


def test_a_teacher_for_other_classes(data: Path, refused: Refusals, tmp_path: Path) -> None:
    assert (
        run("train", *flags(colour_folders(tmp_path / "two", classes=("a", "b")), tmp_path / "teacher", "--epochs", "1")) == 0
    )
    taught = ("--distillation-type", "hard", "--teacher-model", "vit_tiny_patch16_224")
    path = ("--teacher-path", str(tmp_path / "teacher" / "dense"))
    refused("train", *flags(data, refused.out, *taught, *path), telling=("The teacher must know the same 3 classes",))
    wide = ("--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", *SHAPE[1:])
    refused("train", *flags(tmp_path / "two", refused.out, *taught, *path, model=wide), telling=("img_size", "contradicts"))


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_that_is_not_there(refused: Refusals, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("train", *flags(tmp_path / "nowhere", refused.out), telling=("There is no", "nowhere"))
    refused("train", *flags(tmp_path / "empty", refused.out), telling=("empty has no image", "Expected class folders"))
    cifar = ("--data-set", "CIFAR10")
    refused("train", *flags(tmp_path / "empty", refused.out, *cifar), telling=("CIFAR10 is not at", "--download"))
    refused("train", "--output-dir", str(refused.out), *MODEL, *MACHINE, *PAPER, telling=("--data-path",))


def test_one_class_only(refused: Refusals, tmp_path: Path) -> None:
    data = colour_folders(tmp_path / "data", classes=("red",))
    refused("prune", *flags(data, refused.out), telling=("has one class only ('red')",))


def test_classes_that_differ_between_train_and_val(refused: Refusals, tmp_path: Path) -> None:
    data = colour_folders(tmp_path / "data")
    (data / "val" / "red").rename(data / "val" / "rot")
    refused("prune", *flags(data, refused.out), telling=("1 missing (red)", "1 extra (rot)"))


def test_nothing_to_evaluate_on(data: Path, refused: Refusals) -> None:
    given = flags(data / "train", refused.out, "--val-share", "0")
    refused("train", *given, telling=("nothing to evaluate on", "--val-path"))


def test_images_in_no_class_folder(refused: Refusals, tmp_path: Path) -> None:
    tmp_path.joinpath("flat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "flat" / "1.png")
    refused("train", *flags(tmp_path / "flat", refused.out), telling=("1.png",))


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unreadable_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, workers: str) -> None:
    data = colour_folders(tmp_path / "data")
    broken = data / part / "red" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    given = flags(data, tmp_path / "out", "--epochs", "1", "--batch-size", "2", "--no-repeated-aug", "--num-workers", workers)
    assert run("train", *given) == 2
    said = capsys.readouterr().err
    assert f"Cannot read the image {broken}" in said and "--skip-unreadable" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "train" / "summary.json").exists() and not (tmp_path / "out" / "dense").exists()


# --- the output folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_a_finished_run_is_not_replaced_unasked(
    data: Path, pruned_run: Path, refused: Refusals, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    shutil.copytree(pruned_run, refused.out)
    start = () if command == "prune" else ("--model-path", str(refused.out / "pruned"))
    given = flags(data, refused.out, "--epochs", "1", "--prune-start-epoch", "0", *start)
    if command == "finetune":
        given = flags(data, refused.out, "--epochs", "1", *start)
        assert run(command, *given) == 0, "another stage has its own place"
    refused(command, *given, telling=(f"{command} holds a finished run of this stage", "--resume", "--overwrite"))


def test_an_unfinished_run_is_not_replaced_unasked(data: Path, pruned_run: Path, refused: Refusals) -> None:
    shutil.copytree(pruned_run, refused.out)
    (refused.out / "prune" / "summary.json").unlink()
    refused("prune", *flags(data, refused.out), telling=("holds an unfinished run of this stage",))


def test_an_output_folder_that_is_a_file(data: Path, refused: Refusals, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("train", *flags(data, out), telling=("cannot be written", "Choose another --output-dir"))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_whose_model_has_no_place(data: Path, refused: Refusals) -> None:
    refused.out.mkdir()
    (refused.out / "dense").write_text("mine")
    refused("train", *flags(data, refused.out), telling=("dense", "is a file"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that not even root can write to")
def test_an_output_folder_that_cannot_be_written(data: Path, refused: Refusals) -> None:
    refused("train", *flags(data, Path("/proc/self/p3b/run")), telling=("cannot be written",))


def test_a_checkpoint_that_cannot_be_resumed_from(data: Path, refused: Refusals, pruned_run: Path) -> None:
    shutil.copytree(pruned_run, refused.out)
    (refused.out / "prune" / "summary.json").unlink()
    for checkpoint in (refused.out / "prune" / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    given = flags(data, refused.out, "--epochs", "1", "--prune-start-epoch", "0", "--resume")
    refused("prune", *given, telling=("no checkpoint to resume from", "has changed since it was written", "--overwrite"))


# --- in the middle of a run -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step's loss is finite and the first epoch has one step: its weights are ruined before any loss tells."""
    steep = flags(data, tmp_path, "--epochs", "3", "--lr", "1e30", "--opt", "sgd", "--batch-size", "12", *CALM)
    assert run("train", *steep) == 2
    assert "not finite at optimizer step" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "train").iterdir()} == {"config.json", "log.txt"}


def test_the_checkpoint_before_a_loss_that_is_not_finite_can_be_gone_on_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import p3b.run.training

    save = p3b.run.training.save_checkpoint
    kept: list[dict[str, bytes]] = []

    def save_and_steepen(checkpoints: object, learner: object, is_main: bool, **progress: object) -> None:
        save(checkpoints, learner, is_main, **progress)  # type: ignore[arg-type]
        kept.append(everything_in(tmp_path / "train"))
        learner.optimizer.param_groups[0]["lr"] = float("inf")  # type: ignore[attr-defined]
        learner.scheduler = None  # type: ignore[attr-defined]

    given = flags(data, tmp_path, "--epochs", "2", *CALM)
    with monkeypatch.context() as patch:
        patch.setattr(p3b.run.training, "save_checkpoint", save_and_steepen)
        assert run("train", *given) == 2
    said = capsys.readouterr().err
    assert "The loss is not finite at optimizer step 4" in said and "--lr" in said and "--clip-grad" in said
    now = everything_in(tmp_path / "train")
    assert {name: now[name] for name in kept[0] if name != "log.txt"} == {
        name: content for name, content in kept[0].items() if name != "log.txt"
    }
    assert any(name.startswith("checkpoints/") for name in now)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "train" / "best.pth").values())
    assert run("train", *given, "--resume") == 0
    assert [line["epoch"] for line in lines(tmp_path / "train" / "metrics.jsonl")] == [1, 2]
    assert isinstance(p3b.load(tmp_path / "dense"), torch.nn.Module)
