"""Learning from a teacher: its loss, what it sees, what is recorded, resuming, and teachers that are refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from helpers.processes import assert_same_end
from helpers.training import rewind, run
from scipy.special import log_softmax, rel_entr, softmax

from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.optim.losses import distillation_loss
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.step import TrainStep
from resnet_in1k.train.teacher import Teacher, load_teacher
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of
from resnet_in1k.utils.imagenet import names_by_wnid
from resnet_in1k.utils.launch import Launch

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_loss_is_scipys_relative_entropy(temperature: float):
    own, taught = torch.randn(2, 5, 7).unbind()
    divergence = rel_entr(*(softmax(each.numpy() / temperature, axis=1) for each in (taught, own))).sum(axis=1).mean()
    assert distillation_loss(own, taught, temperature).item() == pytest.approx(temperature**2 * divergence, rel=1e-5)


def test_a_step_learns_from_the_teachers_predictions_for_the_same_images(tiny: Recipe):
    """In eval mode, each part of the batch with its own share, whatever the images were mixed to."""
    recipe = replace(tiny, teacher_weight=0.3, teacher_temperature=2.0, label_smoothing=0.0)
    teacher = ResNet("resnet18", 6)
    images, targets = torch.randn(8, 3, 32, 32), torch.randn(8, 6).softmax(dim=1)
    step = TrainStep(
        recipe,
        6,
        Accelerator(cpu=True),
        gradient_accumulation_steps=2,
        teacher=Teacher(teacher, (0.5,) * 3, (0.2,) * 3),
    )
    own = step.plain_copy().train()
    expected, before = [], {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        pixels = images * torch.tensor(imagenet.STD).view(3, 1, 1) + torch.tensor(imagenet.MEAN).view(3, 1, 1)
        taught = teacher.eval()((pixels - 0.5) / 0.2).numpy()
        for part in (slice(0, 4), slice(4, 8)):
            logits = own(images[part]).numpy()
            cross_entropy = -(targets[part].numpy() * log_softmax(logits, axis=1)).sum(axis=1).mean()
            divergence = rel_entr(softmax(taught[part] / 2, axis=1), softmax(logits / 2, axis=1)).sum(axis=1).mean()
            expected.append(0.7 * cross_entropy + 0.3 * 4 * divergence)
    assert step(images, targets, lr=0.1, step=1).item() == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.slow
def test_a_run_records_its_teacher_and_resumes_to_the_same_bits(
    finished: RunFolder, tiny: Recipe, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    recipe = replace(tiny, teacher_weight=0.5, mixup_alpha=0.2)
    how = {"teacher": str(finished.path), "checkpoint_every": 3, "keep_checkpoints": 9}
    whole = run(recipe, image_folder, tmp_path / "whole", **how)
    assert f"  teacher       {finished.path}, resnet18: 50% of the loss, at temperature 1\n" in capsys.readouterr().out
    facts = json.loads(whole.recipe.read_text())["teacher"]
    expected = {"checkpoint": str(finished.path), "origin": "", "sha256": sha256_of(finished.weights)}
    assert facts == {**expected, "architecture": "resnet18", "outputs": ""}
    part = rewind(whole, 3, tmp_path / "part")
    run(recipe, image_folder, part.path, resume=True, **how)
    assert_same_end(part, whole)
    other = {**how, "teacher": str(whole.path)}
    with pytest.raises(UserError, match=f"was started with the teacher {finished.path}, and --teacher {whole.path} is"):
        run(recipe, image_folder, part.path, resume=True, **other)
    facts = json.loads(part.recipe.read_text())
    facts["teacher"]["sha256"] = sha256_of(whole.weights)
    part.recipe.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="other"):  # its checkpoints are of the run with the first teacher
        run(recipe, image_folder, part.path, resume=True, **other)


def test_a_teacher_and_its_weight_need_each_other(tiny: Recipe, image_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"teacher_weight is 0\.5: give --teacher, such as"):
        run(replace(tiny, teacher_weight=0.5), image_folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"--teacher x needs a share of the loss: give --teacher-weight, such as 0\.5"):
        run(tiny, image_folder, tmp_path / "run", teacher="x")


def test_a_teacher_knows_the_classes_of_the_data_by_name(finished: RunFolder, tiny: Recipe):
    """Its other logits are ignored, and the rest are in the order of the data."""
    images, source = torch.randn(2, 3, 32, 32), SimpleNamespace(name="images", class_names=("fox", "ant"))
    facts, teacher = load_teacher(str(finished.path), tiny, source, {}, Launch())
    assert facts["outputs"].startswith("only 2 of the model's 6 classes are in the data")
    expected = load_model(finished.path).eval()(images)
    torch.testing.assert_close(teacher(images), expected[:, [5, 0]])
    source.class_names = ("ant", "gnu")
    with pytest.raises(UserError, match="its classes are not those of the data"):
        load_teacher(str(finished.path), tiny, source, {}, Launch())


def test_a_model_of_timm_by_name(tiny: Recipe, monkeypatch: pytest.MonkeyPatch):
    """With ImageNet's classes and its own normalization; a size that it does not take, or a name that timm does not
    know, is one line."""
    created = timm.create_model("test_resnet", pretrained=False).eval()
    created.pretrained_cfg = {**created.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    make = timm.create_model

    def create(name: str, pretrained: bool) -> torch.nn.Module:
        assert pretrained
        return created if name == "test_resnet.r160_in1k" else make(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", create)
    names = list(names_by_wnid())
    source = SimpleNamespace(name="images", class_names=(names[7], names[3]))
    facts, teacher = load_teacher("timm:test_resnet.r160_in1k", tiny, source, {}, Launch())
    assert (facts["architecture"], facts["origin"]) == ("test_resnet", "timm:test_resnet.r160_in1k")
    assert "1000 outputs are ImageNet's" in facts["outputs"]
    pixels = torch.rand(2, 3, 32, 32)
    ours = (pixels - torch.tensor(imagenet.MEAN).view(3, 1, 1)) / torch.tensor(imagenet.STD).view(3, 1, 1)
    torch.testing.assert_close(teacher(ours), created(pixels * 2 - 1)[:, [7, 3]], rtol=1e-4, atol=1e-4)
    with pytest.raises(
        UserError, match=r"timm:vit_tiny_patch16_224 does not take images of 32 px .*; train at its --image-size"
    ):
        load_teacher("timm:vit_tiny_patch16_224", tiny, source, {}, Launch())
    with pytest.raises(UserError, match=r"timm:resnet_5 cannot be loaded \(Unknown model.*list_models"):
        load_teacher("timm:resnet_5", tiny, source, {}, Launch())
