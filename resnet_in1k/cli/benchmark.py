"""scripts/benchmark.py: the speed of input, step and both together, beside the tutorial's code and beside the limit.

A rate alone says little on a machine that others share. So all ways are measured in the same run, one after the other,
several times, and the result is the ratio of the medians.
"""

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter
from typing import Any, Literal

import torch
import tyro

from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.cli.benchmark_parts import beside_off, input_recipes, random_images, step_ways
from resnet_in1k.cli.communication import collectives_per_step, costs, ways_of_several
from resnet_in1k.cli.reference import DecodeOnly, TutorialDataset, TutorialStep, bare_step, reference_loader
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.loader import PREFETCH_FACTOR, Batch, Prefetched, Tensors, prefetch_to_device
from resnet_in1k.data.registry import open_source
from resnet_in1k.data.sampler import TrainSampler
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Architecture, Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import provenance
from resnet_in1k.train.step import TrainStep
from resnet_in1k.train.trainer import TrainOptions, train_loader
from resnet_in1k.utils.device import (
    PrecisionFlag,
    capabilities,
    choose_cpu_threads,
    choose_workers,
    hardware_name,
    usable_cores,
)
from resnet_in1k.utils.distributed import make_accelerator, translate_process_errors
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch, world_size
from resnet_in1k.utils.pool import translate_worker_errors
from resnet_in1k.utils.timing import Lap, Stopwatch, bottleneck, synchronize
from resnet_in1k.utils.validation import at_least, check_options

TUTORIAL = RECIPES["tutorial"].recipe


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to measure, and on what."""

    what: tyro.conf.Positional[Literal["input", "step", "train"]]
    """input: encoded files to batches on the device; step: training on a batch there, also by several processes; train:
    both."""
    data: str = "synthetic"
    """As for training; of a folder only train/ is needed."""
    json: bool = False
    """Print one JSON object instead of a table."""
    parts: bool = False
    """`step` and `input`: each part of a recipe on, beside off, instead of beside the tutorial's code."""
    beside: tuple[str, ...] = ()
    """`input`: other forms of the same images, such as resized copies or shards:DIR, each beside --data."""
    workers: tuple[int, ...] | None = field(default=None, metadata=at_least(1))
    """Loader workers; `input` measures each number given, by default powers of two up to the cores."""
    model: Architecture = "resnet50"
    """Architecture, by torchvision's name."""
    batch_size: int | None = field(default=None, metadata=at_least(1))
    """Images per step; by default 16 on a CPU, 256 elsewhere."""
    image_size: int = field(default=224, metadata=at_least(32))
    """Side of the training square, in pixels."""
    steps: int | None = field(default=None, metadata=at_least(1))
    """Steps per repetition; by default 30 for input; for step and train 3 on a CPU, 50 elsewhere."""
    repetitions: int = field(default=5, metadata=at_least(1))
    """How often each way is measured, after one round of warm-up."""
    compile: bool = False
    """Compile our model and, on an accelerator, the augmentation by torch.compile."""
    compress_gradients: bool = False
    """As for training, with several processes."""
    precision: PrecisionFlag = "auto"
    """Our training precision; the tutorial's is float32."""
    cpu_threads: int | None = field(default=None, metadata=at_least(1))
    """Threads for computing on the CPU; by default all physical cores."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.workers == ():
            raise UserError("--workers: no number given")
        if self.parts and (self.what == "train" or world_size() > 1):
            raise UserError("--parts: measures step or input, in one process")
        if self.beside and (self.what != "input" or self.parts):
            raise UserError("--beside: is for input, without --parts")


def benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure, and return rates in images/s with all that one must know to compare them.

    Raises:
        UserError: if there is no such data or the machine cannot do it.
    """
    with translate_worker_errors(), translate_process_errors(), Launch.connect() as launch:
        return _benchmark(options, launch)


def _benchmark(options: BenchmarkOptions, launch: Launch) -> dict[str, Any]:
    bench = Bench(options, launch)
    conditions = {
        "what": options.what,
        "hardware": hardware_name(bench.device),
        "cpu_threads": choose_cpu_threads(bench.device, options.cpu_threads),
        "precision": bench.accelerator.mixed_precision,
        "model": options.model,
        "compiled": options.compile,
        "batch_size": bench.batch_size,
        "image_size": options.image_size,
        "repetitions": options.repetitions,
        "num_processes": launch.world_size,
        **provenance(),
    }
    result = {**{"input": bench.input, "step": bench.step, "train": bench.train}[options.what](), **conditions}
    launch.gather(None, "measures")  # a launcher ends the others when one exits early
    bench.accelerator.end_training()
    return result


class Bench:
    """The measured ways, over one recipe on one device."""

    def __init__(self, options: BenchmarkOptions, launch: Launch):
        self.options, self.launch = options, launch
        if launch.world_size > 1 and options.what != "step":
            raise UserError(
                f"benchmark.py {options.what} measures one process; start it with python, not with a launcher"
            )
        self.accelerator = make_accelerator(launch, options.precision, compress_gradients=options.compress_gradients)
        self.device = self.accelerator.device
        on_cpu = self.device.type == "cpu"
        self.batch_size = options.batch_size or (16 if on_cpu else 256)
        self.recipe = replace(
            TUTORIAL, model=options.model, image_size=options.image_size, global_batch_size=self.batch_size
        )
        self.steps = options.steps or (30 if options.what == "input" else 3 if on_cpu else 50)

    def input(self) -> dict[str, Any]:
        """For each number of workers; the fastest of ours is the result."""
        source = self._source()
        if self.options.parts:
            return self._input_parts(source)
        if self.options.beside:
            return self._input_beside(source)
        workers = self.options.workers or tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= usable_cores())
        sweep = []
        for number in workers:
            rates = self._interleaved(
                {
                    "ours": lambda number=number: self._rate(self._our_batches(source, number), number),
                    "tutorial": lambda number=number: self._rate(self._tutorial_batches(source, number), number),
                    "decode_only": lambda number=number: self._rate(self._decode_only(source, number), number),
                }
            )
            ratios = {
                "ratio": ratio(rates, "ours", "tutorial"),
                "share_of_decode_only": ratio(rates, "ours", "decode_only"),
            }
            sweep.append({"workers": number, **summary(rates), **ratios})
        best = max(sweep, key=lambda row: row["ours"])
        return {**best, "augment": self._augment_rate(), "sweep": sweep}

    def step(self) -> dict[str, Any]:
        """On one batch that is on the device; of several processes, one each."""
        if self.options.parts:
            return beside_off(
                summary(
                    self._interleaved(step_ways(self.recipe, self.accelerator, self.options.compile, self._step_rate))
                )
            )
        ours = self._our_step(1000)
        images = torch.randn(self.batch_size, 3, self.recipe.image_size, self.recipe.image_size, device=self.device)
        labels = torch.randint(1000, (self.batch_size,), device=self.device)
        channels_last = images.to(memory_format=torch.channels_last)
        if self.launch.world_size > 1:
            rates = self._interleaved(ways_of_several(self.launch, ours, channels_last, labels, self._step_rate))
            result = {**summary(rates), "collectives_per_step": collectives_per_step(ours, channels_last, labels)}
            return {**result, **costs(result, self.launch.world_size)}
        tutorial = TutorialStep(self.recipe, self.device)
        bare = bare_step(self.recipe, self.device, self.accelerator.mixed_precision)
        rates = self._interleaved(
            {
                "ours": lambda: self._step_rate(lambda: ours(channels_last, labels, 0.01)),
                "tutorial": lambda: self._step_rate(lambda: tutorial(images, labels)),
                "bare": lambda: self._step_rate(lambda: bare(channels_last, labels)),
            }
        )
        result = {**summary(rates), "ratio": ratio(rates, "ours", "tutorial")}
        result["overhead"] = ratio(rates, "bare", "ours") - 1
        return result

    def train(self) -> dict[str, Any]:
        """From encoded files to updated weights."""
        source = self._source()
        workers = choose_workers(self.options.workers[0] if self.options.workers else None)
        ours, tutorial = self._our_step(len(source.class_names)), TutorialStep(self.recipe, self.device)
        total = Lap()
        rates = self._interleaved(
            {
                "ours": lambda: self._our_training_rate(source, workers, ours, total),
                "tutorial": lambda: self._rate(
                    (tutorial(*batch) for batch in self._tutorial_batches(source, workers)), workers
                ),
            }
        )
        return {
            **summary(rates),
            "ratio": ratio(rates, "ours", "tutorial"),
            "waiting_share": total.waiting_share,
            "advice": bottleneck(total, workers),
            "workers": workers,
        }

    def _input_parts(self, source: Source) -> dict[str, Any]:
        """Of one number of workers."""
        workers = self.options.workers[0] if self.options.workers else 1
        ways = {
            name: lambda recipe=recipe: self._rate(self._our_batches(source, workers, recipe), workers)
            for name, recipe in input_recipes(self.recipe).items()
        }
        return {"workers": workers, **beside_off(summary(self._interleaved(ways)))}

    def _input_beside(self, source: Source) -> dict[str, Any]:
        """Of each form of the images, by one number of workers; and the tutorial's loader and decoding of the first."""
        workers = self.options.workers[0] if self.options.workers else 1
        forms = {source.name: source, **{data: self._source(data) for data in self.options.beside}}
        ways = {
            **{
                name: lambda form=form: self._rate(self._our_batches(form, workers), workers)
                for name, form in forms.items()
            },
            "tutorial": lambda: self._rate(self._tutorial_batches(source, workers), workers),
            "decode only": lambda: self._rate(self._decode_only(source, workers), workers),
        }
        return {"workers": workers, **beside_off(summary(self._interleaved(ways)), source.name)}

    def _source(self, data: str = "") -> Source:
        data = data or self.options.data
        source = open_source(data, "train")
        if len(source) < self.batch_size:
            raise UserError(f"{data}: {len(source)} images are fewer than --batch-size {self.batch_size}")
        return source

    def _prefetched(
        self, source: Source, workers: int, prepare: Callable[[Batch], Tensors], recipe: Recipe | None = None
    ) -> Iterator[Prefetched]:
        schedule = StepCounts(recipe or self.recipe, 1, 1, len(source))
        with train_loader(source, schedule, TrainOptions(), workers) as loader:
            order = TrainSampler(schedule, 1, self._num_steps(workers))
            yield from prefetch_to_device(loader.batches(order), self.device, prepare)

    def _our_batches(self, source: Source, workers: int, recipe: Recipe | None = None) -> Iterator[Tensors]:
        """(B, 3, S, S) uint8 and (B,) int64, on the device."""
        prefetched = self._prefetched(source, workers, lambda batch: (batch.images, batch.labels), recipe)
        return (each.tensors() for each in prefetched)

    def _num_steps(self, workers: int) -> int:
        """Enough for the workers to be as busy at the last measured step as at the first."""
        return warmup_steps(workers) + self.steps + PREFETCH_FACTOR * workers

    def _indices(self, source: Source, workers: int) -> list[list[int]]:
        order = TrainSampler(StepCounts(self.recipe, 1, 1, len(source)), 1, self._num_steps(workers))
        return [[sample.index for sample in batch.samples] for batch in order]

    def _tutorial_batches(self, source: Source, workers: int) -> Iterator[Any]:
        """(B, 3, S, S) float32, made one by one in the workers, and (B,) int64."""
        loader = reference_loader(
            TutorialDataset(source, self.recipe),
            self._indices(source, workers),
            workers,
            pin_memory=capabilities(self.device.type).pinned_memory,
        )
        return ((images.to(self.device), labels.to(self.device)) for images, labels in loader)

    def _decode_only(self, source: Source, workers: int) -> Iterator[Any]:
        return iter(reference_loader(DecodeOnly(source), self._indices(source, workers), workers, pin_memory=False))

    def _augment_rate(self) -> float:
        """Images/s of the device's part of the input path, alone."""
        size, augmentation, steps = self.recipe.image_size, self._augmentation(1000), itertools.count(1)
        images = random_images(self.batch_size, size, self.device)
        labels = torch.randint(1000, (self.batch_size,), device=self.device)

        def augment() -> Tensors:
            return augmentation.prepare(Batch(images, labels, labels, next(steps)))

        return statistics.median(self._interleaved({"augment": lambda: self._step_rate(augment)})["augment"])

    def _our_step(self, num_classes: int) -> TrainStep:
        return TrainStep(self.recipe, num_classes, self.accelerator, compile=self.options.compile)

    def _augmentation(self, num_classes: int) -> Augmentation:
        return Augmentation(self.recipe, num_classes, compile=self.options.compile)

    def _our_training_rate(self, source: Source, workers: int, step: TrainStep, total: Lap) -> float:
        """Images/s; adds to `total` where the time went."""
        stopwatch, augmentation = Stopwatch(self.device), self._augmentation(len(source.class_names))
        batches = self._prefetched(source, workers, augmentation.prepare)
        for batch in islice(batches, warmup_steps(workers)):
            step(*batch.tensors(), lr=0.01)
        synchronize(self.device)
        start_seconds = perf_counter()
        for _ in range(self.steps):
            with stopwatch.section("load"):
                batch = next(batches)
            with stopwatch.section("train"):
                step(*batch.tensors(), lr=0.01)
        total.add(stopwatch.lap())
        return self.steps * self.batch_size / (perf_counter() - start_seconds)

    def _rate(self, batches: Iterator[Any], workers: int = 0) -> float:
        """Images/s over `steps` batches, after those that the workers had made ahead."""
        deque(islice(batches, warmup_steps(workers)), maxlen=0)
        synchronize(self.device)
        start_seconds = perf_counter()
        deque(islice(batches, self.steps), maxlen=0)
        synchronize(self.device)
        return self.steps * self.batch_size / (perf_counter() - start_seconds)

    def _step_rate(self, step: Callable[[], object]) -> float:
        return self._rate(step() for _ in itertools.count())

    def _interleaved(self, ways: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Each way's rates, measured in turn, after one round that does not count."""
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(self.options.repetitions + 1):
            for name, way in ways.items():
                rate = way()
                if repetition:
                    rates[name].append(rate)
        return rates


def warmup_steps(workers: int) -> int:
    """Batches that may be ready when the first is taken, and one; measured, they would seem to cost nothing."""
    return PREFETCH_FACTOR * workers + 1


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Each way's median, with its range under `<name>_range`."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, **{f"{name}_range": [min(values), max(values)] for name, values in rates.items()}}


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(rates[name]) / statistics.median(rates[other])
