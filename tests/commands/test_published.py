"""Both published command lines in two processes, on a tiny CIFAR-100 in torchvision's own format."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import p3b
from p3b.storage.artifact import read_config
from processes import SparePython, on_ranks
from runs import everything_in, lines, read, write_cifar100
from tiny import parameters_of

REPOSITORY = Path(__file__).parents[2]
SHAPE = ("img_size=32", "embed_dim=48", "depth=2", "num_heads=3")

PRUNE = """python -m torch.distributed.launch --nproc_per_node=4 --master_port $USED_PORT --use_env main.py
    --output_dir $OUTPUT_DIR --epochs 50 --batch-size 64 --grad-accum-steps 2 --data-set CIFAR100 --data-path $PATH_DATASET
    --model deit_small_patch16_224 --model-path $MODEL_PATH --prune-method "block_pr" --prune-ratio $PRUNE_RATIO
    --prune-steps-update-mask 100 --prune-start-epoch 10 --dist-eval"""
FINETUNE = """python -m torch.distributed.launch --nproc_per_node=4 --master_port $USED_PORT --use_env main.py
    --output_dir $OUTPUT_DIR --batch-size 128 --data-set CIFAR100 --data-path $PATH_DATASET --model deit_small_patch16_224
    --model-path ${OUTPUT_DIR}/first_sparse_checkpoint.pth --resize-model-by-checkpoint --dist-eval"""
SMALL = ("--model-kwargs", *SHAPE, "--layout", "index")
"""Appended, so that the model is small and no layout is measured; the pretrained weights are of that size."""
HERE = ("--num-workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands behind the variables of the published command lines."""
    root = tmp_path_factory.mktemp("published")
    write_cifar100(root / "data", train=22, test=13)  # no multiple of anything
    arguments = {name: int(value) for name, value in (item.split("=") for item in SHAPE)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pretrained = timm.create_model("deit_small_patch16_224", num_classes=1000, **arguments)
    torch.save({"model": pretrained.state_dict()}, root / "deit.pth")
    return {
        "OUTPUT_DIR": str(root / "out"), "PATH_DATASET": str(root / "data"), "MODEL_PATH": str(root / "deit.pth"),
        "PRUNE_RATIO": "0.5",
    }  # fmt: skip


LAUNCHER = """
import runpy, sys, warnings
warnings.resetwarnings()
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""`python -m`, in a process that has loaded torch; the ranks that it starts are Pythons of their own."""


def launch(python: SparePython, command: str, variables: dict[str, str], *appended: str) -> str:
    """Run a published command line with two processes; returns what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = shlex.split(command.replace("--nproc_per_node=4", "--nproc_per_node=2"))
    program, as_module, *given = (_fill(word, {**variables, "USED_PORT": port}) for word in words)
    assert (program, as_module) == ("python", "-m")
    done = python.run(LAUNCHER, *given, *appended, *HERE, folder=REPOSITORY, OMP_NUM_THREADS="1")
    assert done.status == 0, done.output[-3000:] + done.errors[-3000:]
    return done.output


def _fill(word: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        word = word.replace(f"${{{name}}}", value).replace(f"${name}", value)
    return word


@pytest.fixture(scope="module")
def pruned(published: dict[str, str], python: SparePython) -> Path:
    """The output folder of the first published command line."""
    said = launch(python, PRUNE, published, *SMALL, "--no-report")
    out = Path(published["OUTPUT_DIR"])
    assert "2 processes on cpu" in said
    assert said.count("epoch  50/50") == 1, "one process speaks"
    return out


def test_the_first_published_command_prunes(pruned: Path) -> None:
    config = read(pruned / "prune" / "config.json")
    assert config["training"]["epochs"] == 50 and config["training"]["grad_accum_steps"] == 2
    assert config["prune"]["prune_start_epoch"] == "10" and config["prune"]["prune_steps_update_mask"] == 100
    metrics = lines(pruned / "prune" / "metrics.jsonl")
    assert [line["phase"] for line in metrics] == ["warm-up"] * 10 + ["sparsify"] * 15 + ["sharpen"] * 25
    assert {line["kept_params"] for line in metrics[:10]} == {config["resolved"]["params"]}
    summary = read(pruned / "prune" / "summary.json")
    assert abs(summary["reached_prune_ratio"] - 0.5) < 0.01
    assert summary["accuracy"]["test"]["images"] == 13, "every image once, whatever the number of ranks"
    model = p3b.load(pruned / "first_sparse_checkpoint.pth")
    assert parameters_of(model) == summary["pruned"]["params"]
    log = (pruned / "prune" / "log.txt").read_text()
    assert "replaced head.weight: checkpoint (1000, 48), model (100, 48)" in log


def test_the_second_published_command_fine_tunes_what_the_first_has_left(
    pruned: Path, published: dict[str, str], python: SparePython
) -> None:
    """Under the agent of torch's newer launcher, torchrun; the older one's own process is the first command's matter."""
    before = everything_in(pruned)
    assert "report.html" not in before
    given = shlex.split(FINETUNE.split(" main.py")[1])
    done = on_ranks(python, 2, "main.py", *(_fill(word, published) for word in given), "--epochs", "2", *HERE)
    assert done.status == 0, done.errors[-3000:]
    after = everything_in(pruned)
    assert {name: after[name] for name in before} == before, "each stage has its own place"
    assert "report.html" in after
    config = read_config(pruned / "finetuned")
    assert config["blocks"] == read_config(pruned / "pruned")["blocks"]
    assert config["class_names"][:2] == ["class0", "class1"] and config["provenance"]["processes"] == 2
    metrics = lines(pruned / "finetune" / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2] and metrics[1]["lr"] == pytest.approx(1e-5)
    assert np.isfinite([line["train_loss"] for line in metrics]).all()
    assert read(pruned / "finetune" / "summary.json")["accuracy"]["test"]["images"] == 13
    assert read(pruned / "finetune" / "config.json")["resolved"]["processes"] == 2
