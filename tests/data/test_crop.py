"""Crops, against torchvision's older transforms on Pillow images."""

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as F
from PIL import Image

from resnet_in1k.data.crop import EvalPreprocessing, TrainCrop
from resnet_in1k.data.sampler import Sample
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.rng import Stream, key


def recipe_of(**changes: object) -> Recipe:
    fields = {"model": "resnet18", "epochs": 1, "global_batch_size": 1, "lr": 0.1, "image_size": 32, "seed": 5}
    return Recipe(**fields | changes)


def as_tensor(photograph: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photograph)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("image_size", [32, 224, 500])
def test_train_crop_has_the_bits_of_torchvisions(photographs: list[np.ndarray], image_size: int, interpolation: str):
    """However the image lies in memory. They draw the same crop from the same generator, for any size."""
    crop = TrainCrop(recipe_of(train_interpolation=interpolation))
    theirs = v2.RandomResizedCrop(image_size, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    for index, photograph in enumerate(photographs):
        image = as_tensor(photograph)
        for layout, sample, place in (
            (image, Sample(3, index), (3, index)),
            (image.contiguous(), Sample(3, index, copy=1), (3, index, 1)),
        ):
            ours = next(crop([layout], [sample], image_size))
            torch.manual_seed(key(5, Stream.CROP, *place))
            assert torch.equal(ours, theirs(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("image_size", "resize_size"), [(224, 256), (64, 73), (300, 300)])
def test_eval_crop_is_torchvisions_on_pillow_images(
    photographs: list[np.ndarray], image_size: int, resize_size: int, interpolation: str
):
    """Shrunk and enlarged, wide and tall."""
    mode = v1.InterpolationMode(interpolation)
    theirs = v1.Compose([v1.Resize(resize_size, mode), v1.CenterCrop(image_size)])
    ours = EvalPreprocessing(image_size, resize_size, interpolation).crop
    for photograph in (photographs[0], photographs[1].transpose(1, 0, 2), photographs[0][:50, :40]):
        expected = theirs(Image.fromarray(np.ascontiguousarray(photograph)))
        difference = ours(as_tensor(photograph)).int() - F.pil_to_tensor(expected).int()
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 700), (1, 1_000_000)])
def test_a_pixel_and_a_line_can_be_cropped(shape: tuple[int, int]):
    """Without filling the memory; the middle of the crop is the middle of the image."""
    num_pixels = shape[0] * shape[1]
    levels = (torch.arange(num_pixels) * 255 // num_pixels).to(torch.uint8).reshape(shape)
    image = levels.expand(3, *shape)
    train = next(TrainCrop(recipe_of())([image], [Sample(1, 0)], 32))
    evaluation = EvalPreprocessing(224, 256).crop(image)
    assert (train.shape, evaluation.shape) == ((3, 32, 32), (3, 224, 224))
    center = int(image[0, shape[0] // 2, shape[1] // 2])
    assert abs(evaluation.float().mean().item() - center) <= 2


def test_random_interpolation_is_either_as_drawn_for_the_sample(photographs: list[np.ndarray]):
    image, num_bicubic = as_tensor(photographs[0]), 0
    for index in range(40):
        bilinear, bicubic, either = (
            next(TrainCrop(recipe_of(train_interpolation=name))([image], [Sample(1, index)], 64))
            for name in ("bilinear", "bicubic", "random")
        )
        is_bicubic = torch.equal(either, bicubic)
        assert is_bicubic or torch.equal(either, bilinear)
        num_bicubic += is_bicubic
    assert 10 < num_bicubic < 30


def test_alternating_flip_mirrors_each_image_in_every_other_epoch(photographs: list[np.ndarray]):
    image = as_tensor(photographs[0])
    plain, alternating = (TrainCrop(recipe_of(crop_scale_min=0.5, alternating_flip=on)) for on in (False, True))
    in_first_epoch = 0
    for index in range(60):
        mirrored = []
        for epoch in (1, 2, 3, 4):
            ours, before = (next(crop([image], [Sample(epoch, index)], 32)) for crop in (alternating, plain))
            mirrored.append(torch.equal(ours, before.flip(-1)))
            assert mirrored[-1] or torch.equal(ours, before)
        assert mirrored in ([True, False, True, False], [False, True, False, True])
        in_first_epoch += mirrored[0]
    assert 18 < in_first_epoch < 42, "a fair bit decides"
