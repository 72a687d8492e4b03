from dataclasses import replace
from pathlib import Path

import pytest

from resnet_in1k.errors import UserError
from resnet_in1k.plan import Plan, describe
from resnet_in1k.recipes import DEMO, TUTORIAL
from resnet_in1k.sources import open_train_and_val


def plan(**changes: object) -> Plan:
    return Plan(
        **{
            "recipe": TUTORIAL,
            "num_processes": 2,
            "gradient_accumulation_steps": 1,
            "num_train_images": 1_281_167,
            **changes,
        }
    )


def test_imagenet_on_two_gpus():
    assert plan().per_process_batch_size == plan().per_device_batch_size == 128
    assert plan().steps_per_epoch == 5004
    assert plan().total_steps == 100_080
    assert plan(gradient_accumulation_steps=4).per_device_batch_size == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 3}, "--global-batch-size 256 cannot be divided evenly among 3 processes.*multiple of 3"),
        ({"gradient_accumulation_steps": 3}, "2 processes × 3 accumulation steps; take a multiple of 6"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps 0: at least 1"),
        ({"num_train_images": 255}, "255 training images are fewer than --global-batch-size 256"),
    ],
)
def test_what_does_not_work_out_is_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_the_plan_in_words(image_folder: Path):
    train, val = open_train_and_val(str(image_folder))
    recipe = replace(TUTORIAL, global_batch_size=12, epochs=7)
    text = describe(
        plan(recipe=recipe, num_train_images=len(train), gradient_accumulation_steps=3),
        recipe_name="tutorial",
        named_recipe=TUTORIAL,
        train=train,
        val=val,
        device="a device",
        mixed_precision="bf16",
        workers=1,
        cpu_threads=2,
    )
    for part in (
        "tutorial, but epochs 20 → 7; global_batch_size 256 → 12",
        "resnet50, 6 classes, 224 px",
        "37 training and 12 validation images",
        "12 global = 2 processes × 6 in 3 accumulation steps of 2",
        "3 an epoch (1 other images each epoch sit out) × 7 epochs = 21",
        "0.1, × 0.2 every 5 epochs",
        "bfloat16 autocast, channels_last",
        "1 loader worker, 2 CPU threads",
    ):
        assert part in text
    assert plan(recipe=DEMO).schedule() == "1 epoch of warm-up to 0.02, then cosine to 0"
