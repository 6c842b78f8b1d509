"""`p3b inspect`: the architecture of a saved model, read from its config without loading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from p3b.run.look_options import InspectConfig
from p3b.run.trained_images import trained_on
from p3b.storage import artifact
from p3b.storage.model_config import TRAINING_IMAGES
from p3b.vit.architecture import branches_of
from p3b.vit.families.family import BranchOutline

_SHOWN_CLASSES = 10


def inspect(config: InspectConfig) -> Mapping[str, Any]:
    """Print what the model is; returns its config.

    Raises:
        WeightsError: nothing is there, or what is there is damaged or of another origin.
    """
    found = artifact.read_config(config.model)
    arguments, console = found["architecture"]["arguments"], Console(highlight=False)
    outlines = {outline.name: outline for outline in branches_of(found["architecture"])}
    dense_width, depth = arguments["embed_dim"], len({name.rpartition(".")[0] for name in outlines})
    width = found.get("stream", dense_width)
    say = partial(console.print, soft_wrap=True, markup=False)
    say(f"{found['architecture'].get('name', 'VisionTransformer')}: {found['params']:,} parameters, schema {found['schema']}")
    say(f"width {width}" + (f" of {dense_width}" if width != dense_width else "") + f", depth {depth}")
    classes = found["class_names"] or []
    more = f" and {len(classes) - _SHOWN_CLASSES:,} more" if len(classes) > _SHOWN_CLASSES else ""
    say(f"classes: {arguments['num_classes']:,} ({', '.join(classes[:_SHOWN_CLASSES]) or 'names unknown'}{more})")
    preprocessing = found["preprocessing"]
    known = "unknown" if preprocessing is None else ", ".join(f"{key} {value}" for key, value in preprocessing.items())
    say(f"preprocessing: {known}")
    console.print(_blocks(found, width, outlines))
    for key, value in (found["provenance"] or {}).items():
        if key != TRAINING_IMAGES:
            say(f"{key}: {value}")
    training = trained_on(config.model)
    if training is not None:
        say(f"trained on: {training.record.images:,} images, cut by {dict(training.rule)}")
    return found


def _blocks(config: Mapping[str, Any], width: int, outlines: Mapping[str, BranchOutline]) -> Table:
    """One row a block: how much it reads, its inner width, how much it writes."""
    table = Table()
    for position, name in enumerate(("block", "form", "reads", "heads", "inner width", "writes")):
        table.add_column(name, justify="left" if position < 2 else "right")
    for block in config["blocks"]:
        form, outline = block["form"], outlines[block["name"]]
        wide = outline.width or width
        inside = form in ("whole", "small")
        heads = (block.get("heads") or outline.heads) if block["name"].endswith("attn") and inside else ""
        reads = (len(block["inputs"]) or outline.reads or wide) if inside else ""
        writes = "" if form == "gone" else len(block["outputs"]) or wide
        table.add_row(block["name"], form, *map(str, (reads, heads, (block["inner"] or "whole") if inside else "", writes)))
    return table
