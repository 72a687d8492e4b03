"""Model card: its metadata as the Hub reads them, and its description of a run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from resnet_in1k.hub import model_card
from resnet_in1k.hub.hub_folder import make_config, read_run
from resnet_in1k.hub.model_card import RunRecord, make_card, published_facts
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.utils.imagenet import names_by_wnid


@pytest.fixture(scope="module")
def record(finished: RunFolder) -> RunRecord:
    return read_run(finished, "me/tiny", "mit")


def assert_rendered_cleanly(text: str) -> None:
    assert not re.search(r"\n\n\n|\{[{%]|[%}]\}|[ \t]$", text, re.M)


def test_metadata_as_the_hubs_library_reads_them(record: RunRecord, image_folder: Path):
    data, result = ModelCard(make_card(record)).data, record.evaluation
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "timm", "image-classification")
    top1, top5 = data.eval_results
    expected = [result["top1_accuracy"], result["top5_accuracy"]]
    assert [top1.metric_value, top5.metric_value] == pytest.approx(expected, abs=1e-6)
    assert (top1.dataset_name, top1.dataset_split, top1.dataset_args["num_images"]) == (image_folder.name, "val", 12)


def test_the_card_describes_this_run(record: RunRecord, finished: RunFolder, image_folder: Path):
    text = make_card(record)
    recipe, facts = read_recipe(finished)
    for field in recipe.non_default_fields().keys() - {"lr_step_epochs", "lr_step_factor", "lr_batch_rule"}:
        assert f"| `{field}` | {getattr(recipe, field)} |" in text
    assert "random_erasing" not in text
    assert "lr_step" not in text  # the schedule is cosine
    for part in (facts["hardware"], f"torch {facts['versions']['torch']}", facts["commit"], "![Loss", "32 px"):
        assert part in text
    for name in ("ant", "bee", "cat", "dog", "eel", "fox"):
        assert re.search(rf"^\| {name} \| \d+\.\d% \| [012] of 2 \|$", text, re.M)
    assert f"--data path/to/{image_folder.name}\n" in text
    assert "## Limits and bias" in text
    assert "BICUBIC" not in text
    assert "BICUBIC" in make_card(replace(record, evaluation=record.evaluation | {"interpolation": "bicubic"}))
    assert_rendered_cleanly(text)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("US$ 5 or A$ 5", r"US\$ 5 or A\$ 5"),
        ("a|b*c", r"a\|b\*c"),
        ("two\nlines", r"two\\nlines"),
        ("[x](y) <b> `c`", r"\[x\](y) \<b\> \`c\`"),
        ("_so_ and n01440764_1", r"\_so\_ and n01440764_1"),
        ("猫 ", "猫 "),
    ],
)
def test_any_class_name_is_one_cell_of_a_table(record: RunRecord, name: str, cell: str):
    """Markup in it is escaped, and a newline is shown as text."""
    names = [name, *record.evaluation["class_names"][1:]]
    text = make_card(replace(record, evaluation=record.evaluation | {"class_names": names}))
    (row,) = re.findall(rf"^\| {re.escape(cell)} \| \d+\.\d% \| [012] of 2 \|$", text, re.M)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_only_fields_that_had_an_effect_are_listed(record: RunRecord):
    listed = make_card(record)
    for field in ("momentum", "decay_norms", "decay_biases", "lr_schedule"):
        assert f"| `{field}` |" in listed
    recipe = replace(record.recipe, optimizer="adamw", weight_decay=0.0, rand_augment_magnitude=5, lr_schedule="step")
    listed = make_card(replace(record, recipe=recipe))
    for field in ("momentum", "decay_norms", "decay_biases", "rand_augment_magnitude"):
        assert f"| `{field}` |" not in listed
    assert "gradient accumulation" not in listed
    assert "| `lr_step_factor` |" in make_card(replace(record, recipe=replace(recipe, lr_step_factor=0.2)))
    facts = record.facts | {"gradient_accumulation_steps": 4}
    assert "| gradient accumulation steps | 4 |" in make_card(replace(record, facts=facts))


def test_an_address_and_exported_networks_are_named_only_if_there_are_any(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
):
    text = make_card(record)
    assert not re.search(r"onnx|torch\.export|pip install|\]\(http", text, re.I)
    monkeypatch.setattr(model_card, "PROJECT_URL", "https://example.com/resnet-in1k")
    exported = record.evaluation | {"file": "net.onnx"}
    text = make_card(replace(record, exported=[exported]))
    assert "loads in [resnet-in1k](https://example.com/resnet-in1k), torchvision" in text
    assert "Install it with `pip install git+https://example.com/resnet-in1k`." in text
    assert 'onnxruntime.InferenceSession(hf_hub_download("me/tiny", "net.onnx"))' in text
    assert "torch.export" not in text
    assert_rendered_cleanly(text)


def test_resumes_unreadable_images_and_the_price_are_listed(record: RunRecord, tmp_path: Path):
    plain = make_card(record)
    assert not re.search(r"\| (unreadable training images|resumed|cost) \|", plain)
    facts = record.facts | {"resumed": [record.facts | {"world_size": 2}]}
    run = RunFolder(tmp_path)
    run.bad_images.write_text("a\nb\nc\n")
    for line in record.run.records():
        run.append(line | ({"dollars": 1.25} if line["kind"] == "epoch" else {}))
    text = make_card(replace(record, facts=facts, run=run))
    assert f"| hardware (processes × device) | 1 × {facts['hardware']}; 2 × {facts['hardware']} |" in text
    assert "| unreadable training images | 3 |" in text
    assert "| resumed | once; " in text
    assert "| cost | 2.50 dollars |" in text


def test_the_recorded_command_is_published_without_local_folders(record: RunRecord):
    command = "/home/me/repo/scripts/train.py --recipe a3 --data DATA --lr=0.1 --output_dir /home/me/runs/x"
    words = [word.replace("DATA", "/home/me/my data") for word in command.split()]
    words += ["--init-from=/home/me/base", "--backup", "s3://secret/x", "--no-nesterov"]
    initial = {"checkpoint": "/home/me/base", "origin": "", "sha256": "12", "head": "with its head"}
    facts = record.facts | {"command": words, "world_size": 2, "init_from": initial}
    text = make_card(replace(record, facts=published_facts(facts)))
    assert (
        "\naccelerate launch --multi_gpu --num_processes 2 -m resnet_in1k train --recipe a3 --data 'path/to/my data' "
        "--lr 0.1 --output_dir path/to/x --init-from path/to/base --backup path/to/x --no-nesterov\n"
    ) in text
    resumed = facts | {"resumed": [{"after_step": 4, "command": [*words, "--resume"], "init_from": initial}]}
    published = json.dumps(published_facts(resumed))
    assert "/home/me" not in published
    assert "secret" not in published
    assert published_facts(resumed)["resumed"][0]["command"][-1] == "--resume"


def test_names_that_others_can_use_stay_in_the_command(record: RunRecord):
    words = ["train.py", "--recipe", "hub:me/base", "--data", "digits", "--init-from", "timm/resnet18.a1_in1k"]
    initial = {"checkpoint": words[-1], "origin": words[-1], "sha256": "12", "head": "with its head"}
    facts = published_facts(record.facts | {"command": words, "init_from": initial})
    text = make_card(replace(record, facts=facts))
    assert "\nresnet-in1k train --recipe hub:me/base --data digits --init-from timm/resnet18.a1_in1k\n" in text


def test_a_share_for_validation_is_in_both_commands(record: RunRecord):
    facts = record.facts | {"data": record.facts["data"] | {"val_share": 0.2}}
    text = make_card(replace(record, facts=facts))
    assert len(re.findall(r"^resnet-in1k (?:train|evaluate) .*--data \S+ --val-share 0\.2\b", text, re.M)) == 2
    assert "--val-share" not in make_card(record)


def test_weights_trained_elsewhere_have_a_card_too(finished: RunFolder, tmp_path: Path):
    for path in (finished.weights, finished.evaluation):
        shutil.copy(path, tmp_path)
    text = make_card(read_run(RunFolder(tmp_path), "me/tiny", "mit"))
    assert "trained elsewhere and evaluated on" in text
    assert "The training is not recorded" in text
    assert "resnet-in1k train" not in text


@pytest.mark.parametrize(("architecture", "num_features"), [("resnet34", 512), ("resnet50", 2048)])
def test_weights_of_imagenet_are_compared_with_torchvisions(architecture: str, num_features: int, tmp_path: Path):
    """The metrics are made up; the published accuracies are torchvision's own."""
    result = {
        "top1_accuracy": 0.8, "top5_accuracy": 0.9, "loss": 1.0, "num_images": 50_000, "num_classes": 1000, "top_k": 5,
        "top1_correct": 40_000, "top5_correct": 45_000, "image_size": 224, "resize_size": 256, "data": "data/imagenet",
        "split": "val", "weights_sha256": "0" * 64, "class_names": list(names_by_wnid()),
        "class_num_images": [50] * 1000, "class_top1_correct": [40] * 1000, "class_top5_correct": [45] * 1000,
        "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    record = RunRecord(RunFolder(tmp_path), f"me/{architecture}", "mit", architecture, result)
    config, card = make_config(record), make_card(record)
    assert config["num_features"] == num_features
    assert config["label_names"][:2] == ["tench", "goldfish"]
    assert (config["pretrained_cfg"]["crop_pct"], config["pretrained_cfg"]["input_size"]) == (0.875, [3, 224, 224])
    assert_rendered_cleanly(card)
    assert "type: ILSVRC/imagenet-1k" in card
    terms = "non-commercial research and education. Whether they bind weights that were trained on the images"
    assert terms in card
    if architecture == "resnet50":
        assert "| torchvision IMAGENET1K_V1 | 256 px, crop 224 px | 76.13% | +3.87 points |" in card
        assert "| torchvision IMAGENET1K_V2 | 232 px, crop 224 px | 80.86% | -0.86 points |" in card
    # Other data with the same classes, such as ImageNetV2, have another number of images.
    other = make_card(replace(record, evaluation=result | {"num_images": 49_000, "data": "data/imagenetv2"}))
    assert "ILSVRC" not in other
    assert "IMAGENET1K" not in other
    assert terms not in other


@pytest.mark.parametrize("origin", ["", "timm:convnext_tiny.fb_in1k"])
def test_the_card_of_a_taught_model_names_its_teacher(record: RunRecord, origin: str):
    """In the text, and in the command by a name that others can use."""
    checkpoint = origin or "/home/me/runs/big"
    words = ["scripts/train.py", "--teacher", checkpoint, "--teacher-weight", "0.25"]
    teacher = {"checkpoint": checkpoint, "origin": origin, "sha256": "34cd", "architecture": "resnet50"}
    facts = published_facts(record.facts | {"command": words, "teacher": teacher})
    recipe = replace(record.recipe, teacher_weight=0.25, teacher_temperature=2)
    text = make_card(replace(record, facts=facts, recipe=recipe))
    named = f"{origin or 'big'} (resnet50, sha256 `34cd`), with 25% of the loss at temperature 2."
    assert f"It also learned the predictions of {named}" in text
    assert f"--teacher {origin or 'path/to/big'} --teacher-weight 0.25\n" in text
    assert "The weights that the training learned from have their own license." in text
    assert "/home/me" not in text
    assert_rendered_cleanly(text)


@pytest.mark.parametrize("origin", ["", "timm/resnet18.a1_in1k", "torchvision/resnet18"])
def test_the_card_of_a_fine_tuned_model_names_where_it_comes_from(record: RunRecord, origin: str):
    """Only a repository of the Hub is its base model there."""
    initial = {"checkpoint": origin or "/home/me/runs/tv1", "origin": origin, "sha256": "12ab", "head": "with its head"}
    text = make_card(replace(record, facts=published_facts(record.facts | {"init_from": initial})))
    assert "This is a ResNet-18 that was fine-tuned on " in text
    assert f"The training started from {origin or 'tv1'} (sha256 `12ab`), with its head." in text
    assert "/home/me" not in text
    assert ModelCard(text).data.base_model == (origin if origin.startswith("timm") else None)
    assert_rendered_cleanly(text)
