"""Numbers and times in a few letters, for lines that must fit a terminal."""

from __future__ import annotations


def short_count(number: int) -> str:
    """A number in three digits or four: 97.3 k, 5.52 M, 304 M."""
    scaled, unit = (number / 1e6, "M") if number >= 999_950 else (number / 1e3, "k")
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"


def short_loss(loss: float) -> str:
    """A loss in at most six letters or so: 0.4127, 12.35, 1.2e+03."""
    return f"{loss:.4f}" if abs(loss) < 10 else f"{loss:.4g}"


def duration(seconds: float) -> str:
    """A time in at most six letters: 8.3 s, 21m05s, 3h20m, 12d04h."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, small, unit, smaller in ((60, 1, "m", "s"), (3600, 60, "h", "m"), (86400, 3600, "d", "h")):
        if whole < 100 * size or unit == "d":
            return f"{whole // size}{unit}{whole % size // small:02}{smaller}"
    raise AssertionError
