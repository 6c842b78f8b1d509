"""Products of cases that say little new: some of each run by default, the others where there is time (`make test-slow`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(rows: Iterable[Any], columns: Iterable[Any], every: int, *, whole: int = 1) -> list[Any]:
    """Parameters (row, column) for every pair; all but a share of them carry the mark `slow`.

    By default the first `whole` rows run with all columns, each other row with every so many of them, one further on from row
    to row, so that each row and each column has its turn.
    """
    rows, columns = list(rows), list(columns)
    return [
        pytest.param(row, column, marks=() if r < whole or (c - r) % every == 0 else pytest.mark.slow)
        for r, row in enumerate(rows)
        for c, column in enumerate(columns)
    ]
