"""`p3b models` in a small part of timm; docs/models.md says what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p3b.commands.models import BEGIN, END, look, markdown
from p3b.storage.catalogue import matching
from runs import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_table_fits_80_columns_and_ends_with_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "vit_small*dinov[23]") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("  vit")] == [
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_small_plus_patch16_dinov3",
    ]
    assert lines[-1].startswith("4 of 4 entries, ")


def test_json_has_a_model_for_each_that_was_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "vit_small*dinov[23]", "--json", "--num-classes", "10") == 0
    told = json.loads(capsys.readouterr().out)
    small = next(each for each in told["models"] if each["name"] == "vit_small_patch14_dinov2")
    assert small["prunable"] and 0.94 < small["largest_ratio"] <= small["prunable_params"] / small["params"]
    assert [each["refusal"] for each in told["models"]] == [""] * 4
    assert told["num_classes"] == 10 and told["summary"].startswith("4 of 4 entries")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("nothing_of_the_kind*",), "Unknown timm model"),
        (("--json", "--markdown", "page.md"), "Leave out"),
        (("--num-classes", "0"), "at least 1"),
    ],
)
def test_what_makes_no_sense_is_said(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", *flags) == 2
    assert message in capsys.readouterr().err


def test_the_page_says_what_the_code_says_of_some_families() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    rows = [
        line
        for name in ("deit", "cait_", "vit_base_patch16_rpn")
        for line in markdown(look(matching(name)))
        if line.startswith("| ")
    ]
    families = [row for row in rows if not row.startswith(("| family", "| why"))]
    assert len(families) >= 5
    assert [row for row in families if row not in made] == []
