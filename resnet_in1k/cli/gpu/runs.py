"""Checks of whole runs: scripts/train.py in processes of their own, as a user starts it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from resnet_in1k.cli.gpu.setting import CheckFailedError, LeftOutError, Setting, check
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.format import first_line

ROOT = Path(__file__).resolve().parents[3]
DEMO_ACCURACY = 0.97
SMALL = ("--recipe", "demo", "--model", "resnet18", "--epochs", "2", "--log-every", "1", "--workers", "2")
"""On digits, with each step logged."""
FEW_STEPS = (*SMALL, "--global-batch-size", "256", "--lr", "0.02")
"""Ten of them."""
SAME_LOSS = 0.02
"""Relative: what losses after a resume may differ by where the device does not add up in a fixed order."""


def _start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, ROOT / "scripts/train.py", "--output-dir", folder, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, **pipes)


def _train(folder: Path, *flags: str) -> RunFolder:
    process = _start(folder, *flags)
    _, errors = process.communicate()
    if process.returncode:
        raise CheckFailedError(first_line(RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else "")))
    return RunFolder(folder)


def _failure(folder: Path, *flags: str) -> str:
    """The last line of a run that must fail."""
    process = _start(folder, *flags)
    _, errors = process.communicate()
    check(process.returncode == 2, f"exit status {process.returncode}")
    return errors.strip().splitlines()[-1]


def _losses(folder: RunFolder) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in folder.records() if record["kind"] == "train"}


def precisions(setting: Setting) -> str:
    """Two epochs each learn something; on a CPU fp16 has no loss scaler, and the other runs are fp32."""
    seen = []
    for precision in ("bf16",) if setting.on_cpu else ("fp32", "bf16", "fp16"):
        losses = _losses(_train(setting.folder / precision, *FEW_STEPS, "--precision", precision))
        first, last = losses[min(losses)], losses[max(losses)]
        check(last < first, f"{precision}: the loss went from {first:.3f} to {last:.3f}")
        seen.append(f"{precision} {first:.2f} → {last:.2f}")
    return "loss: " + ", ".join(seen)


def killed_and_resumed(setting: Setting) -> str:
    """Killed (-9) in the second epoch and resumed, against a run that was left alone."""
    flags = (*FEW_STEPS, "--precision", "fp32", "--checkpoint-every", "2")
    whole = _train(setting.folder / "whole", *flags)
    process = _start(setting.folder / "killed", *flags)
    for line in process.stdout:
        if line.startswith("epoch 2/2  step"):
            process.kill()
            break
    process.communicate()
    resumed = _train(setting.folder / "killed", *flags, "--resume")
    ours, theirs = _losses(resumed), _losses(whole)
    check(ours.keys() == theirs.keys(), f"other steps were logged: {sorted(ours.keys() ^ theirs.keys())}")
    furthest = max(abs(ours[step] / theirs[step] - 1) for step in ours)
    check(furthest < SAME_LOSS, f"losses differ by up to {furthest:.1%}")
    (last, last_of_whole) = (sorted(folder.checkpoints.glob("step_*"))[-1] for folder in (resumed, whole))
    tensors = [load_file(folder / "model.safetensors") for folder in (last, last_of_whole)]
    equal = all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])
    if setting.on_cpu:
        check(equal, "the weights differ")
    return "the same bits" if equal else f"losses within {furthest:.2%}; bits differ, as sums on this device may"


def out_of_memory(setting: Setting) -> str:
    """Named, with what divides the batch."""
    if setting.on_cpu:
        raise LeftOutError("on a CPU the operating system ends the process")
    # About a gigabyte of activations an image in the device's memory, a megabyte in the host's.
    large = ("--model", "resnet152", "--image-size", "512", "--global-batch-size", "512")
    text = _failure(setting.folder / "memory", *SMALL, *large)
    check("out of memory" in text and "--gradient-accumulation-steps" in text, text)
    return text.removeprefix("error: ")


def diverging_run(setting: Setting) -> str:
    """A learning rate that no network survives ends the run with one line and the images of the batch."""
    text = _failure(setting.folder / "diverging", *FEW_STEPS, "--lr", "1e30", "--warmup-epochs", "0")
    check("is nan" in text or "is inf" in text or "not finite" in text, text)
    check((setting.folder / "diverging/nonfinite_batch.txt").exists(), "no list of the batch's images")
    return text.removeprefix("error: ").partition(";")[0]


def demo(setting: Setting) -> str:
    """The demo reaches its accuracy; at toy size one epoch of it runs."""
    start_seconds = time.perf_counter()
    folder = _train(setting.folder / "demo", *(FEW_STEPS if setting.toy else ("--recipe", "demo")))
    accuracy = json.loads(folder.evaluation.read_text(encoding="utf-8"))["top1_accuracy"]
    check(setting.toy or accuracy >= DEMO_ACCURACY, f"top-1 {accuracy:.2%}, below {DEMO_ACCURACY:.0%}")
    return f"top-1 {accuracy:.2%} in {time.perf_counter() - start_seconds:.0f} s" + (", a toy" if setting.toy else "")


RUNS: dict[str, Callable[[Setting], str]] = {
    "precisions": precisions,
    "kill_and_resume": killed_and_resumed,
    "out_of_memory": out_of_memory,
    "divergence": diverging_run,
    "demo": demo,
}
