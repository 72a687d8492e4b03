"""How fast are input, step and both together on this machine, beside the tutorial's own code and beside the limit?

A rate alone says little on a machine that others share. So every way is measured in the same run, one after the other,
again and again, and what counts is the ratio of the medians.
"""

import contextlib
import io
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
import torchvision
import tyro
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resnet_in1k.augment import IMAGENET_MEAN, IMAGENET_STD, augment, draw
from resnet_in1k.devices import (
    Precision,
    choose_cpu_threads,
    choose_workers,
    hardware_name,
    make_accelerator,
    usable_cores,
)
from resnet_in1k.errors import UserError
from resnet_in1k.images import decode
from resnet_in1k.pipeline import (
    PREFETCH_FACTOR,
    Batch,
    TrainOrder,
    on_device,
    train_loader,
    worker_context,
    worker_deaths_explained,
)
from resnet_in1k.recipes import TUTORIAL, Architecture, Recipe
from resnet_in1k.run_folder import provenance
from resnet_in1k.sources import Source, open_source
from resnet_in1k.step import TrainStep
from resnet_in1k.stopwatch import Lap, Stopwatch, diagnose, duration

IMAGENET_NUM_TRAIN_IMAGES = 1_281_167
RESNET50_BYTES_PER_IMAGE = 475e6
"""What a bf16 training step of an eager ResNet-50 at 224 px must move through a GPU's memory, computed, per image."""

What = Literal["input", "step", "train"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to measure, and on what."""

    what: tyro.conf.Positional[What]
    """input: encoded files to batches on the device; step: training on a batch that is there; train: both."""
    data: str = "synthetic"
    """As for training; of a folder only train/ is needed."""
    json: bool = False
    """Print one JSON object instead of a table."""
    workers: tuple[int, ...] | None = None
    """Loader workers; `input` measures each number given, by default powers of two up to the cores."""
    model: Architecture = "resnet50"
    """Architecture, by torchvision's name."""
    batch_size: int | None = None
    """Images per step; by default 16 on a CPU, 256 elsewhere."""
    image_size: int = 224
    """Side of the training square, in pixels."""
    steps: int | None = None
    """Steps per repetition; by default 30 for input; for step and train 3 on a CPU, 50 elsewhere."""
    repetitions: int = 5
    """How often each way is measured, after one round to warm up."""
    compile: bool = False
    """Compile our model by torch.compile."""
    precision: Precision = "auto"
    """Our training precision; the tutorial's is float32."""
    cpu_threads: int | None = None
    """Threads for computing on the CPU; by default all physical cores."""

    def __post_init__(self) -> None:
        for name, least in [("batch_size", 1), ("image_size", 32), ("steps", 1), ("repetitions", 1)]:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least {least}")
        if self.workers is not None and (not self.workers or min(self.workers) < 1):
            raise UserError("--workers: numbers of at least 1")


def benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure, and return rates in images/s with all that one must know to compare them.

    Raises:
        UserError: if there is no such data or the machine cannot do it.
    """
    accelerator = make_accelerator(options.precision)
    device = accelerator.device
    batch_size = options.batch_size or (16 if device.type == "cpu" else 256)
    recipe = replace(TUTORIAL, model=options.model, image_size=options.image_size, global_batch_size=batch_size)
    bench = Bench(options, recipe, accelerator)
    conditions = {
        "what": options.what,
        "hardware": hardware_name(device),
        "cpu_threads": choose_cpu_threads(device, options.cpu_threads),
        "precision": accelerator.mixed_precision,
        "model": options.model,
        "compiled": options.compile,
        "batch_size": batch_size,
        "image_size": options.image_size,
        "repetitions": options.repetitions,
        **provenance(),
    }
    with worker_deaths_explained():
        return {**bench.measure(), **conditions}


class Bench:
    """The measured ways, over one recipe on one device."""

    def __init__(self, options: BenchmarkOptions, recipe: Recipe, accelerator: Accelerator):
        self.options, self.recipe, self.accelerator = options, recipe, accelerator
        self.device, self.batch_size = accelerator.device, recipe.global_batch_size
        if accelerator.num_processes > 1:
            raise UserError("benchmark.py measures one process; start it with python, not with a launcher of several")
        default_steps = 30 if options.what == "input" else 3 if self.device.type == "cpu" else 50
        self.steps = options.steps or default_steps

    def measure(self) -> dict[str, Any]:
        return {"input": self.input, "step": self.step, "train": self.train}[self.options.what]()

    def input(self) -> dict[str, Any]:
        """For each number of workers; the fastest of ours is the result."""
        source = self._source()
        workers = self.options.workers or tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= usable_cores())
        sweep = []
        for number in workers:
            rates = interleaved(
                {
                    "ours": lambda number=number: self._rate(self._our_batches(source, number), number),
                    "tutorial": lambda number=number: self._rate(self._tutorial_batches(source, number), number),
                    "decode_only": lambda number=number: self._rate(self._decode_only(source, number), number),
                },
                self.options.repetitions,
            )
            sweep.append(
                {
                    "workers": number,
                    **summary(rates),
                    "ratio": ratio(rates, "ours", "tutorial"),
                    "share_of_decode_only": ratio(rates, "ours", "decode_only"),
                }
            )
        best = max(sweep, key=lambda row: row["ours"])
        return {**best, "augment": self._augment_rate(), "sweep": sweep}

    def step(self) -> dict[str, Any]:
        ours, tutorial, bare = self._our_step(), TutorialStep(self.recipe, self.device), self._bare_step()
        images = torch.randn(self.batch_size, 3, self.recipe.image_size, self.recipe.image_size, device=self.device)
        labels = torch.randint(1000, (self.batch_size,), device=self.device)
        channels_last = images.to(memory_format=torch.channels_last)
        rates = interleaved(
            {
                "ours": lambda: self._step_rate(lambda: ours(channels_last, labels, 0.01)),
                "tutorial": lambda: self._step_rate(lambda: tutorial(images, labels)),
                "bare": lambda: self._step_rate(lambda: bare(channels_last, labels)),
            },
            self.options.repetitions,
        )
        result = {**summary(rates), "ratio": ratio(rates, "ours", "tutorial")}
        result["overhead"] = ratio(rates, "bare", "ours") - 1
        if self.device.type == "cuda" and (self.options.model, self.options.image_size) == ("resnet50", 224):
            limit = memory_bandwidth(self.device) / RESNET50_BYTES_PER_IMAGE
            result |= {"memory_bandwidth_limit": limit, "share_of_memory_bandwidth_limit": result["ours"] / limit}
        return result

    def train(self) -> dict[str, Any]:
        source = self._source()
        asked = self.options.workers[0] if self.options.workers else None
        workers = choose_workers(self.device, asked)
        ours, tutorial = self._our_step(len(source.class_names)), TutorialStep(self.recipe, self.device)
        total = Lap()

        def our_way() -> float:
            rate, lap = self._our_training_rate(source, workers, ours)
            total.add(lap)
            return rate

        def tutorials_way() -> float:
            return self._rate((tutorial(*batch) for batch in self._tutorial_batches(source, workers)), workers)

        rates = interleaved({"ours": our_way, "tutorial": tutorials_way}, self.options.repetitions)
        images_per_second = statistics.median(rates["ours"])
        return {
            **summary(rates),
            "ratio": ratio(rates, "ours", "tutorial"),
            "waiting_share": total.waiting_share,
            "advice": diagnose(total, workers),
            "workers": workers,
            "imagenet_hours": TUTORIAL.epochs * IMAGENET_NUM_TRAIN_IMAGES / images_per_second / 3600,
        }

    def _source(self) -> Source:
        source = open_source(self.options.data, "train")
        if len(source) < self.batch_size:
            raise UserError(f"{self.options.data}: {len(source)} images are fewer than --batch-size {self.batch_size}")
        return source

    def _order(self, source: Source, workers: int) -> TrainOrder:
        """The images of a repetition: enough for workers to be as busy at the last measured step as at the first."""
        return TrainOrder(
            num_images=len(source),
            global_batch_size=self.batch_size,
            seed=self.recipe.seed,
            first_step=1,
            last_step=self._last_step(workers),
        )

    def _last_step(self, workers: int) -> int:
        return warmup_steps(workers) + self.steps + PREFETCH_FACTOR * workers

    def _rate(self, batches: Iterator[Any], workers: int = 0) -> float:
        """Images/s over `steps` batches, once those that the workers had made ahead are gone."""
        deque(islice(batches, warmup_steps(workers)), maxlen=0)
        self._synchronize()
        start_seconds = time.perf_counter()
        deque(islice(batches, self.steps), maxlen=0)
        self._synchronize()
        return self.steps * self.batch_size / (time.perf_counter() - start_seconds)

    def _step_rate(self, step: Callable[[], object]) -> float:
        return self._rate(step() for _ in itertools.count())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _our_batches(self, source: Source, workers: int) -> Iterator[Any]:
        loader = self._our_loader(source, workers)
        return (take() for take in on_device(loader, self.device, lambda batch: (batch.images, batch.labels)))

    def _our_loader(self, source: Source, workers: int) -> Any:
        return train_loader(
            source,
            self.recipe,
            first_step=1,
            last_step=self._last_step(workers),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )

    def _tutorial_batches(self, source: Source, workers: int) -> Iterator[Any]:
        """(B, 3, S, S) float32, made one by one in the workers, and (B,) int64."""
        loader = DataLoader(
            TutorialDataset(source, self.recipe),
            batch_sampler=_indices_only(self._order(source, workers)),
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=worker_context(),
        )
        return ((images.to(self.device), labels.to(self.device)) for images, labels in loader)

    def _decode_only(self, source: Source, workers: int) -> Iterator[Any]:
        """The limit: the same workers decode, and send nothing back."""
        loader = DataLoader(
            DecodeOnly(source),
            batch_sampler=_indices_only(self._order(source, workers)),
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR,
            multiprocessing_context=worker_context(),
        )
        return iter(loader)

    def _augment_rate(self) -> dict[str, float]:
        """Images/s of the device's part of the input path, alone."""
        size = self.recipe.image_size
        images = torch.randint(256, (self.batch_size, 3, size, size), dtype=torch.uint8, device=self.device)
        steps = itertools.count(1)
        rates = interleaved(
            {"augment": lambda: self._step_rate(lambda: augment(images, draw(self.recipe, next(steps))))},
            self.options.repetitions,
        )
        return summary(rates)["augment"]

    def _our_step(self, num_classes: int = 1000) -> TrainStep:
        return TrainStep(self.recipe, num_classes, self.accelerator, compile=self.options.compile)

    def _bare_step(self) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """The least that trains in our precision: no Accelerate, no schedule, no log."""
        model = getattr(torchvision.models, self.recipe.model)().to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

        def step(images: torch.Tensor, labels: torch.Tensor) -> None:
            with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
                logits = model(images)
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _our_training_rate(self, source: Source, workers: int, step: TrainStep) -> tuple[float, Lap]:
        """Images/s from encoded files to updated weights, and where the time went, less the first step."""
        stopwatch, steps = Stopwatch(self.device), itertools.count(1)

        def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
            return augment(batch.images, draw(self.recipe, next(steps))), batch.labels

        takes = on_device(self._our_loader(source, workers), self.device, prepare)
        for take in islice(takes, warmup_steps(workers)):
            step(*take(), lr=0.01)
        self._synchronize()
        start_seconds = time.perf_counter()
        for _ in range(self.steps):
            with stopwatch.section("load"):
                take = next(takes)
            with stopwatch.section("train"):
                step(*take(), lr=0.01)
        lap = stopwatch.lap()
        return self.steps * self.batch_size / (time.perf_counter() - start_seconds), lap


class TutorialDataset(Dataset):
    """The tutorial's own: Pillow, and all of its transforms image by image, to float tensors."""

    def __init__(self, source: Source, recipe: Recipe):
        self._source = source
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe.image_size),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(10),
                transforms.ColorJitter(0.2, 0.2, 0.2, 0.2),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(io.BytesIO(self._source.read(index).tobytes())) as image:
            return self._transform(image.convert("RGB")), int(self._source.labels[index])


class DecodeOnly(Dataset):
    def __init__(self, source: Source):
        self._source = source

    def __getitem__(self, index: int) -> int:
        return decode(self._source.read(index)).ndim


class TutorialStep:
    """The tutorial's loop: float32, NCHW, plain SGD, and the loss fetched at each step."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self._model = getattr(torchvision.models, recipe.model)().to(device)
        self._loss_function = torch.nn.CrossEntropyLoss()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        self._optimizer.zero_grad()
        loss = self._loss_function(self._model(images), labels)
        loss.backward()
        self._optimizer.step()
        return loss.item()


def warmup_steps(workers: int) -> int:
    """Batches that may lie ready when the first is taken, and one; measured, they would seem to cost nothing."""
    return PREFETCH_FACTOR * workers + 1


def _indices_only(order: TrainOrder) -> list[list[int]]:
    return [[index for _, index in batch] for batch in order]


def interleaved(ways: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Each way's rates, measured in turn, after one round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            rate = way()
            if repetition:
                rates[name].append(rate)
    return rates


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Each way's median, with its range under `<name>_range`."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, **{f"{name}_range": [min(values), max(values)] for name, values in rates.items()}}


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(rates[name]) / statistics.median(rates[other])


def memory_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy within the GPU's memory, read and written bytes both counted."""
    source = torch.rand(1 << 29, device=device)  # 2 GiB, far more than any cache
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 10 * 2 * source.nbytes / (start.elapsed_time(end) / 1000)


def table(result: dict[str, Any]) -> str:
    """What a person reads."""

    def rate(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}_range"]
        return f"{row[name]:,.1f} ({low:,.1f} to {high:,.1f})"

    lines = [
        f"{result['what']}: images/s, median of {result['repetitions']} interleaved repetitions (least to most)",
        f"  {result['hardware']}, {result['cpu_threads']} CPU threads, torch {result['versions']['torch']}, "
        f"commit {result['commit']}",
        f"  {result['model']}, batch {result['batch_size']}, {result['image_size']} px, {result['precision']}",
    ]
    if result["what"] == "input":
        for row in result["sweep"]:
            lines += [
                f"  {row['workers']} worker{'s' * (row['workers'] > 1)}",
                f"    ours         {rate(row, 'ours')}",
                f"    tutorial     {rate(row, 'tutorial')}   ours is {row['ratio']:.2f} times that",
                f"    decode only  {rate(row, 'decode_only')}   ours is {row['share_of_decode_only']:.2f} of that",
            ]
        lines.append(f"  augmentation on the device, counted apart: {result['augment']:,.0f}")
    else:
        lines.append(f"  ours         {rate(result, 'ours')}")
        lines.append(f"  tutorial     {rate(result, 'tutorial')}   ours is {result['ratio']:.2f} times that")
    if result["what"] == "step":
        lines.append(f"  bare loop    {rate(result, 'bare')}   our overhead is {result['overhead']:.1%}")
        if "memory_bandwidth_limit" in result:
            share = result["share_of_memory_bandwidth_limit"]
            lines.append(
                f"  memory bandwidth allows {result['memory_bandwidth_limit']:,.0f}; ours is {share:.0%} of that"
            )
    if result["what"] == "train":
        hours = duration(3600 * result["imagenet_hours"])
        workers = f"{result['workers']} worker{'s' * (result['workers'] > 1)}"
        lines += [
            f"  waited for data {result['waiting_share']:.1%} of the time, with {workers}: {result['advice']}",
            f"  {TUTORIAL.epochs} epochs of ImageNet-1k, as the recipe tutorial has, would take {hours} at that rate",
        ]
    return "\n".join(lines)
