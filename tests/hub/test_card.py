"""The model card: its metadata as the Hub reads them, and what it says of a run."""

import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from resnet_in1k.cli import train
from resnet_in1k.hub.hub_folder import make_config, read_run
from resnet_in1k.hub.model_card import RunRecord, make_card
from resnet_in1k.model.resnet import LAYOUTS
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.utils.imagenet import names_by_wnid


@pytest.fixture(scope="module")
def record(finished: RunFolder) -> RunRecord:
    return read_run(finished, "me/tiny", "mit")


def assert_rendered_cleanly(text: str) -> None:
    """Without repeated blank lines, spaces at the ends of lines, or parts of the template."""
    assert not re.search(r"\n\n\n|\{[{%]|[%}]\}|[ \t]$", text, re.M)


def test_metadata_as_the_hubs_library_reads_them(record: RunRecord, image_folder: Path):
    data, result = ModelCard(make_card(record)).data, record.evaluation
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "timm", "image-classification")
    top1, top5 = data.eval_results
    assert (top1.metric_value, top5.metric_value) == (result["top1_accuracy"], result["top5_accuracy"])
    assert (top1.dataset_name, top1.dataset_split, top1.dataset_args["num_images"]) == (image_folder.name, "val", 12)


def test_the_card_describes_this_run(record: RunRecord, finished: RunFolder, image_folder: Path):
    text = make_card(record)
    recipe, facts = read_recipe(finished)
    for field, value in recipe.non_default_fields().items():
        assert f"| `{field}` | {value} |" in text
    assert "random_erasing" not in text
    for part in (facts["hardware"], f"torch {facts['versions']['torch']}", facts["commit"], "![Loss", "32 px"):
        assert part in text
    for name in ("ant", "bee", "cat", "dog", "eel", "fox"):
        assert re.search(rf"^\| {name} \| \d+\.\d% \| [012] of 2 \|$", text, re.M)
    assert f"--data path/to/{image_folder.name} " in text
    assert "--lr 0.002" in text
    assert recipe.lr == 0.002
    assert "## Limits and bias" in text
    assert "BICUBIC" not in text
    assert "BICUBIC" in make_card(replace(record, evaluation=record.evaluation | {"interpolation": "bicubic"}))
    assert_rendered_cleanly(text)


def test_the_command_repeats_only_what_differs_from_a_named_recipe(record: RunRecord):
    facts = record.facts | {
        "recipe": record.facts["recipe"] | {"name": "demo"},
        "mixed_precision": "bf16",
        "gradient_accumulation_steps": 2,
        "resumed": [record.facts | {"world_size": 2}],
    }
    recipe = replace(RECIPES["demo"].recipe, zero_init_residual=False, seed=7)
    text = make_card(replace(record, facts=facts, recipe=recipe, num_bad_train_images=3))
    assert (
        " scripts/train.py --recipe demo --data path/to/images0 --no-zero-init-residual --seed 7 --precision bf16 "
        "--gradient-accumulation-steps 2 --on-bad-image skip\n"
    ) in re.sub(r"path/to/\S+", "path/to/images0", text)
    assert "zero_init_residual True → False; seed 0 → 7" in text
    assert f"| hardware (processes × device) | 1 × {facts['hardware']}; 2 × {facts['hardware']} |" in text
    assert "| unreadable images | 3 |" in text
    assert "| resumed | once; " in text


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe nv-90 --global-batch-size 512 --lr 2.048",
        "--recipe nv-90 --global-batch-size 512 --epochs 30 --warmup-epochs 8",
        "--recipe tv1 --epochs 45 --image-size 112",
        "--recipe budget-16 --epochs 32 --image-size 96 --no-nesterov",
        "--recipe one-gpu-24gb --gradient-accumulation-steps 1",
        "--recipe one-gpu-24gb --global-batch-size 512",
    ],
)
def test_the_command_gives_the_same_recipe_again(record: RunRecord, monkeypatch: pytest.MonkeyPatch, flags: str):
    """Parsed as train.py does, which derives some fields from others."""

    def parsed(words: list[str]) -> train.Arguments:
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *words])
        return train.parse(train.given_recipe())

    asked = parsed(flags.split())
    facts = record.facts | {
        "recipe": record.facts["recipe"] | {"name": asked.recipe},
        "gradient_accumulation_steps": asked.how.gradient_accumulation_steps,
    }
    text = make_card(replace(record, facts=facts, recipe=asked.what))
    (command,) = re.findall(r"^accelerate launch .* scripts/train.py (.*)$", text, re.M)
    again = parsed(shlex.split(command))
    assert again.what == asked.what
    assert again.how.gradient_accumulation_steps == asked.how.gradient_accumulation_steps


def test_a_share_for_validation_is_in_both_commands(record: RunRecord):
    facts = record.facts | {"data": record.facts["data"] | {"val_share": 0.2}}
    text = make_card(replace(record, facts=facts))
    assert len(re.findall(r"^.*scripts/(?:train|evaluate)\.py .*--data \S+ --val-share 0\.2\b", text, re.M)) == 2
    assert "--val-share" not in make_card(record)


def test_the_price_is_the_sum_of_the_epochs(record: RunRecord):
    """Which a resume may have changed."""
    assert "| cost |" not in make_card(record)
    epochs = [line | {"dollars": 1.25} if line["kind"] == "epoch" else line for line in record.records]
    assert "| cost | 2.50 dollars |" in make_card(replace(record, records=epochs))


def test_weights_trained_elsewhere_have_a_card_too(finished: RunFolder, tmp_path: Path):
    for path in (finished.weights, finished.evaluation):
        shutil.copy(path, tmp_path)
    text = make_card(read_run(RunFolder(tmp_path), "me/tiny", "mit"))
    assert "trained elsewhere and evaluated on" in text
    assert "the weights were trained elsewhere" in text
    assert "scripts/train.py" not in text


def test_data_without_a_folder_describe_their_own_limits(record: RunRecord):
    text = make_card(replace(record, evaluation=record.evaluation | {"data": "digits"}))
    assert "--data digits" in text
    assert "written by 13 people" in text


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_every_architecture_on_imagenet(architecture: str):
    """With made-up metrics; the published accuracies beside them are torchvision's own."""
    result = {
        "top1_accuracy": 0.8, "top5_accuracy": 0.9, "loss": 1.0, "num_images": 50_000, "num_classes": 1000, "top_k": 5,
        "top1_correct": 40_000, "top5_correct": 45_000, "image_size": 224, "resize_size": 256, "data": "data/imagenet",
        "split": "val", "weights_sha256": "0" * 64, "class_names": list(names_by_wnid()),
        "class_num_images": [50] * 1000, "class_top1_correct": [40] * 1000, "class_top5_correct": [45] * 1000,
    }  # fmt: skip
    record = RunRecord(
        repo_id=f"me/{architecture}", license="mit", architecture=architecture, evaluation=result, recipe=None,
        facts=None, records=[], num_bad_train_images=0, has_curves=False,
    )  # fmt: skip
    config, card = make_config(record), make_card(record)
    assert config["num_features"] == (512 if architecture in ("resnet18", "resnet34") else 2048)
    assert config["label_names"][:2] == ["tench", "goldfish"]
    assert (config["pretrained_cfg"]["crop_pct"], config["pretrained_cfg"]["input_size"]) == (0.875, [3, 224, 224])
    assert_rendered_cleanly(card)
    assert "type: ILSVRC/imagenet-1k" in card
    assert "https://arxiv.org/abs/2006.07159" in card
    if architecture == "resnet50":
        assert "| torchvision IMAGENET1K_V1 | 256 px, crop 224 px | 76.13 % | +3.87 points |" in card
        assert "| torchvision IMAGENET1K_V2 | 232 px, crop 224 px | 80.86 % | -0.86 points |" in card
    # Other data with the same classes, such as ImageNetV2, are told by their number of images.
    other = make_card(replace(record, evaluation=result | {"num_images": 49_000, "data": "data/imagenetv2"}))
    assert "ILSVRC" not in other
    assert "IMAGENET1K" not in other


def test_the_card_of_a_fine_tuned_model_names_where_it_comes_from(record: RunRecord):
    """Repositories by name, files of this machine without their folders."""
    initial = {"checkpoint": "/home/me/runs/tv1", "origin": "", "sha256": "12ab", "architecture": "resnet18"}
    initial["head"] = "with a new head of 6 classes, as its classes are others"
    local = replace(record, facts=record.facts | {"init_from": initial})
    text = make_card(local)
    assert "A ResNet-18 fine-tuned on " in text
    assert (
        "The training started from tv1 (sha256 `12ab`), with a new head of 6 classes, as its classes are others."
        in text
    )
    assert "--init-from path/to/tv1 " in text
    assert "/home/me" not in text
    assert ModelCard(text).data.base_model is None
    assert_rendered_cleanly(text)
    published = initial | {"checkpoint": "timm/resnet18.a1_in1k", "origin": "timm/resnet18.a1_in1k"}
    text = make_card(replace(record, facts=record.facts | {"init_from": published}))
    assert ModelCard(text).data.base_model == "timm/resnet18.a1_in1k"
    assert "--init-from timm/resnet18.a1_in1k " in text
    torchvisions = initial | {"checkpoint": "torchvision/resnet18", "origin": "torchvision/resnet18"}
    text = make_card(replace(record, facts=record.facts | {"init_from": torchvisions}))
    assert ModelCard(text).data.base_model is None
    assert "The training started from torchvision/resnet18 " in text
