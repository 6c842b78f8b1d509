"""`p3b models`: which models of the installed timm can be pruned, how far, and why the others cannot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import timm
from rich.console import Console
from rich.progress import track

from p3b.errors import ConfigError, RunFolderError
from p3b.run.model_options import ModelsConfig
from p3b.storage.catalogue import Entry, entry, matching, may_be_covered, summary
from p3b.storage.files import write_atomically

BEGIN, END = "<!-- made by `p3b models --markdown FILE`; do not edit -->", "<!-- end of what p3b models makes -->"
_PROGRESS_FROM = 30
"""As many models take seconds."""


def models(config: ModelsConfig) -> list[Entry]:
    """Print what timm offers; returns all entries that the pattern means, the listed ones and the others.

    Raises:
        ModelError: the pattern means no model.
        ConfigError: settings that contradict each other, or a number out of range.
    """
    if config.markdown is not None and (config.json or config.pattern):
        raise ConfigError("--markdown writes the page of all models. Leave out --json and the pattern.")
    if config.num_classes < 1:
        raise ConfigError(f"--num-classes is {config.num_classes}; expected at least 1.")
    names = matching(config.pattern)
    whole = bool(config.pattern) or config.all or config.markdown is not None
    found = look(names, config.num_classes, only_covered=not whole)
    if config.json:
        print(json.dumps(_as_json(found, config.num_classes), indent=1))
    elif config.markdown is not None:
        _write_between_marks(config.markdown, markdown(found))
    else:
        print("\n".join([*table(found if whole else [each for each in found if each.prunable]), summary(found)]))
        if not whole:
            print("p3b models --all, or with a pattern, lists the others, too.")
    return found


def look(names: Sequence[str], num_classes: int = 1000, *, only_covered: bool = False) -> list[Entry]:
    """Entries of these names; a line on stderr shows how far it is.

    Args:
        names: of timm's models.
        num_classes: of the heads.
        only_covered: leave unbuilt what cannot be of a class that is covered.
    """
    shown = track(
        names,
        description="looking at timm's models",
        console=Console(stderr=True),
        transient=True,
        disable=len(names) < _PROGRESS_FROM,
    )
    return [entry(name, num_classes, built=not only_covered or may_be_covered(name)) for name in shown]


def table(entries: Iterable[Entry]) -> list[str]:
    """Lines of at most 80 columns: a heading for each family, below it one line a model."""
    lines = [f"{'':<2}{'model':<44}{'weights':>7}{'M params':>9}{'in blocks':>10}{'largest':>8}"]
    for (family, refusal), group in _grouped(entries).items():
        heading = f"{family}: cannot be pruned ({refusal})" if refusal else family
        lines += textwrap.wrap(heading, 80, subsequent_indent="    ")
        for each in group:
            share = f"{each.prunable_params / each.params:>10.1%}{each.largest_ratio:>8.4f}" if each.prunable else ""
            params = f"{each.params / 1e6:,.1f}" if each.kind else "-"
            lines.append(f"  {each.name:<44}{len(each.weights):>7}{params:>9}{share}")
    return lines


def markdown(entries: Sequence[Entry]) -> list[str]:
    """Two tables: families that can be pruned, a line each, and reasons why others cannot, with the families."""
    transformers = [each for each in entries if each.has_attention]
    groups = _grouped(transformers)
    lines = [f"timm {timm.__version__}: {summary(transformers, 'entries with attention')}.", ""]
    lines += ["| family | entries | weights | million parameters | largest ratio |", "|---|---:|---:|---:|---:|"]
    for (family, refusal), group in groups.items():
        if not refusal:
            sizes, ratios = ([getattr(each, key) for each in group] for key in ("params", "largest_ratio"))
            span = _span([size / 1e6 for size in sizes], "{:,.0f}"), _span(ratios, "{:.4f}")
            lines.append(f"| {family} | {len(group)} | {_weights(group)} | {span[0]} | {span[1]} |")
    lines += ["", "| why it cannot be pruned | families | entries | weights |", "|---|---|---:|---:|"]
    refused = sorted({each.refusal for each in transformers if not each.prunable})
    for refusal in refused:
        group = [each for each in transformers if each.refusal == refusal]
        families = ", ".join(sorted({each.family for each in group}))
        lines.append(f"| {refusal} | {families} | {len(group)} | {_weights(group)} |")
    return [*lines, ""]


def _write_between_marks(file: Path, lines: Sequence[str]) -> None:
    """Put lines into a page in place of those that are between the marks.

    Raises:
        RunFolderError: the page cannot be read or written, or has no marks.
    """
    try:
        before, begun, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        _, ended, after = rest.partition(END)
        if not (begun and ended):
            raise RunFolderError(f"{file} lacks the lines between which the tables go: {BEGIN} and {END}. Add them.")
        text = "\n".join([f"{before}{BEGIN}", "", *lines, f"{END}{after}"])
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"Cannot write {file}: {error.strerror}. Name a page that is there.") from error


def _grouped(entries: Iterable[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """By family and reason, those that can be pruned first, then in the order of the names."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for each in entries:
        groups.setdefault((each.family, each.refusal), []).append(each)
    return dict(sorted(groups.items(), key=lambda item: (bool(item[0][1]), item[0])))


def _as_json(entries: Sequence[Entry], num_classes: int) -> dict[str, object]:
    listed = [{**asdict(each), "prunable": each.prunable, "largest_ratio": each.largest_ratio} for each in entries if each.kind]
    return {"timm": timm.__version__, "num_classes": num_classes, "summary": summary(entries), "models": listed}


def _weights(group: Sequence[Entry]) -> int:
    return sum(len(each.weights) for each in group)


def _span(values: Sequence[float], form: str) -> str:
    """ "6 to 86"; one value where both ends read alike."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
