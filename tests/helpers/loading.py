"""Sources made of given bytes, and batches of a source as training loads them."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from resnet_in1k.data.crop import EvalPreprocessing, TrainCrop
from resnet_in1k.data.dataset import PackedBytes, PackedSource, Source
from resnet_in1k.data.decode import IfBad
from resnet_in1k.data.loader import Batch, Loader
from resnet_in1k.data.sampler import BatchSpec, eval_specs, train_specs
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts

PREPROCESSING = EvalPreprocessing(image_size=32, resize_size=36)


def packed_source(items: Sequence[bytes], class_names: Sequence[str] | None = None) -> PackedSource:
    """A source of these encoded images, each of a label of its own."""
    names = tuple(class_names or map(str, range(len(items))))
    return PackedSource(
        name="dirty", split="train", class_names=names, labels=np.arange(len(items)), items=PackedBytes(items)
    )


def with_bad_images(source: Source, num_images: int, bad: Collection[int]) -> PackedSource:
    """The images of `source` over and over, each of a label of its own; those at `bad` are cut off."""
    items = [source.read(index % len(source)).tobytes() for index in range(num_images)]
    return packed_source([item[:150] if index in bad else item for index, item in enumerate(items)])


def train_loader(source: Source, recipe: Recipe, *, num_workers: int = 0, if_bad: IfBad = "fail") -> Loader:
    """For one process."""
    return Loader(
        source,
        TrainCrop(recipe),
        batch_size=recipe.global_batch_size,
        largest_image_size=recipe.image_size,
        num_workers=num_workers,
        if_bad=if_bad,
    )


def specs_of(source: Source, recipe: Recipe, last_step: int, first_step: int = 1) -> Iterator[BatchSpec]:
    return train_specs(source, StepCounts(recipe, 1, 1, len(source)), first_step, last_step)


def train_batches(
    source: Source, recipe: Recipe, last_step: int, *, first_step: int = 1, num_workers: int = 0, if_bad: IfBad = "fail"
) -> list[Batch]:
    with train_loader(source, recipe, num_workers=num_workers, if_bad=if_bad) as loader:
        return list(loader.batches(specs_of(source, recipe, last_step, first_step)))


def eval_batches(source: Source, *, batch_size: int = 4, num_workers: int = 0, if_bad: IfBad = "blank") -> list[Batch]:
    """With PREPROCESSING."""
    size = PREPROCESSING.image_size
    how = {"batch_size": batch_size, "largest_image_size": size, "num_workers": num_workers, "if_bad": if_bad}
    with Loader(source, PREPROCESSING.crop_all, **how) as loader:
        return list(loader.batches(eval_specs(len(source), batch_size, size)))
