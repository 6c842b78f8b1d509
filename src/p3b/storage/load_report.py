"""What became of every tensor when weights were loaded, for a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

_MOST_NAMED = 8


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor when weights were loaded, each mismatch by name."""

    source: str
    """Where the weights came from."""
    loaded: int
    """Tensors taken as they are."""
    replaced: tuple[str, ...] = ()
    """Heads of another size, with both shapes: kept as newly initialised."""
    resampled: tuple[str, ...] = ()
    """Position and patch embeddings that were adapted to another grid, patch, colour or set of prefix tokens."""
    missing: tuple[str, ...] = ()
    """In the model, not in the file (only heads can be)."""
    unexpected: tuple[str, ...] = ()
    """In the file, not in the model (only heads, prefix tokens and what belongs to training can be)."""
    notes: tuple[str, ...] = ()
    """Where in the file the weights lay, how their names were understood, and what is a guess."""

    def with_note(self, note: str) -> LoadReport:
        """The same report with one more line."""
        return replace(self, notes=(*self.notes, note))

    def lines(self) -> list[str]:
        """The report for a log, one line a fact; many tensors of one part that were left out share a line."""
        return [
            f"{self.source}: {self.loaded} tensors taken as they are",
            *self.notes,
            *(f"replaced {item}" for item in self.replaced),
            *(f"resampled {item}" for item in self.resampled),
            *(f"missing {name}: kept as newly initialised" for name in self.missing),
            *(f"unexpected {names}: left out" for names in _grouped(self.unexpected)),
        ]


def shapes(found: Tensor, expected: Tensor) -> str:
    """Both shapes of one tensor, for a report."""
    return f"checkpoint {tuple(found.shape)}, model {tuple(expected.shape)}"


def first(names: Sequence[str], separator: str = ", ", count: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(names) - count
    return separator.join(names[:count]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _grouped(names: Sequence[str]) -> Iterator[str]:
    parts = Counter(name.split(".", maxsplit=1)[0] for name in names)
    told = set()
    for name in names:
        part = name.split(".", maxsplit=1)[0]
        if parts[part] <= _MOST_NAMED:
            yield name
        elif part not in told:
            told.add(part)
            yield f"{part}.* ({parts[part]} tensors)"
