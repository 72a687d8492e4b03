"""Evaluation, compared with a plain loop over Pillow images."""

from pathlib import Path

import pytest
import torch
import torchvision.transforms as v1
from accelerate import Accelerator
from helpers.loading import PREPROCESSING, with_bad_images
from PIL import Image
from torch.nn import functional

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_source
from resnet_in1k.evaluate.evaluation import NO_CLASS, EvalLoader, Evaluation, evaluate_model, padded, predict_batch
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.utils.errors import UserError


def evaluate(
    model: torch.nn.Module,
    source: Source,
    *,
    preprocessing: EvalPreprocessing = PREPROCESSING,
    batch_size: int = 5,
    num_workers: int = 0,
    mixed_precision: str = "no",
) -> Evaluation:
    with EvalLoader(source, preprocessing, batch_size, num_workers) as loader:
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        return evaluate_model(model, loader, accelerator)


@pytest.fixture
def val(image_folder: Path) -> Source:
    """Two images of each of six classes."""
    return open_source(str(image_folder), "val")


@pytest.mark.parametrize(("interpolation", "num_workers"), [("bilinear", 0), ("bicubic", 2)])
def test_against_a_plain_loop_over_pillow_images(model: ResNet, val: Source, interpolation: str, num_workers: int):
    """Pillow, torchvision's transforms, one image at a time, counted by hand."""
    transform = v1.Compose([v1.Resize(36, v1.InterpolationMode(interpolation)), v1.CenterCrop(32), v1.ToTensor()])
    normalize = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    top1, top5, loss = [0] * 6, [0] * 6, 0.0
    evaluation = evaluate(model, val, preprocessing=EvalPreprocessing(32, 36, interpolation), num_workers=num_workers)
    for index in range(len(val)):
        image = Image.open(val.image_name(index)).convert("RGB")
        label = val.class_names.index(Path(val.image_name(index)).parent.name)
        with torch.no_grad():
            logits = model(normalize(transform(image))[None])[0]
        ranked = logits.argsort(descending=True).tolist()
        top1[label] += ranked[0] == label
        top5[label] += label in ranked[:5]
        loss += functional.cross_entropy(logits, torch.tensor(label)).item() / len(val)
        assert evaluation.top_ids[index, 0] == ranked[0]
        assert evaluation.confidences[index] == pytest.approx(logits.softmax(0).max().item(), abs=0.01)

    assert evaluation.counts == {
        "top1_accuracy": sum(top1) / 12, "top5_accuracy": sum(top5) / 12, "num_images": 12, "top1_correct": sum(top1),
        "top5_correct": sum(top5), "num_classes": 6, "top_k": 5, "class_num_images": [2] * 6,
        "class_top1_correct": top1, "class_top5_correct": top5,
    }  # fmt: skip
    assert evaluation.loss == pytest.approx(loss, abs=1e-2)  # resized pixels may differ by a gray level
    assert evaluation.summary().endswith("   12 images")


def test_padding_does_not_change_predictions(model: ResNet):
    images, labels = torch.randn(5, 3, 32, 32), torch.arange(5)
    full, part = padded(images, 8), predict_batch(model, images, labels, labels)
    assert full.shape == (8, 3, 32, 32)
    assert padded(images, 4) is images
    with_padding = predict_batch(model, full, labels, labels)
    assert all(torch.allclose(with_padding[name], part[name], atol=1e-5) for name in part)


def settings() -> tuple:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision


def test_it_computes_in_float32_without_tf32_whatever_the_training_precision(model: ResNet, val: Source):
    seen, before = set(), settings()
    hook = model.fc.register_forward_hook(lambda module, inputs, output: seen.add((output.dtype, settings())))
    evaluate(model, val, mixed_precision="bf16")
    hook.remove()
    assert seen == {(torch.float32, (False, True, "ieee", "ieee"))}
    assert settings() == before


def test_a_bad_image_counts_as_wrong_and_not_in_the_loss(val: Source):
    """Weights that always rank 0, 1, 2, 3, 4 first, on twelve images each of a class of its own."""
    model = ResNet("resnet18", 12)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.arange(12.0, 0.0, -1.0)
    evaluation = evaluate(model, with_bad_images(val, 12, bad={0, 3, 11}))
    counts = evaluation.counts
    assert (counts["num_images"], counts["top1_correct"], counts["top5_correct"]) == (12, 0, 3)
    assert counts["class_top5_correct"] == [0, 1, 1, 0, 1, *[0] * 7]
    losses = torch.logsumexp(model.fc.bias.detach(), 0) - torch.tensor([11, 10, 8, 7, 6, 5, 4, 3, 2.0])
    assert evaluation.loss == pytest.approx(losses.mean().item(), rel=1e-6)  # of those that could be read
    assert list(evaluation.bad_images) == [f"dirty/train[{index}]" for index in (0, 3, 11)]
    assert evaluation.top_ids[3].tolist() == [NO_CLASS] * 5
    assert evaluation.confidences[3] == 0
    assert evaluation.to_json("", "model")["num_bad_images"] == 3
    assert evaluation.summary().endswith("12 images, 3 unreadable, counted as wrong")


def test_without_a_readable_image_there_is_no_evaluation(model: ResNet, val: Source):
    with pytest.raises(UserError, match=r"no image of dirty/train can be read: dirty/train\[0\] \(.*\)"):
        evaluate(model, with_bad_images(val, 6, bad=range(6)))


def test_weights_that_have_diverged_are_an_error(val: Source):
    model = ResNet("resnet18", num_classes=6)
    model.fc.bias.data[2] = torch.nan
    with pytest.raises(UserError, match=r"the loss on .*/val is nan: these weights have diverged"):
        evaluate(model, val)
