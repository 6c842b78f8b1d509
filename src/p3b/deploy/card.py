"""The card of a saved model, README.md: where it comes from, what it may be used under, what was measured, how it is loaded.

Everything on it is read from the model's config and, where the model still lies in the run that made it, from that run's files.
What is not known is said to be so, or left out.

The last line of a card is a comment: a digest of the text above it, and what the run said, as JSON. By the digest a card that
nobody has edited is known, and renewed. What the run said makes a new card where the folder has been moved away from its run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import timm
from timm.models import get_pretrained_cfg

from p3b.deploy.plain import plain_call
from p3b.storage import artifact
from p3b.storage.files import write_atomically
from p3b.vit.anatomy.shape import WHOLE

CARD_FILE = "README.md"
_FIGURE = "keep_ratio"
_TEMPLATE = "model_card.md.j2"
_SEAL, _END = "<!-- Made by p3b, which renews this file until somebody edits it: ", " -->\n"
_FACTS = ("model", "prune", "dense", "pruned", "accuracy", "reached_prune_ratio", "provenance")
"""What a card needs to know of the settings and the summary of its run."""
_ROWS = (
    ("parameters", "params", "{:,.0f}"),
    ("MACs", "macs", "{:,.0f}"),
    ("size on disk (bytes)", "bytes", "{:,.0f}"),
    ("top-1 (%)", "top1", "{:.2f}"),
    ("top-5 (%)", "top5", "{:.2f}"),
    ("images per second", "images_per_second", "{:,.0f}"),
)


@dataclass(frozen=True)
class Base:
    """What the model was trained from.

    Attributes:
        said: in words.
        licence: of these weights, as timm records it; None where it is not known.
        hub_id: of them; None where they are not of the hub.
    """

    said: str
    licence: str | None = None
    hub_id: str | None = None


@dataclass(frozen=True)
class Run:
    """What the stage that made the model wrote: its settings and its summary."""

    settings: Mapping[str, Any]
    summary: Mapping[str, Any]


def write_card(folder: Path, *, name: str, on_hub: bool = False, origin: Path | None = None) -> bool:
    """Write README.md into the folder of a saved model, and beside it the figure that it shows.

    Args:
        folder: of the saved model.
        name: that the model goes by: "user/name", or a folder's.
        on_hub: whether that is a name of the hub.
        origin: where the model lay when it was made, if `folder` is another place; its run is looked for there.

    Returns:
        Whether it was written: a README.md that is not p3b's, or that somebody has edited, stays as it is.

    Raises:
        WeightsError: the folder holds no model.
    """
    config = artifact.read_config(folder)
    if has_own_card(folder):
        return False
    origin = origin or folder
    run = run_of(origin, config)
    drawn = sorted([*_stage_of(origin, config).glob(f"{_FIGURE}.*"), *origin.glob(f"{_FIGURE}.*")]) if run else []
    figure = drawn[0].name if drawn else None
    if figure is not None and drawn[0].parent != folder:
        shutil.copyfile(drawn[0], folder / figure)
    text = _sealed(card(config, name, on_hub=on_hub, run=run, figure=figure), run)
    write_atomically(folder / CARD_FILE, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    return True


def has_own_card(folder: Path) -> bool:
    """Whether a folder has a README.md that p3b did not write, or that somebody has edited since."""
    return (folder / CARD_FILE).exists() and _facts_on(folder / CARD_FILE) is None


def card(
    config: Mapping[str, Any], name: str, *, on_hub: bool = False, run: Run | None = None, figure: str | None = None
) -> str:
    """The text of a card; pure.

    Args:
        config: of the saved model.
        name: that the model goes by.
        on_hub: whether that is a name of the hub.
        run: that made it.
        figure: file beside the card.
    """
    provenance = config["provenance"] or {}
    return _template().render(
        name=name,
        on_hub=on_hub,
        is_small=any(block["form"] != WHOLE for block in config["blocks"]),
        base=base_of(provenance, run),
        arguments=config["architecture"]["arguments"],
        params=config["params"],
        classes=None if config["class_names"] is None else [_inline(each) for each in config["class_names"]],
        preprocessing=config["preprocessing"],
        data=None if "data" not in provenance else _inline(str(provenance["data"])),
        date=provenance.get("date"),
        versions=provenance.get("versions", {}),
        budget=None if run is None else _budget(run),
        rows=[] if run is None else _rows(run),
        part="" if run is None else "test" if "test" in run.summary.get("accuracy", {}) else "val",
        figure=figure,
        plain=plain_call(config),
    )


@cache
def _template() -> jinja2.Template:
    """Compiled once, since a series of runs writes a card for each."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("p3b.deploy", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown: what is put in is quoted here
        keep_trailing_newline=True,
    )
    return environment.get_template(_TEMPLATE)


def run_of(folder: Path, config: Mapping[str, Any]) -> Run | None:
    """The finished run that made the model in a folder: of its files, or of the card, where the folder was moved away from it.

    None where neither is there, or where what is there made another model.
    """
    stage = _stage_of(folder, config)
    try:
        facts = [json.loads((stage / file).read_text("utf-8")) for file in ("config.json", "summary.json")]
    except (OSError, ValueError):
        facts = _facts_on(folder / CARD_FILE) or []
    made = facts[1].get("provenance") if len(facts) == 2 else None
    provenance = config["provenance"] or {}
    if not made or any(provenance.get(key) != value for key, value in made.items()):
        return None
    return Run(*facts)  # a model says more of itself than a summary does: which images it was trained on


def _stage_of(folder: Path, config: Mapping[str, Any]) -> Path:
    """Where the files of the stage lie that made the model in a folder."""
    return folder.parent / str((config["provenance"] or {}).get("stage", ""))


def _sealed(text: str, run: Run | None) -> str:
    """A card with its last line."""
    files = () if run is None else (run.settings, run.summary)
    facts = [{key: value for key, value in file.items() if key in _FACTS} for file in files]
    said = json.dumps(facts).replace(">", "\\u003e")  # a comment ends at the first -->
    return f"{text}{_SEAL}{_digest(text + said)} {said}{_END}"


def _facts_on(file: Path) -> list[Any] | None:
    """Settings and summary of the run on a card that p3b wrote and nobody has edited, empty without a run; else None."""
    try:
        text, found, seal = file.read_bytes().decode().rpartition(_SEAL)
    except (OSError, UnicodeDecodeError):
        return None
    digest, _, said = seal.removesuffix(_END).partition(" ")
    if not found or not seal.endswith(_END) or digest != _digest(text + said):
        return None
    facts: list[Any] = json.loads(said)
    return facts


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def base_of(provenance: Mapping[str, Any], run: Run | None) -> Base:
    """What the model was trained from, and under which licence that came."""
    name = str(provenance.get("model", ""))
    if not name:
        return Base("not recorded")
    architecture = f"the architecture {name} of timm"
    settings = {} if run is None else run.settings.get("model", {})
    if not settings:
        return Base(architecture)
    if settings.get("model_path"):
        return Base(f"{architecture}, with the weights of the file {_inline(Path(settings['model_path']).name)}")
    if not settings.get("model_pretrained"):
        return Base(f"{architecture}, without pretrained weights")
    cfg = get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        return Base(f"{architecture}, with timm's pretrained weights")
    tagged = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else name
    return Base(f"timm's pretrained {tagged}", cfg.license, cfg.hf_hub_id)


def _budget(run: Run) -> str | None:
    options, reached = run.settings.get("prune"), run.summary.get("reached_prune_ratio")
    if options is None or reached is None:
        return None
    of = "the parameters of the blocks" if options["prune_blocks_only"] else "all parameters"
    share = f"{options['prune_ratio']:.0%} of {of}"
    return f"{share} to be pruned by {options['prune_method']}; {reached:.1%} of all parameters are gone"


def _rows(run: Run) -> list[tuple[str, ...]]:
    """Name and figures of each measured quantity: the dense model's, where there is one, and this one's."""
    columns = [run.summary[key] for key in ("dense", "pruned", "model") if key in run.summary]
    rows: list[tuple[str, ...]] = [("", *(("dense", "this model") if len(columns) == 2 else ("this model",)))]
    for label, key, form in _ROWS:
        values = [column.get(key) for column in columns]
        if any(value is not None for value in values):
            rows.append((label, *("-" if value is None else form.format(value) for value in values)))
    return rows


def _inline(text: str) -> str:
    """Text of anywhere inside a line of Markdown: as code, in which nothing has a meaning."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
