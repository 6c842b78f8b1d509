"""The laws of `tests/laws` with few examples each; the campaign tries thousands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from faults.laws import cases, examples_of_each, try_law
from laws import LAWS
from laws.law import FULL, Law, demand

FEW = 15


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hypothesis keeps tables of characters in the working folder."""
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_law_holds(law: Law) -> None:
    result = try_law(law, FEW + len(law.known), seed=1)
    assert result["ok"], result["detail"]
    assert result["cases"] == FEW + len(law.known)
    assert result["violations"] == 0


def test_examples_are_shared_among_the_laws_and_shrinking_gets_a_tenth_at_least() -> None:
    assert sum(law.share for law in LAWS) == FULL
    given = examples_of_each(FULL)
    assert sum(given) == FULL
    assert given == [law.share for law in LAWS]
    shrinking = next(law for law in LAWS if law.name.startswith("the small network is the masked one"))
    assert shrinking.share >= 1000
    assert all(examples > len(law.known) for law, examples in zip(LAWS, examples_of_each(1), strict=True))


def test_a_broken_law_is_told_with_its_smallest_example_and_what_is_known_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def below_a_thousand(number: int) -> None:
        tried.append(number)
        demand(number < 1000, f"{number} is too much")

    broken = Law("numbers are below a thousand", 1, st.integers(0, 10**6), below_a_thousand)
    first, again = try_law(broken, 500, seed=3), try_law(broken, 500, seed=3)
    assert first == again
    assert not first["ok"]
    assert first["violations"] == 1
    assert first["detail"] == "1000: BrokenLawError: 1000 is too much"
    assert 1 <= first["cases"] < len(tried)  # the search for the smallest example is not counted

    tried.clear()
    known = Law(broken.name, 1, st.integers(0, 999), below_a_thousand, known=(123, 456))
    assert try_law(known, 40, seed=3)["cases"] == 40 == len(tried)
    assert sorted(tried[:2]) == [123, 456]

    def crash(number: int) -> None:
        raise KeyError(number)

    assert "KeyError" in try_law(Law("nothing crashes", 1, st.integers(), crash), 10, seed=0)["detail"]

    monkeypatch.setattr("faults.laws.LAWS", (known, broken))
    monkeypatch.setattr("faults.laws.FULL", 2)
    lines = list(cases(1000, 3, Path()))
    assert [(line["part"], line["case"], line["ok"]) for line in lines] == [
        ("laws", known.name, True),
        ("laws", broken.name, False),
    ]
    assert lines[0]["cases"] == 500
