"""Sides that are timed in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call of each side in each round, after a call of each that warms up.

    Args:
        sides: what is called, by name; it returns when its work is done.
        rounds: at most; three at least, however long a call takes.
        seconds: that the rounds may take together, about.
        clock: what seconds are read from.

    Returns:
        As many measurements of each side; those at the same place are of the same round.
    """
    for call in sides.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    begin = clock()
    for done in range(rounds):
        if done >= 3 and clock() - begin >= seconds:
            break
        for name, call in sides.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    return taken
