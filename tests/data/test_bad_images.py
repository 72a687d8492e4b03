"""Images that cannot be read: training fails or replaces them, evaluation counts them as wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loading import eval_batches, packed_source, train_batches, with_bad_images

from resnet_in1k.data.crop import TrainCrop
from resnet_in1k.data.dataset import PackedSource, Source
from resnet_in1k.data.decode import decode, max_bad_images
from resnet_in1k.data.image_folder import open_paths
from resnet_in1k.data.sampler import Sample, epoch_order
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import ProcessError


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next_good_one(source: Source, tiny: Recipe, num_workers: int):
    """With any number of workers, by the crop that was drawn for its sample, and from the start after the last one."""
    num_images, bad = 3000, {700, 701, 2999}
    dirty = with_bad_images(source, num_images, bad)
    recipe = replace(tiny, global_batch_size=100, image_size=8)
    batches = train_batches(dirty, recipe, 30, num_workers=num_workers, if_bad="skip")
    wanted = epoch_order(dirty, recipe, 1).tolist()
    replaced_by = {700: 702, 701: 702, 2999: 0}
    assert [index for batch in batches for index in batch.indices.tolist()] == [replaced_by.get(i, i) for i in wanted]
    assert all(torch.equal(batch.labels, batch.indices) for batch in batches)
    assert set().union(*(batch.bad_images for batch in batches)) == bad

    row, expected = wanted.index(2999), next(TrainCrop(tiny)([decode(dirty.read(0))], [Sample(1, 2999)], 8))
    assert torch.equal(batches[row // 100].images[row % 100], expected)


def test_more_bad_images_in_a_row_than_may_be_replaced_stop_the_run(source: Source, tiny: Recipe):
    """One in a thousand may be, and always one; here there are two."""
    assert [max_bad_images(number) for number in (999, 1000, 1_281_167)] == [1, 1, 1281]
    dirty = with_bad_images(source, 1000, {5, 6})
    words = r"2 of 1,000 training images cannot be read \(dirty/train\[5\], …\); --on-bad-image skip replaces at most"
    with pytest.raises(ProcessError, match=words):
        train_batches(dirty, replace(tiny, global_batch_size=1000, image_size=8), 1, if_bad="skip")


def test_one_bad_image_is_replaced_however_few_there_are(source: Source, tiny: Recipe):
    (batch,) = train_batches(with_bad_images(source, 8, {7}), replace(tiny, global_batch_size=8), 1, if_bad="skip")
    assert sorted(batch.indices.tolist()) == [0, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_in_evaluation_a_bad_image_is_blank_and_reported(source: Source, num_workers: int):
    """Also where the slot's last image was not blank."""
    good = source.read(0).tobytes()
    items = [good] * 24
    items[22] = good[:200]
    batches = eval_batches(packed_source(items), batch_size=3, num_workers=num_workers)
    bright = torch.cat([batch.images.flatten(1).amax(dim=1).gt(0) for batch in batches])
    assert bright.tolist() == [index != 22 for index in range(24)]
    assert batches[7].indices.tolist() == [21, 22, 23]
    assert [list(batch.bad_images) for batch in batches] == [[]] * 7 + [[22]]
    assert "truncated" in batches[7].bad_images[22].lower()


def test_a_missing_file_is_blank_in_prediction_and_stops_all_else(tiny: Recipe, tmp_path: Path):
    """It is not replaced in training: it may be there again in the next epoch, whose images would then not be those
    of an uninterrupted run."""
    gone, recipe = open_paths([tmp_path / "gone.jpg"]), replace(tiny, global_batch_size=1)
    for load in (lambda: eval_batches(gone), lambda: train_batches(gone, recipe, 1, if_bad="skip")):
        with pytest.raises(ProcessError, match=r"gone\.jpg cannot be read from its disk: No such file"):
            load()
    (batch,) = eval_batches(gone, if_bad="blank_on_any_error")
    assert batch.bad_images == {0: "No such file or directory"}
    assert not batch.images.any()


def test_a_read_that_fails_once_is_repeated(source: Source, monkeypatch: pytest.MonkeyPatch):
    class StaleOnce(PackedSource):
        def read(self, index: int) -> np.ndarray:
            failed.append(index)
            if failed.count(index) == 1 and index == 2:
                raise OSError(116, "Stale file handle")
            return super().read(index)

    failed: list[int] = []
    monkeypatch.setattr(files, "RETRY_AFTER_SECONDS", 0)
    packed = packed_source([source.read(index).tobytes() for index in range(4)])
    (batch,) = eval_batches(StaleOnce(**vars(packed)), if_bad="fail")
    assert torch.equal(batch.images, eval_batches(packed)[0].images)
    assert failed == [0, 1, 2, 2, 3]
