"""What can hardly work is said before it starts: one sentence a cause, with a flag that mends it; nothing where all is well."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p3b.core.schedule import Schedule
from p3b.run.cautions import CAUTIONS, Outlook, cautions

WELL = Outlook(
    model="deit_small_patch16_224",
    has_weights=True,
    images={"cat": 5000, "dog": 5000},
    batch_size=64,
    global_batch=64,
    steps_per_epoch=156,
    epochs=50,
    lr=5e-4,
    rate=5e-4 * 64 / 512,
    schedule=Schedule(start=780, sparse=3400, final=7800, update_every=52),
)


def test_nothing_is_said_where_all_is_well() -> None:
    assert cautions(WELL) == []
    assert cautions(replace(WELL, schedule=None)) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"has_weights": False}, ("random weights", "--model-pretrained", "--model-path")),
        ({"images": {"cat": 5000, "dog": 3, "elk": 9}}, ("2 of 3 classes", "dog, 3", "--val-share")),
        (
            {"epochs": 3, "rate": 4e-4},
            ("too few optimizer steps", "468 in all (156 an epoch)", "--epochs (now 3)", "--batch-size"),
        ),
        ({"schedule": Schedule(10, 40, 7800, 52)}, ("warm-up 10 steps", "--prune-start-epoch", "--batch-size")),
        ({"schedule": Schedule(0, 400, 401, 52)}, ("sharpen 1 step)", "--epochs")),
        ({"schedule": Schedule(780, 3400, 7800, 3)}, ("renewed every 3 steps of 64 images", "--prune-steps-update-mask 20")),
        ({"rate": 1e-6}, ("1.0e-06", "--lr 0.0005 is meant for 512 images", "--lr 0.")),
    ],
)
def test_each_cause_is_said_once_with_the_flag_that_mends_it(changed: dict[str, object], words: tuple[str, ...]) -> None:
    (said,) = cautions(replace(WELL, **changed))  # type: ignore[arg-type]
    assert all(word in said for word in words), said


def test_a_warm_up_of_no_steps_is_no_short_phase() -> None:
    assert cautions(replace(WELL, schedule=Schedule(0, 3400, 7800, 52))) == []


def test_few_steps_between_updates_are_noise_by_their_images_too() -> None:
    """Six steps of 64 images are enough, six of 8 are not."""
    often = replace(WELL, schedule=Schedule(780, 3400, 7800, 6))
    assert cautions(often) == []
    assert len(cautions(replace(often, batch_size=8, global_batch=8, rate=2e-4))) == 1


def test_the_batch_that_is_advised_gives_updates_enough_steps() -> None:
    small = replace(WELL, images={"cat": 120, "dog": 120}, steps_per_epoch=3, schedule=Schedule(200, 400, 800, 1), epochs=600)
    said = next(said for said in cautions(small) if "masks are renewed" in said)
    batch = int(said.split("such as ")[1].split(",")[0])
    assert batch % 2 == 0 and 3 * 64 // batch >= 20 and "--prune-steps-update-mask 20" in said


def test_an_interval_that_had_to_give_way_is_said() -> None:
    given_way = replace(WELL, steps_per_epoch=9, epochs=500, schedule=Schedule(300, 900, 4000, 3), asked_interval=20)
    assert any("--prune-steps-update-mask 20 is longer than an epoch and gives way" in said for said in cautions(given_way))


def test_the_worst_case_is_said_by_every_cause_once() -> None:
    worst = Outlook("vit", False, {"a": 1, "b": 1}, 64, 2, 1, 2, 5e-4, 2e-6, Schedule(0, 1, 2, 1), 20)
    assert len(cautions(worst)) == len(CAUTIONS)
