"""`p3b compare`: every run is an ordinary one, is done once, and the table says what the lines say."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU

import p3b
import p3b.commands.compare
import p3b.run.records
import p3b.run.stage
from p3b.commands.command_line import STOPPED, USER_ERROR
from p3b.commands.compare import plan
from p3b.errors import ConfigError, ModelError
from p3b.methods import METHODS
from p3b.report.comparison import read_lines, subject, summarise, table
from p3b.report.comparison_page import figure_of, write_report
from p3b.run.guessing import said_of_guessing
from p3b.run.options import CompareConfig, CompareOptions
from p3b.run.same_settings import comparable
from p3b.run.series_lines import dense_guesses
from p3b.vit.architecture import describe_dense
from p3b.vit.smaller import cut_evenly, evenly_spaced, smaller_architecture
from processes import SparePython, on_ranks
from refusals import Refusals
from runs import PAPER, colour_folders, everything_in, flags, lines, read, run, same_tensors, weights
from tiny import DISTILLED, VIT, parameters_of, tiny_vit

QUICK = ("--epochs", "2", "--prune-start-epoch", "0", "--finetune-epochs", "1")
TWO = ("--methods", "block_benefit", "uniform", *QUICK)
NAMES = ["dense-seed0", "smaller-0.5-seed0", "block_benefit-0.5-seed0", "uniform-0.5-seed0"]


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a whole comparison, never changed by a test."""
    out = tmp_path_factory.mktemp("compared")
    assert run("compare", *flags(data, out, *TWO), figures=True) == 0
    return out


def runs_of(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out / "compare.jsonl") if line["kind"] == "run"]


def saved(out: Path, name: str) -> Path:
    return out / "runs" / name / ("dense" if name.startswith(("dense", "smaller")) else "pruned")


def without_times(found: list[dict[str, Any]], out: Path) -> list[str]:
    measured = {"train_seconds": None, "processor_seconds": None, "images_per_second": None}
    return [json.dumps({**line, **measured}).replace(str(out), "OUT") for line in found]


# --- the runs ---------------------------------------------------------------------------------------------------------


def test_a_line_for_each_run_and_what_it_says_is_so(compared: Path) -> None:
    found = runs_of(compared)
    assert [line["name"] for line in found] == NAMES
    for line in found:
        assert line["status"] == "done" and line["part"] == "test" and line["images"] == 9
        assert line["params"] == parameters_of(p3b.load(saved(compared, line["name"])))
        stage = compared / "runs" / line["name"] / ("prune" if "pruned" in str(saved(compared, line["name"])) else "train")
        assert line["top1"] == read(stage / "summary.json")["accuracy"]["test"]["top1"]
        assert line["epochs"] == 3, "as many for every row"
        assert line["train_seconds"] == sum(epoch["train_seconds"] for epoch in lines(stage / "metrics.jsonl"))
        assert line["versions"]["torch"] == torch.__version__ and line["hardware"]["cores"] == os.cpu_count()
    dense, *small = (line["params"] for line in found)
    assert all(abs(params / dense - 0.5) < 0.02 for params in small)


def test_the_recorded_command_gives_the_run_again(compared: Path, tmp_path: Path) -> None:
    for line in runs_of(compared):
        program, command, *given = shlex.split(line["command"])
        assert program == "p3b" and given[given.index("--output-dir") + 1] == str(compared / "runs" / line["name"])
        given[given.index("--output-dir") + 1] = str(tmp_path / line["name"])
        assert run(command, *given) == 0
        again = tmp_path / line["name"] / saved(compared, line["name"]).name
        assert same_tensors(weights(again), weights(saved(compared, line["name"]))), line["name"]


def test_methods_that_can_share_a_warm_up_and_come_out_as_alone(data: Path, tmp_path: Path) -> None:
    """block_benefit trains probes in it, at one ratio here; the others have nothing of their own by then."""
    given = ("--methods", "block_benefit", "uniform", "random", "--no-smaller", "--epochs", "2", "--prune-start-epoch", "1")
    assert run("compare", *flags(data, tmp_path, *given)) == 0
    assert [folder.name for folder in (tmp_path / "warm-ups").iterdir()] == ["plain-seed0"]
    for name in ("uniform-0.5-seed0", "random-0.5-seed0"):
        assert "is taken from" in (tmp_path / "runs" / name / "prune" / "log.txt").read_text()
    assert "is taken from" not in (tmp_path / "runs" / "block_benefit-0.5-seed0" / "prune" / "log.txt").read_text()
    command = shlex.split(runs_of(tmp_path)[-1]["command"])[2:]
    command[command.index("--output-dir") + 1] = str(tmp_path / "alone")
    assert run("prune", *command) == 0
    assert same_tensors(weights(tmp_path / "alone" / "pruned"), weights(saved(tmp_path, "random-0.5-seed0")))


def test_nothing_is_run_twice_and_more_may_be_added(data: Path, tmp_path: Path) -> None:
    given = ("--methods", "uniform", "--no-smaller", *QUICK)
    assert run("compare", *flags(data, tmp_path, *given)) == 0
    before = everything_in(tmp_path)
    (tmp_path / ".compare.jsonl.killed.part").write_text("half")
    assert run("compare", *flags(data, tmp_path, *given)) == 0
    assert everything_in(tmp_path) == before, "nor is anything left of one that was killed"
    assert run("compare", *flags(data, tmp_path, *given, "--prune-ratios", "0.5", "0.3", "--seeds", "0", "1")) == 0
    after = everything_in(tmp_path)
    ours = [name for name in before if name.startswith("runs/")]
    assert ours and all(after[name] == before[name] for name in ours)
    added = ["uniform-0.3-seed0", "dense-seed1", "uniform-0.5-seed1", "uniform-0.3-seed1"]
    assert [line["name"] for line in runs_of(tmp_path)] == ["dense-seed0", "uniform-0.5-seed0", *added]
    speeds = [line for line in lines(tmp_path / "compare.jsonl") if line["kind"] == "speed"]
    assert [(line["batch_size"], len(line["images_per_second"])) for line in speeds] == [(1, 2), (32, 2), (1, 6), (32, 6)]


def test_interrupted_and_continued_is_as_never_interrupted(
    data: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once in the middle of training, once while a run is wound up, by each signal that asks to stop."""

    def stop_at(place: str, owner: type, method: str, number: int) -> None:
        whole, calls = getattr(owner, method), []

        def stopping(self: Any, *given: Any) -> Any:
            if place in str(self.folder.root) and not calls:
                calls.append(1)
                os.kill(os.getpid(), number)
            return whole(self, *given)

        monkeypatch.setattr(owner, method, stopping)

    given = flags(data, tmp_path, *TWO)
    stop_at("smaller", p3b.run.records.Records, "log_epoch", signal.SIGTERM)
    stop_at("block_benefit", p3b.run.stage.Stage, "write_summary", signal.SIGINT)
    assert run("compare", *given) == STOPPED
    assert "run the same command again" in capsys.readouterr().err
    assert [line["name"] for line in runs_of(tmp_path)] == NAMES[:1]
    assert "| dense |" in (tmp_path / "compare.md").read_text(), "what is done has its table"
    assert run("compare", *given) == STOPPED
    assert [line["name"] for line in runs_of(tmp_path)] == NAMES[:2]
    assert run("compare", *given) == 0
    expected, found = (without_times(lines(out / "compare.jsonl"), out) for out in (compared, tmp_path))
    assert found == expected
    assert all(same_tensors(weights(saved(tmp_path, name)), weights(saved(compared, name))) for name in NAMES)


def test_a_failing_run_does_not_stop_the_others(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 97 % not even what lies outside the blocks may stay."""
    given = flags(data, tmp_path, "--methods", "uniform", *QUICK, "--prune-ratios", "0.97", "0.5")
    assert run("compare", *given) == USER_ERROR
    said = capsys.readouterr().err
    assert "2 of 5 runs failed: smaller-0.97-seed0, uniform-0.97-seed0" in said and "Traceback" not in said
    status = {line["name"]: line["status"] for line in runs_of(tmp_path)}
    assert status == {
        "dense-seed0": "done",
        "smaller-0.97-seed0": "failed",
        "uniform-0.97-seed0": "failed",
        "smaller-0.5-seed0": "done",
        "uniform-0.5-seed0": "done",
    }
    assert all("cannot be met" in line["message"] for line in runs_of(tmp_path) if line["status"] == "failed")
    assert re.search(r"## Failed\n\n- smaller-0\.97-seed0: .*cannot be met", (tmp_path / "compare.md").read_text())
    before = runs_of(tmp_path)
    assert run("compare", *given) == USER_ERROR
    assert runs_of(tmp_path) == before, "the same failure is said once"


def test_every_run_is_on_all_ranks(python: SparePython, data: Path, tmp_path: Path) -> None:
    once = ("--epochs", "1", "--prune-start-epoch", "0", "--finetune-epochs", "0", "--batch-size", "2")
    few = ("--methods", "uniform", "--no-smaller", "--prune-ratios", "0.97", "0.5", "--layout", "index")
    done = on_ranks(python, 2, "compare", *flags(data, tmp_path, *few, *once))
    assert "1 of 3 runs failed: uniform-0.97-seed0" in done.errors, done.errors[-3000:]
    assert done.errors.count("runs failed") == 1, "one process speaks"
    found = [line for line in runs_of(tmp_path) if line["status"] == "done"]
    assert [(line["name"], line["processes"]) for line in found] == [("dense-seed0", 2), ("uniform-0.5-seed0", 2)]
    assert len(lines(tmp_path / "compare.jsonl")) == 5, "three runs, two batch sizes"


# --- settings ---------------------------------------------------------------------------------------------------------


def parsed(monkeypatch: pytest.MonkeyPatch, *given: str) -> CompareConfig:
    """The settings that a command line comes to."""
    found: list[CompareConfig] = []
    monkeypatch.setattr(p3b.commands.compare, "compare", lambda config, splits: found.append(config))
    assert run("compare", *PAPER, "--from-scratch", *given) == 0
    return found[0]


def test_a_yaml_file_says_what_flags_say_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text(
        "methods: [uniform, random]\nprune-ratios: [0.3, 0.5]\nseeds: 7\nsmaller: false\nepochs: 4\nlr: 1e-3\naa: null\n"
        "repeated_aug: no\nmodel_kwargs: [img_size=16, patch_size=8]\noutput_dir: out\nmean: [0.5, 0.5, 0.5]\n"
    )
    said = ("--methods", "uniform", "random", "--prune-ratios", "0.3", "0.5", "--seeds", "7", "--no-smaller", "--epochs", "4")
    said += ("--lr", "0.001", "--aa", "None", "--no-repeated-aug", "--model-kwargs", "img_size=16", "patch_size=8")
    said += ("--output-dir", "out", "--mean", "0.5", "0.5", "0.5")
    by_flags = parsed(monkeypatch, *said)
    by_file = parsed(monkeypatch, "--config", str(file))
    assert comparable(by_file, 1) == comparable(by_flags, 1)
    assert plan(by_file) == plan(by_flags) and by_file.run == by_flags.run
    assert by_file.augment.aa is None and by_file.training.lr == 1e-3 and by_file.compare.seeds == (7,)
    over = parsed(monkeypatch, "--seeds", "1", "2", f"--config={file}", "--epochs", "9", "--repeated-aug")
    assert over.compare.seeds == (1, 2) and over.training.epochs == 9 and over.augment.repeated_aug
    assert over.training.lr == 1e-3


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("methds: [uniform]", "Unknown setting 'methds'. Did you mean 'methods'"),
        ("config: other.yaml", "Unknown setting 'config'"),
        ("training:\n  epochs: 3", "Unknown setting 'training'"),
        ("epochs: {a: 1}", "epochs is {'a': 1}; expected a number"),
        ("smaller: 1", "smaller is 1; expected true or false"),
        ("epochs: true", "epochs is True; expected a number"),
        ("- epochs", "holds no settings"),
        ("epochs: [", "cannot be read"),
        ("prune-ratios: 0.5\nprune_ratios: 0.3", "gives prune_ratios twice"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], written: str, message: str
) -> None:
    file, out = tmp_path / "compare.yaml", tmp_path / "out"
    file.write_text(written)
    assert run("compare", *flags(data, out, *QUICK), "--config", str(file)) == USER_ERROR
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--methods", "unifrom"), "Unknown prune method 'unifrom'. Did you mean 'uniform'"),
        (
            ("--methods", "block_pr", "block_pr"),
            "--methods is block_pr block_pr; expected at least one, each once",
        ),
        (("--prune-ratios", "1.5"), "--prune-ratios must lie in [0, 1), got 1.5"),
        (("--seeds", "-1"), "--seed must lie in [0, 2**31), got -1"),
        (("--methods", "uniform", "--prune-alpha", "0.7"), "--prune-alpha 0.7 means nothing to the methods that are compared"),
        (("--epochs", "0"), "--prune-start-epoch 0 means nothing with --epochs 0"),
        (("--epochs", "0", "--finetune-epochs", "0"), "there is no dense model to compare with"),
        (("--data-path", "nowhere"), "nowhere"),
        (("--model", "vit_tinny_patch16_224"), "Did you mean 'vit_tiny_patch16_224'"),
        (("--model-path", "nowhere.pth"), "nowhere.pth"),
        (("--device", "cuda:99"), "Device 'cuda:99'" if not torch.cuda.is_available() else "cuda"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    data: Path, refused: Refusals, given: tuple[str, ...], message: str
) -> None:
    refused("compare", *flags(data, refused.out, *QUICK, *given), telling=(message,))


def test_other_settings_in_the_same_folder_are_refused(data: Path, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything_in(compared)
    assert run("compare", *flags(data, compared, *TWO, "--lr", "0.1")) == USER_ERROR
    assert "lr was 0.0005, now 0.1" in capsys.readouterr().err
    assert everything_in(compared) == before


def test_a_series_goes_on_with_images_kept_in_memory_or_not(compared: Path) -> None:
    assert read(compared / "compare.json").keys().isdisjoint({"cache", "num_workers"})


def test_all_methods_by_default_and_a_setting_only_for_those_that_take_it() -> None:
    config = CompareConfig(compare=CompareOptions(seeds=(3, 4)))
    runs = plan(config)
    assert [entry.row for entry in runs[: len(runs) // 2]] == ["dense", "smaller", *METHODS]
    assert [entry.seed for entry in runs] == [3] * (len(runs) // 2) + [4] * (len(runs) // 2)
    with pytest.raises(ConfigError, match="--seeds is empty"):
        plan(CompareConfig(compare=CompareOptions(seeds=())))


# --- the smaller model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"embed_dim": 64, "num_heads": 8, "depth": 3},
        {"name": DISTILLED},
        {"init_values": 0.1, "reg_tokens": 2},
        {"qkv_bias": False, "class_token": False, "global_pool": "avg"},
        {"global_pool": "map", "class_token": False},
        {"mlp_ratio": 2.0, "embed_dim": 40, "num_heads": 5},
    ],
    ids=str,
)
def test_the_smaller_model_has_the_parameters_of_the_pruned_one(changed: dict[str, Any], ratio: float) -> None:
    model = tiny_vit(**changed)
    architecture = describe_dense(model)
    small = cut_evenly(model, smaller_architecture(architecture, (1 - ratio) * parameters_of(model)))
    assert abs(parameters_of(small) / ((1 - ratio) * parameters_of(model)) - 1) <= 0.02
    assert len(small.blocks) == len(model.blocks)
    assert small.blocks[0].attn.head_dim == model.blocks[0].attn.head_dim
    assert small.embed_dim <= model.embed_dim
    assert small.blocks[0].mlp.fc1.out_features <= model.blocks[0].mlp.fc1.out_features
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_the_smaller_model_starts_from_evenly_spaced_channels() -> None:
    model = tiny_vit(embed_dim=32, num_heads=4)
    architecture = describe_dense(model)
    architecture["arguments"] |= {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 3.0}
    small = cut_evenly(model, architecture)
    block, cut = model.blocks[1], small.blocks[1]
    channels = list(range(0, 32, 2))
    assert torch.equal(small.pos_embed, model.pos_embed[..., channels])
    assert torch.equal(cut.norm1.weight, block.norm1.weight[channels])
    # Of four heads of eight channels the first and the third stay, whole, in q, k and v alike.
    heads = block.attn.qkv.weight.unflatten(0, (3, 4, 8))[:, [0, 2]][..., channels]
    assert torch.equal(cut.attn.qkv.weight, heads.flatten(0, 2))
    outputs = block.attn.proj.weight.unflatten(1, (4, 8))[channels][:, [0, 2]]
    assert torch.equal(cut.attn.proj.weight, outputs.flatten(1))
    hidden = evenly_spaced(128, 48)
    assert hidden[:4] == [0, 2, 5, 8] and len(set(hidden)) == 48
    assert torch.equal(cut.mlp.fc1.weight, block.mlp.fc1.weight[hidden][:, channels])
    assert torch.equal(cut.mlp.fc2.weight, block.mlp.fc2.weight[channels][:, hidden])
    assert torch.equal(small.head.weight, model.head.weight[:, channels])
    assert torch.equal(small.head.bias, model.head.bias)


def test_cutting_to_the_same_size_changes_nothing() -> None:
    model = tiny_vit()
    assert same_tensors(cut_evenly(model, describe_dense(model)).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mlp_layer": SwiGLU}, "mlp_layer=SwiGLU"),
        ({"scale_attn_norm": True}, "scale_attn_norm=True"),
        ({"name": "vit_small_patch16_dinov3", "embed_dim": 32, "num_heads": 2}, "Eva"),
    ],
)
def test_a_smaller_model_of_another_kind_is_refused(changed: dict[str, Any], reason: str) -> None:
    model = tiny_vit(**changed)
    with pytest.raises(ModelError, match=rf"{reason}.*--no-smaller"):
        smaller_architecture(describe_dense(model), 0.5 * parameters_of(model))


def test_a_size_that_no_smaller_model_has_is_refused() -> None:
    model = tiny_vit()
    with pytest.raises(ModelError, match=r"comes within 2% of .*--no-smaller"):
        smaller_architecture(describe_dense(model), 0.01 * parameters_of(model))


@pytest.mark.parametrize("classes", [("blue", "green", "red"), ("light", "dark")], ids=["its classes", "others"])
def test_the_smaller_row_starts_from_the_weights_of_the_dense_one(data: Path, tmp_path: Path, classes: tuple[str, ...]) -> None:
    """The head too, where it is for as many classes."""
    source = colour_folders(tmp_path / "source", classes=classes)
    assert run("train", *flags(source, tmp_path / "before", "--epochs", "1")) == 0
    given = ("--methods", "uniform", "--model-path", str(tmp_path / "before" / "dense"), *QUICK)
    assert run("compare", *flags(data, tmp_path / "out", *given)) == 0
    dense = p3b.load(tmp_path / "before" / "dense")
    start = p3b.load(tmp_path / "out" / "runs" / "smaller-0.5-seed0" / "start")
    architecture = describe_dense(start)  # type: ignore[arg-type]
    architecture["arguments"]["num_classes"] = len(classes)
    expected, found = cut_evenly(dense, architecture).state_dict(), start.state_dict()  # type: ignore[arg-type]
    if len(classes) != 3:
        assert found.pop("head.weight").shape == (3, 16) and found.pop("head.bias").shape == (3,)
        expected = {key: expected[key] for key in found}
    assert same_tensors(found, expected)


# --- the table --------------------------------------------------------------------------------------------------------


def cells_of(out: Path) -> dict[tuple[str, str], list[str]]:
    """The cells of compare.md by row and ratio."""
    rows = [line.strip("|").split("|") for line in (out / "compare.md").read_text().splitlines() if line.startswith("| ")]
    return {(cells[0].strip(), cells[1].strip()): [cell.strip() for cell in cells] for cells in rows[1:]}


def test_the_table_says_what_the_lines_say(compared: Path) -> None:
    cells = cells_of(compared)
    found = {line["name"]: line for line in runs_of(compared)}
    speeds = {
        line["batch_size"]: line["images_per_second"] for line in lines(compared / "compare.jsonl") if line["kind"] == "speed"
    }
    assert list(cells) == [("dense", "-"), ("smaller", "50 %"), ("block_benefit", "50 %"), ("uniform", "50 %")]
    dense = found["dense-seed0"]
    for (row, _), told in cells.items():
        line = found[next(name for name in NAMES if name.startswith(row))]
        share = line["top1"] / 100
        assert told[2] == "0"
        assert told[3] == f"{line['top1']:.2f} ± {100 * (share * (1 - share) / 9) ** 0.5:.2f}"
        assert told[4:8] == [  # no top-5 of three classes
            f"{line['params']:,}",
            f"{line['params'] / dense['params']:.1%}",
            f"{line['macs'] / 1e6:.1f}",
            f"{line['macs'] / dense['macs']:.1%}",
        ]
        for cell, speed in zip(told[8:10], (speeds[1], speeds[32]), strict=True):
            assert cell == f"{speed[line['name']]:,.0f} (x {speed[line['name']] / speed['dense-seed0']:.2f})"
        assert told[10] == f"{line['train_seconds'] / 60:.1f}"
    text = (compared / "compare.md").read_text()
    guesses = said_of_guessing("The dense model", "test", dense["top1"], 100 / 3, 9)
    assert (guesses is not None) == ("no better than guessing" in text) and "top-5" not in text
    assert "one seed only" in text and "standard deviation" not in text
    assert all(line["command"] in text for line in found.values())


def test_the_page_needs_no_other_file(compared: Path) -> None:
    text = (compared / "compare.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text) and "<script" not in text and "@import" not in text
    assert text.count("<svg") == 2 and text.count("<path") > 20, "the figure is there, and not empty"
    assert "#222222" not in text, "its ink is the page's, light or dark"
    for cells in cells_of(compared).values():
        assert all(f">{cell}</td>" in text for cell in cells)


def test_the_page_says_what_is_compared(compared: Path) -> None:
    """Model, size and data stand above the table, and every cell knows its column, for screens too narrow for columns."""
    lines = read_lines(compared)
    told = subject(summarise(lines))
    dense = next(line for line in lines if line.get("row") == "dense")
    assert told.startswith(f"{VIT} ({dense['params']:,} parameters); FOLDER from ")
    for name in ("compare.html", "compare.md"):
        assert told in html.unescape((compared / name).read_text())
    text = (compared / "compare.html").read_text()
    assert text.count('data-label="parameters"') == len(cells_of(compared))


def line_of(row: str, ratio: float | None, seed: int, top1: float, **changed: Any) -> dict[str, Any]:
    name = f"{row}-{ratio}-seed{seed}"
    line = {"kind": "run", "name": name, "row": row, "ratio": ratio, "seed": seed, "command": f"p3b {name}", "status": "done"}
    line |= {"part": "test", "images": 400, "top1": top1, "top5": 99.0, "params": 1000 + seed, "macs": 5_000_000}
    line |= {"train_seconds": 60.0 * (seed + 1), "device": "cpu", "processes": 1, "precision": "float32", "versions": {}}
    return {**line, "commit": None, "date": "2026-01-01", **changed}


def test_mean_and_spread_over_seeds_and_the_last_line_of_a_run_wins() -> None:
    told = [80.0, 83.0, 84.5]
    given = [
        line_of("uniform", 0.5, 0, 1.0),
        *(line_of("uniform", 0.5, seed, top1) for seed, top1 in enumerate(told)),
        line_of("dense", None, 0, 90.0),
        line_of("random", 0.3, 0, 70.0),
        line_of("random", 0.5, 0, 0.0, status="failed", message="no"),
    ]
    comparison = summarise(given)
    assert [(row.name, row.ratio) for row in comparison.rows] == [("dense", None), ("random", 0.3), ("uniform", 0.5)]
    dense, random, uniform = comparison.rows
    assert uniform.seeds == (0, 1, 2) and uniform.params == 1001 and uniform.train_seconds == 120
    assert (uniform.top1.mean, uniform.top1.deviation) == pytest.approx((statistics.mean(told), statistics.stdev(told)))
    assert random.top1.deviation == pytest.approx(100 * (0.7 * 0.3 / 400) ** 0.5) and dense.speeds == {}
    assert [line["name"] for line in comparison.failed] == ["random-0.5-seed0"]
    head, cells = table(comparison)
    assert not any("images/s" in name for name in head) and len(head) == len(cells[0])


def test_latencies_that_hardly_differ_look_alike() -> None:
    """Axes begin at 0, and no line makes a trend of latencies."""
    lines = [line_of("dense", None, 0, 90.0), *(line_of("uniform", ratio, 0, 80.0 - ratio) for ratio in (0.3, 0.5))]
    speeds = {line["name"]: 100.0 + number for number, line in enumerate(lines)}
    told = {
        "kind": "speed",
        "batch_size": 1,
        "images_per_second": speeds,
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
    }
    sizes, latencies = figure_of(summarise([*lines, told])).axes
    assert sizes.get_xlim()[0] == latencies.get_xlim()[0] == 0
    spread = 1000 / 100 - 1000 / 102
    assert spread / latencies.get_xlim()[1] < 0.02
    assert all(container.lines[0].get_linestyle() == "None" for container in latencies.containers)
    assert sizes.containers[-1].lines[0].get_linestyle() == "-", "sizes are joined, budget by budget"


def test_a_table_of_an_unfinished_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--output-dir", str(tmp_path), "--table-only", "--figure-format", "svg")
    assert run("compare", *given) == USER_ERROR
    assert "nothing has been compared there yet" in capsys.readouterr().err
    line = line_of("uniform", 0.5, 0, 50.0, command="p3b prune --model '<b>'")
    (tmp_path / "compare.jsonl").write_text(json.dumps(line) + "\n")
    assert run("compare", *given, figures=True) == 0
    assert cells_of(tmp_path)["uniform", "50 %"][3:7] == ["50.00 ± 2.50", "99.00 ± 0.50", "1,000", "-"]
    assert "&lt;b&gt;" in (tmp_path / "compare.html").read_text()
    assert (tmp_path / "compare.svg").read_text().startswith("<?xml")


def test_equal_lines_give_equal_reports(compared: Path, tmp_path: Path) -> None:
    (tmp_path / "compare.jsonl").write_bytes((compared / "compare.jsonl").read_bytes())
    written = write_report(tmp_path, answer=dense_guesses(read_lines(tmp_path)))
    assert [file.name for file in written] == ["compare.png", "compare.md", "compare.html"]
    for name in ("compare.md", "compare.html", "compare.png"):
        assert (tmp_path / name).read_bytes() == (compared / name).read_bytes()


@pytest.mark.parametrize("damaged", ["{", "[]", '{"kind": "cake"}', "{}"])
def test_a_damaged_line_is_named(compared: Path, tmp_path: Path, damaged: str) -> None:
    good = (compared / "compare.jsonl").read_text().splitlines()[0]
    (tmp_path / "compare.jsonl").write_text(f"{good}\n{damaged}\n")
    with pytest.raises(OSError, match=r"Line 2 of .*compare\.jsonl is not of a comparison"):
        read_lines(tmp_path)
