"""For the processor time of dense training, which small model is the best one? Every row gets as many epochs as fit into it.

    python benchmarks/equal_time.py costs --ratios 0.9 0.75       # what steps take, in turns; the epochs follow from it
    python benchmarks/equal_time.py run --only p3b-early          # runs that are not in the record yet; resumable
    python benchmarks/equal_time.py run --seeds 0 1 --distilled   # every row learns from the dense run of its seed, too
    python benchmarks/equal_time.py speed                         # latency of all models that are there, in turns
    python benchmarks/equal_time.py table                         # docs/results/equal_time.md from equal_time.jsonl

    python benchmarks/equal_time.py run --equal epochs            # as many epochs as dense training, as published comparisons
    python benchmarks/equal_time.py run --transfer syllables      # 512 classes instead of 6; see glyph_images.py

Images and recipe: `transfers.py`. The rows and how their epochs are counted: `equal_rows.py`. The row of Torch-Pruning needs
that package (`peers/torch_pruning_taylor.py`). One process at a time works in a folder.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

import equal_page
from equal_costs import ROUNDS, measure_costs
from equal_rows import EPOCHS, PEER, ROWS, TIME, Costs, Entry, Plan, Scale, costs_of, is_timed, plan
from harness.paired import pack
from harness.records import Line, add_line, certified, read_lines, write_lines
from harness.turns import CPU, take_turns
from measured import require_budget
from measured import settings as study_settings
from p3b.commands.command_line import STOPPED, USER_ERROR
from p3b.commands.prune import prune
from p3b.commands.train import train
from p3b.deploy.choice import CANDIDATES, with_layout
from p3b.errors import BudgetError, ConfigError, Stopped, UserError
from p3b.run.options import CompareConfig, PruneConfig, TrainConfig
from p3b.run.products import PRODUCTS
from p3b.run.series_plan import DENSE, SMALLER, Run, config_of
from p3b.run.smaller_start import make_start
from p3b.storage import artifact
from p3b.train.distributed import Processes
from p3b.vit.cost import count_parameters
from peers import torch_pruning_taylor as peer
from transfers import TRANSFERS, USUAL, Transfer

RATIOS = (0.9, 0.75)
SPEED_BATCHES, SPEED_ROUNDS = (1, 32), 15
NEARLY = {PEER: peer.NEAR}
"""Rows that may miss their size by more than the others."""
PACKAGES = ("torch", "timm", "torch-pruning")


@dataclass(frozen=True)
class Place:
    """What is learned, and where it lies.

    Attributes:
        transfer: which.
        data: folder with its images and weights.
        work: folder for the run folders.
    """

    transfer: Transfer
    data: Path
    work: Path

    def settings(self, entry: Entry) -> CompareConfig:
        """What the runs of a seed share; epochs and phases are the rows' own."""
        scale = entry.scale
        return study_settings(self.data, self.work, [entry.seed], self.transfer.flags(scale.pixels, scale.images))

    def folder(self, entry: Entry) -> Path:
        """Of a run."""
        return self.work / "runs" / entry.name


def place_of(given: argparse.Namespace) -> Place:
    return Place(TRANSFERS[given.transfer], given.shared / "data", given.work)


def entries(given: argparse.Namespace) -> list[Entry]:
    """The runs that are asked for: seed by seed, budget by budget, rows in the order in which they are named."""
    names = given.only or [name for name, row in ROWS.items() if not row.explores]
    scale, learning = scale_of(given), (given.distilled, given.alpha, given.tau)
    found = []
    for seed, ratio, name in product(given.seeds, given.ratios, names):
        if name != DENSE:
            found.append(Entry(ROWS[name], ratio, seed, scale, *learning))
        elif ratio == given.ratios[0] and not given.distilled:
            found.append(Entry(ROWS[DENSE], None, seed, scale))
    return found


def scale_of(given: argparse.Namespace) -> Scale:
    return Scale(given.epochs, given.pixels, given.images, given.equal)


def recorded_costs(lines: Sequence[Line], entry: Entry, transfer: Transfer) -> Costs:
    """The costs that the epochs of a run follow from, of this record or else of the project's; the dense row needs none.

    Of every side the first that was measured counts, so that rows keep their epochs where others come later.

    Raises:
        ConfigError: they were not measured.
    """
    if entry.ratio is None:
        return Costs({}, {}, 0.0)
    asked = entry.ratio, entry.scale.pixels
    costs = [
        line
        for line in [*read_lines(transfer.record), *lines]
        if line["kind"] == "costs" and is_timed(line, transfer.precision)
    ]
    found = [line for line in costs if (line["ratio"], line["pixels"]) == asked]
    if not found:
        raise ConfigError(f"What steps take was not measured: {_command('costs', transfer, *asked)}")
    steps = max(line.get("steps_per_epoch", 0) for line in found)
    return costs_of(
        {"steps_per_epoch": steps, "sides": {name: side for line in reversed(found) for name, side in line["sides"].items()}}
    )


def config_for(entry: Entry, epochs: Plan, place: Place) -> TrainConfig | PruneConfig:
    """Settings of the run: of `p3b prune`, or of `p3b train` for a model that is not pruned here."""
    shared = place.settings(entry)
    training = replace(shared.training, epochs=epochs.before or epochs.small)
    if entry.distilled:
        alpha, tau = entry.alpha, entry.tau
        training = replace(training, distillation_alpha=training.distillation_alpha if alpha is None else alpha)
        training = replace(training, distillation_tau=training.distillation_tau if tau is None else tau)
    training = replace(training, **dict(entry.row.training))
    pruning = replace(
        shared.prune,
        prune_start_epoch=f"{epochs.warm_up:g}",
        finetune_epochs=epochs.small,
        distill_from="dense-run" if entry.distilled else "none",
    )
    config: CompareConfig = replace(shared, training=training, prune=pruning)
    row = entry.row
    method = DENSE if row.method == PEER else row.method
    run = Run(method, None if method == DENSE else entry.ratio, entry.seed, row.settings, place.folder(entry.teacher))
    found = config_of(config, run)
    folder = place.folder(entry)
    if row.method == SMALLER:
        found = replace(found, model=replace(found.model, model_path=folder / "start"))
    if not row.prunes:
        found = replace(found, training=replace(found.training, epochs=epochs.small))
    return replace(found, run=replace(found.run, output_dir=folder))


def carry_out(entry: Entry, epochs: Plan, place: Place) -> dict[str, Any]:
    """Make a run, or the rest of it; returns what its line says of it."""
    config, folder = config_for(entry, epochs, place), place.folder(entry)
    if entry.row.method == PEER:
        assert entry.ratio is not None
        teacher = place.folder(entry.teacher) / PRODUCTS["train"] if entry.distilled else None
        found = peer.run(config, peer.Phases(epochs.before, epochs.small), entry.ratio, teacher)
        told = {key: found[key] for key in ("params", "dense_params", "processor_seconds", "channel_ratio", "curve")}
        return {**told, **_accuracy(found), "correct": pack(found["correct"])}
    if isinstance(config, PruneConfig):
        summary, stage = prune(config), "prune"
    else:
        if entry.row.method == SMALLER:
            _make_start(entry, place, config)
        summary, stage = train(config), "train"
    figures = summary["pruned" if stage == "prune" else "model"]
    lines = read_lines(folder / stage / "metrics.jsonl")
    blocks = next(reversed(read_lines(folder / stage / "blocks.jsonl")), {"blocks": []})["blocks"]
    return {
        "params": figures["params"],
        "dense_params": summary["dense"]["params"] if "dense" in summary else None,
        "macs": figures["macs"],
        "processor_seconds": sum(line["processor_seconds"] for line in lines),
        **_accuracy(summary),
        "curve": [[round(line["processor_seconds"], 1), round(line["val_top1"], 2)] for line in lines],
        "keep_ratios": {block["name"]: round(block["kept_params"] / block["params"], 4) for block in blocks},
        "distillation": summary.get("distillation", {}).get("share_of_time"),
        "correct": pack(_correct(folder / stage / "predictions.csv")),
    }


def _accuracy(summary: Mapping[str, Any]) -> dict[str, Any]:
    part, provenance = summary["part"], summary["provenance"]
    accuracy = summary["accuracy"]
    data = provenance["data"]
    return {
        "part": part,
        "images": accuracy[part]["images"],
        "top1": accuracy[part]["top1"],
        "loss": accuracy[part]["loss"],
        "val_top1": accuracy["val"]["top1"],
        "precision": provenance["precision"],
        "data": data[data.index(": ") + 2 :],  # where the images lie is nobody's business
    }


def _correct(predictions: Path) -> list[bool]:
    with predictions.open(newline="", encoding="utf-8") as file:
        return [row["target"] == row["predicted"] for row in csv.DictReader(file)]


def _make_start(entry: Entry, place: Place, config: TrainConfig) -> None:
    assert config.model.model_path is not None and entry.ratio is not None
    shared = place.settings(entry)
    alone = Processes()
    make_start(config.model.model_path, shared.data, shared.model, alone, ratio=entry.ratio, blocks_only=False, seed=entry.seed)


def run_all(given: argparse.Namespace) -> list[str]:
    """Make the runs that are asked for and not recorded yet; returns the names of those that failed or were refused."""
    wrong, place = [], place_of(given)
    transfer = place.transfer
    for entry in entries(given):
        lines = read_lines(given.record)
        if entry.name in {line["name"] for line in lines}:
            continue
        try:
            costs, scale = recorded_costs(lines, entry, transfer), entry.scale
            epochs = plan(entry.row, costs, scale.epochs, distilled=entry.distilled, equal=scale.equal)
            print(f"{entry.name}: {epochs.warm_up:g} + {epochs.pruning:g} + {epochs.small} epochs", flush=True)
            make = partial(carry_out, entry, epochs, place)
            made = certified(make, again(entry, transfer), *PACKAGES)
            line = {**_said(entry, epochs), **made}
            if line["dense_params"] is None:
                line["dense_params"] = dense_size(place, entry)
            require_budget(line, NEARLY)
            add_line(given.record, line)
            print(f"{entry.name}: top-1 {line['top1']:.2f} %, {line['processor_seconds']:.0f} s of training", flush=True)
        except (UserError, BudgetError) as error:
            if isinstance(error, Stopped):
                raise
            wrong.append(entry.name)
            print(f"equal_time: {entry.name}: {error}", file=sys.stderr, flush=True)
    return wrong


def _said(entry: Entry, epochs: Plan) -> dict[str, Any]:
    """What is known of a run before it is made."""
    return {
        "kind": "run",
        "name": entry.name,
        "row": entry.row.name,
        "ratio": entry.ratio,
        "seed": entry.seed,
        "scale": asdict(entry.scale),
        "distilled": entry.distilled,
        "alpha": entry.alpha,
        "tau": entry.tau,
        "plan": asdict(epochs),
    }


def dense_size(place: Place, entry: Entry) -> int:
    """Parameters of the dense model of the same seed and classes."""
    from p3b.run.inputs import open_model

    return count_parameters(open_model(place.settings(entry).model, place.transfer.classes, entry.seed).model)


def again(entry: Entry, transfer: Transfer) -> str:
    """The command that makes a run again and records it elsewhere."""
    told = {key: value for key, value in asdict(entry.scale).items() if value != TIME}
    scale = " ".join(f"--{key} {value}" for key, value in told.items())
    asked = f"--only {entry.row.name} --seeds {entry.seed} {scale}"
    asked += "" if entry.ratio is None else f" --ratios {entry.ratio:g}"
    asked += " --distilled" if entry.distilled else ""
    asked += "".join(f" --{key} {value:g}" for key, value in (("alpha", entry.alpha), ("tau", entry.tau)) if value is not None)
    asked = " ".join([*transfer.asked, asked])
    return f"python benchmarks/equal_time.py run {asked} --work again --record again/equal_time.jsonl"


def measure_all_costs(given: argparse.Namespace) -> None:
    """Record what steps take at each prune ratio; a new line replaces an earlier one of the same rows."""
    place = place_of(given)
    for ratio in given.ratios:
        entry = Entry(ROWS[DENSE], None, 0, scale_of(given))
        config = config_for(entry, Plan(0, 0, 1, 1.0), replace(place, work=place.work / "costs"))
        rows = [ROWS[name] for name in given.only or ROWS]
        only = f" --only {' '.join(given.only)}" if given.only else ""
        command = _command("costs", place.transfer, ratio, given.pixels) + only
        saved = {row.name: place.folder(Entry(row, ratio, given.seeds[0], scale_of(given))) / PRODUCTS["prune"] for row in rows}
        saved = {name: folder for name, folder in saved.items() if folder.exists()}
        made = certified(partial(measure_costs, config, rows, ratio, given.rounds, saved), command, *PACKAGES)
        other = [] if made["precision"] == place.transfer.precision else [made["precision"]]
        name = "-".join([f"costs-{ratio:g}-{given.pixels}px", *other, *(given.only or [])])
        told = {"kind": "costs", "name": name, "ratio": ratio, "pixels": given.pixels}
        _replace(given.record, {**told, "rounds": given.rounds, **made})


def measure_speed(given: argparse.Namespace) -> None:
    """Record the latency of all models that are there, of a size, in every layout, in turns with the dense one."""
    lines = [line for line in read_lines(given.record) if line["kind"] == "run" and Scale(**line["scale"]) == scale_of(given)]
    # Any seed's will do: how fast it is follows from its shape alone.
    dense = [line for line in lines if line["row"] == DENSE and (given.work / "runs" / line["name"]).exists()][:1]
    if not dense:
        raise ConfigError(f"{given.work} holds no dense run of this scale to compare with: run --only {DENSE} first.")
    for ratio in given.ratios:
        at_ratio = dense + [line for line in lines if line["ratio"] == ratio and line["seed"] == given.seeds[0]]
        models = dict(_models(at_ratio, given.work / "runs"))
        for batch in SPEED_BATCHES:
            command = _command("speed", TRANSFERS[given.transfer], ratio, given.pixels)
            made = certified(lambda: {"sides": _latencies(models, batch)}, command, *PACKAGES)  # noqa: B023
            told = {"kind": "speed", "name": f"speed-{ratio:g}-{batch}-{given.pixels}px", "ratio": ratio, "batch": batch}
            _replace(given.record, {**told, "pixels": given.pixels, **made})


def _command(action: str, transfer: Transfer, ratio: float, pixels: int) -> str:
    return " ".join(["python benchmarks/equal_time.py", action, *transfer.asked, f"--ratios {ratio:g} --pixels {pixels}"])


def _models(lines: Sequence[Line], runs: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    """By "run layout": the models of runs whose folders are there; the dense one first."""
    for line in lines:
        folder, prunes = runs / line["name"], ROWS[line["row"]].prunes
        if (folder / peer.MODEL).exists():
            yield f"{line['name']} index", torch.load(folder / peer.MODEL, weights_only=False).eval()  # made here, by ourselves
            continue
        product = folder / PRODUCTS["prune" if prunes else "train"]
        if not product.exists():
            continue
        model = artifact.load(product)
        for layout in CANDIDATES if prunes else CANDIDATES[:1]:
            yield f"{line['name']} {layout}", with_layout(model, layout).eval()


@torch.inference_mode()
def _latencies(models: Mapping[str, torch.nn.Module], batch: int) -> dict[str, Any]:
    vit = next(iter(models.values()))
    assert isinstance(vit, VisionTransformer)
    images = torch.rand(batch, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)

    def side(model: torch.nn.Module) -> Callable[[], object]:
        return lambda: model(images)

    repeats = dict.fromkeys(models, max(1, 8 // batch))
    return take_turns(CPU, {name: side(model) for name, model in models.items()}, SPEED_ROUNDS, repeats)


def _replace(record: Path, line: Line) -> None:
    write_lines(record, [*(old for old in read_lines(record) if old["name"] != line["name"]), line])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; what depends on the transfer and is not given is the transfer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("costs", "run", "speed", "table"))
    parser.add_argument("--transfer", choices=tuple(TRANSFERS), default=USUAL, help="what is learned")
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), metavar="ROW", help=f"rows: {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds, one after the other")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="shares of the parameters that go")
    parser.add_argument("--epochs", type=int, default=Scale().epochs, help="of dense training, whose time every row may take")
    parser.add_argument("--equal", choices=(TIME, EPOCHS), default=TIME, help="what rows have as much of as dense training")
    parser.add_argument("--pixels", type=int, default=Scale().pixels, help="side of the images")
    parser.add_argument("--images", type=int, help="of the training set; usually all that the transfer has")
    parser.add_argument("--distilled", action="store_true", help="learn from the dense run of the same seed and scale, too")
    parser.add_argument("--alpha", type=float, help="weight of the teacher")
    parser.add_argument("--tau", type=float, help="temperature of the teacher")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of the costs")
    parser.add_argument(
        "--shared", type=Path, help="folder that holds data/ with the images; ../shared, or what glyph_images.py made"
    )
    parser.add_argument("--work", type=Path, help="folder for the run folders; usually runs/ and the name of the record")
    parser.add_argument("--record", type=Path, help="file of the JSON lines; the page is written beside it")
    given = parser.parse_args(arguments)
    transfer = TRANSFERS[given.transfer]
    usual = {"images": transfer.images, "shared": transfer.shared, "record": transfer.record}
    usual["work"] = Path("runs") / transfer.record.stem
    for name, value in usual.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status: 0 done, 2 a run failed or was refused, 75 stopped."""
    given, status = parsed(arguments), 0
    torch.set_num_threads(1)
    try:
        if given.action == "costs":
            measure_all_costs(given)
        elif given.action == "run":
            status = USER_ERROR if run_all(given) else 0
        elif given.action == "speed":
            measure_speed(given)
        else:
            equal_page.write(given.record, TRANSFERS[given.transfer])
    except Stopped as stop:
        print(f"equal_time: {stop}; the same command resumes.", file=sys.stderr)
        status = STOPPED
    except UserError as error:
        print(f"equal_time: {error}", file=sys.stderr)
        status = USER_ERROR
    return status


if __name__ == "__main__":
    sys.exit(main())
