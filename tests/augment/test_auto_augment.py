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
from torchvision.transforms.v2 import functional as F

from resnet_in1k.augment.auto_augment import POLICIES
from resnet_in1k.data.crop import TrainCrop
from resnet_in1k.data.sampler import Sample
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.rng import Stream, key


def librarys(name: str, interpolation: str, size: int = 64, magnitude: int = 6) -> Callable[[Image.Image], Image.Image]:
    """For a recipe that resizes at random: bilinear in torchvision's policies, random in timm's, as its default is."""
    if name == "timm_rand_augment":
        # Shifts of up to 0.45 of the side, the mean color outside, as timm's create_transform sets them.
        settings = {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104), "magnitude_max": 9.99}
        if interpolation != "random":
            settings["interpolation"] = Image.Resampling[interpolation.upper()]
        return rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", settings)
    mode = v2.InterpolationMode("bilinear" if interpolation == "random" else interpolation)
    if name == "rand_augment":
        return v2.RandAugment(2, 9, interpolation=mode)
    return {"trivial_augment": v2.TrivialAugmentWide, "auto_augment": v2.AutoAugment}[name](interpolation=mode)


def with_policy(recipe: Recipe, name: str, interpolation: str) -> Recipe:
    if name == "timm_rand_augment":
        recipe = replace(recipe, rand_augment_magnitude=6, rand_augment_magnitude_std=0.5)
    return replace(recipe, augment_policy=name, train_interpolation=interpolation)


def as_tensor(photograph: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photograph)).permute(2, 0, 1)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("name", ["trivial_augment", "rand_augment", "auto_augment", "timm_rand_augment"])
def test_policy_is_the_librarys_for_the_samples_seed(
    tiny: Recipe, photographs: list[np.ndarray], name: str, interpolation: str
):
    """On the crop without a policy, as Pillow image; bit for bit, over 60 draws, most of which change the image."""
    recipe, theirs = with_policy(tiny, name, interpolation), librarys(name, interpolation)
    crop, plain = TrainCrop(recipe), TrainCrop(replace(recipe, augment_policy="none"))
    num_changed = 0
    for index in range(60):
        image, sample = as_tensor(photographs[index % 2]), Sample(3, index, copy=1)
        ours, before = (next(each([image], [sample], 64)) for each in (crop, plain))
        seed_all(key(tiny.seed, Stream.POLICY, 3, index, 1))
        assert torch.equal(ours, F.pil_to_tensor(theirs(F.to_pil_image(before))))
        num_changed += not torch.equal(ours, before)
    assert num_changed > 30


def test_timms_policy_follows_the_image_size_at_the_greatest_strength(tiny: Recipe, photographs: list[np.ndarray]):
    recipe = with_policy(tiny, "timm_rand_augment", "bilinear")
    policy = POLICIES[recipe.augment_policy](replace(recipe, rand_augment_magnitude=10))
    for size in (32, 96):
        image = Image.fromarray(photographs[0][:size, :size])
        theirs = librarys("timm_rand_augment", "bilinear", size, magnitude=10)
        for seed in range(30):
            seed_all(seed)
            ours = policy(image)
            seed_all(seed)
            assert ours == theirs(image)


@pytest.mark.parametrize("name", RECIPES)
def test_the_crop_of_every_recipe_can_be_sent_to_a_worker(name: str, photographs: list[np.ndarray]):
    crop, image = TrainCrop(RECIPES[name].recipe), as_tensor(photographs[0])
    copy = pickle.loads(pickle.dumps(crop))
    assert torch.equal(*(next(each([image], [Sample(1, 2)], 64)) for each in (copy, crop)))
