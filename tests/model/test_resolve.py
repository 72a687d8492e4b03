"""Resolving --ckpt to a weights file, its preprocessing and its class names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.model.weights import write_tensors
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, write_recipe
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "run/model.safetensors"
    path.parent.mkdir()
    write_tensors({"fc.bias": torch.zeros(2)}, path)
    return path


def record_evaluation(weights: Path, /, **changes: object) -> dict:
    """Write eval.json to the weights' folder."""
    recorded = {"weights_sha256": sha256_of(weights), "image_size": 64, "resize_size": 73, "interpolation": "bicubic"}
    recorded |= {"class_names": ["ant", "bee"], **changes}
    (weights.parent / "eval.json").write_text(json.dumps(recorded))
    return recorded


def publish_config(weights: Path, **changes: object) -> None:
    """Write timm's config.json to the weights' folder."""
    mean = [0.485, 0.456, 0.406]
    settings = {"mean": mean, "input_size": [3, 96, 96], "crop_pct": 0.95, "interpolation": "bicubic", **changes}
    config = {"pretrained_cfg": settings, "label_names": ["tench", "goldfish"]}
    (weights.parent / "config.json").write_text(json.dumps(config))


def write_run(weights: Path, recipe: Recipe) -> None:
    write_recipe(RunFolder(weights.parent), "tiny", recipe, {"source": "digits", "class_names": ["a", "b"]}, {})


def test_a_file_without_metadata_has_the_default_preprocessing(weights: Path):
    found = resolve_checkpoint(weights)
    assert (found.file, found.class_names, found.data, found.recorded_evaluation) == (weights, None, None, None)
    assert found.preprocessing == EvalPreprocessing(224, 256, "bilinear")


def test_precedence_of_the_preprocessing(weights: Path, tiny: Recipe):
    """eval.json of these weights comes first, then config.json, then the recipe."""
    write_run(weights, tiny)
    found = resolve_checkpoint(weights.parent)
    assert (found.class_names, found.data) == (["a", "b"], "digits")
    assert found.preprocessing == EvalPreprocessing(32, 36, "bilinear")
    publish_config(weights)
    assert resolve_checkpoint(weights.parent).preprocessing == EvalPreprocessing(96, 101, "bicubic")
    recorded = record_evaluation(weights)
    found = resolve_checkpoint(weights.parent)
    assert (found.recorded_evaluation, found.class_names) == (recorded, ["ant", "bee"])
    assert found.preprocessing == EvalPreprocessing(64, 73, "bicubic")
    assert found.preprocessing.at(32) == EvalPreprocessing(32, 36, "bicubic")


def test_an_evaluation_recorded_before_interpolations_was_bilinear(weights: Path):
    recorded = record_evaluation(weights)
    del recorded["interpolation"]
    (weights.parent / "eval.json").write_text(json.dumps(recorded))
    assert resolve_checkpoint(weights).preprocessing == EvalPreprocessing(64, 73, "bilinear")


@pytest.mark.parametrize(
    "changes",
    [
        *({"input_size": [3, size, size]} for size in (0, 10**9, True, "224", 224.0, None)),
        *({"crop_pct": ratio} for ratio in (0, 1e-9, 1.5, "0.9", None, 10**400)),
    ],
)
def test_an_impossible_preprocessing_is_an_error(weights: Path, changes: dict):
    publish_config(weights, **changes)
    with pytest.raises(UserError, match=r"config\.json cannot be read \(\w+Error: "):
        resolve_checkpoint(weights)


def test_a_recorded_evaluation_of_impossible_sizes_is_an_error_at_once(weights: Path):
    """The search for a crop ratio would not end for a fractional resize size; JSON's 1e999 is infinite."""
    for name, sizes in (("image_size", ("0", "1e999", "true")), ("resize_size", ("73.5", "null", str(10**400)))):
        for size in sizes:
            record_evaluation(weights, **{name: "SIZE"})
            file = weights.parent / "eval.json"
            file.write_text(file.read_text().replace('"SIZE"', size))
            with pytest.raises(UserError, match=r"eval\.json cannot be read \(ValueError: a crop of"):
                resolve_checkpoint(weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": None},
        {"data": {"source": 5, "class_names": ["a"]}},
        {"recipe": {"image_size": 10**400}},
        {"recipe": {"eval_crop_ratio": 1e-9}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_recipe_of_wrong_types_or_sizes_is_one_line(weights: Path, tiny: Recipe, changes: dict):
    write_run(weights, tiny)
    whole = json.loads((weights.parent / "recipe.json").read_text())
    recipe = {**whole["recipe"], **changes.get("recipe", {})}
    (weights.parent / "recipe.json").write_text(json.dumps({**whole, **changes, "recipe": recipe}))
    with pytest.raises(UserError, match=r"model\.safetensors|recipe\.json") as error:
        resolve_checkpoint(weights)
    assert "\n" not in str(error.value)


def test_class_names_cannot_write_to_the_terminal(weights: Path):
    record_evaluation(weights, class_names=["\x1b[2Jant", "bee\r\n"])
    assert resolve_checkpoint(weights).class_names == ["\\x1b[2Jant", "bee\\r\\n"]
    for names in ("ant", [1, 2], {"a": 1}):
        record_evaluation(weights, class_names=names)
        with pytest.raises(UserError, match="its class names are not a list of texts"):
            resolve_checkpoint(weights)


def test_json_that_is_nested_too_deeply_is_like_none(weights: Path):
    for name in ("config.json", "eval.json"):
        (weights.parent / name).write_text('{"a":' + "[" * 100_000)
    assert resolve_checkpoint(weights).preprocessing.image_size == 224
    (weights.parent / "recipe.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"recipe\.json cannot be read .*nested too deeply"):
        resolve_checkpoint(weights)


@pytest.mark.parametrize("checkpoint", ["run/gone", "gone/model.safetensors", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_taken_for_a_repository(weights: Path, monkeypatch, tmp_path, checkpoint: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(UserError, match=f"^{checkpoint}: no such file or folder; give a run folder"):
        resolve_checkpoint(checkpoint)


def test_published_weights_of_a_run_are_those_that_its_recipe_publishes(weights: Path, tiny: Recipe):
    for publish in ("ema", "model"):
        write_run(weights, replace(tiny, ema_decay=0.9, publish=publish))
        assert resolve_checkpoint(weights.parent).kind == publish
    other = shutil.copy(weights, weights.parent / "ema.safetensors")
    assert resolve_checkpoint(other).kind == "ema"


def test_averages_of_a_checkpoint_folder_are_taken_if_wanted(weights: Path, tiny: Recipe):
    write_run(weights, replace(tiny, ema_decay=0.9))
    checkpoint = weights.parent / "checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    for name in ("model", "ema"):
        shutil.copy(weights, checkpoint / f"{name}.safetensors")
    for wanted, name in ((None, "model"), ("model", "model"), ("ema", "ema")):
        found = resolve_checkpoint(checkpoint, wanted)
        assert (found.file.name, found.kind) == (f"{name}.safetensors", name)
    with pytest.raises(UserError, match=r"--weights ema: .* has the other ones; give one of the run's checkpoint"):
        resolve_checkpoint(weights.parent, "ema")


def test_an_evaluation_of_averages_is_not_one_of_the_weights_in_the_same_file(weights: Path):
    record_evaluation(weights, weights="ema")
    assert resolve_checkpoint(weights).kind == "ema"  # copied from a run without its recipe.json
    both = weights.with_name("both.pth")
    torch.save({"model": {}, "model_ema": {}}, both)
    record_evaluation(both, weights="ema")
    assert resolve_checkpoint(both, "ema").class_names == ["ant", "bee"]
    assert resolve_checkpoint(both).recorded_evaluation is None
