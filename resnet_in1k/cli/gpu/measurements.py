"""What gpu_check.py measures: the step in its variants beside its limits, augmentation, decoding, whole training."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchvision

from resnet_in1k.cli.benchmark import Bench, BenchmarkOptions, summary
from resnet_in1k.cli.communication import collectives_per_step, costs, ways_of_several
from resnet_in1k.cli.gpu.setting import Setting, check
from resnet_in1k.cli.reference import TutorialStep, bare_step
from resnet_in1k.data.registry import open_source
from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils.device import choose_workers
from resnet_in1k.utils.format import first_line
from resnet_in1k.utils.timing import synchronize

BYTES_PER_IMAGE = 475e6
"""Memory traffic of a training image of ResNet-50 at 224 px in bf16, operation by operation; computed, not measured."""
COMPILE_VARIANTS: dict[str, dict[str, Any]] = {
    "ours, compiled": {},
    "ours, compiled with CUDA graphs": {"mode": "reduce-overhead"},
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: float | None
    """None: not measured, see the note."""
    unit: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _bench(setting: Setting, what: str, **more: Any) -> Bench:
    recipe = setting.recipe
    sizes = {"model": recipe.model, "image_size": recipe.image_size, "batch_size": recipe.global_batch_size}
    quick = {"steps": 1, "repetitions": 1} if setting.toy else {"repetitions": 3}
    return Bench(BenchmarkOptions(what=what, data=setting.data, **sizes, **quick, **more), setting.launch)


def _batch(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, S, S) float32 and (B,) int64 on the device."""
    size = setting.recipe.image_size
    images = torch.randn(setting.recipe.global_batch_size, 3, size, size, device=setting.device)
    return images, setting.labels().to(setting.device)


def memory_bandwidth(setting: Setting) -> list[Row]:
    """Of a copy on the device, which reads and writes each byte."""
    source = torch.empty((1 << 24) if setting.toy else (1 << 31), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        synchronize(setting.device)
        start_seconds = time.perf_counter()
        target.copy_(source)
        synchronize(setting.device)
        times.append(time.perf_counter() - start_seconds)
    return [Row("memory bandwidth of a copy", 2 * source.nbytes / min(times) / 1e9, "GB/s")]


def steps(setting: Setting) -> list[Row]:
    """All variants in turn, in one run; the share of the limit by the bandwidth measured here."""
    bench = _bench(setting, "step")
    images, labels = _batch(setting)
    channels_last = images.to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}

    def add(name: str, step: Callable[..., object], *arguments: object) -> None:
        try:
            step(*arguments)  # compiles, and shows whether it works at all
            ways[name] = lambda: step(*arguments)
        except Exception as error:  # of a compiler: no Triton, no C compiler, an unsupported device
            left_out[name] = first_line(error)

    add("ours", _our_step(setting), channels_last, labels, 0.01)
    for name, how in COMPILE_VARIANTS.items():
        # At toy size only the tracing: the compiler takes a minute.
        add(name, _our_step(setting, {"backend": "eager"} if setting.toy else how), channels_last, labels, 0.01)
    contiguous = _our_step(setting)
    contiguous.model.to(memory_format=torch.contiguous_format)
    add("ours, NCHW", contiguous, images, labels, 0.01)
    add("the tutorial's loop, float32", TutorialStep(bench.recipe, setting.device), images, labels)
    bare = bare_step(bench.recipe, setting.device, setting.accelerator.mixed_precision)
    add("a bare loop", bare, channels_last, labels)
    rates = bench._interleaved({name: lambda way=way: bench._step_rate(way) for name, way in ways.items()})
    medians = summary(rates)
    (bandwidth,) = memory_bandwidth(setting)
    limit = bandwidth.value * 1e9 / BYTES_PER_IMAGE
    rows = []
    for name in ways:
        note = f"{medians[name] / medians['a bare loop']:.2f} of the bare loop"
        if not setting.toy:
            note += f", {medians[name] / limit:.2f} of the limit by memory bandwidth ({limit:,.0f})"
        rows.append(Row(f"step: {name}", medians[name], "images/s", note))
    return rows + [Row(f"step: {name}", None, "images/s", f"left out: {why}") for name, why in left_out.items()]


def _our_step(setting: Setting, compile_how: dict[str, Any] | None = None) -> TrainStep:
    step = TrainStep(setting.recipe, 1000, setting.accelerator)
    if compile_how is not None:
        step.model.compile(**compile_how)
    return step


def augmentation(setting: Setting) -> list[Row]:
    rows = [Row("augmentation, alone", _bench(setting, "input")._augment_rate(), "images/s")]
    if setting.on_cpu:
        return [*rows, Row("augmentation, compiled", None, "images/s", "left out: not compiled on a CPU")]
    return [*rows, Row("augmentation, compiled", _bench(setting, "input", compile=True)._augment_rate(), "images/s")]


def decoding(setting: Setting) -> list[Row]:
    """Loader workers, which also crop, and the GPU's own decoder, which does not."""
    bench, workers = _bench(setting, "input"), choose_workers(None)
    source = open_source(setting.data, "train")
    rate = bench._interleaved({"ours": lambda: bench._rate(bench._our_batches(source, workers), workers)})["ours"]
    rows = [Row(f"files to cropped batches, {workers} loader workers", summary({"r": rate})["r"], "images/s")]
    if setting.device.type != "cuda":
        return [*rows, Row("decoding by nvJPEG", None, "images/s", "left out: it needs a CUDA device")]
    files = [torch.from_numpy(source.read(index).copy()) for index in range(min(len(source), 256))]
    files = [file for file in files if file[:2].tolist() == [0xFF, 0xD8]]  # JPEGs
    try:
        torchvision.io.decode_jpeg(files, device=setting.device)
        synchronize(setting.device)
        start_seconds = time.perf_counter()
        torchvision.io.decode_jpeg(files, device=setting.device)
        synchronize(setting.device)
    except RuntimeError as error:  # a torchvision without nvJPEG
        return [*rows, Row("decoding by nvJPEG", None, "images/s", f"left out: {first_line(error)}")]
    return [*rows, Row("decoding by nvJPEG", len(files) / (time.perf_counter() - start_seconds), "images/s", "no crop")]


def training(setting: Setting) -> list[Row]:
    """From files to updated weights."""
    result = _bench(setting, "train").train()
    note = f"waits for data {result['waiting_share']:.1%} of the time: {result['advice']}"
    return [
        Row(f"train: ours, {result['workers']} workers", result["ours"], "images/s", note),
        Row(f"train: the tutorial's, {result['workers']} workers", result["tutorial"], "images/s"),
    ]


def several_processes(setting: Setting) -> list[Row]:
    """What communication costs; on all processes."""
    launch = setting.launch
    bench, step = _bench(setting, "step"), _our_step(setting)
    images, labels = _batch(setting)
    images = images.to(memory_format=torch.channels_last)
    rates = summary(bench._interleaved(ways_of_several(launch, step, images, labels, bench._step_rate)))
    of_all = costs(rates, launch.world_size)
    counted = ", ".join(f"{number} {name}" for name, number in collectives_per_step(step, images, labels).items())
    return [
        Row(f"step: {launch.world_size} processes", rates["ours"], "images/s", f"a step's collectives: {counted}"),
        Row("step: one process alone", rates["one_process"], "images/s"),
        Row("scaling efficiency", of_all["scaling_efficiency"], ""),
        Row("share of the step that communicates", of_all["communication_share"], ""),
        _all_reduce(setting),
    ]


def _all_reduce(setting: Setting) -> Row:
    """Of 100 MB, as the gradients of a ResNet-50: exact, and how fast."""
    num_processes = setting.launch.world_size
    size = (250_000 if setting.toy else 25_000_000,)
    values = torch.full(size, float(setting.launch.rank + 1), device=setting.device)
    torch.distributed.all_reduce(values)
    exact = num_processes * (num_processes + 1) / 2
    check(bool((values == exact).all()), "an all-reduce gave another sum")
    synchronize(setting.device)
    start_seconds = time.perf_counter()
    torch.distributed.all_reduce(values)
    synchronize(setting.device)
    moved = 2 * (num_processes - 1) / num_processes * values.nbytes
    return Row("all-reduce, each process's traffic", moved / (time.perf_counter() - start_seconds) / 1e9, "GB/s")


MEASUREMENTS: dict[str, Callable[[Setting], list[Row]]] = {
    "bandwidth": memory_bandwidth,
    "step": steps,
    "augment": augmentation,
    "decode": decoding,
    "train": training,
    "processes": several_processes,
}
