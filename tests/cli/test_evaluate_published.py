"""Weights that timm has saved, from a local Hub: the same counts as by its own code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers.hub_server import HubServer
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.model.resnet import load_model
from resnet_in1k.run_folder import RunFolder

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def counted(
    model: torch.nn.Module, transform: Callable[[Image.Image], torch.Tensor], data: Path, class_names: list[str]
) -> tuple[int, int, float]:
    """One image at a time: right by the first and by the first five logits, and the mean loss."""
    top1, top5, losses = 0, 0, []
    for label, name in enumerate(class_names):
        for file in (data / "val" / name).iterdir():
            with torch.inference_mode():
                logits = model(transform(Image.open(file).convert("RGB")).unsqueeze(0))[0]
            ranked = logits.argsort(descending=True).tolist()
            top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked[:5])
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(label)).item())
    return top1, top5, sum(losses) / len(losses)


@pytest.mark.parametrize(
    "changes",
    [
        {"interpolation": "bilinear", "crop_pct": 0.875, "input_size": (3, 32, 32)},
        {"interpolation": "bicubic", "crop_pct": 0.95, "input_size": (3, 48, 48), "mean": (0.5, 0.45, 0.4)},
        {"test_input_size": (3, 64, 64), "test_crop_pct": 1.0, "crop_pct": 0.95, "std": (0.25, 0.25, 0.3)},
    ],
)
def test_timms_repository_as_timm_validates_it(
    hub: HubServer, evaluated: RunFolder, image_folder: Path, tmp_path: Path, changes: dict
):
    """timm's names of classes are in another order than the folders'."""
    names = CLASSES[3:] + CLASSES[:3]
    state = load_model(evaluated.weights).state_dict()
    order = [CLASSES.index(name) for name in names]
    state |= {key: state[key][order] for key in ("fc.weight", "fc.bias")}
    model = timm.create_model("resnet18", num_classes=6)
    model.load_state_dict(state)
    model.pretrained_cfg.update({"test_input_size": None, "test_crop_pct": None} | changes)
    save_for_hf(model, tmp_path / "saved", model_config={"label_names": names}, safe_serialization=True)
    hub.publish("timm/resnet18.a1_in6", {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})

    evaluation = evaluate(EvalOptions(ckpt="timm/resnet18.a1_in6", data=str(image_folder), workers=0))
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=model.pretrained_cfg, use_test_size=True))
    top1, top5, loss = counted(model.eval(), transform, image_folder, names)
    assert (evaluation.counts["top1_correct"], evaluation.counts["top5_correct"]) == (top1, top5)
    assert evaluation.loss == pytest.approx(loss, rel=1e-4)  # by a gray level in the resizing
