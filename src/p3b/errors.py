"""The errors that a user can mend. Each message says what was got, what is expected and how to mend it.

The command line prints such an error as one paragraph without a traceback and exits with status 2; anything else is a bug of
ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used; the message tells how to mend it."""


class BudgetError(UserError, ValueError):
    """A prune ratio or budget that cannot be met."""


class ScheduleError(UserError, ValueError):
    """Phases that are out of order or do not fit the run."""


class ModelError(UserError, ValueError):
    """A model that is unknown or has a part that cannot be pruned."""


class WeightsError(UserError, ValueError):
    """Weights that are missing, damaged or belong to another architecture."""


class DataError(UserError, ValueError):
    """A data set that is missing, empty or inconsistent."""


class ConfigError(UserError, ValueError):
    """A setting outside its range, or settings that contradict each other."""


class RunFolderError(UserError, OSError):
    """An output folder that cannot be used as asked."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot go on, for instance because its loss is not finite."""


class ComparisonError(UserError, RuntimeError):
    """Some runs of a comparison failed; the others are done."""


class ExportError(UserError, RuntimeError):
    """An export that does not compute what the model computes, or that loses more than is allowed."""


class HubError(UserError, OSError):
    """A model hub that cannot be reached, or refuses."""


class Stopped(Exception):  # noqa: N818 - it is none
    """A signal asked the run to stop: it has finished its step and saved; nothing went wrong and nothing is lost."""


def unknown_name(kind: str, got: str, known: Iterable[str]) -> str:
    """Message for a name that is not known: what was got, the nearest known names, or all of them where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=5, cutoff=0.5)
    if near:
        return f"Unknown {kind} '{got}'. Did you mean {' or '.join(repr(name) for name in near)}?"
    shown = ", ".join(names[:20]) + (f" ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"Unknown {kind} '{got}'. Known: {shown}."
