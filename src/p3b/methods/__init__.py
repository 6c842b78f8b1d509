"""Pruning methods, one a file. `METHODS` lists them by name; a method is built by `create_method`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from p3b.errors import ConfigError, unknown_name
from p3b.methods import global_score, uniform
from p3b.methods.base import Method
from p3b.methods.block_benefit import BlockBenefit
from p3b.methods.savit import Savit
from p3b.methods.wdpruning import WDPruning
from p3b.scoring.interactions import KINDS
from p3b.scoring.meter import Reduce
from p3b.scoring.removal import REMOVAL
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.layout import DEFAULT_DIMS, ModelLayout

METHODS: Mapping[str, Callable[..., Method]] = {
    "block_benefit": BlockBenefit,
    "uniform": uniform.uniform,
    "random": uniform.random,
    "magnitude": global_score.magnitude,
    "taylor": global_score.taylor,
    "wdpruning": WDPruning,
    "savit": Savit,
}
METHOD_DIMS: Mapping[str, tuple[str, ...]] = {"wdpruning": ("heads", "hidden", "out"), "savit": KINDS}
"""Dimensions that a method prunes, of `p3b.vit.layout.DIMS`, where they are others than `DEFAULT_DIMS`."""
ACTIVE_ALONE = ("block_benefit", "uniform", "random", "magnitude", "taylor")
"""Methods that decide as well where elements with the lowest masks are not computed. The others learn masks by the gradients of
closed ones, or measure interactions with them."""
PUBLISHED_NAMES = {"block_pr": "block_benefit"}
PUBLISHED_OPTIONS: Mapping[str, Mapping[str, Any]] = {"block_pr": {"estimator": "paper"}}
"""Who asks for a method by its published name gets it as it was published, where nothing else is said."""

ONE_SHOT_METHODS = tuple(name for name in METHODS if name != "wdpruning")
"""Those that can prune a trained model in one shot; the other learns while it trains."""
ONE_SHOT_ESTIMATORS = (REMOVAL, "ridge")
"""Estimators of block benefit in one shot, the usual one first: one has no probes, those of the other are solved."""

_STATELESS_IN_WARM_UP = ("uniform", "random", "magnitude", "taylor", "savit")
_OF_BLOCK_BENEFIT_LATER = ("alpha", "gamma", "benefit_scale", "blocks_only", "align", "stream", "keep_ratios")
"""Options of block_benefit that come into play when masks are decided: its probes know nothing of them."""


def create_method(
    name: str, model: VisionTransformer, layout: ModelLayout, prune_ratio: float, reduce: Reduce, options: Mapping[str, Any]
) -> Method:
    """Build a method by its name or published name.

    Raises:
        ConfigError: the name or an option is unknown; the message lists the nearest known ones.
        BudgetError: the prune ratio cannot be met.
    """
    known = method_options(name)
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"option of {name}", option, known))
    build = METHODS[PUBLISHED_NAMES.get(name, name)]
    return build(model, layout, prune_ratio, reduce, **effective_options(name, options))


def effective_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method as it is built: those given, then those it was published with, then its own defaults.

    Args:
        name: of the method, or its published name.
        options: that are given.

    Raises:
        ConfigError: the name is unknown.
    """
    defaults = inspect.signature(METHODS[PUBLISHED_NAMES.get(name, name)]).parameters if method_options(name) else {}
    return {**{key: defaults[key].default for key in method_options(name)}, **PUBLISHED_OPTIONS.get(name, {}), **options}


def method_dims(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The dimensions that a method wants to be prunable: what `read_layout` is to be given.

    Whole heads are among them where counts are to be aligned: they go where heads would be too thin. Where the residual stream
    is narrowed it takes the place of what blocks read and write.

    Args:
        name: of the method, or its published name.
        options: that it is built with.

    Raises:
        ConfigError: the name is unknown.
    """
    given = effective_options(name, options)
    aligned = given.get("align", 1) > 1
    dims = METHOD_DIMS.get(PUBLISHED_NAMES.get(name, name), DEFAULT_DIMS)
    if given.get("stream", 0) != 0:  # blocks read and write all that is left of it
        dims = ("head", "hidden", STREAM)
    return ("heads", *dims) if aligned and "heads" not in dims else dims


def options_of_one_shot(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method that prunes a trained model in one shot.

    Raises:
        ConfigError: the method learns while the model trains, so that one shot would tell it nothing, or it is unknown.
    """
    method_options(name)
    if not prunes_in_one_shot(name):
        raise ConfigError(
            f"{name} learns while the model trains, so it cannot prune in one shot. Give it a schedule and epochs to train in, "
            f"or choose another method: {', '.join(ONE_SHOT_METHODS)}."
        )
    if "estimator" in method_options(name) and options.get("keep_ratios") is None:
        options = {"estimator": ONE_SHOT_ESTIMATORS[0], **options}
        if options["estimator"] not in ONE_SHOT_ESTIMATORS:
            raise ConfigError(
                f"The probes of estimator={options['estimator']!r} learn by gradient over many steps, so they cannot measure a "
                f"benefit in one shot; leave it out ({ONE_SHOT_ESTIMATORS[0]!r} is taken) or give {ONE_SHOT_ESTIMATORS[1]!r}."
            )
    return dict(options)


def method_options(name: str) -> list[str]:
    """The options that a method takes.

    Raises:
        ConfigError: the name is unknown; the message lists the nearest known ones.
    """
    build = METHODS.get(PUBLISHED_NAMES.get(name, name))
    if build is None:
        raise ConfigError(unknown_name("prune method", name, [*METHODS, *PUBLISHED_NAMES]))
    return [key for key, p in inspect.signature(build).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]


def prunes_in_one_shot(name: str) -> bool:
    """Whether a method can decide on a trained model, without learning anything of its own on the way."""
    return PUBLISHED_NAMES.get(name, name) in ONE_SHOT_METHODS


def computes_active_alone(name: str) -> bool:
    """Whether a method decides as well where elements with the lowest masks are not computed."""
    return PUBLISHED_NAMES.get(name, name) in ACTIVE_ALONE


def require_active_alone(name: str) -> None:
    """Refuse a method that needs every element computed.

    Raises:
        ConfigError: names those that do not.
    """
    if not computes_active_alone(name):
        raise ConfigError(
            f"compute='active' (--prune-compute) is not for {name}, which looks at closed elements; leave it out, or choose "
            f"one of {', '.join(ACTIVE_ALONE)}."
        )


def own_in_warm_up(name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a method's own state at the end of the warm-up, before pruning starts, depends on besides model and data.

    Methods and budgets for which this is the same may go on from one warm-up: none of them has looked at the budget by then.
    A new method shares with nobody until it is named here.

    Args:
        name: of the method, or its published name.
        options: that it is built with.

    Returns:
        Settings by name; empty where it has no state of its own by then; None where it does not share.
    """
    if PUBLISHED_NAMES.get(name, name) not in METHODS:
        return None
    options = effective_options(name, options)
    name = PUBLISHED_NAMES.get(name, name)
    without_probes = name == "block_benefit" and (options["keep_ratios"] is not None or options["estimator"] == REMOVAL)
    if name in _STATELESS_IN_WARM_UP or without_probes:
        return {}
    if name == "block_benefit":  # its probes learn from the first step on
        return {"method": name} | {key: value for key, value in options.items() if key not in _OF_BLOCK_BENEFIT_LATER}
    return None
