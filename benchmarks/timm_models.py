"""Which of timm's Vision Transformers can be pruned, and is what comes out exact? Every model that is accepted is asked.

    python benchmarks/timm_models.py run                 # all of them: about a quarter of an hour of one core
    python benchmarks/timm_models.py run --only hiera    # those of one module of timm's
    python benchmarks/timm_models.py table               # the table of docs/families.md from the JSON lines

A model is taken with its own widths, heads and parts, but with two blocks (one in each stage of a hierarchy) and a small image:
what a family gets wrong, it gets wrong in one block. Names that differ in depth, image or weights alone are one model then, and
are looked at once. It is pruned by steps of training with the default method, a tower without a head by Taylor scores, and
has to hold:

- in float64 the small model gives what the masked one gives, logits and features, to 1e-9 of the largest;
- parameters are those that were asked for, to one element of the costliest gate;
- saved and loaded it is the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b
from harness.command import Bench, Given, main
from harness.pages import Part, folded, how_it_was_run, table
from harness.records import RESULTS, ROOT, Line, read_lines
from p3b.core.allocation import largest_prune_ratio
from p3b.errors import UserError
from p3b.storage.catalogue import Entry, entry, matching
from p3b.storage.outline import outline
from p3b.vit.architecture import describe_dense
from p3b.vit.cost import block_params, dense_params
from p3b.vit.families import images_of
from p3b.vit.layout import BlockLayout, read_layout

ISOTROPIC = (
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "deit"),
    *("vitamin", "eva", "beit", "naflexvit", "qwen3_vit", "cait", "xcit", "convit", "deepseek_vit", "gemma4_vit", "tnt"),
)
"""timm's modules of Vision Transformers with one residual stream."""
HIERARCHIES = ("swin_transformer", "swin_transformer_v2", "hiera")
"""Of those with stages, the modules whose models can be pruned."""
CLASSES, IMAGES, CLOSE = 7, 4, 1e-9
WIDE = 150_000_000
"""Parameters of two blocks and what is around them, above which one block has to do."""


def smaller(kind: str, patch: tuple[int, int], depth: int) -> dict[str, Any]:
    """Arguments that leave a model of a class its widths and parts, with few blocks and patches."""
    if kind == "Hiera":
        return {"stages": (1,) * 4, "img_size": (64, 64)}
    if kind.startswith("Swin"):
        return {"depths": (1,) * 4, "img_size": 16 * patch[0]}
    more = {"global_attn_indexes": (depth - 1,)} if kind == "VisionTransformerSAM" else {}
    return {"depth": depth, "img_size": (4 * patch[0], 4 * patch[1]), **more}


def arguments_of(found: Entry) -> dict[str, Any]:
    """What a model is built with here."""
    whole = outline(found.name)
    patch = images_of(whole).patch
    apart = [block.attn for block in getattr(whole, "blocks", ()) if getattr(block.attn, "q_proj", None) is not None]
    of_keys = list(dict.fromkeys(attention.num_kv_heads for attention in apart if hasattr(attention, "num_kv_heads")))
    for depth in (2, 1):
        arguments = {"num_classes": CLASSES, **smaller(found.kind, patch, depth)}
        if of_keys:  # told block by block, since they may differ
            arguments["num_kv_heads"] = (of_keys * depth)[:depth]
        if sum(parameter.numel() for parameter in outline(found.name, **arguments).parameters()) <= WIDE:
            break
    return arguments


def same_model(found: Entry, arguments: Mapping[str, Any]) -> str:
    """What two names have in common that are one model here."""
    return json.dumps(describe_dense(outline(found.name, **arguments)), sort_keys=True)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every parameter a value that is seen in the output: as initialised many are zero, or scale a branch to nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else noise * parameter[0].numel() ** -0.5)


def problems_of(model: nn.Module) -> list[str]:
    """What does not hold of a model that is pruned; the model is used up."""
    randomise(model)
    layout = read_layout(model)
    dense = p3b.count_parameters(model)
    ratio = 0.5 * largest_prune_ratio(sum(map(dense_params, layout.blocks)), layout.other_params)
    method = "block_benefit" if layout.num_classes else "taylor"  # probes answer as a head does
    schedule = p3b.Schedule(start=0, sparse=1, final=2, update_every=1)
    pruner = p3b.Pruner(model.train(), ratio, method, schedule=schedule)
    criterion, targets = nn.CrossEntropyLoss(), torch.arange(IMAGES) % CLASSES
    while not pruner.done:
        logits = _answer(model, _images(model, pruner.steps_done))
        loss = criterion(logits, targets) if layout.num_classes else logits.square().mean()
        (loss + pruner.loss(criterion, targets)).backward()
        pruner.step()
        model.zero_grad()
    pruner.decide_last()
    return list(_problems(pruner, model.double().eval(), dense, ratio))


@torch.no_grad()
def _problems(pruner: p3b.Pruner, model: nn.Module, dense: int, ratio: float) -> Iterator[str]:
    batch, costliest = _images(model, 9).double(), max(map(costliest_element, pruner.layout.blocks))
    masked, features = model(batch), cast("VisionTransformer", model).forward_features(batch)
    small = pruner.shrink()
    found = small(batch)
    if not torch.isfinite(masked).all() or not masked.abs().max():
        yield "the masked model gives nothing that could be compared"
    if (miss := _difference(found, masked)) > CLOSE:
        yield f"small and masked differ by {miss:.1e} of the largest logit"
    if (miss := _difference(cast("VisionTransformer", small).forward_features(batch), features)) > CLOSE:
        yield f"features of small and masked differ by {miss:.1e} of the largest"
    kept, asked = p3b.count_parameters(small), (1 - ratio) * dense
    if abs(kept - asked) > costliest:
        yield f"{kept:,} parameters are kept, asked for were {asked:,.0f}; an element has at most {costliest:,}"
    with tempfile.TemporaryDirectory() as folder:
        again = p3b.load(p3b.save(small, folder))
    if not torch.equal(again(batch), found):
        yield "saved and loaded it answers otherwise"


def costliest_element(block: BlockLayout) -> int:
    """Parameters that go with one element of a block's gates, with those that go along with its last one."""
    alone = sum(
        _numel(weight.axes) for weight in block.weights if all(isinstance(f, int) for axis in weight.axes for f in axis)
    )
    left = [int(block_params(block, {dim: torch.tensor(size - 1)})) for dim, size in block.dims.items()]
    return dense_params(block) - min(left) + alone


def check(found: Entry, arguments: Mapping[str, Any]) -> list[str]:
    """What does not hold of one of timm's models, each in words; nothing where all does."""
    try:
        torch.manual_seed(0)
        return problems_of(timm.create_model(found.name, **arguments))
    except UserError as error:
        return [f"accepted, then refused: {error}"]
    except Exception:
        return [f"crashed: {traceback.format_exc(limit=-2)}"]


def look(module: str) -> dict[str, Any]:
    """All models of a module of timm's: how many there are and are accepted, and what does not hold of those."""
    entries = [entry(name, CLASSES) for name in matching("") if module_of(name) == module]
    accepted = [each for each in entries if each.prunable]
    seen: dict[str, list[str]] = {}
    wrong: dict[str, list[str]] = {}
    unasked: dict[str, str] = {}
    for found in accepted:
        try:
            arguments = arguments_of(found)
            model = same_model(found, arguments)
        except Exception as error:  # whatever timm raises: the model does not take these arguments
            unasked[found.name] = f"{type(error).__name__}: {error}"
            continue
        if model not in seen:
            seen[model] = check(found, arguments)
            print(f"{found.name}: {'; '.join(seen[model]) or 'exact'}", flush=True)
        if seen[model]:
            wrong[found.name] = seen[model]
    weights, accepted_weights = (sum(len(each.weights) for each in some) for some in (entries, accepted))
    return {
        "entries": len(entries),
        "weights": weights,
        "accepted": len(accepted),
        "accepted_weights": accepted_weights,
        "families": sorted({each.family for each in accepted}),
        "models": len(seen),
        "exact": len(accepted) - len(wrong) - len(unasked),
        "wrong": wrong,
        "unasked": unasked,
    }


GROUPS: Mapping[str, Sequence[str]] = {"isotropic": ISOTROPIC, "hierarchical": HIERARCHIES}
MODULES = (*ISOTROPIC, *HIERARCHIES)


def module_of(name: str) -> str:
    """timm's module that a model is defined in."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def _answer(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)
    return sum(logits) / len(logits) if isinstance(logits, tuple) else cast("Tensor", logits)


def _images(model: nn.Module, seed: int) -> Tensor:
    return torch.randn((IMAGES, *images_of(model).shape), generator=torch.Generator().manual_seed(seed))


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _numel(axes: Any) -> int:
    return math.prod(factor for axis in axes for factor in axis)


# --- the table


def tables(lines: Sequence[Line]) -> list[str]:
    """The table of families, made from the lines."""
    results = {line["name"]: line["result"] for line in sorted(lines, key=lambda line: MODULES.index(line["name"]))}
    missing = [module for module in MODULES if module not in results]
    text = [_of_group(group, results) for group, modules in GROUPS.items() if not set(modules) & set(missing)]
    text += [f"Not looked at yet: {', '.join(missing)}."] if missing else []
    wrong, unasked = ({name: told for each in results.values() for name, told in each[key].items()} for key in _TOLD)
    text += [
        f"{_sum(results, 'exact')} of {_sum(results, 'accepted')} accepted entries were pruned and are exact "
        f"({_sum(results, 'models')} models that differ). {len(wrong)} are inexact, miss their budget or crash. "
        f"{len(unasked)} cannot be made small enough to be asked.",
        "",
    ]
    rows = [
        [
            f"`{module}`",
            ", ".join(each["families"]) or "none",
            f"{each['accepted']} of {each['entries']}",
            f"{each['accepted_weights']} of {each['weights']}",
            str(each["models"]),
            str(each["exact"]),
        ]
        for module, each in results.items()
    ]
    text += table(_HEAD, rows, text=2)
    text += (
        table(["model", "what does not hold"], [[name, "; ".join(each)] for name, each in wrong.items()], text=2)
        if wrong
        else []
    )
    text += folded("Not asked", [f"- `{name}`: {reason}" for name, reason in unasked.items()]) if unasked else []
    return [*text, *how_it_was_run(lines)]


_TOLD = ("wrong", "unasked")
_HEAD = ("module of timm", "families that can be pruned", "entries", "pretrained weights", "models that differ", "found exact")


def _of_group(group: str, results: Mapping[str, Any]) -> str:
    there = {module: results[module] for module in GROUPS[group]}
    some, weights = _sum(there, "accepted_weights"), _sum(there, "weights")
    return (
        f"Of the {group} models below {_sum(there, 'accepted')} of {_sum(there, 'entries')} entries can be pruned, "
        f"with {some} of {weights} pretrained weights ({some / weights:.0%})."
    )


def _sum(results: Mapping[str, Any], key: str) -> int:
    return sum(each[key] for each in results.values())


def measure(name: str, given: Given) -> dict[str, Any]:
    return {"result": look(name), "threads": torch.get_num_threads()}


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=1)


PART = Part("timm_models.py", RESULTS / "timm_models.jsonl", ROOT / "docs" / "families.md", tables)
BENCH = Bench(__doc__, PART, MODULES, measure, flags)

if __name__ == "__main__":
    status = main(BENCH)
    sys.exit(status or any(line["result"]["wrong"] for line in read_lines(PART.lines)))
