"""Policies: torchvision's and timm's own for the same image and seeds."""

import pickle
import random
from collections.abc import Callable
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


def timms(magnitude: int, size: int) -> Callable[[Image.Image], Image.Image]:
    """Shifts of up to 0.45 of the side, the mean color outside, as timm's create_transform sets them."""
    settings = {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104), "magnitude_max": 9.99}
    settings["interpolation"] = Image.Resampling.BILINEAR
    return rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", settings)


THEIRS = {
    "trivial_augment": v2.TrivialAugmentWide(interpolation=BILINEAR),
    "rand_augment": v2.RandAugment(2, 9, interpolation=BILINEAR),
    "auto_augment": v2.AutoAugment(interpolation=BILINEAR),
    "timm_rand_augment": timms(magnitude=6, size=64),
}


def with_policy(recipe: Recipe, name: str) -> Recipe:
    if name == "timm_rand_augment":
        recipe = replace(recipe, rand_augment_magnitude=6, rand_augment_magnitude_std=0.5)
    return replace(recipe, augment_policy=name)


def as_tensor(photograph: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photograph)).permute(2, 0, 1)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_policy_is_the_librarys_for_the_samples_seed(tiny: Recipe, photographs: list[np.ndarray], name: str):
    """On the crop without a policy, as Pillow image; bit for bit, over 60 draws, most of which change the image."""
    crop, plain = TrainCrop.from_recipe(with_policy(tiny, name)), TrainCrop.from_recipe(tiny)
    num_changed = 0
    for index in range(60):
        image, sample = as_tensor(photographs[index % 2]), Sample(3, index, copy=1)
        ours, before = crop(image, sample, 64), plain(image, sample, 64)
        seed_all(key(tiny.seed, Stream.POLICY, 3, index, 1))
        assert torch.equal(ours, F.pil_to_tensor(THEIRS[name](F.to_pil_image(before))))
        num_changed += not torch.equal(ours, before)
    assert num_changed > 30


def test_timms_policy_follows_the_image_size_at_the_greatest_strength(tiny: Recipe, photographs: list[np.ndarray]):
    policy = build_policy(replace(with_policy(tiny, "timm_rand_augment"), rand_augment_magnitude=10))
    for size in (32, 96):
        image, theirs = Image.fromarray(photographs[0][:size, :size]), timms(magnitude=10, size=size)
        for seed in range(30):
            seed_all(seed)
            ours = policy(image)
            seed_all(seed)
            assert ours == theirs(image)


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_interpolation_is_that_of_the_training(tiny: Recipe, photographs: list[np.ndarray], name: str):
    """For a recipe that resizes at random: bilinear in torchvision's policies, random in timm's, as its default is."""
    results = {}
    for interpolation in ("bilinear", "bicubic", "random"):
        policy, images = build_policy(replace(with_policy(tiny, name), train_interpolation=interpolation)), []
        for seed in range(20):
            seed_all(seed)
            images.append(policy(Image.fromarray(photographs[0][:64, :64])))
        results[interpolation] = images
    assert results["bilinear"] != results["bicubic"]
    assert (results["random"] == results["bilinear"]) == (name != "timm_rand_augment")


@pytest.mark.parametrize("name", RECIPES)
def test_the_crop_of_every_recipe_can_be_sent_to_a_worker(name: str, photographs: list[np.ndarray]):
    crop, image = TrainCrop.from_recipe(RECIPES[name].recipe), as_tensor(photographs[0])
    copy = pickle.loads(pickle.dumps(crop))
    assert torch.equal(copy(image, Sample(1, 2), 64), crop(image, Sample(1, 2), 64))
