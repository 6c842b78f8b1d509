"""The page of the table at equal processor time, and its figure, from the lines of the record alone."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from equal_rows import ROWS, TIME, Costs, Row, Scale, costs_of, is_timed, plan
from harness.pages import Part, how_it_was_run, table
from harness.paired import Paired, compare, unpack
from harness.records import Line, read_lines
from harness.turns import ratio as ratio_cell
from measured import spread_cell
from p3b.errors import ConfigError
from p3b.run.series_plan import DENSE
from transfers import Transfer

REFERENCES, EXPLORED = ("p3b-once", "p3b-early-stream"), "p3b-early"
"""Rows that others are compared with, the first that a table has; and the one that the explored ones change in one thing."""
SURE = 0.05
PLANNED = (3, 8)
"""Epochs of dense training that rows are planned for from the costs."""

Group = Mapping[str, Sequence[Line]]
"""Lines of one table, by row."""


def write(record: Path, transfer: Transfer) -> None:
    """Write the page of a record beside it, and its figure."""
    lines = read_lines(record)
    if any(line["kind"] == "run" for line in lines):
        draw(lines, record.with_suffix(".png"))
    part(record, transfer).write()


def part(record: Path, transfer: Transfer) -> Part:
    """The page is beside the record."""
    script = " ".join(["equal_time.py", *transfer.asked])
    return Part(script, record, record.with_suffix(".md"), partial(tables, record.with_suffix(".png").name, transfer.precision))


def tables(figure: str, precision: str, lines: Sequence[Line]) -> list[str]:
    """Top-1 of every row at every size and scale, then what steps take and how quick the models are.

    Args:
        figure: name of its file, which is beside the page.
        precision: of the runs whose times count.
        lines: of the record.
    """
    runs = [line for line in lines if line["kind"] == "run"]
    text = []
    for scale in sorted({_scale(line) for line in runs}, key=lambda scale: (*scale[:-1], scale[-1] == TIME), reverse=True):
        here = [line for line in runs if _scale(line) == scale or (line["row"] == DENSE and _scale(line)[:-1] == scale[:-1])]
        for ratio in sorted({line["ratio"] for line in here if line["ratio"] is not None}, reverse=True):
            at_ratio = [line for line in here if line["ratio"] in (ratio, None)]
            title = f"{ratio:.0%} of the parameters pruned, {_scale_in_words(*scale)}"
            text += [f"## {title}", "", *_accuracy(at_ratio, precision)]
    if runs:
        text += [f"![Accuracy against processor time and latency]({figure})", "", *HOW_TO_READ, ""]
    return [*text, *_costs(lines), *_latencies(lines), *_how_it_was_run(lines)]


HOW_TO_READ = (
    "- Epochs: of the warm-up, of pruning, and of the small model. Planned: what they take, in epochs of dense training, by",
    "  the costs of steps below; epochs of the small model are whole, so rows differ by up to half of one. The training of a",
    "  teacher does not count; it takes the time of the dense row once more.",
    "- Measured: least and most processor seconds of the training itself, without evaluation and cut, on machines of different",
    "  speed that do other work too; of those on processors without AMX and in the precision that the costs were measured in.",
    "  Where bf16 is faster less is gained.",
    f'- "vs. P3B": top-1 less that of "{ROWS[REFERENCES[0]].title}", or where a table has no such row of',
    f'  "{ROWS[REFERENCES[1]].title}", learning from the same, over the seeds that both have. Alone right: test images that',
    "  only this row, and only P3B, answers rightly. p over images: would these very networks differ on other images",
    "  (McNemar's test; with more seeds an image counts once)? p over seeds: would the methods differ with other seeds",
    f"  (paired t-test)? Bold: below {SURE:g}.",
)


def _accuracy(lines: Sequence[Line], precision: str) -> list[str]:
    head = [
        "model",
        "seeds",
        "epochs",
        "planned",
        "measured (s)",
        "top-1 (%)",
        "vs. P3B",
        "alone right",
        "p, images",
        "p, seeds",
    ]
    rows = []
    for distilled in (False, True):
        group = _by_row([line for line in lines if line["distilled"] is distilled])
        reference = next((name for name in REFERENCES if name in group), REFERENCES[-1])
        for name, found in group.items():
            title = found[0]["title"] + (", distilled" if distilled else "")
            paired = None if name == reference else compare(correct(found), correct(group.get(reference, [])))
            rows.append(
                [title, _seeds(found), _epochs(found[0]), *_time(found, precision), spread_cell(found), *_paired(paired)]
            )
    tested = " and ".join(sorted({f"{line['images']:,} {line['part']} images" for line in lines}))
    return [f"Accuracy on {tested}:", "", *table(head, rows)]


def _by_row(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines by row and, where it is not the usual one, the teacher's weight; in the order of the rows."""
    found: dict[str, list[Line]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: (list(ROWS).index(line["row"]), line["seed"])):
        changed = "".join(f", {key} {line[key]:g}" for key in ("alpha", "tau") if line[key] is not None)
        found[line["row"] + changed].append({**line, "title": _title(line["row"]) + changed})
    return dict(found)


def _title(row: str) -> str:
    explored = ROWS[row].explores
    return f"{ROWS[EXPLORED].title}: {ROWS[row].title}" if explored else ROWS[row].title


def correct(lines: Sequence[Line]) -> dict[int, list[bool]]:
    """By seed: which test images a row answers rightly."""
    return {line["seed"]: unpack(line["correct"], line["images"]) for line in lines}


def _paired(found: Paired | None) -> list[str]:
    if found is None:
        return [""] * 4
    return [f"{found.points:+.2f}", f"{found.only_first} : {found.only_second}", _p(found.p_images), _p(found.p_seeds)]


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.3f}" if value >= 0.001 else "< 0.001"
    return f"**{text}**" if value < SURE else text


def _seeds(lines: Sequence[Line]) -> str:
    return ", ".join(str(line["seed"]) for line in lines)


def _epochs(line: Line) -> str:
    plan = line["plan"]
    phases = [plan["warm_up"], plan["pruning"], plan["small"]]
    return " + ".join(f"{epochs:g}" for epochs in phases) if plan["warm_up"] + plan["pruning"] else f"{plan['small']:g}"


def _time(lines: Sequence[Line], precision: str) -> list[str]:
    seconds = [
        f"{line['processor_seconds']:,.0f}"
        for line in sorted(lines, key=itemgetter("processor_seconds"))
        if is_timed(line, precision)
    ]
    return [f"{lines[0]['plan']['dense_epochs']:.2f}", " to ".join(dict.fromkeys([*seconds[:1], *seconds[-1:]])) or "-"]


def _costs(lines: Sequence[Line]) -> list[str]:
    found = [line for line in lines if line["kind"] == "costs"]
    if not found:
        return []
    text = [
        "## What a step takes",
        "",
        "Processor time of a training step in dense ones, in turns in one process: median (range).",
        "",
    ]
    for line in found:
        rows = [[_side(name), ratio_cell(side)] for name, side in line["sides"].items()]
        dense = f"{1000 * line['sides'][DENSE]['seconds']:.0f} ms"
        precision = line.get("precision", "bfloat16")
        title = f"{line['ratio']:.0%} pruned, {line['pixels']} pixels ({line['rounds']} rounds, {precision}; dense: {dense})"
        text += table([title, "of a dense step"], rows)
        text += _epochs_that_follow(line)
    return text


def _epochs_that_follow(line: Line) -> list[str]:
    """What every row whose costs were measured gets for the time of some dense epochs."""
    rows = []
    for row in (row for row in ROWS.values() if row.method != DENSE):
        cells = [_plan_cell(row, costs_of(line), epochs, distilled) for epochs in PLANNED for distilled in (False, True)]
        rows += [[_title(row.name), *cells]] if any(cells) else []
    head = [f"{epochs} dense epochs{', distilled' if distilled else ''}" for epochs in PLANNED for distilled in (False, True)]
    return table(["epochs that fit (what they take)", *head], rows)


def _plan_cell(row: Row, costs: Costs, epochs: int, distilled: bool) -> str:
    unknown = (row.pruning and (row.cost or row.name) not in costs.pruning) or (row.at_once and row.name not in costs.cut)
    if unknown or (row.structure or row.name) not in costs.small:
        return ""
    try:
        found = plan(row, costs, epochs, distilled=distilled)
    except ConfigError:
        return "does not fit"
    return f"{_epochs({'plan': asdict(found)})} ({found.dense_epochs:.2f})"


def _side(name: str) -> str:
    kind, _, row = name.partition(" ")
    if not row:
        return {"dense": "dense step", "teacher": "pass of the teacher"}[name]
    return {"pruning": "pruning, ", "small": "small model, ", "cut": "cut, "}[kind] + _title(row)


def quickest(line: Line) -> dict[str, tuple[str, float]]:
    """By run: its quickest layout, and its time in that of the dense model."""
    found: dict[str, tuple[str, float]] = {}
    for side, measured in line["sides"].items():
        run, _, layout = side.partition(" ")
        if run not in found or measured["ratio"] < found[run][1]:
            found[run] = layout, measured["ratio"]
    return found


def _latencies(lines: Sequence[Line]) -> list[str]:
    text = []
    for line in (line for line in lines if line["kind"] == "speed"):
        rows = [[run, layout, f"{ratio:.3f}", f"{1 / ratio:.2f}"] for run, (layout, ratio) in quickest(line).items()]
        text += table([f"batch {line['batch']}", "quickest layout", "time, dense = 1", "times as quick"], rows)
    return ["## How quick the models are", "", "In float32, in turns, by processor time.", "", *text] if text else []


def _how_it_was_run(lines: Sequence[Line]) -> list[str]:
    facts = [f"{line['precision']}, {line['data']}" if line["kind"] == "run" else line["kind"] for line in lines]
    return ["## How the runs were made", "", *how_it_was_run(lines, *facts)]


def _scale(line: Line) -> tuple[int, int, int, str]:
    scale = Scale(**line["scale"])
    return scale.images, scale.pixels, scale.epochs, scale.equal


def _scale_in_words(images: int, pixels: int, epochs: int, equal: str) -> str:
    there = f"the time of {epochs} dense epochs" if equal == TIME else f"{epochs} epochs"
    return f"{there} of {images:,} images of {pixels} pixels"


# --- the figure


def draw(lines: Sequence[Line], out: Path) -> object:
    """Top-1 on the validation images over the time of training, and on the test images over latency at batch 32.

    Time is told in epochs of dense training, of which a run takes as many as it was planned for. Of one scale and budget:
    those that most runs are of.
    """
    import matplotlib  # here, where it is needed

    from p3b.report.charts import SOFT_INK
    from p3b.report.figures import STYLE, new_figure, save_figure

    runs = _most(lines)
    latency = {
        name: ratio
        for line in lines
        if line["kind"] == "speed" and line["batch"] == 32
        for name, (_, ratio) in quickest(line).items()
    }
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=11, height=4.6)
        over_time, over_latency = figure.subplots(1, 2)
        for index, (title, found) in enumerate(_curves(runs).items()):
            style: dict[str, Any] = {
                "color": _COLOURS[index % len(_COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
                "markersize": 4,
            }
            for number, line in enumerate(found):
                seconds, top1 = zip(*_cumulated(line["curve"]), strict=True)
                epochs = [each / seconds[-1] * line["plan"]["dense_epochs"] for each in seconds]
                over_time.plot(epochs, top1, linewidth=1.2, label="_" if number else title, **style)
                if line["name"] in latency:
                    over_latency.plot(latency[line["name"]], line["top1"], linestyle="", **style)
        over_time.set_xlabel("time of training (epochs of dense training)")
        over_time.set_ylabel("validation top-1 (%), after each epoch")
        over_latency.set_xlabel("time of a batch of 32 (dense = 1)")
        over_latency.set_ylabel("test top-1 (%)")
        for panel in (over_time, over_latency):
            panel.grid(axis="y", color="#e4e4e4", linewidth=0.8)
            panel.tick_params(color=SOFT_INK)
        handles, labels = over_time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        return save_figure(figure, out)


_COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00", "#8C8C8C")
_MARKERS = ("*", "o", "s", "^", "v", "D", "P", "X", "<")


def _most(lines: Sequence[Line]) -> list[Line]:
    """Runs of the scale and budget that most are of, with the dense ones of that scale."""
    runs = [line for line in lines if line["kind"] == "run"]
    asked = statistics.mode(
        [(_scale(line), line["ratio"]) for line in runs if line["ratio"] is not None] or [(_scale(runs[0]), None)]
    )
    return [line for line in runs if _scale(line) == asked[0] and line["ratio"] in (asked[1], None)]


def _curves(runs: Sequence[Line]) -> dict[str, list[Line]]:
    """Runs by the title of their row, where they recorded how training went."""
    found: dict[str, list[Line]] = defaultdict(list)
    for distilled in (False, True):
        for lines in _by_row([line for line in runs if line["distilled"] is distilled]).values():
            for line in (line for line in lines if line.get("curve")):
                found[line["title"] + (", distilled" if distilled else "")].append(line)
    return found


def _cumulated(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """(seconds up to the end of an epoch, top-1 after it)."""
    seconds, found = 0.0, []
    for taken, top1 in curve:
        seconds += taken
        found.append((seconds, top1))
    return found
