"""Hub folder: complete, readable by other libraries, and an error if anything is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from resnet_in1k.hub.hub_folder import build_hub_folder, make_config, read_run
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of


@pytest.fixture
def run(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy that a test may change."""
    return RunFolder(
        Path(shutil.copytree(finished.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    )


MISSING = object()


def change(run: RunFolder, **values: object) -> None:
    """Change eval.json."""
    result = json.loads(run.evaluation.read_text()) | values
    run.evaluation.write_text(json.dumps({key: value for key, value in result.items() if value is not MISSING}))


def rewrite_weights(run: RunFolder, edit: Callable[[dict], dict]) -> None:
    """Other weights, and an evaluation with their sha256."""
    save_file(edit(load_file(run.weights)), run.weights, metadata={"format": "pt"})
    change(run, weights_sha256=sha256_of(run.weights))


def test_contents_of_the_hub_folder(run: RunFolder, image_folder: Path):
    folder = build_hub_folder(run, "me/tiny")
    assert folder == run.path / "hub"
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert contents.keys() == {
        "README.md", "config.json", "curves.png", "eval.json", "model.safetensors", "recipe.json",
    }  # fmt: skip
    assert sha256_of(folder / "model.safetensors") == json.loads(contents["eval.json"])["weights_sha256"]
    # Folders of this machine are not published.
    assert not any(str(image_folder.parent).encode() in content for content in contents.values())
    assert json.loads(contents["recipe.json"])["data"]["source"] == image_folder.name

    build_hub_folder(run, "me/tiny")  # again: the same bytes
    assert contents == {name: (folder / name).read_bytes() for name in contents}


def test_config_has_the_interpolation_of_the_evaluation(run: RunFolder):
    change(run, interpolation="bicubic")
    assert make_config(read_run(run, "me/tiny", "mit"))["pretrained_cfg"]["interpolation"] == "bicubic"
    change(run, interpolation=MISSING)  # an evaluation by an earlier version
    assert make_config(read_run(run, "me/tiny", "mit"))["pretrained_cfg"]["interpolation"] == "bilinear"


REFUSED: dict[str, tuple[Callable[[RunFolder], object], str]] = {
    "no run": (lambda run: shutil.rmtree(run.path), "no model.safetensors in it"),
    "no weights": (lambda run: run.weights.unlink(), "no model.safetensors in it"),
    "no evaluation": (lambda run: run.evaluation.unlink(), "eval.json is missing, or .*; evaluate again: python"),
    "of other weights": (lambda run: change(run, weights_sha256="0" * 64), "eval.json is missing, or is not of "),
    "of the training split": (lambda run: change(run, split="train"), "split is 'train', not 'val'"),
    "a metric missing": (lambda run: change(run, top5_accuracy=MISSING), "eval.json cannot be read .*top5_accuracy"),
    "an infinite loss": (
        lambda run: run.evaluation.write_text(re.sub(r'"loss": [^,]+', '"loss": 1e999', run.evaluation.read_text())),
        "the loss is not finite",
    ),
    "a metric that is text": (lambda run: change(run, top1_correct="many"), "top1_correct is 'many', not "),
    "another accuracy than counted": (lambda run: change(run, top1_accuracy=0.99), "top1_accuracy is 0.99, not "),
    "more correct than there are": (lambda run: change(run, top5_correct=13), "top5_correct is 13, not "),
    "classes that do not add up": (lambda run: change(run, class_num_images=[2] * 5 + [1]), "num_images is 12, not 11"),
    "one class": (lambda run: change(run, num_classes=1), "one class only, for which any network is right; train on"),
    "another number of classes": (lambda run: change(run, num_classes=7), "num_classes is 7, not 6"),
    "a part of the images": (
        lambda run: change(
            run, num_images=6, top1_correct=0, top5_correct=0, top1_accuracy=0.0, top5_accuracy=0.0,
            class_num_images=[1] * 6, class_top1_correct=[0] * 6, class_top5_correct=[0] * 6,
        ),
        "num_images is 6, not 12; evaluate again: python",
    ),
    "an unknown interpolation": (lambda run: change(run, interpolation="box"), "images resized by 'box', which is not"),
    "keys with a prefix": (
        lambda run: rewrite_weights(run, lambda weights: {f"module.{key}": value for key, value in weights.items()}),
        "names of tensors that other libraries cannot load, such as module",
    ),
    "truncated weights": (lambda run: run.weights.write_bytes(b"\0" * 99), "cannot be read as plain tensors"),
    "a recipe.json without versions": (
        lambda run: run.recipe.write_text(run.recipe.read_text().replace('"versions"', '"version"')),
        "records in .* are incomplete",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_problem_is_an_error_in_one_line(run: RunFolder, name: str):
    damage, message = REFUSED[name]
    damage(run)
    with pytest.raises(UserError, match=message) as error:
        build_hub_folder(run, "me/tiny")
    assert "\n" not in str(error.value)
    assert not (run.path / "hub").exists()


@pytest.mark.parametrize(
    ("repo_id", "license", "message"),
    [
        ("tiny", "mit", "USER/NAME"),
        ("me/--tiny", "mit", "--repo-id me/--tiny: "),
        ("me/tiny", "MIT License", "--license MIT License: not an identifier"),
        ("me/tiny", "", "--license : not an identifier"),
    ],
)
def test_names_of_the_wrong_form_are_refused(finished: RunFolder, repo_id: str, license: str, message: str):
    with pytest.raises(UserError, match=message):
        build_hub_folder(finished, repo_id, license)
