"""The options of a pruning method: which settings of the command line are for it, and what it calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from p3b.errors import ConfigError
from p3b.methods import METHODS, computes_active_alone, method_options
from p3b.run.options import PhaseOptions, PruneOptions

METHOD_OPTIONS = {
    "prune_blocks_only": "blocks_only",
    "prune_benefit": "estimator",
    "align": "align",
    "prune_stream": "stream",
    "spare": "spare",
    "prune_keep_ratios": "keep_ratios",
    "prune_alpha": "alpha",
    "prune_gamma": "gamma",
    "prune_benefit_scale": "benefit_scale",
    "probe_lr": "probe_lr",
    "wd_round_to": "round_to",
    "wd_classifiers": "classifiers",
    "wd_classifier_choose": "classifier_choose",
    "wd_classifier_lr": "classifier_lr",
    "wd_lr": "lr",
    "wd_lambda_lr": "lambda_lr",
    "savit_every": "every",
    "savit_images": "images",
}
"""Settings of the command line that are for the method alone, and what the methods that take them call them."""


def method_options_of(options: PruneOptions, seed: int) -> dict[str, Any]:
    """The options of the chosen method, as it takes them.

    Args:
        options: of the command line.
        seed: for a method that draws random numbers.

    Raises:
        ConfigError: the method is unknown, or a setting that it does not take was changed: it would be ignored otherwise.
    """
    defaults, method = PruneOptions(), options.prune_method
    taken = method_options(method)
    given: dict[str, Any] = {"seed": seed} if "seed" in taken else {}
    for setting, option in METHOD_OPTIONS.items():
        value = getattr(options, setting)
        if option in taken:
            if value is not None:  # what is left open is the method's to say
                given[option] = None if value == () else value
        elif value != getattr(defaults, setting):
            raise _means_nothing(setting, value, f"--prune-method {method}", "leave it out or choose another method")
    return given


def require_taken(options: PhaseOptions, methods: Sequence[str]) -> None:
    """Refuse a setting that none of the methods takes: it would be ignored.

    Raises:
        ConfigError: names the setting and the methods that take it.
    """
    defaults = PhaseOptions()
    taken = {option for method in methods for option in method_options(method)}
    for setting, option in METHOD_OPTIONS.items():
        value = getattr(options, setting, None)
        if option not in taken and value is not None and value != getattr(defaults, setting):
            raise _means_nothing(setting, value, "the methods that are compared", "leave it out")
    if options.prune_compute == "active" and not any(map(computes_active_alone, methods)):
        raise ConfigError("--prune-compute active means nothing to the methods that are compared; leave it out.")


def _means_nothing(setting: str, value: Any, whom: str, mend: str) -> ConfigError:
    takers = [name for name in METHODS if METHOD_OPTIONS[setting] in method_options(name)]
    return ConfigError(f"--{setting.replace('_', '-')} {value} means nothing to {whom}, only to {', '.join(takers)}; {mend}.")
