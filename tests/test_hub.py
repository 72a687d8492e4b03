"""What is published: refused if anything is amiss, complete, and readable by the Hub's own library."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from resnet_in1k import hub
from resnet_in1k.card import interval, make_card
from resnet_in1k.checkpoint import save_weights
from resnet_in1k.errors import UserError
from resnet_in1k.files import sha256_of
from resnet_in1k.hub import build_hub_folder, gather_evidence
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.names import human_names, imagenet_names, is_imagenet_1k
from resnet_in1k.recipes import crop_ratio_for
from resnet_in1k.run_folder import RunFolder, read_recipe


@pytest.fixture
def run(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to damage."""
    return RunFolder(
        Path(shutil.copytree(finished.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    )


def change(run: RunFolder, **values: object) -> None:
    result = json.loads(run.evaluation.read_text()) | values
    run.evaluation.write_text(json.dumps({key: value for key, value in result.items() if value != "absent"}))


def rewrite_weights(run: RunFolder, edit: Callable[[dict], dict]) -> None:
    """Other weights, and an evaluation that is said to be theirs."""
    weights = edit(load_file(run.weights))
    save_file(weights, run.weights, metadata={"format": "pt"})
    change(run, weights_sha256=sha256_of(run.weights))


def test_the_folder_holds_what_it_should(run: RunFolder, image_folder: Path):
    folder = build_hub_folder(run, "me/tiny")
    assert folder == run.path / "hub"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "config.json", "curves.png", "eval.json", "model.safetensors", "recipe.json",
        f".eval_results/{image_folder.name}.yaml",
    }  # fmt: skip
    assert sha256_of(folder / "model.safetensors") == json.loads((folder / "eval.json").read_text())["weights_sha256"]
    torchvision.models.resnet18(num_classes=6).load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    published = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".yaml"))
    assert str(image_folder.parent) not in published  # where the data lay is nobody's business
    again = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    build_hub_folder(run, "me/tiny")
    assert again == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_our_own_loader_reads_the_folder(run: RunFolder):
    folder = build_hub_folder(run, "me/tiny")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(ResNet.from_pretrained(folder)(images), ResNet.from_pretrained(run.path)(images))


BROKEN: dict[str, tuple[Callable[[RunFolder], object], str]] = {
    "no weights": (lambda run: run.weights.unlink(), "has no model.safetensors"),
    "no evaluation": (lambda run: run.evaluation.unlink(), "eval.json is missing"),
    "of other weights": (lambda run: change(run, weights_sha256="0" * 64), "is of other weights"),
    "a metric missing": (lambda run: change(run, top5_accuracy="absent"), "not a whole evaluation .*top5_accuracy"),
    "a metric not finite": (lambda run: change(run, loss=math.nan), "a metric is not finite"),
    "a metric in words": (lambda run: change(run, top1_accuracy="much"), "not a whole evaluation"),
    "no JSON": (lambda run: run.evaluation.write_text("{"), "not a whole evaluation"),
    "another accuracy than counted": (lambda run: change(run, top1_accuracy=0.99), "not those of the counts"),
    "more correct than there are": (lambda run: change(run, top5_correct=13), "cannot be right"),
    "classes that do not add up": (lambda run: change(run, class_num_images=[2, 2, 2, 2, 2, 1]), "do not add up"),
    "another number of classes": (lambda run: change(run, num_classes=7), "the weights have 6 classes"),
    "a part of the images": (
        lambda run: change(
            run, num_images=6, top1_correct=0, top5_correct=0, top1_accuracy=0.0, top5_accuracy=0.0,
            class_num_images=[1] * 6, class_top1_correct=[0] * 6, class_top5_correct=[0] * 6,
        ),
        "partial or of other data: 6 images, where the run's val split has 12",
    ),
    "keys with a prefix": (
        lambda run: rewrite_weights(run, lambda weights: {f"module.{key}": value for key, value in weights.items()}),
        "keys with a prefix .module",
    ),
    "weights that have diverged": (
        lambda run: rewrite_weights(run, lambda weights: weights | {"fc.bias": torch.full((6,), math.nan)}),
        "fc.bias is not finite",
    ),
    "weights cut off": (lambda run: run.weights.write_bytes(run.weights.read_bytes()[:9999]), "not a whole safetensor"),
    "a key missing": (
        lambda run: rewrite_weights(run, lambda w: {key: value for key, value in w.items() if key != "fc.bias"}),
        "holds no torchvision ResNet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_amiss_is_refused_in_one_line(run: RunFolder, name: str):
    damage, message = BROKEN[name]
    damage(run)
    with pytest.raises(UserError, match=message) as error:
        build_hub_folder(run, "me/tiny")
    assert "\n" not in str(error.value)
    assert not (run.path / "hub").exists()


@pytest.mark.parametrize(
    ("repo_id", "license", "message"),
    [
        ("tiny", "mit", "USER/NAME"),
        ("me/a/b", "mit", "--repo-id me/a/b: "),
        ("me/--tiny", "mit", "--repo-id me/--tiny: "),
        ("me/ti ny", "mit", "--repo-id me/ti ny: "),
        ("me/tiny", "free", "--license free: not an identifier"),
        ("me/tiny", "", "--license : not an identifier"),
    ],
)
def test_names_that_the_hub_would_not_take(run: RunFolder, repo_id: str, license: str, message: str):
    with pytest.raises(UserError, match=message):
        build_hub_folder(run, repo_id, license)


def test_the_cards_metadata_is_read_back_by_the_hubs_own_library(run: RunFolder, image_folder: Path):
    folder = build_hub_folder(run, "me/tiny", "mit")
    card = ModelCard.load(folder / "README.md")
    result = json.loads(run.evaluation.read_text())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "timm",
        "image-classification",
    )
    top1, top5 = card.data.eval_results
    assert (top1.metric_value, top5.metric_value) == (result["top1_accuracy"], result["top5_accuracy"])
    assert (top1.dataset_name, top1.dataset_split, top1.dataset_args["num_images"]) == (image_folder.name, "val", 12)
    (entries,) = (yaml.safe_load(path.read_text()) for path in (folder / ".eval_results").iterdir())
    assert [entry["value"] for entry in entries] == [result["top1_accuracy"], result["top5_accuracy"]]


def test_the_card_speaks_of_this_run(run: RunFolder):
    text = (build_hub_folder(run, "me/tiny") / "README.md").read_text()
    recipe, facts = read_recipe(run)
    for field, value in facts["recipe"].items():
        assert field == "name" or f"| `{field}` | {value} |" in text
    for part in (facts["hardware"], facts["versions"]["torch"], facts["commit"], "| 12 |", "![Loss", "32 px"):
        assert part in text
    for name in ("ant", "bee", "cat", "dog", "eel", "fox"):
        assert re.search(rf"^\| {name} \| \d+\.\d% \| [012] of 2 \|$", text, re.M)
    assert "--lr 0.002" in text  # how to reproduce it
    assert recipe.lr == 0.002
    assert "## Limits and bias" in text


def test_weights_trained_elsewhere_have_a_card_too(run: RunFolder):
    for path in (run.recipe, run.log, run.curves.with_suffix(".png")):
        path.unlink()
    text = (build_hub_folder(run, "me/tiny") / "README.md").read_text()
    assert "the weights were trained elsewhere" in text
    assert not (run.path / "hub/recipe.json").exists()


def test_wilsons_interval():
    """8 of 10, worked by hand: centre (0.8 + 0.19207) / 1.38415, half width 0.22653."""
    low, high = interval(8, 10)
    assert (low, high) == (pytest.approx(0.49016, abs=1e-4), pytest.approx(0.94332, abs=1e-4))
    assert interval(10, 10)[1] == pytest.approx(1.0)


def test_imagenets_folders_have_names():
    names = imagenet_names()
    assert len(names) == len(set(names.values())) == 1000
    known = {
        "n01440764": "tench",
        "n02099601": "golden retriever",
        "n03445777": "golf ball",
        "n15075141": "toilet tissue",
    }
    assert {wnid: names[wnid] for wnid in known} == known
    assert human_names(["n03445777", "n01440764", "n00000000"]) == ["golf ball", "tench", "n00000000"]
    assert human_names(["ant", "bee"]) == ["ant", "bee"]
    assert is_imagenet_1k(list(names))
    assert not is_imagenet_1k(list(names)[::-1])


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_every_architecture_and_imagenet_itself(architecture: str, tmp_path: Path):
    """1000 classes with an evaluation made up for the test: the published figures beside it are torchvision's own."""
    folder = RunFolder(tmp_path / architecture)
    folder.path.mkdir()
    with torch.device("meta"):
        empty = ResNet(architecture, 1000)
    model = empty.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    save_weights(weights_to_save(model), folder.weights)
    per_class = {"class_num_images": [50] * 1000, "class_top1_correct": [40] * 1000, "class_top5_correct": [45] * 1000}
    result = {
        "top1_accuracy": 0.8, "top5_accuracy": 0.9, "loss": 1.0, "num_images": 50_000, "num_classes": 1000, "top_k": 5,
        "top1_correct": 40_000, "top5_correct": 45_000, "image_size": 224, "resize_size": 256, "data": "data/imagenet",
        "split": "val", "weights_sha256": sha256_of(folder.weights), "class_names": list(imagenet_names()), **per_class,
    }  # fmt: skip
    folder.evaluation.write_text(json.dumps(result))
    evidence = gather_evidence(folder, f"me/{architecture}", "mit")
    config, card = hub.make_config(evidence), make_card(evidence)
    assert config["num_features"] == model.fc.in_features
    assert config["label_names"][:2] == ["tench", "goldfish"]
    assert (config["pretrained_cfg"]["crop_pct"], config["pretrained_cfg"]["input_size"]) == (0.875, [3, 224, 224])
    assert "type: ILSVRC/imagenet-1k" in card
    if architecture == "resnet50":
        assert "| torchvision IMAGENET1K_V1 | 256 px, crop 224 px | 76.13 % | +3.87 points |" in card
        assert "| torchvision IMAGENET1K_V2 | 232 px, crop 224 px | 80.86 % | -0.86 points |" in card
    fewer = replace(evidence, evaluation=result | {"num_images": 49_000})  # as of ImageNetV2
    assert "ILSVRC" not in make_card(replace(fewer, evaluation=fewer.evaluation | {"data": "data/imagenetv2"}))


@pytest.mark.parametrize("sizes", [(224, 256), (160, 232), (192, 225), (64, 93), (32, 32), (224, 232)])
def test_the_published_crop_makes_the_same_resize_again(sizes: tuple[int, int]):
    """By timm's own rule, floor(size / crop_pct)."""
    assert math.floor(sizes[0] / crop_ratio_for(*sizes, preferred=0.875)) == sizes[1]
