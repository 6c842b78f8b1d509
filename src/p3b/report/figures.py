"""The figures of a run, drawn from the files in its folder alone.

`blocks.jsonl` holds one line a mask update: when it was, and for every block its benefit, its goal and what it keeps.
Two figures come out of it:
- benefit: what each block does for the task over training, class token above, patches below, attention left, MLP right
  (the figure of arXiv 2506.23675: deeper blocks rise later);
- keep ratio: what each block keeps at the last update, over depth, and how it came to that.

Matplotlib is used through `Figure` alone: no pyplot, no window, nothing that other figures of the process notice.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from p3b.errors import ConfigError, RunFolderError, unknown_name
from p3b.report.updates import KIND_TITLES, Update, kinds_of, read_updates, series_of

FORMATS = ("png", "svg")

_KIND_COLOURS = {"attn": "#0072B2", "mlp": "#D55E00"}  # Okabe and Ito: told apart by every eye, and in grey
_KIND_MARKERS = {"attn": "o", "mlp": "s"}
_PROBE_LABELS = {"benefit_cls": "class token", "benefit_patch": "patches"}
_INK, SOFT_INK, _SHADE = "#222222", "#707070", "#f1f1ee"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "text.color": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.edgecolor": SOFT_INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "svg.hashsalt": "p3b",  # the same figure gives the same file
}


def draw_figures(stage_folder: str | os.PathLike[str], fmt: str = "png") -> list[Path]:
    """Draw every figure that the folder has numbers for, into the folder itself.

    Args:
        stage_folder: folder with `blocks.jsonl`.
        fmt: "png" or "svg".

    Returns:
        The files written, `benefit.<fmt>` and `keep_ratio.<fmt>`; those without numbers are left out.

    Raises:
        ConfigError: another format.
        RunFolderError: `blocks.jsonl` is missing or damaged (the message names the line), or a figure cannot be saved.
    """
    if fmt not in FORMATS:
        raise ConfigError(unknown_name("figure format", fmt, FORMATS))
    folder = Path(stage_folder)
    drawn = (
        benefit_figure(folder, folder / f"benefit.{fmt}"),
        keep_ratio_figure(folder, folder / f"keep_ratio.{fmt}"),
    )
    return [path for path in drawn if path is not None]


def benefit_figure(stage_folder: str | os.PathLike[str], out: Path) -> Path | None:
    """Draw the benefit of every block over the epochs.

    Args:
        stage_folder: folder with `blocks.jsonl`.
        out: file to write, .png or .svg.

    Returns:
        `out`, or None where no benefit was measured (no update yet, or a method without probes).

    Raises:
        ConfigError: `out` ends otherwise.
        RunFolderError: as for `draw_figures`.
    """
    figure = draw_benefit(read_updates(Path(stage_folder)))
    return None if figure is None else save_figure(figure, Path(out))


def draw_benefit(updates: list[Update]) -> Figure | None:
    """The benefit of every block over the epochs; None where no benefit was measured."""
    probes = [probe for probe in _PROBE_LABELS if any(_known(block[probe]) for u in updates for block in u.blocks)]
    if not probes:
        return None
    kinds = kinds_of(updates)
    epochs = [update.epoch for update in updates]
    depth = max(len(series_of(updates, kind)) for kind in kinds)
    colours = _depth_colours(depth)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=4.6 * len(kinds) + 1.0, height=2.75 * len(probes) + 0.5)
        panels = figure.subplots(len(probes), len(kinds), sharex=True, sharey="row", squeeze=False)
        for row, probe in enumerate(probes):
            for column, kind in enumerate(kinds):
                panel = panels[row][column]
                _shade_phases(panel, updates, with_names=row == 0)
                panel.axhline(0, color=SOFT_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
                for index, blocks in enumerate(series_of(updates, kind)):
                    values = [_number_or_nan(block[probe]) for block in blocks]
                    panel.plot(epochs, values, color=colours[index], linewidth=1.4, **_markers(len(epochs)))
                if row == len(probes) - 1:
                    panel.set_xlabel("epoch")
                if column == 0:
                    panel.set_ylabel(f"{_PROBE_LABELS[probe]}\nbenefit (loss difference, nats)")
                panel.tick_params(labelleft=column == 0)
                panel.set_xlim(*_epoch_range(epochs))
                panel.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        for column, kind in enumerate(kinds):
            # Above the phases' names, which stand between title and panel.
            panels[0][column].set_title(KIND_TITLES[kind], pad=20)
        norm = BoundaryNorm([d + 0.5 for d in range(depth + 1)], depth)
        bar = figure.colorbar(
            ScalarMappable(norm, ListedColormap(colours)), ax=panels, ticks=_depth_ticks(depth), pad=0.015, aspect=35
        )
        bar.set_label("block depth")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.minorticks_off()
        return figure


def keep_ratio_figure(stage_folder: str | os.PathLike[str], out: Path) -> Path | None:
    """Draw what every block keeps: over depth at the last update, and as a map of blocks by updates.

    Arguments and errors as for `benefit_figure`; None where there was no update yet.
    """
    figure = draw_keep_ratios(read_updates(Path(stage_folder)))
    return None if figure is None else save_figure(figure, Path(out))


def draw_keep_ratios(updates: list[Update]) -> Figure | None:
    """What every block keeps at the last update, and over all updates; None where there was no update."""
    if not updates:
        return None
    kinds = kinds_of(updates)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=11.0, height=4.6)
        grid = figure.add_gridspec(len(kinds), 2, width_ratios=(1.0, 1.15))
        _draw_last_update(figure.add_subplot(grid[:, 0]), updates, kinds)
        maps = [figure.add_subplot(grid[row, 1]) for row in range(len(kinds))]
        edges = _update_edges([update.epoch for update in updates])
        for row, (panel, kind) in enumerate(zip(maps, kinds, strict=True)):
            ratios = [[_number_or_nan(block["keep_ratio"]) for block in blocks] for blocks in series_of(updates, kind)]
            rows = [d + 0.5 for d in range(len(ratios) + 1)]
            image = panel.pcolormesh(edges, rows, ratios, cmap="cividis", vmin=0, vmax=1, rasterized=True)
            panel.set_title(KIND_TITLES[kind], color=_KIND_COLOURS[kind])
            panel.set_ylabel("block depth")
            panel.set_yticks(_depth_ticks(len(ratios), at_most=6))
            panel.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
            panel.tick_params(length=0)
            for spine in panel.spines.values():
                spine.set_visible(False)
            if row == len(kinds) - 1:
                panel.set_xlabel("epoch")
            else:
                panel.tick_params(labelbottom=False)
        bar = figure.colorbar(image, ax=maps, pad=0.02, aspect=30, ticks=(0, 0.25, 0.5, 0.75, 1))
        bar.set_label("keep ratio, applied")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        return figure


def _draw_last_update(panel: Axes, updates: list[Update], kinds: list[str]) -> None:
    """Keep ratio over depth at the last update: a line for each kind of block, its goals as open diamonds."""
    handles = []
    goals_known = False
    longest = 1
    for kind in kinds:
        last = [blocks[-1] for blocks in series_of(updates, kind)]
        depths = list(range(1, len(last) + 1))
        longest = max(longest, len(last))
        style: dict[str, Any] = {"color": _KIND_COLOURS[kind], "marker": _KIND_MARKERS[kind], "markersize": 5}
        handles += panel.plot(
            depths,
            [_number_or_nan(block["keep_ratio"]) for block in last],
            linewidth=1.8,
            label=KIND_TITLES[kind],
            clip_on=False,  # a ratio of 0 or 1 keeps its whole marker
            zorder=3,
            **style,
        )
        goals = [_number_or_nan(block["keep_ratio_goal"]) for block in last]
        goals_known |= not all(map(math.isnan, goals))
        panel.plot(
            depths,
            goals,
            linestyle="none",
            marker="D",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=_KIND_COLOURS[kind],
            markeredgewidth=1.0,
            clip_on=False,
            zorder=2,
        )
    if goals_known:
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker="D",
                markersize=8,
                markerfacecolor="none",
                color=SOFT_INK,
                label="goal",
            )
        )
    panel.set_title(f"Last update, epoch {updates[-1].epoch:.1f}", pad=26)
    panel.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles),
        borderaxespad=0.4,
        columnspacing=1.6,
        handletextpad=0.5,
    )
    panel.set_xlabel("block depth")
    panel.set_ylabel("keep ratio (share of the block's parameters)")
    panel.set_xlim(0.5, longest + 0.5)
    panel.set_ylim(0, 1)
    panel.set_xticks(_depth_ticks(longest))
    panel.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    panel.set_axisbelow(True)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number_or_nan(value: float | None) -> float:
    """What is not known, or not finite, leaves a gap in a line."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _depth_colours(depth: int) -> list[Any]:
    """One colour a depth, evenly spaced to the eye, without the ends of the map: they are lost on white and on black."""
    colour_map = matplotlib.colormaps["viridis"]
    return [colour_map(0.22 + 0.68 * index / max(depth - 1, 1)) for index in range(depth)]


def _depth_ticks(depth: int, at_most: int = 13) -> list[int]:
    """Depths to name: the first, then every so many."""
    return list(range(1, depth + 1, math.ceil(depth / at_most)))


def _markers(num_updates: int) -> dict[str, Any]:
    """Single updates show as dots as long as dots do not run into each other."""
    return {"marker": "o", "markersize": 5 if num_updates == 1 else 3} if num_updates <= 15 else {}


def _epoch_range(epochs: list[float]) -> tuple[float, float]:
    """Limits of the epoch axis: the updates, with a little air."""
    first, last = min(epochs), max(epochs)
    air = 0.02 * (last - first) if last > first else 0.5
    return first - air, last + air


def _update_edges(epochs: list[float]) -> list[float]:
    """Where each update's column begins and ends: a mask holds until the next; the last as long as the one before."""
    usual = epochs[-1] - epochs[-2] if len(epochs) > 1 else 0.0
    return [*epochs, epochs[-1] + (usual if usual > 0 else 1.0)]


def _shade_phases(panel: Axes, updates: list[Update], with_names: bool) -> None:
    """Shade every second phase and name the phases above the panel; an update belongs to the interval that it ends."""
    spans: list[tuple[str | None, float, float]] = []
    low, high = _epoch_range([update.epoch for update in updates])
    for update in updates:
        if spans and spans[-1][0] == update.phase:
            spans[-1] = (update.phase, spans[-1][1], update.epoch)
        else:
            spans.append((update.phase, spans[-1][2] if spans else low, update.epoch))
    spans[-1] = (spans[-1][0], spans[-1][1], high)
    for index, (phase, start, end) in enumerate(spans):
        if phase is None:
            continue
        if index % 2 == 1:
            panel.axvspan(start, end, color=_SHADE, linewidth=0, zorder=0)
        if with_names and (end - start) > 0.12 * (high - low):
            panel.annotate(
                phase,
                xy=((start + end) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
                color=SOFT_INK,
            )


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, bound to the Agg canvas and to nothing global."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out: Path) -> Path:
    """Write the figure under a temporary name, then move it into place: a reader never meets half a file."""
    fmt = out.suffix.removeprefix(".")
    if fmt not in FORMATS:
        raise ConfigError(f"{unknown_name('figure format', fmt, FORMATS)} The file's name decides it; got '{out.name}'.")
    # A figure says nothing about when it was drawn, so that the same numbers give the same file.
    metadata = {"Date": None} if fmt == "svg" else {"Software": None}
    try:
        with whole_file(out) as file, matplotlib.rc_context(STYLE):
            figure.savefig(file, format=fmt, metadata=metadata)
    except OSError as error:
        raise RunFolderError(f"Cannot write the figure '{out}' ({error}). Give a folder that exists, with space.") from error
    return out


@contextmanager
def whole_file(out: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name when all of it is written; nothing is left of one that fails."""
    temporary: Path | None = None
    try:
        # Named as everything that is half written, so that a resumed run removes what a killed one left.
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            yield file
        temporary.chmod(0o644)  # as any other file of the run, not private as temporary files are
        temporary.replace(out)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
