"""The table at equal processor time: epochs follow from costs, rows are compared by image, the page says what lines say."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import equal_page
import equal_time
from equal_rows import PEER, ROWS, Costs, Entry, Plan, Scale, costs_of, is_timed, plan
from harness.paired import _beyond, compare, pack, unpack
from harness.records import read_lines, write_lines
from measured import require_budget
from p3b.errors import BudgetError, ConfigError
from p3b.run.option_checks import check
from p3b.run.options import PruneConfig, TrainConfig
from p3b.run.series_plan import DENSE, SMALLER
from transfers import TRANSFERS, USUAL, Transfer

ANIMALS = TRANSFERS[USUAL]
COSTS = Costs(dict.fromkeys(ROWS, 1.2), dict.fromkeys(ROWS, 0.4), 0.3, dict.fromkeys(ROWS, 0.1))


# --- epochs


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_row_takes_the_time_of_dense_training_to_half_an_epoch_of_its_small_model(row: Any, distilled: bool) -> None:
    found = plan(row, COSTS, 8, distilled=distilled)
    assert abs(found.dense_epochs - 8) <= (0.4 + 0.3 * distilled) / 2 + 1e-9
    assert row.at_once or found.warm_up + found.pruning == found.before, "the model is made small at the end of an epoch"


def test_what_a_row_takes_is_the_sum_of_its_phases() -> None:
    row = ROWS["uniform-early"]
    assert plan(row, COSTS, 3, distilled=False) == Plan(0.25, 0.75, 5, pytest.approx(0.25 + 0.75 * 1.2 + 5 * 0.4))
    assert plan(row, COSTS, 3, distilled=True) == Plan(0.25, 0.75, 2, pytest.approx(0.25 + 0.75 * 1.5 + 2 * 0.7))
    probing = plan(ROWS["p3b-early-full"], COSTS, 3, distilled=False)
    assert probing.dense_epochs == pytest.approx(1.2 + 4 * 0.4), "its probes learn during the warm-up, too"
    narrowed = Costs({**COSTS.pruning, "p3b-early": 0.4}, COSTS.small, 0.3)
    narrowing = plan(ROWS["p3b-early"], narrowed, 3, distilled=False)
    assert narrowing.dense_epochs == pytest.approx(0.25 + 0.75 * (1.0 + 0.4) / 2 + 6 * 0.4), "steps get cheaper on the way"
    assert plan(ROWS[SMALLER], COSTS, 3, distilled=True).small == 4
    assert plan(ROWS["p3b-once"], COSTS, 3, distilled=False) == Plan(0.25, 0, 7, pytest.approx(0.25 + 0.1 + 7 * 0.4))
    assert plan(ROWS["p3b-once"], COSTS, 3, distilled=False, equal="epochs").small == 2


def test_rows_may_have_as_many_epochs_as_the_dense_model_instead() -> None:
    found = plan(ROWS["uniform-early"], COSTS, 3, distilled=False, equal="epochs")
    assert found == Plan(0.25, 0.75, 2, pytest.approx(0.25 + 0.75 * 1.2 + 2 * 0.4))
    assert plan(ROWS[SMALLER], COSTS, 3, distilled=False, equal="epochs").small == 3
    with pytest.raises(ConfigError, match="it may take 2 in all"):
        plan(ROWS["uniform"], COSTS, 2, distilled=False, equal="epochs")
    alike = [
        Entry(ROWS[row], None if row == DENSE else 0.9, 0, Scale(equal=equal)).name
        for row in ("uniform", DENSE)
        for equal in ("time", "epochs")
    ]
    assert alike[0] != alike[1] == "uniform-0.9-equal-epochs-e3-32px-10000-seed0"
    assert alike[2] == alike[3], "dense training is the same"
    assert " --equal epochs " in equal_time.again(Entry(ROWS["uniform"], 0.9, 0, Scale(equal="epochs")), ANIMALS)
    assert "--equal" not in equal_time.again(Entry(ROWS["uniform"], 0.9, 0, Scale()), ANIMALS)


def test_a_row_that_does_not_fit_or_was_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"p3b-late takes 2\.40 epochs before its model is small; it may take 2 in all"):
        plan(ROWS["p3b-late"], COSTS, 2, distilled=False)
    with pytest.raises(ConfigError, match="a step of uniform takes was not measured; measured were savit"):
        plan(ROWS["uniform"], Costs({}, {"savit": 1.0}, 0.3), 3, distilled=False)


def test_costs_are_read_from_their_line() -> None:
    sides = {
        "dense": 1.0,
        "teacher": 0.3,
        "pruning uniform": 1.1,
        "small uniform": 0.4,
        "small smaller": 0.3,
        "cut uniform": 25.0,
    }
    line = {"steps_per_epoch": 100, "sides": {name: {"ratio": ratio} for name, ratio in sides.items()}}
    assert costs_of(line) == Costs({"uniform": 1.1}, {"uniform": 0.4, "smaller": 0.3}, 0.3, {"uniform": 0.25})


def test_costs_are_those_of_the_budget_and_the_image_size() -> None:
    entry, sides = Entry(ROWS["uniform"], 0.123, 0, Scale()), {"teacher": {"ratio": 0.3}, "small uniform": {"ratio": 0.4}}
    lines = [{"kind": "costs", "ratio": 0.123, "pixels": pixels, "sides": sides} for pixels in (16, 32)]
    assert equal_time.recorded_costs(lines, entry, ANIMALS).small == {"uniform": 0.4}
    with pytest.raises(ConfigError, match=r"equal_time.py costs --ratios 0\.123 --pixels 32"):
        equal_time.recorded_costs(lines[:1], entry, ANIMALS)
    equal_time.recorded_costs([], Entry(ROWS[DENSE], None, 0, Scale()), ANIMALS)


def test_latency_needs_a_dense_model_to_compare_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["speed", "--work", str(tmp_path), "--record", str(tmp_path / "lines.jsonl")]
    assert equal_time.main(asked) == 2
    assert "no dense run of this scale" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- runs


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=lambda transfer: transfer.name)
@pytest.mark.parametrize("name", [DENSE, SMALLER, "p3b-early", "savit", PEER])
def test_a_run_is_told_its_epochs_its_folder_and_its_teacher(name: str, transfer: Transfer) -> None:
    row, distilled = ROWS[name], name in (SMALLER, "p3b-early")
    entry = Entry(row, None if row.method == DENSE else 0.9, 1, Scale(8, 24, 3000), distilled)
    epochs = plan(row, COSTS, 8, distilled=entry.distilled)
    config = equal_time.config_for(entry, epochs, equal_time.Place(transfer, Path("DATA"), Path("WORK")))
    check(config)
    assert config.run.output_dir == Path("WORK/runs") / entry.name and config.run.seed == 1 and config.run.resume
    assert config.data.max_train_images == 3000
    if row.method != SMALLER:
        assert "img_size=24" in config.model.model_kwargs
    teacher = Path("WORK/runs") / Entry(ROWS[DENSE], None, 1, entry.scale).name
    if isinstance(config, PruneConfig):
        assert row.prunes and config.training.epochs == epochs.before and config.prune.finetune_epochs == epochs.small
        assert float(config.prune.prune_start_epoch) == row.warm_up and config.prune.prune_ratio == 0.9
        assert config.prune.dense_run == (teacher if distilled else None)
    else:
        assert isinstance(config, TrainConfig) and config.training.epochs == epochs.small
        if row.method == SMALLER:
            assert config.training.teacher_path == (teacher / "dense" if distilled else None)


def test_names_tell_runs_apart_and_the_command_asks_for_the_same_run() -> None:
    entry = Entry(ROWS["p3b-early"], 0.75, 2, Scale(8, 24, 3000), True, 0.7, 4.0)
    assert entry.name == "p3b-early-distilled-alpha0.7-tau4-0.75-e8-24px-3000-seed2"
    words = equal_time.again(entry, ANIMALS).split()
    assert words[:2] == ["python", "benchmarks/equal_time.py"]
    assert equal_time.entries(equal_time.parsed(words[2:])) == [entry]
    of_syllables = equal_time.parsed(equal_time.again(entry, TRANSFERS["syllables"]).split()[2:])
    assert of_syllables.transfer == "syllables" and equal_time.entries(of_syllables) == [entry]


def test_what_is_not_said_is_the_transfers() -> None:
    given = equal_time.parsed(["run", "--transfer", "syllables", "--work", "elsewhere"])
    assert given.images == TRANSFERS["syllables"].images == 20 * 512
    assert given.record.name == "equal_time_syllables.jsonl" and given.work == Path("elsewhere")
    assert equal_time.parsed(["run"]).work == Path("runs/equal_time")


def test_what_is_asked_for_comes_seed_by_seed_in_the_order_that_was_asked_for() -> None:
    def names(*flags: str) -> list[str]:
        return [
            f"{entry.row.name} {entry.ratio} {entry.seed}" for entry in equal_time.entries(equal_time.parsed(["run", *flags]))
        ]

    both = ["--ratios", "0.9", "0.75", "--only", "uniform", DENSE]
    assert names(*both) == ["uniform 0.9 0", "dense None 0", "uniform 0.75 0"]
    assert names(*both, "--distilled") == ["uniform 0.9 0", "uniform 0.75 0"], "the teacher is not distilled"
    once = [f"{name} {None if name == DENSE else 0.9} {{}}" for name, row in ROWS.items() if not row.explores]
    assert names("--ratios", "0.9", "--seeds", "1", "0") == [name.format(seed) for seed in (1, 0) for name in once]


def test_a_model_of_another_size_is_refused() -> None:
    line = {"name": "x", "row": "uniform", "ratio": 0.9, "params": 104, "dense_params": 1000}
    with pytest.raises(BudgetError, match=r"x keeps 10\.400% of the parameters; expected 10\.0% within 0\.1 points"):
        require_budget(line, equal_time.NEARLY)
    require_budget({**line, "row": PEER}, equal_time.NEARLY)
    require_budget({**line, "row": DENSE, "ratio": None}, equal_time.NEARLY)


# --- statistics


def test_bits_survive_being_packed() -> None:
    bits = [True, False, True, True, False, False, True, False, True, True, True]
    assert unpack(pack(bits), len(bits)) == bits


def test_one_seed_is_mcnemars_test() -> None:
    ours, theirs = [True] * 30 + [False] * 10 + [True] * 60, [False] * 30 + [True] * 10 + [True] * 60
    found = compare({0: ours}, {0: theirs, 1: theirs})
    assert found is not None and (found.only_first, found.only_second, found.seeds) == (30, 10, (0,))
    assert found.points == 20 and found.p_seeds is None
    assert found.p_images == pytest.approx(math.erfc(20 / math.sqrt(40) / math.sqrt(2)))


def test_a_second_seed_that_answers_alike_adds_no_evidence_over_images() -> None:
    ours, theirs = [True] * 12 + [False] * 4 + [True] * 9, [False] * 12 + [True] * 4 + [True] * 9
    once, twice = compare({0: ours}, {0: theirs}), compare({0: ours, 1: ours}, {0: theirs, 1: theirs})
    assert once is not None and twice is not None and twice.p_images == pytest.approx(once.p_images)
    assert twice.p_seeds is None, "two equal differences have no spread to judge by"
    swapped = compare({0: theirs}, {0: ours})
    assert swapped is not None and swapped.points == -once.points and swapped.p_images == once.p_images


def test_rows_without_a_common_seed_or_of_other_images_cannot_be_compared() -> None:
    assert compare({0: [True]}, {1: [True]}) is None
    alike = compare({0: [True, False]}, {0: [True, False]})
    assert alike is not None and alike.p_images == 1 and alike.points == 0
    with pytest.raises(ValueError, match="2 and 1 images"):
        compare({0: [True, False]}, {0: [True]})


def test_many_seeds_have_a_p_value_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = {seed: (torch.rand(400, generator=generator) < 0.5).tolist() for seed in range(4)}
    ours = {seed: [right or index % 8 == seed for index, right in enumerate(row)] for seed, row in theirs.items()}
    found = compare(ours, theirs)
    assert found is not None and found.p_seeds is not None and found.p_seeds < 0.05 and found.p_images < 1e-6


def test_the_t_test_over_seeds_is_students() -> None:
    assert _beyond(12.706, 1) == pytest.approx(0.05, abs=1e-5), "tables of the t distribution"
    assert _beyond(3.182, 3) == pytest.approx(0.05, abs=1e-4) and _beyond(0.0, 3) == 1


# --- the page


def run_line(row: str, seed: int = 0, top1: float = 50.0, *, distilled: bool = False, **changed: Any) -> dict[str, Any]:
    ratio = None if row == DENSE else 0.9
    entry = Entry(ROWS[row], ratio, seed, Scale(), distilled)
    right = round(top1 / 100 * 200)
    made_by = {"commit": "0" * 40, "changed_since": False, "date": "2026-01-01", "seconds": 9.0, "versions": {"torch": "2"}}
    made_by["hardware"] = {"machine": "x", "cores": 2, "threads": 1, "accelerator": None}
    epochs = plan(entry.row, COSTS, 3, distilled=distilled)
    return {
        **equal_time._said(entry, epochs), "command": equal_time.again(entry, ANIMALS), "part": "test",
        "images": 200, "top1": top1, "val_top1": top1, "params": 100, "dense_params": 1000, "processor_seconds": 250.0,
        "precision": "bfloat16", "data": "d", "curve": [[100.0, 40.0], [150.0, top1]],
        "correct": pack([index < right for index in range(200)]), **made_by, **changed,
    }  # fmt: skip


def test_the_page_compares_alike_with_alike(tmp_path: Path) -> None:
    lines = [
        run_line(DENSE, top1=60.0),
        run_line("p3b-early-stream", top1=55.0),
        run_line("uniform-early", top1=50.0),
        run_line("p3b-early-stream", top1=58.0, distilled=True),
        run_line("uniform-early", top1=58.5, distilled=True),
        {**run_line("p3b-early-stream"), "kind": "speed", "name": "speed", "batch": 32, "sides": {
            f"{run_line('p3b-early-stream')['name']} {layout}": {"ratio": ratio}
            for layout, ratio in (("index", 0.4), ("folded", 0.3))
        }},
        {**run_line("p3b-early-stream"), "kind": "costs", "name": "costs", "pixels": 32, "rounds": 3, "sides": {
            "dense": {"ratio": 1.0, "seconds": 0.3}, "teacher": {"ratio": 0.3}, "small p3b-early-stream": {"ratio": 0.4},
            "pruning p3b-early-low_rank": {"ratio": 2.6}, "small p3b-early": {"ratio": 0.4},
            "pruning p3b-early-stream": {"ratio": 1.2, "seconds": 0.4, "ratio_range": [1.1, 1.3]},
        }},
    ]  # fmt: skip
    by_epochs = {**run_line("uniform", top1=47.0), "name": "by epochs", "scale": asdict(Scale(equal="epochs"))}
    write_lines(tmp_path / "equal_time.jsonl", [*lines, by_epochs])
    equal_page.write(tmp_path / "equal_time.jsonl", ANIMALS)
    page = (tmp_path / "equal_time.md").read_text()
    assert (tmp_path / "equal_time.png").stat().st_size > 10_000
    rows: dict[str, list[str]] = {}
    for line in page.splitlines():
        title, *cells = [cell.strip() for cell in line.split("|")[1:-1]] or [""]
        rows[title] = rows.get(title, []) + cells
    assert rows["dense"][4:9] == ["60.00", "+5.00", "10 : 0", "**0.002**", "-"]
    assert rows["uniform, small early"][1:7] == ["0.25 + 0.75 + 5", "3.15", "250", "50.00", "-5.00", "0 : 10"]
    assert rows["uniform, small early, distilled"][4:7] == ["58.50", "+0.50", "1 : 0"]
    assert rows["P3B, small early, narrow stream"][5:9] == [""] * 4
    assert rows["P3B, small early, narrow stream"][9:11] == ["0.25 + 0.75 + 4 (2.80)", "0.25 + 0.75 + 2 (2.83)"]
    assert rows["P3B, small early: low_rank probes"][:2] == ["0.25 + 0.75 + 1 (3.00)", "does not fit"]
    assert rows["pruning, P3B, small early, narrow stream"] == ["1.200 (1.100 to 1.300)"]
    assert rows[run_line("p3b-early-stream")["name"]] == ["folded", "0.300", "3.33"]
    assert "## 90% of the parameters pruned, the time of 3 dense epochs of 10,000 images of 32 pixels" in page
    other = page.split("## 90% of the parameters pruned, 3 epochs of 10,000 images of 32 pixels")[1].split("##")[0]
    assert "| dense | 0 |" in other and "| 47.00 |" in other and "| P3B" not in other


def test_times_of_other_precisions_and_processors_do_not_count() -> None:
    line = run_line("p3b-early")
    assert is_timed(line, "bfloat16") and not is_timed(line, "float32")
    assert not is_timed({**line, "hardware": {**line["hardware"], "instructions": "AMX"}}, "bfloat16")
    text = "\n".join(
        equal_page.tables("f.png", "float32", [run_line("p3b-early"), run_line("uniform-early", precision="float32")])
    )
    assert "| - | 50.00 |" in text
    assert "| uniform, small early | 0 | 0.25 + 0.75 + 5 | 3.15 | 250 | 50.00 |" in text


def test_explored_rows_are_told_from_those_of_the_table() -> None:
    text = "\n".join(equal_page.tables("figure.png", "bfloat16", [run_line("p3b-early"), run_line("p3b-early-low_rank")]))
    assert "| P3B, small early: low_rank probes |" in text


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=lambda transfer: transfer.name)
def test_what_is_recorded_is_known_and_of_its_size(transfer: Transfer) -> None:
    for line in (line for line in read_lines(transfer.record) if line["kind"] == "run"):
        entry = Entry(
            ROWS[line["row"]],
            line["ratio"],
            line["seed"],
            Scale(**line["scale"]),
            line["distilled"],
            line["alpha"],
            line["tau"],
        )
        assert line["name"] == entry.name and line["command"] == equal_time.again(entry, transfer)
        require_budget(line, equal_time.NEARLY)
        assert len(unpack(line["correct"], line["images"])) == line["images"]
        # Lines of runs before 2026-11-30 may differ by a few images: under bf16 two classes were equally likely.
        assert 100 * sum(unpack(line["correct"], line["images"])) / line["images"] == pytest.approx(line["top1"], abs=0.05)


# --- the peer


def test_torch_pruning_meets_the_budget_and_its_network_trains() -> None:
    pytest.importorskip("torch_pruning", reason="the peer is no dependency")
    import timm

    from peers.torch_pruning_taylor import NEAR, cut_to, take_gradients

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )
    take_gradients(model, [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))], nn.CrossEntropyLoss())
    _, small = cut_to(model, 0.5)
    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert abs(kept - 0.5) <= NEAR
    small(torch.randn(2, 3, 8, 8)).sum().backward()
