"""What the search of a sweep has come to: as a line of sweep.jsonl, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from p3b.run.bisection import Budget, judge, largest
from p3b.run.options import SweepOptions
from p3b.run.products import PRODUCTS
from p3b.run.series_lines import finished
from p3b.run.series_plan import DENSE


def budgets_of(lines: Sequence[Mapping[str, Any]], asked: SweepOptions) -> list[Budget]:
    """What is known of the budgets in the range that is searched, ascending; nothing before the dense model is done."""
    done = finished(lines).values()
    dense = next((line for line in done if line["row"] == DENSE), None)
    if dense is None or asked.max_loss is None:
        return []
    found = [
        judge(dense["accuracy"]["val"], line["accuracy"]["val"], line["ratio"], asked.max_loss)
        for line in done
        if line["row"] != DENSE and asked.lowest <= line["ratio"] <= asked.highest
    ]
    return sorted(found, key=lambda budget: budget.ratio)


def known(tried: Sequence[Budget]) -> dict[float, bool]:
    """Whether each budget that was tried holds."""
    return {budget.ratio: budget.holds for budget in tried}


def answer_of(lines: Sequence[Mapping[str, Any]], tried: Sequence[Budget], asked: SweepOptions) -> dict[str, Any]:
    """What the search has come to, as a line. The test part comes in here, for the dense model and the answer alone."""
    done = finished(lines).values()
    ratio = largest(known(tried))
    chosen = {
        "dense": next(line for line in done if line["row"] == DENSE),
        "answer": next((line for line in done if line["ratio"] is not None and line["ratio"] == ratio), None),
    }
    return {
        "kind": "answer",
        "max_loss": asked.max_loss,
        "searched": [asked.lowest, asked.highest, asked.ratio_step],
        "ratio": ratio,
        "name": None if chosen["answer"] is None else chosen["answer"]["name"],
        "budgets": [asdict(budget) for budget in tried],
        "dense_top1": chosen["dense"]["accuracy"]["val"]["top1"],
        "images": chosen["dense"]["accuracy"]["val"]["images"],
        "test": {name: line["accuracy"]["test"] for name, line in chosen.items() if line and "test" in line["accuracy"]},
    }


def sentences(answer: Mapping[str, Any]) -> list[str]:
    """The answer in words, for the page, the table and the screen."""
    lowest, highest, step = answer["searched"]
    within = f"between {lowest:g} and {highest:g} in steps of {step:g}"
    told = []
    if answer["ratio"] is None:
        told.append(f"No prune ratio {within} was found that loses at most {answer['max_loss']:g} points of top-1.")
    else:
        told.append(
            f"The largest prune ratio found {within} that loses at most {answer['max_loss']:g} points of top-1: "
            f"{answer['ratio']:g} (runs/{answer['name']}/{PRODUCTS['prune']})."
        )
    told.append(f"On {answer['images']:,} validation images, where the dense model has {answer['dense_top1']:.2f} %:")
    for budget in answer["budgets"]:
        sign = "holds" if budget["holds"] else "does not hold"
        told.append(
            f"- {budget['ratio']:g}: {budget['top1']:.2f} %, {_loss(budget['loss'])} (standard error at most "
            f"{budget['standard_error']:.2f} points): {sign}"
        )
    if answer["test"].get("answer"):
        dense, found = answer["test"]["dense"], answer["test"]["answer"]
        judged = judge(dense, found, answer["ratio"], answer["max_loss"])
        told.append(
            f"On {found['images']:,} test images, which had no part in the choice: {found['top1']:.2f} %, {_loss(judged.loss)} "
            f"({dense['top1']:.2f} %; standard error at most {judged.standard_error:.2f} points)."
        )
    errors = [budget["standard_error"] for budget in answer["budgets"]]
    if errors and answer["max_loss"] < 2 * max(errors):
        told.append(
            f"Below the noise: {answer['max_loss']:g} points are less than two standard errors of a difference on so many "
            f"images ({2 * max(errors):.2f} points). Chance has a say in which budgets hold; more validation images, or "
            "another seed, may give another answer."
        )
    return told


def _loss(points: float) -> str:
    return f"{abs(points):.2f} points {'under' if points >= 0 else 'above'} the dense model"
