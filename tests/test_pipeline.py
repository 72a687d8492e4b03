import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Collection
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_sources import tree_of_links

from resnet_in1k import pipeline
from resnet_in1k.errors import BadImageError, ProcessError
from resnet_in1k.images import TrainTransform, decode
from resnet_in1k.pipeline import Batch, EvalOrder, Loader, TrainOrder, epoch_order, eval_loader, on_device, train_loader
from resnet_in1k.sources import PackedBytes, Source, open_source


def train_order(**changes: int) -> TrainOrder:
    return TrainOrder(
        **{"num_images": 50, "global_batch_size": 12, "seed": 1, "first_step": 1, "last_step": 8, **changes}
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_global_batches_do_not_depend_on_the_number_of_processes(world_size: int):
    ranks = [train_order(rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == list(train_order())
    assert [len(batch) for batch in together] == [12] * 8


def test_an_epoch_shows_each_image_at_most_once_and_the_next_in_another_order():
    steps = list(train_order())  # four steps an epoch: 48 of 50 images
    for epoch, batches in ((1, steps[:4]), (2, steps[4:])):
        samples = list(chain(*batches))
        assert {e for e, _ in samples} == {epoch}
        assert len({i for _, i in samples}) == 48
    assert [i for _, i in steps[0]] != [i for _, i in steps[4]]


@pytest.mark.parametrize("first_step", [3, 5, 8])
def test_the_order_can_be_taken_up_at_any_step(first_step: int):
    assert list(train_order(first_step=first_step)) == list(train_order())[first_step - 1 :]


def test_epoch_order_is_a_permutation_of_its_own():
    order = epoch_order(1000, seed=0, epoch=1)
    assert sorted(order.tolist()) == list(range(1000))
    assert not torch.equal(order, epoch_order(1000, seed=0, epoch=2))
    assert not torch.equal(order, epoch_order(1000, seed=1, epoch=1))
    # The first images of ImageNet's first epoch: were these to change, no run could be resumed or reproduced.
    assert epoch_order(1_281_167, seed=0, epoch=1)[:4].tolist() == [850991, 147023, 218125, 826740]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_images", "batch_size"), [(250, 64), (7, 3), (5, 128), (24, 8)])
def test_evaluation_sees_each_image_once_on_any_number_of_processes(num_images: int, batch_size: int, world_size: int):
    orders = [
        EvalOrder(num_images=num_images, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [index for order in orders for batch in order for _, index in batch]
    assert sorted(seen) == list(range(num_images))
    assert all(len(list(order)) == len(order) for order in orders)


@pytest.fixture
def source(image_folder: Path) -> Source:
    return open_source(str(image_folder), "train")


def load_all(source: Source, tiny, **how: int) -> list[Batch]:
    options = {"first_step": 1, "last_step": 6, "num_workers": 0, "pin_memory": False, **how}
    return list(train_loader(source, tiny, **options))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(source: Source, tiny, num_workers: int):
    """Over several rounds of the slots that workers write into."""
    many = load_all(source, tiny, last_step=40, num_workers=num_workers)
    for ours, alone in zip(many, load_all(source, tiny, last_step=40), strict=True):
        assert torch.equal(ours.images, alone.images)
        assert torch.equal(ours.indices, alone.indices)


def test_batches_are_uint8_images_with_their_labels(source: Source, tiny):
    for batch in load_all(source, tiny):
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 3, 32, 32))
        assert np.array_equal(batch.labels.numpy(), source.labels[batch.indices.numpy()])


def test_two_processes_load_the_halves_of_one_processes_batches(source: Source, tiny):
    halves = [load_all(source, tiny, rank=rank, world_size=2) for rank in range(2)]
    for whole, first, second in zip(load_all(source, tiny), *halves, strict=True):
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_named(source: Source, tiny, num_workers: int):
    broken = Source(
        "broken", "val", source.class_names, source.labels[:3], PackedBytes([source.read(0).tobytes(), b"", b"x"])
    )
    loader = train_loader(
        broken,
        replace(tiny, global_batch_size=3),
        first_step=1,
        last_step=1,
        num_workers=num_workers,
        pin_memory=False,
    )
    with pytest.raises(BadImageError, match=r"broken/val\[[12]\] cannot be read as an image \(.{8,}\); replace or"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_in_evaluation_a_bad_image_is_blank_and_told(source: Source, num_workers: int):
    good = source.read(0).tobytes()
    broken = Source("broken", "val", source.class_names, source.labels[:3], PackedBytes([good, good[:200], good]))
    (batch,) = eval_loader(
        broken, image_size=32, resize_size=36, batch_size=3, num_workers=num_workers, pin_memory=False
    )
    assert batch.indices.tolist() == [0, 1, 2]
    assert batch.images.flatten(1).amax(dim=1).gt(0).tolist() == [True, False, True]
    assert batch.bad_images.keys() == {1}
    assert "truncated" in batch.bad_images[1].lower()


def with_bad_images(source: Source, num_images: int, bad: Collection[int]) -> Source:
    """The images of `source` over and over, each of a label of its own; those at `bad` are cut off."""
    items = [source.read(index % len(source)).tobytes() for index in range(num_images)]
    items = [item[:150] if index in bad else item for index, item in enumerate(items)]
    return Source("dirty", "train", source.class_names, np.arange(num_images), PackedBytes(items))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next_good_one(source: Source, tiny, num_workers: int):
    """Alike with any number of workers; with the crop that was drawn for its sample; and round the end."""
    num_images, bad = 3000, {700, 701, 2999}
    dirty = with_bad_images(source, num_images, bad)
    recipe = replace(tiny, global_batch_size=100)
    how = {"first_step": 1, "last_step": 30, "pin_memory": False, "on_bad_image": "skip"}
    batches = list(train_loader(dirty, recipe, num_workers=num_workers, **how))
    wanted = epoch_order(num_images, recipe.seed, 1).tolist()
    stand_ins = {700: 702, 701: 702, 2999: 0}
    assert [index for batch in batches for index in batch.indices.tolist()] == [stand_ins.get(i, i) for i in wanted]
    assert all(torch.equal(batch.labels, batch.indices) for batch in batches)
    assert set().union(*(batch.bad_images for batch in batches)) == bad

    row = wanted.index(2999)
    image = decode(dirty.read(0))
    expected = TrainTransform(image_size=32, crop_scale_min=tiny.crop_scale_min, seed=tiny.seed)(image, 1, 2999)
    assert torch.equal(batches[row // 100].images[row % 100], expected)


def test_more_bad_images_in_a_row_than_may_be_skipped_stop_the_run(source: Source, tiny):
    dirty = with_bad_images(source, 1000, {5, 6})
    how = {"first_step": 1, "last_step": 125, "num_workers": 0, "pin_memory": False, "on_bad_image": "skip"}
    with pytest.raises(ProcessError, match=r"2 of 1,000 training images cannot be read \(dirty/train\[5\], …\), more"):
        list(train_loader(dirty, tiny, **how))


def test_a_vanished_file_is_named(source: Source, tmp_path: Path):
    gone = Source("gone", "val", source.class_names, source.labels[:1], PackedBytes([b"a/b.jpg"]), folder=tmp_path)
    with pytest.raises(ProcessError, match=r"a/b.jpg cannot be read from its disk: No such file"):
        list(eval_loader(gone, image_size=8, resize_size=8, batch_size=1, num_workers=0, pin_memory=False))


class Killer:
    """A transform that ends its worker as the kernel does when memory runs out."""

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return image


def test_a_workers_death_is_told_with_what_to_do(source: Source):
    loader = Loader(source, Killer(), [[(1, 0)]], batch_size=1, image_size=8, num_workers=1, pin_memory=False)
    with pytest.raises(ProcessError, match=r"a loader worker died .*/dev/shm.*fewer --workers"):
        list(loader)


@pytest.mark.parametrize("hung_starts", [1, 2])
def test_a_worker_that_hangs_in_its_birth_is_started_again(source: Source, monkeypatch, hung_starts: int):
    """As by a lock that another thread held when it was forked: it waits, and hears of no signal but SIGKILL."""
    births = []

    class Fork(multiprocessing.get_context("fork").Process):
        def run(self) -> None:
            if len(births) <= hung_starts * 2 and len(births) % 2:  # the first of two workers
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
                threading.Event().wait()
            super().run()

        def start(self) -> None:
            births.append(self)
            super().start()

    monkeypatch.setattr(multiprocessing.get_context("fork"), "Process", Fork)
    monkeypatch.setattr(pipeline, "START_SECONDS", 1.0)
    loader = eval_loader(source, image_size=8, resize_size=8, batch_size=5, num_workers=2, pin_memory=False)
    batches = list(loader)
    assert [index for batch in batches for index in batch.indices.tolist()] == list(range(len(source)))
    assert len(births) == 2 * (hung_starts + 1)
    assert not any(worker.is_alive() for worker in births)


def test_workers_that_never_begin_are_an_error(source: Source, monkeypatch):
    monkeypatch.setattr(pipeline, "_be_a_modest_worker", lambda worker_id, parent, begun: None)
    monkeypatch.setattr(pipeline, "START_SECONDS", 0.3)
    with pytest.raises(
        ProcessError, match=r"1 loader workers have not begun within 0 s, 3 times; take fewer --workers"
    ):
        list(eval_loader(source, image_size=8, resize_size=8, batch_size=5, num_workers=1, pin_memory=False))


def test_a_worker_whose_parent_is_killed_in_its_first_moment_ends_too(tmp_path: Path):
    """The worker finds another parent when it first looks, and is asked for nothing: only a pipe's end tells of it."""
    code = """
import os, time
from resnet_in1k import pipeline
from resnet_in1k.sources import open_train_and_val
whole = pipeline._be_a_modest_worker
def late(*arguments, **named):
    print("begun", flush=True)
    while os.getppid() == named["parent"]:
        time.sleep(0.01)
    whole(*arguments, **named)
pipeline._be_a_modest_worker = late
_, source = open_train_and_val("digits")
next(iter(pipeline.eval_loader(source, image_size=8, resize_size=8, batch_size=1, num_workers=1, pin_memory=False)))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.communicate(timeout=20)  # to the end of what the worker, too, holds open


def test_on_the_cpu_batches_are_prepared_in_order(source: Source, tiny):
    batches = load_all(source, tiny)
    prepared = on_device(batches, torch.device("cpu"), lambda batch: (batch.images.float() + 1, batch.labels))
    for batch, take in zip(batches, prepared, strict=True):
        images, labels = take()
        assert torch.equal(images, batch.images.float() + 1)
        assert torch.equal(labels, batch.labels)


def test_workers_do_not_grow_from_epoch_to_epoch(tmp_path: Path):
    """A worker's own memory after each of four epochs of 10,000 listed files, all of which it reads.

    In a quiet process: where the main process copies a shared page, the worker is left as the old one's only owner.
    """
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")  # what is decoded does not matter here, and it takes time
    root = tree_of_links(tmp_path, tmp_path / "small.png", num_classes=10, images_per_class=1000)
    code = f"""
import dataclasses, gc, multiprocessing, psutil
from resnet_in1k.pipeline import train_loader
from resnet_in1k.recipes import DEMO
from resnet_in1k.sources import open_source
source = open_source({str(root)!r}, "train")
recipe = dataclasses.replace(DEMO, global_batch_size=1000, image_size=8)
gc.freeze()
loader = train_loader(source, recipe, first_step=1, last_step=40, num_workers=1, pin_memory=False)
for step, _ in enumerate(loader, start=1):
    if step % 10 == 0:
        worker, = multiprocessing.active_children()
        print(psutil.Process(worker.pid).memory_full_info().uss)
gc.unfreeze()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    own_bytes = [int(line) for line in result.stdout.split()]
    assert len(own_bytes) == 4, result.stderr
    growth = [after - before for before, after in pairwise(own_bytes)]
    assert statistics.median(growth) < 0.5e6  # a buffer may grow once; what grows with epochs grows in each
