"""Measure the speed of input, training step and training on this machine.

They are compared with the tutorial's code and with upper limits. Other programs may use the machine at the same time,
so a rate alone says little: all ways are measured in turn in one run, several times, and the ratios are those of the
medians.
"""

import contextlib
import io
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, repeat
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.train_options import BenchmarkOptions
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import decode
from resnet_in1k.data.loader import PREFETCH_FACTOR, Batch, Tensors, prefetch_to_device
from resnet_in1k.data.registry import open_source
from resnet_in1k.data.sampler import train_specs
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import provenance
from resnet_in1k.train.step import MovingAverage, TrainStep
from resnet_in1k.train.trainer import train_loader
from resnet_in1k.utils import device as devices
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.errors import UserError, translate_errors
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.pool import worker_context
from resnet_in1k.utils.process import rank
from resnet_in1k.utils.timing import Lap, Stopwatch, bottleneck, synchronize, waiting_share

LR = 0.01
TUTORIAL = RECIPES["tutorial"].recipe


def main() -> None:
    options = parse(BenchmarkOptions)
    result = benchmark(options)
    if rank() == 0:
        print(json.dumps(result) if options.json else table(result))


def benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Return rates in images/s and the conditions; raises UserError if the data or the machine is not suitable."""
    advice = "use a smaller --batch-size: the tutorial's step in float32 needs twice the memory of bf16"
    with Launch.connect() as launch, translate_errors(advice=advice):
        bench = Bench(options, launch)
        threads = devices.choose_cpu_threads(bench.device, options.cpu_threads)
        result = {"input": bench.input, "step": bench.step, "train": bench.train}[options.what]()
        result |= {"what": options.what, "repetitions": options.repetitions, "num_processes": launch.world_size}
        result |= {"model": bench.recipe.model, "batch_size": bench.batch_size, "image_size": bench.recipe.image_size}
        result |= {"recipe_changes": TUTORIAL.differences(options.recipe), "compiled": options.compile}
        result |= {"hardware": devices.hardware_name(bench.device), "cpu_threads": threads, "workers": bench.workers}
        result |= {"precision": bench.accelerator.mixed_precision, **provenance()}
        launch.wait_for_everyone("measuring")  # a launcher ends the other processes when one exits early
        bench.accelerator.end_training()
    return result


Batches = Iterator[Callable[[], Tensors]]
"""Functions that return the tensors of a batch: the time of waiting for a batch is apart from that of its use."""
Way = tuple[Callable[[], Batches] | None, Callable[..., object] | None]
"""A way to do the work: its batches, made again for each repetition, and the step that takes their tensors."""


class Bench:
    """The ways to measure, over one recipe on one device."""

    def __init__(self, options: BenchmarkOptions, launch: Launch):
        self.options, self.launch = options, launch
        if launch.world_size > 1 and options.what != "step":
            raise UserError(f"benchmark.py {options.what} measures one process: start it without a launcher")
        self.accelerator = make_accelerator(launch, options.precision, compress_gradients=options.compress_gradients)
        self.device = self.accelerator.device
        self.stopwatch, self.laps = Stopwatch(self.device), defaultdict(Lap)
        on_cpu = self.device.type == "cpu"
        self.batch_size = options.batch_size or (16 if on_cpu else 256)
        self.recipe = replace(options.recipe, global_batch_size=self.batch_size * launch.world_size)
        self.num_steps = options.steps or (30 if options.what == "input" else 3 if on_cpu else 50)
        self.num_classes, self.workers, self.num_warmup_steps = 1000, 0, 1
        if options.what != "step":
            self.source = open_source(options.data, "train")
            num_images, self.num_classes = len(self.source), len(self.source.class_names)
            if num_images < self.batch_size:
                raise UserError(f"{options.data}: {num_images} images are fewer than --batch-size {self.batch_size}")
            self.workers = devices.choose_workers(options.workers)
            # Batches that workers have ready at the start would seem to cost nothing.
            self.num_warmup_steps = PREFETCH_FACTOR * self.workers + 1
            # More steps than are measured: at the last one the workers are as busy as at the first.
            last_step = self.num_warmup_steps + self.num_steps + PREFETCH_FACTOR * self.workers
            self.counts = StepCounts(self.recipe, 1, 1, num_images)
            self.specs = list(train_specs(self.source, self.counts, 1, last_step))
        shape = (self.batch_size, 3, self.recipe.image_size, self.recipe.image_size)
        self.images = torch.randn(shape, device=self.device).to(memory_format=torch.channels_last)
        self.labels = torch.randint(self.num_classes, (self.batch_size,), device=self.device)

    def input(self) -> dict[str, Any]:
        """Measure from encoded files to batches on the device, and separately the augmentation there."""
        augmentation, numbers = Augmentation(self.recipe, self.num_classes), count(1)
        pixels = self.images.mul(64).add(128).clamp(0, 255).to(torch.uint8)
        result = self._measure(
            ours=(lambda: self._our_batches(lambda batch: (batch.images, batch.labels)), None),
            tutorial=(lambda: self._torch_batches(self.recipe.image_size), None),
            decode_only=(lambda: self._torch_batches(image_size=0), None),
            augment=(None, lambda: augmentation(pixels, self.labels, next(numbers))),
        )
        return {**result, "share_of_decode_only": result["ours"] / result["decode_only"]}

    def step(self) -> dict[str, Any]:
        """Measure optimizer steps on one batch on the device."""
        images, labels, our_step = self.images, self.labels, self._our_step()
        targets = one_hot(labels, self.num_classes).float() if self.recipe.mixes else labels
        drawn = [each[: self.batch_size].to(self.device) for each in self.train_step.draw(1).values()]
        if self.launch.world_size > 1:
            return self._step_of_several(lambda: our_step(images, targets, *drawn))
        tutorial, bare = self._reference_step(bare=False), self._reference_step(bare=True)
        contiguous = images.contiguous()  # NCHW, as in the tutorial
        result = self._measure(
            ours=(None, lambda: our_step(images, targets, *drawn)),
            tutorial=(None, lambda: tutorial(contiguous, labels)),
            bare=(None, lambda: bare(images, labels)),
        )
        return {**result, "overhead": result["bare"] / result["ours"] - 1}  # time over the bare loop's

    def _step_of_several(self, step: Callable[[], None]) -> dict[str, Any]:
        """Measure all processes together, the same without communication, and process 0 alone."""

        def step_alone() -> None:
            with self.accelerator.no_sync(self.train_step.prepared_model):
                step()

        one_process = step_alone if self.launch.is_main_process else None
        ways = {"ours": step, "without_communication": step_alone, "one_process": one_process}
        result = self._measure(**{name: (None, way) for name, way in ways.items()})
        world_size = self.launch.world_size
        result["one_process"] /= world_size  # a rate is of the images of all processes
        result["one_process_range"] = [rate / world_size for rate in result["one_process_range"]]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        names = [event.name for event in profiler.events() if event.name.startswith(("gloo:", "nccl:", "xccl:"))]
        result["communication_share"] = 1 - result["ours"] / result["without_communication"]
        result["scaling_efficiency"] = result["ours"] / (world_size * result["one_process"])
        return {**result, "collectives_per_step": dict(Counter(names))}

    def train(self) -> dict[str, Any]:
        """Measure from encoded files to updated weights."""
        our_step = self._our_step()
        augmentation = Augmentation(self.recipe, self.num_classes, draw_for_step=self.train_step.draw)
        result = self._measure(
            ours=(lambda: self._our_batches(augmentation.apply_to), our_step),
            tutorial=(lambda: self._torch_batches(self.recipe.image_size), self._reference_step(bare=False)),
        )
        lap = self.laps[our_step]
        return {**result, "waiting_share": waiting_share(lap), "advice": bottleneck(lap, self.workers)}

    def _measure(self, **ways: Way) -> dict[str, Any]:
        """Return each way's median rate and its range, over repetitions in turn after one that does not count."""
        rounds = [[self._rate(*way) for way in ways.values()] for _ in range(self.options.repetitions + 1)][1:]
        rates = dict(zip(ways, zip(*rounds, strict=True), strict=True))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ranges = {f"{name}_range": [min(values), max(values)] for name, values in rates.items()}
        ratio = {"ratio": medians["ours"] / medians["tutorial"]} if "tutorial" in ways else {}
        return {**medians, **ranges, **ratio}

    def _rate(self, make_batches: Callable[[], Batches] | None, step: Callable[..., object] | None) -> float:
        """Return images/s of all processes over `num_steps` steps, after a warm-up."""
        batches = make_batches() if make_batches else repeat(lambda: ())
        self.launch.wait_for_everyone("measuring")  # start at the same time
        for number in range(self.num_warmup_steps + self.num_steps):
            if number == self.num_warmup_steps:
                synchronize(self.device)
                self.stopwatch.lap()  # drops the warm-up
                start_seconds = perf_counter()
            with self.stopwatch.section("load"):
                take = next(batches)
            with self.stopwatch.section("train"):
                tensors = take()
                if step:
                    step(*tensors)
        synchronize(self.device)
        seconds = perf_counter() - start_seconds
        self.laps[step].update(self.stopwatch.lap())
        return self.num_steps * self.recipe.global_batch_size / seconds

    def _our_batches(self, prepare: Callable[[Batch], Tensors]) -> Batches:
        with train_loader(self.source, self.counts, self.workers) as loader:
            for _, take in prefetch_to_device(loader.batches(self.specs), self.device, prepare):
                yield take

    def _torch_batches(self, image_size: int) -> Batches:
        """Yield the batches of torch's DataLoader, with the images, workers and prefetch factor of our loader."""
        loader = DataLoader(
            ReferenceDataset(self.source, image_size),
            batch_sampler=[[sample.index for sample in spec.samples] for spec in self.specs],
            num_workers=self.workers,
            prefetch_factor=PREFETCH_FACTOR,
            pin_memory="pinned_memory" in devices.capabilities(self.device.type),
            multiprocessing_context=worker_context(),
        )
        for batch in loader:
            yield lambda batch=batch: [tensor.to(self.device) for tensor in batch]

    def _our_step(self) -> Callable[..., None]:
        """Return a function that takes a step and updates the moving average, if the recipe has one."""
        step = self.train_step = TrainStep(
            self.recipe, self.num_classes, self.accelerator, compile=self.options.compile
        )
        schedule = StepCounts(self.recipe, 1, 1, 100 * self.recipe.global_batch_size)
        average = MovingAverage(step.plain_copy(), schedule) if self.recipe.ema_decay else None
        numbers = count(1)

        def take_step(images: Tensor, targets: Tensor, *drawn: Tensor) -> None:
            step(images, targets, LR, number := next(numbers), *drawn)
            if average is not None:
                average.update(step.model, number)

        return take_step

    def _reference_step(self, bare: bool) -> Callable[[Tensor, Tensor], None]:
        """Return the tutorial's step (float32, NCHW, loss read at each step), or the shortest step in our precision."""
        layout = torch.channels_last if bare else torch.contiguous_format
        network = getattr(models, self.recipe.model)().to(self.device, memory_format=layout)
        optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=1e-4, fused=bare or None)

        def step(images: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            with self.accelerator.autocast() if bare else contextlib.nullcontext():
                logits = network(images)
            loss = cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            if not bare:
                loss.item()  # makes the host wait for the device

        return step


class ReferenceDataset(Dataset):
    """Images for torch's loader: all of the tutorial's work, image by image; or decoded only, sending nothing back."""

    def __init__(self, source: Source, image_size: int):
        self._source, self._decode_only = source, not image_size
        crop = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
        color = [transforms.RandomRotation(10), transforms.ColorJitter(0.2, 0.2, 0.2, 0.2), transforms.ToTensor()]
        self._transform = transforms.Compose([*crop, *color, transforms.Normalize(imagenet.MEAN, imagenet.STD)])

    def __getitem__(self, index: int) -> tuple[Tensor | int, int]:
        if self._decode_only:
            return decode(self._source.read(index)).ndim, 0
        with Image.open(io.BytesIO(self._source.read(index).tobytes())) as image:
            return self._transform(image.convert("RGB")), int(self._source.labels[index])


def table(result: dict[str, Any]) -> str:
    """Format a result for the terminal."""
    lines = [f"{result['what']}: images/s, median of {result['repetitions']} interleaved repetitions (min to max)"]
    for name in [name for name in result if not name.endswith("_range")]:
        text = f"{result[name]:.3g}" if isinstance(result[name], float) else str(result[name])
        if f"{name}_range" in result:
            text = "{:,.1f} ({:,.1f} to {:,.1f})".format(result[name], *result[f"{name}_range"])
        lines.append(f"  {name.replace('_', ' '):<22}{text}")
    return "\n".join(lines)
