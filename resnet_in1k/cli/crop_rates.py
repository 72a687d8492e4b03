"""What resized copies gain: both forms read, decoded and cropped in turn, by what a loader worker runs.

`benchmark.py input` measures the input path with workers; this takes seconds, in one process.
"""

import statistics
import time

import torch

from resnet_in1k.data.crop import TrainCrop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.loader import SlotWriter
from resnet_in1k.data.sampler import BatchSpec, Sample

NUM_IMAGES, NUM_REPETITIONS, CROP_SIZE = 100, 5, 224


def crop_rates(original: Source, copy: Source) -> tuple[float, float]:
    """Training crops a second of each; medians of repetitions in turn."""
    number = min(NUM_IMAGES, len(original))
    batch = BatchSpec(1, CROP_SIZE, [Sample(1, place * len(original) // number) for place in range(number)])
    slots = torch.empty((1, 3 * number * CROP_SIZE**2), dtype=torch.uint8)
    workers = [SlotWriter(source, TrainCrop(scale_min=0.08, seed=0), slots, "replace") for source in (original, copy)]
    seconds: dict[int, list[float]] = {0: [], 1: []}
    torch.set_num_threads(1)  # as a loader worker has
    for _ in range(NUM_REPETITIONS):
        for which, worker in enumerate(workers):
            started = time.perf_counter()
            worker.__getitems__((0, batch))
            seconds[which].append(time.perf_counter() - started)
    return number / statistics.median(seconds[0]), number / statistics.median(seconds[1])
