"""Policies: torchvision's and timm's own for the same image and seeds; the same for a sample wherever it is."""

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from resnet_in1k.augment.auto_augment import build_policy
from resnet_in1k.data.crop import TrainCrop
from resnet_in1k.data.sampler import Sample
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.rng import Stream, key

BILINEAR = InterpolationMode.BILINEAR
MEAN = (124, 116, 104)
THEIRS = {
    "trivial_augment": v2.TrivialAugmentWide(interpolation=BILINEAR),
    "rand_augment": v2.RandAugment(2, 9, interpolation=BILINEAR),
    "auto_augment": v2.AutoAugment(interpolation=BILINEAR),
    "timm_rand_augment": rand_augment_transform(
        "rand-m6-mstd0.5-inc1",
        {"translate_const": int(64 * 0.45), "img_mean": MEAN, "interpolation": Image.Resampling.BILINEAR},
    ),
}


def with_policy(tiny: Recipe, name: str) -> Recipe:
    if name == "timm_rand_augment":
        tiny = replace(tiny, rand_augment_magnitude=6, rand_augment_magnitude_std=0.5)
    return replace(tiny, augment_policy=name)


def as_tensor(photograph: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photograph)).permute(2, 0, 1)


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_policy_is_the_librarys_for_the_samples_seed(tiny: Recipe, photographs: list[np.ndarray], name: str):
    """On the crop without a policy, as Pillow image; bit for bit, over 60 draws, most of which change the image."""
    recipe = with_policy(tiny, name)
    crop, plain = TrainCrop.from_recipe(recipe), TrainCrop.from_recipe(tiny)
    num_changed = 0
    for index in range(60):
        image, sample = as_tensor(photographs[index % 2]), Sample(3, index)
        ours, before = crop(image, sample, 64), plain(image, sample, 64)
        seed = key(tiny.seed, Stream.POLICY, 3, index)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        expected = F.pil_to_tensor(THEIRS[name](F.to_pil_image(before)))
        assert torch.equal(ours, expected)
        num_changed += not torch.equal(ours, before)
    assert num_changed > 30


def test_interpolation_is_that_of_the_training(tiny: Recipe, photographs: list[np.ndarray]):
    """Of timm's: random, as its own default, for a recipe that resizes at random; for torchvision's bilinear then."""
    for name in sorted(THEIRS):
        recipe, differing = with_policy(tiny, name), {}
        for interpolation in ("bilinear", "bicubic", "random"):
            policy = build_policy(replace(recipe, train_interpolation=interpolation))
            results = []
            for seed in range(20):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
                results.append(np.asarray(policy(Image.fromarray(photographs[0][:64, :64]))).tobytes())
            differing[interpolation] = tuple(results)
        assert differing["bilinear"] != differing["bicubic"]
        assert (differing["random"] == differing["bilinear"]) == (name != "timm_rand_augment")


@pytest.mark.parametrize("name", RECIPES)
def test_the_crop_of_every_recipe_can_be_sent_to_a_spawned_worker(name: str, photographs: list[np.ndarray]):
    crop = TrainCrop.from_recipe(RECIPES[name].recipe)
    copy = pickle.loads(pickle.dumps(crop))
    image = as_tensor(photographs[0])
    assert torch.equal(copy(image, Sample(1, 2), 64), crop(image, Sample(1, 2), 64))
    assert pickle.loads(pickle.dumps(crop)) is not crop  # after its first use, too


def test_each_operation_is_torchvisions_functional(photographs: list[np.ndarray]):
    """On a Pillow image, as here, and on a tensor: at most a gray level apart, but where pixels come from another
    place, of which the nearest levels and the border may be others."""
    image = as_tensor(photographs[0])[:, :128, :128].contiguous()
    picture = F.to_pil_image(image)
    of_levels = {
        "brightness": lambda x: F.adjust_brightness(x, 1.4),
        "contrast": lambda x: F.adjust_contrast(x, 0.7),
        "posterize": lambda x: F.posterize(x, 4),
        "solarize": lambda x: F.solarize(x, 100),
        "autocontrast": F.autocontrast,
        "equalize": F.equalize,
        "hflip": F.horizontal_flip,
    }
    for name, operation in of_levels.items():
        difference = (F.pil_to_tensor(operation(picture)).int() - operation(image).int()).abs()
        assert difference.max() <= 1, name
    of_places = {
        "rotate": lambda x: F.rotate(x, 17, interpolation=BILINEAR),
        "shear": lambda x: F.affine(x, 0, [0, 0], 1.0, [12.0, 0.0], interpolation=BILINEAR, center=[0, 0]),
        "translate": lambda x: F.affine(x, 0, [9, 0], 1.0, [0.0, 0.0], interpolation=BILINEAR),
    }
    for name, operation in of_places.items():
        difference = (F.pil_to_tensor(operation(picture)).int() - operation(image).int()).abs().float()
        assert difference[:, 24:-24, 24:-24].mean() < 1, name


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_draws_depend_on_the_sample_alone(tiny: Recipe, photographs: list[np.ndarray], name: str):
    crop, image = TrainCrop.from_recipe(with_policy(tiny, name)), as_tensor(photographs[0])
    first = [crop(image, Sample(1, index), 48) for index in range(20)]
    random.random()
    np.random.rand(3)
    torch.rand(3)
    again = [crop(image, Sample(1, index), 48) for index in reversed(range(20))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    copies = [crop(image, Sample(1, index, copy=1), 48) for index in range(20)]
    assert not any(torch.equal(one, other) for one, other in zip(first, copies, strict=True))


def test_shifts_of_timms_policy_follow_the_image_size(tiny: Recipe):
    """Up to 0.45 of the side, the mean color outside: on white, all that is not white is it."""
    policy = build_policy(replace(with_policy(tiny, "timm_rand_augment"), rand_augment_magnitude=10))
    for size in (32, 96):
        white = Image.new("RGB", (size, size), (255, 255, 255))
        widths = set()
        for seed in range(150):
            random.seed(seed)
            np.random.seed(seed)
            pixels = np.array(policy(white))
            shifted = (pixels[size // 2] == MEAN).all(axis=1).sum()
            widths.add(int(shifted))
        assert size * 0.3 < max(widths) < size * 0.95
