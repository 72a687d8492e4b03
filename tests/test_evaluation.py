import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from accelerate import Accelerator
from PIL import Image
from torch.nn import functional

from resnet_in1k.checkpoint import save_weights
from resnet_in1k.errors import UserError
from resnet_in1k.evaluation import evaluate_model
from resnet_in1k.files import sha256_of
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.scoring import EvalOptions, evaluate_checkpoint
from resnet_in1k.sources import Source, open_source


@pytest.fixture(scope="module")
def model() -> ResNet:
    torch.manual_seed(0)
    return ResNet("resnet18", num_classes=6).eval()


def evaluate(model: torch.nn.Module, source: Source, **how: int):
    options = {"image_size": 32, "resize_size": 36, "num_workers": 0, **how}
    return evaluate_model(model, source, Accelerator(cpu=True), **options)


def test_against_a_plain_loop_over_pillow_images(model: ResNet, image_folder: Path):
    """PIL, torchvision's transforms, one image at a time, counted by hand."""
    source = open_source(str(image_folder), "val")
    transform = v1.Compose([v1.Resize(36), v1.CenterCrop(32), v1.ToTensor()])
    normalise = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    top1 = top5 = loss = 0
    for index in range(len(source)):
        image = Image.open(source.image_name(index)).convert("RGB")
        label = source.class_names.index(Path(source.image_name(index)).parent.name)
        with torch.no_grad():
            logits = model(normalise(transform(image))[None])[0]
        ranked = logits.argsort(descending=True).tolist()
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked[:5])
        loss += functional.cross_entropy(logits, torch.tensor(label)).item() / len(source)

    evaluation = evaluate(model, source)
    assert (evaluation.num_images, evaluation.top1_correct, evaluation.topk_correct) == (12, top1, top5)
    assert evaluation.loss == pytest.approx(loss, abs=1e-2)  # resized pixels may differ by a grey level
    assert "12 of 12 images" in evaluation.summary()


@pytest.mark.parametrize("batch_size", [1, 5, 12, 128])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_do_not_hang_on_batch_size_or_workers(model, image_folder: Path, batch_size: int, num_workers: int):
    source = open_source(str(image_folder), "val")
    reference = evaluate(model, source, batch_size=3)
    evaluation = evaluate(model, source, batch_size=batch_size, num_workers=num_workers)
    assert (evaluation.top1_correct, evaluation.topk_correct) == (reference.top1_correct, reference.topk_correct)
    assert evaluation.loss == pytest.approx(reference.loss, abs=1e-5)


def test_fewer_than_five_classes_give_top_k_of_what_there_is(image_folder: Path, tmp_path: Path):
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            shutil.copytree(image_folder / split / name, tmp_path / split / name)
    evaluation = evaluate(ResNet("resnet18", num_classes=3), open_source(str(tmp_path), "val"))
    assert (evaluation.top_k, evaluation.topk_correct) == (3, evaluation.num_images)
    assert "top-3" in evaluation.summary()


@pytest.fixture
def weights(model: ResNet, tmp_path: Path) -> Path:
    save_weights(weights_to_save(model), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_outside_a_run_are_evaluated_on_what_is_given(weights: Path, image_folder: Path, tmp_path: Path):
    output = tmp_path / "result.json"
    evaluation = evaluate_checkpoint(
        EvalOptions(ckpt=weights, data=str(image_folder), split="train", image_size=32, workers=0, output=output)
    )
    result = json.loads(output.read_text())
    assert result["top1_accuracy"] == evaluation.top1_correct / 37
    assert result["num_images"] == 37
    assert (result["image_size"], result["resize_size"], result["split"]) == (32, 36, "train")
    assert result["weights_sha256"] == sha256_of(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not lie in a run folder.*give --data"),
        ({"data": "digits"}, "knows 6 classes, but digits has 10"),
        ({"data": "nowhere"}, "no such folder"),
        ({"data": "digits", "output": Path("no/such/folder.json")}, "no folder no/such"),
        ({"data": "digits", "batch_size": 0}, "--batch-size 0"),
        ({"data": "digits", "image_size": 0}, "--image-size 0"),
        ({"data": "digits", "eval_crop_ratio": 1.5}, "--eval-crop-ratio 1.5"),
    ],
)
def test_what_cannot_be_evaluated_is_named(weights: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        evaluate_checkpoint(EvalOptions(ckpt=weights, **options))


def damage(image_folder: Path, to: Path, *names: str) -> Path:
    data = Path(shutil.copytree(image_folder, to))
    for name in names:
        (data / name).write_bytes((data / name).read_bytes()[:200])
    return data


def test_a_bad_image_counts_as_wrong_and_is_told(image_folder: Path, tmp_path: Path, capsys):
    """Weights that always rank ant, bee, cat, dog, eel first, on two images of each and of fox."""
    model = ResNet("resnet18", 6)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.arange(6.0, 0.0, -1.0)
    save_weights(weights_to_save(model), tmp_path / "weights.safetensors")
    names = [f"val/{name}/0.jpg" for name in ("ant", "dog", "fox")]
    data = damage(image_folder, tmp_path / "dirty", *names)
    evaluation = evaluate_checkpoint(
        EvalOptions(ckpt=tmp_path / "weights.safetensors", data=str(data), workers=1, image_size=32, batch_size=5)
    )
    assert (evaluation.num_images, evaluation.top1_correct, evaluation.topk_correct) == (12, 1, 8)
    losses = torch.logsumexp(model.fc.bias.detach(), 0) - torch.tensor([6, 5, 5, 4, 4, 3, 2, 2, 1.0])
    assert evaluation.loss == pytest.approx(losses.mean().item(), rel=1e-6)  # of those that could be read
    assert [Path(name) for name in evaluation.bad_images] == [data / name for name in names]
    assert evaluation.to_json("")["num_bad_images"] == 3
    said = capsys.readouterr().out
    assert "12 of 12 images, 3 of them unreadable, counted as wrong" in said
    assert f"counted as wrong: {data / names[0]} (" in said


def test_images_none_of_which_can_be_read_are_no_evaluation(weights: Path, image_folder: Path, tmp_path: Path):
    names = [path.relative_to(image_folder) for path in image_folder.glob("val/*/*")]
    data = damage(image_folder, tmp_path / "dirty", *map(str, names))
    with pytest.raises(UserError, match=r"no image of .*/val can be read: .*0.jpg \(.*\) and all others"):
        evaluate_checkpoint(EvalOptions(ckpt=weights, data=str(data), workers=0, image_size=32))


def test_weights_that_are_not_those_of_the_recorded_evaluation_are_told(finished: RunFolder, tmp_path: Path, capsys):
    copy = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    data = bytearray(copy.weights.read_bytes())
    data[-1] ^= 1
    copy.weights.write_bytes(data)
    evaluate_checkpoint(EvalOptions(ckpt=copy.path, workers=0))
    said = capsys.readouterr().out
    assert "model.safetensors is not what the eval.json beside it was measured on: replaced since, or damaged\n" in said
    assert "reproduced" not in said


def test_other_classes_than_the_runs_are_refused(weights: Path, image_folder: Path, tmp_path: Path, tiny):
    from resnet_in1k.run_folder import RunFolder, write_recipe

    write_recipe(RunFolder(tmp_path), "tiny", tiny, {"source": str(image_folder), "class_names": ["ant", "yak"]})
    with pytest.raises(UserError, match=r"only in the run: yak; only in .*: bee, cat, dog and 2 more"):
        evaluate_checkpoint(EvalOptions(ckpt=weights))


def test_a_missing_image_would_be_noticed(model: ResNet, image_folder: Path, monkeypatch: pytest.MonkeyPatch):
    from resnet_in1k import pipeline

    whole = pipeline.EvalOrder.__iter__
    monkeypatch.setattr(pipeline.EvalOrder, "__iter__", lambda self: iter(list(whole(self))[:-1]))
    with pytest.raises(AssertionError, match="each image exactly once"):
        evaluate(model, open_source(str(image_folder), "val"), batch_size=5)


def test_evaluates_in_float32_whatever_the_training(model: ResNet, image_folder: Path):
    seen = set()
    hook = model.fc.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    evaluate_model(
        model,
        open_source(str(image_folder), "val"),
        Accelerator(cpu=True, mixed_precision="bf16"),
        image_size=32,
        resize_size=36,
        num_workers=0,
    )
    hook.remove()
    assert seen == {torch.float32}
    assert np.isfinite(model.fc.weight.detach().numpy()).all()
