"""Recipes: pure choices from facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p3b.run.flags import settings_of
from p3b.run.options import PruneConfig
from p3b.run.recipe_terms import Facts
from p3b.run.recipes import auto_recipe, small_recipe

PHOTOS = Facts(
    images=240,
    classes=6,
    smallest=40,
    largest=40,
    side=500,
    symbols=False,
    input_size=224,
    resizable=True,
    patch_size=16,
    width=384,
    depth=12,
    pretrained=True,
    on_gpu=False,
    memory=16 * 10**9,
    processes=1,
    prunes=True,
    narrows=True,
    compensates=True,
)


def chosen(facts: Facts, **given: object) -> dict[str, object]:
    return {choice.setting: choice.value for choice in auto_recipe(facts, given).choices}


def rate_of(values: dict[str, object], facts: Facts = PHOTOS) -> float:
    """Learning rate of a step."""
    return float(values["lr"]) * int(values["batch_size"]) * facts.processes / 512  # type: ignore[call-overload, arg-type]


def test_every_choice_is_a_setting_with_a_reason() -> None:
    known = {name for name, _ in settings_of(PruneConfig())}
    choices = auto_recipe(PHOTOS, {}).choices
    names = [choice.setting for choice in choices]
    assert set(names) <= known and len(set(names)) == len(names)
    assert all(choice.reason for choice in choices)


@pytest.mark.parametrize("setting", sorted(chosen(PHOTOS)))
def test_what_is_given_is_never_chosen(setting: str) -> None:
    value = chosen(PHOTOS)[setting]
    assert chosen(PHOTOS, **{setting: value}) == {key: other for key, other in chosen(PHOTOS).items() if key != setting}


def test_the_rate_of_a_step_fits_the_batch_that_is_given() -> None:
    """Rates per step grow with the square root of the batch, and hardly depend on how many images there are."""
    rates = [rate_of({**chosen(PHOTOS, batch_size=size), "batch_size": size}) for size in (16, 64)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.1)
    assert rate_of(chosen(PHOTOS)) == pytest.approx(0.94e-4, rel=0.1)
    assert rate_of(chosen(replace(PHOTOS, width=128))) == pytest.approx(2.8e-4, rel=0.1)
    assert rate_of(chosen(replace(PHOTOS, pretrained=False))) == pytest.approx(1.9e-4, rel=0.1)


@pytest.mark.parametrize("images", [12, 120, 240, 1200, 6000, 50_000, 1_000_000])
@pytest.mark.parametrize("prunes", [True, False])
def test_there_are_enough_steps_and_masks_live_for_some_tens_of_them(images: int, prunes: bool) -> None:
    facts = replace(PHOTOS, images=images, prunes=prunes, compensates=False)
    values = chosen(facts)
    batch = int(values["batch_size"])  # type: ignore[call-overload]
    epochs = int(values["epochs"])  # type: ignore[call-overload]
    total = epochs + int(values.get("finetune_epochs", 0))  # type: ignore[call-overload]
    steps_per_epoch = max(1, images // batch)
    assert 10 <= total <= 90 and 2 <= batch <= 64 and batch % 2 == 0
    assert total * steps_per_epoch >= 200
    if prunes:
        interval = int(str(values["prune_update_every"]).removesuffix("steps"))
        share = int(str(values["prune_start_epoch"]).removesuffix("%")) / 100
        span = (1 - share) * epochs * steps_per_epoch
        assert interval >= min(30, span / 3 - 1) and 2.9 <= span / interval <= 40


def test_passes_fall_and_steps_grow_with_the_images() -> None:
    passes = [int(chosen(replace(PHOTOS, images=images, prunes=False))["epochs"]) for images in (240, 1200, 6000, 50_000)]  # type: ignore[call-overload]
    assert passes == sorted(passes, reverse=True) and passes[0] == 60 and passes[-1] == 10
    steps = [count * images for count, images in zip(passes, (240, 1200, 6000, 50_000), strict=True)]
    assert steps == sorted(steps)


def test_the_batch_fits_the_memory_and_is_a_power_of_two() -> None:
    large = replace(PHOTOS, images=100_000, width=768)
    sizes = [int(chosen(replace(large, memory=gigabytes * 10**9))["batch_size"]) for gigabytes in (2, 4, 8, 16, 80)]  # type: ignore[call-overload]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 64
    assert all(size & (size - 1) == 0 for size in sizes)
    reason = next(
        choice.reason for choice in auto_recipe(replace(large, memory=4 * 10**9), {}).choices if choice.setting == "batch_size"
    )
    assert reason == "what fits 4 GB of memory"


def test_small_images_are_not_blown_up_on_a_cpu() -> None:
    assert chosen(PHOTOS)["input_size"] == 224
    tiny = replace(PHOTOS, side=32)
    assert chosen(tiny)["input_size"] == 96 and chosen(tiny)["crop_pct"] == 1.0
    assert chosen(replace(tiny, on_gpu=True))["input_size"] == 224
    assert chosen(replace(PHOTOS, side=130))["input_size"] == 144
    assert "input_size" not in chosen(replace(tiny, resizable=False)) and "crop_pct" not in chosen(PHOTOS)


def test_many_classes_get_more_passes_but_not_without_end() -> None:
    def steps(classes: int, images: int) -> tuple[float, float]:
        values = chosen(replace(PHOTOS, classes=classes, images=images, prunes=False))
        passes = float(values["epochs"])  # type: ignore[arg-type]
        return passes * (images // int(values["batch_size"])), passes  # type: ignore[call-overload]

    assert steps(41, 328)[0] >= 20 * 41 > steps(6, 328)[0] and steps(500, 10_000)[0] >= 20 * 500
    assert steps(5_000, 10_000)[1] == 100 and steps(101, 75_000) == steps(6, 75_000)


def test_augmentation_grows_with_how_often_an_image_is_seen_and_with_the_steps() -> None:
    often = {"epochs": 60, "finetune_epochs": 60}
    seen = [(6_000, {}), (240, {}), (1_000, often), (1_000_000, {})]
    values = [chosen(replace(PHOTOS, images=images), **given) for images, given in seen]
    assert [each["mixup"] for each in values] == [0.0, 0.0, 0.2, 0.8]
    assert [each["drop_path"] for each in values] == [0.0, 0.0, 0.0, 0.1]
    assert [each["aa"] is None for each in values] == [True, True, False, False], "60 times in 480 steps is no reason"


def test_rare_classes_get_more_weight_where_there_are_some() -> None:
    uneven = replace(PHOTOS, smallest=5, largest=80)
    assert chosen(uneven)["class_balance"] == "inverse" and "class_balance" not in chosen(PHOTOS)
    assert chosen(replace(uneven, largest=400))["class_balance"] == "sqrt"
    reason = next(choice.reason for choice in auto_recipe(uneven, {}).choices if choice.setting == "class_balance")
    assert reason == "the largest class has 16 times as many images as the smallest"


def test_characters_are_not_mirrored() -> None:
    assert chosen(replace(PHOTOS, symbols=True))["hflip"] == 0.0 and "hflip" not in chosen(PHOTOS)


def test_phases_follow_what_is_given_of_them() -> None:
    assert "prune_update_every" not in chosen(PHOTOS, prune_steps_update_mask=10)
    assert chosen(PHOTOS, epochs=10, prune_start_epoch="5", batch_size=24)["prune_update_every"] == "17steps"


def test_a_model_that_is_not_pruned_has_no_phases() -> None:
    for names in (chosen(replace(PHOTOS, prunes=False)), {choice.setting for choice in small_recipe({}, prunes=False).choices}):
        assert not {"prune_start_epoch", "prune_update_every", "finetune_epochs"} & set(names)


def test_the_small_recipe_is_fixed() -> None:
    values = {choice.setting: choice.value for choice in small_recipe({"epochs": 3}, prunes=True).choices}
    assert "epochs" not in values and values["lr"] == 4e-3 and values["batch_size"] == 32 and values["mixup"] == 0.2


def test_one_shot_gets_nothing_that_it_would_not_use() -> None:
    assert set(chosen(PHOTOS, epochs=0)) == {"batch_size", "prune_method"}
    assert "prune_method" not in chosen(PHOTOS)
    assert "prune_method" not in chosen(PHOTOS, epochs=0, spare=("blocks.0",))
    tuned = set(chosen(PHOTOS, epochs=0, finetune_epochs=3))
    assert {"lr", "crop_scale"} <= tuned
    assert not tuned & {"input_size", "crop_pct", "prune_start_epoch", "prune_update_every"}
    small = {choice.setting for choice in small_recipe({"epochs": 0}, prunes=True).choices}
    assert not small & {"epochs", "finetune_epochs", "prune_start_epoch", "prune_update_every"}


MANY = replace(PHOTOS, images=10_000)
GRADUAL = replace(MANY, compensates=False)


def test_many_images_get_a_cut_at_once_where_it_can_be_compensated() -> None:
    values = chosen(MANY)
    at_once = {"prune_schedule": "at-once", "prune_stream": "auto", "align": 8, "calibration_images": 128}
    assert at_once.items() <= values.items()
    assert values["epochs"] == 10 and values["prune_start_epoch"] == "94steps", "3 % of the run"
    gradual = {"finetune_epochs", "prune_update_every", "prune_benefit", "prune_compute"}
    assert not gradual & values.keys() and gradual <= chosen(GRADUAL).keys()
    assert chosen(replace(MANY, images=5_000))["prune_start_epoch"] == "80steps", "and 80 at least"
    assert chosen(replace(MANY, images=1_000_000, classes=300))["calibration_images"] == 600
    assert "prune_schedule" not in chosen(replace(MANY, classes=300)), "ten images of a class tell too little"
    for given in ({"align": 8}, {"prune_stream": "auto"}, {"prune_benefit": "removal"}, {"prune_method": "uniform"}):
        assert chosen(MANY, **given)["prune_schedule"] == "at-once", given
    for given in (
        {"prune_masks": "hard"},
        {"prune_compute": "active"},
        {"prune_benefit": "linear"},
        {"prune_stream": 0.0},
        {"compensate": "off"},
        {"spare": ("blocks.0",)},
        {"prune_method": "block_pr"},
        {"prune_method": "taylor"},
        {"prune_schedule": "gradual"},
    ):
        assert "prune_schedule" not in chosen(MANY, **given) and "calibration_images" not in chosen(MANY, **given), given
    for facts in (GRADUAL, replace(MANY, narrows=False), replace(MANY, prunes=False), PHOTOS):
        assert "prune_schedule" not in chosen(facts)


def test_a_model_whose_stream_can_be_narrowed_gets_narrower_where_nothing_forbids_it() -> None:
    widths = {"prune_stream": "auto", "align": 8}
    assert widths.items() <= chosen(MANY).items()
    assert widths.items() <= chosen(MANY, methods=("savit", "uniform")).items()
    for given in (
        {"prune_method": "block_pr"},
        {"prune_method": "taylor"},
        {"methods": ("taylor", "savit")},
        {"spare": ("blocks.0",)},
        {"prune_keep_ratios": (0.5,) * 24},
    ):
        assert not chosen(MANY, **given).keys() & widths.keys(), given
    for facts in (replace(MANY, narrows=False), replace(MANY, prunes=False), PHOTOS):
        assert not chosen(facts).keys() & widths.keys()
    assert chosen(MANY, prune_stream=0.0)["align"] == 8, "what is given is not all that a rule depends on"


def test_where_probes_would_see_few_images_of_a_class_there_are_none() -> None:
    crowded = replace(GRADUAL, classes=512, smallest=20, largest=20)
    (choice,) = [each for each in auto_recipe(crowded, {}).choices if each.setting == "prune_benefit"]
    assert choice.value == "removal" and "images of a class before pruning starts" in choice.reason
    assert chosen(crowded, epochs=40, prune_start_epoch="20")["prune_benefit"] == "linear", "a longer warm-up shows more"
    assert chosen(replace(crowded, images=1_000_000))["prune_benefit"] == "linear"


def test_with_many_images_most_of_a_run_is_of_the_small_model() -> None:
    for images, least, most in ((120, 0.9, 1.0), (1200, 0.9, 1.0), (6000, 1.5, 2.1), (1_000_000, 1.5, 2.1)):
        values = chosen(replace(PHOTOS, images=images, compensates=False))
        assert least <= values["finetune_epochs"] / values["epochs"] <= most  # type: ignore[operator]


def test_many_images_get_the_cheapest_probes_and_steps_that_get_quicker() -> None:
    cheap = {"prune_benefit": "linear", "prune_compute": "active"}
    assert cheap.items() <= chosen(GRADUAL).items() and not cheap.keys() & chosen(PHOTOS).keys()
    assert not cheap.keys() & chosen(GRADUAL, prune_method="taylor").keys()
    assert not cheap.keys() & chosen(GRADUAL, prune_method="block_pr").keys()
    assert cheap.keys() & chosen(GRADUAL, prune_method="uniform").keys() == {"prune_compute"}
    assert cheap.keys() & chosen(GRADUAL, compile=True).keys() == {"prune_benefit"}
