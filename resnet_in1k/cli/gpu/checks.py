"""Checks in this process: what the device computes is what a CPU computes, and the host never waits for it."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.cli.gpu.setting import LeftOutError, Setting, check
from resnet_in1k.data.loader import Batch, prefetch_to_device
from resnet_in1k.evaluate.evaluation import padded, predict_batch
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.device import capabilities, missing_capabilities, reproducible_float32
from resnet_in1k.utils.timing import Stopwatch, synchronize

NUM_BATCHES = 12


def device_is_complete(setting: Setting) -> str:
    """What the device can do; a CPU needs nothing of it."""
    missing = missing_capabilities(setting.device.type)
    check(not missing, "; ".join(missing))
    return "a CPU" if setting.on_cpu else "streams, timing events, pinned memory, fused optimizers"


def augmentation_equals_the_cpus(setting: Setting) -> str:
    """Within one gray level, except where a rounding difference chooses the neighboring pixel of a rotation."""
    augmentation = Augmentation(setting.recipe, num_classes=1000)
    images, labels, draws = setting.images(), setting.labels(), augmentation.draw(step=1)
    reference, _ = augmentation.apply(images, labels, draws)
    ours, _ = augmentation.apply(images.to(setting.device), labels.to(setting.device), draws)
    levels = torch.tensor(imagenet.STD).view(3, 1, 1) * 255
    difference = (ours.cpu() - reference).abs() * levels
    share = (difference > 1).double().mean().item()
    check(share < 1e-3, f"{share:.2%} of the values differ by more than one gray level")
    return f"{1 - share:.4%} of the values within one gray level, {(difference == 0).double().mean():.1%} equal"


def prefetching_keeps_every_byte(setting: Setting) -> str:
    """On the side stream, while the compute stream allocates, frees and is busy."""
    batches = list(_batches(setting, range(NUM_BATCHES)))
    side = 64 if setting.toy else 4096
    square = torch.randn(side, side, device=setting.device)

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        return (batch.images + torch.zeros_like(batch.images),)  # memory of the side stream, used and freed there

    kept = []
    for prefetched in prefetch_to_device(batches, setting.device, prepare):
        (images,) = prefetched.tensors()
        for _ in range(4):
            square = (square @ square).tanh()  # keeps the device behind the host
        kept.append(images.clone())
        del images
        torch.full((setting.images().nbytes,), 255, dtype=torch.uint8, device=setting.device)  # takes what was freed
    equal = [torch.equal(ours.cpu(), batch.images) for ours, batch in zip(kept, batches, strict=True)]
    check(all(equal), f"{equal.count(False)} of {NUM_BATCHES} batches have other bytes")
    return f"{NUM_BATCHES} batches, all bytes"


def stopwatch_measures_the_device(setting: Setting) -> str:
    """Against the host's clock around work that the host waits for."""
    stopwatch = Stopwatch(setting.device)
    square = torch.randn(256 if setting.toy else 4096, device=setting.device).diag()

    def work() -> None:
        for _ in range(20):
            torch.mm(square, square)

    work()
    synchronize(setting.device)
    start_seconds = time.perf_counter()
    with stopwatch.section("train"):
        work()
    launched_seconds = time.perf_counter() - start_seconds
    synchronize(setting.device)
    host_seconds = time.perf_counter() - start_seconds
    measured = stopwatch.lap()["train"]
    check(0.5 < measured / host_seconds < 1.1, f"{measured:.4f} s, by the host's clock {host_seconds:.4f} s")
    milliseconds = [1000 * seconds for seconds in (measured, host_seconds, launched_seconds)]
    return "{:.1f} ms, by the host's clock {:.1f}; Python had launched it after {:.1f}".format(*milliseconds)


def host_never_waits(setting: Setting) -> str:
    """Between two lines of the log: copy, augmentation, training step and guard; and in evaluation."""
    step, augmentation = TrainStep(setting.recipe, 1000, setting.accelerator), Augmentation(setting.recipe, 1000)
    if setting.accelerator.scaler is not None:
        raise LeftOutError("fp16's loss scaler waits for the device by design")
    model = step.plain_copy().eval()
    stopwatch = Stopwatch(setting.device)

    def train(numbers: range) -> None:
        prefetched = prefetch_to_device(_batches(setting, numbers), setting.device, augmentation.prepare)
        for _ in numbers:
            with stopwatch.section("load"):
                batch = next(prefetched)
            with stopwatch.section("train"):
                step(*batch.tensors(), lr=0.01)

    def evaluate(numbers: range) -> None:
        with torch.inference_mode(), reproducible_float32():
            for batch in _batches(setting, numbers):
                on_device = batch.to(setting.device)
                predict_batch(model, normalize(on_device.images), on_device.labels, on_device.indices)

    for work in (train, evaluate):
        work(range(2))  # kernels are chosen and constants made
    with _sync_is_an_error(setting):
        for work in (train, evaluate):
            work(range(2, 5))
    return "3 steps and 3 evaluation batches" + (" (nothing to wait for on a CPU)" if setting.on_cpu else "")


def _batches(setting: Setting, numbers: range) -> Iterator[Batch]:
    """As the loader makes them: in pinned memory, where the device has it."""
    pin = capabilities(setting.device.type).pinned_memory
    for number in numbers:
        tensors = (setting.images(number), setting.labels(), setting.labels())
        yield Batch(*(each.pin_memory() if pin else each for each in tensors), number)


@contextlib.contextmanager
def _sync_is_an_error(setting: Setting) -> Iterator[None]:
    if setting.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def evaluation_does_not_depend_on_the_batch(setting: Setting) -> str:
    """The same images in full batches, and in a padded one beside none of them."""
    model = ResNet(setting.recipe.model).to(setting.device, memory_format=torch.channels_last).eval()
    images, labels = setting.images().to(setting.device), setting.labels().to(setting.device)
    few = len(images) // 4
    with torch.inference_mode(), reproducible_float32():
        whole = predict_batch(model, normalize(images), labels, labels)
        part = predict_batch(model, normalize(padded(images[:few], len(images))), labels[:few], labels[:few])
    different = [name for name in part if not torch.equal(whole[name][:few], part[name])]
    check(not different, f"{', '.join(different)} differ")
    return f"{few} images alone and among {len(images)}: equal to the bit"


def no_weight_changes_after_a_loss_that_is_not_finite(setting: Setting) -> str:
    step = TrainStep(setting.recipe, 1000, setting.accelerator)
    labels = setting.labels().to(setting.device)
    images = normalize(setting.images().to(setting.device))
    step(images, labels, 0.01)
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    losses = [step(images * factor, labels, 0.01).item() for factor in (float("nan"), 1.0)]
    equal = all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    check(equal and all(loss != loss for loss in losses), f"weights changed, losses {losses}")
    return "weights as before it, the host is told by the loss"


CHECKS: dict[str, Callable[[Setting], str]] = {
    "device": device_is_complete,
    "augmentation": augmentation_equals_the_cpus,
    "prefetch": prefetching_keeps_every_byte,
    "stopwatch": stopwatch_measures_the_device,
    "host_sync": host_never_waits,
    "evaluation": evaluation_does_not_depend_on_the_batch,
    "nonfinite_loss": no_weight_changes_after_a_loss_that_is_not_finite,
}
"""In this order; each returns what was seen, or raises CheckFailedError or LeftOutError."""
