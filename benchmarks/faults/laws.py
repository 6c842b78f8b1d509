"""Do the laws of the mathematics and of shrinking (`tests/laws`) hold on random examples?

Hypothesis draws, and shrinks what breaks a law to its smallest form.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, Verbosity, settings

from laws import LAWS
from laws.law import FULL, Law


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """Try every law; one dict each, with the examples that were really run and the smallest one that breaks it.

    Args:
        count: examples over all laws.
        seed: the same seed draws the same examples.
        work: not used; the laws leave nothing behind.
    """
    torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
    for law, examples in zip(LAWS, examples_of_each(count), strict=True):
        yield try_law(law, examples, seed)


def examples_of_each(count: int) -> list[int]:
    """Examples for every law by its share: `count` in all, and at least what is known to have broken it and one more."""
    bounds = [round(count * sum(law.share for law in LAWS[:end]) / FULL) for end in range(len(LAWS) + 1)]
    return [max(bounds[number + 1] - bounds[number], len(law.known) + 1) for number, law in enumerate(LAWS)]


def try_law(law: Law, examples: int, seed: int) -> dict[str, Any]:
    """Run one law on so many examples, or until one breaks it.

    Returns:
        A case of the campaign. `cases` counts the examples up to the first that broke the law, not the search for a smaller
        one; `violations` is 1 where the law is broken, since the search ends there.
    """
    ran, broken, latest = 0, False, ""

    def check(example: Any) -> None:
        nonlocal ran, broken, latest
        ran += not broken
        latest = repr(example)
        try:
            law.check(example)
        except Exception:
            broken = True
            raise

    trial = hypothesis.given(law.examples)(check)
    for example in law.known:
        trial = hypothesis.example(example)(trial)
    trial = settings(
        max_examples=examples - len(law.known),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
    )(trial)
    detail = ""
    try:
        hypothesis.seed(seed)(trial)()
    except Exception as error:
        detail = f"{latest}: {type(error).__name__}: {error}"
    return {
        "part": "laws",
        "case": law.name,
        "ok": not broken and not detail,
        "cases": ran,
        "violations": int(broken or bool(detail)),
        "detail": detail,
    }
