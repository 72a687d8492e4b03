"""Evaluate saved weights; write eval.json and, if asked for, a report."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from resnet_in1k.augment.normalize import RGB
from resnet_in1k.cli.arguments import parse
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.dataset import Split
from resnet_in1k.data.registry import open_source
from resnet_in1k.evaluate.class_matching import match_classes
from resnet_in1k.evaluate.evaluation import EVAL_BATCH_SIZE, EvalLoader, Evaluation, evaluate_model
from resnet_in1k.evaluate.metrics import compute_by_metric
from resnet_in1k.evaluate.report import write_report
from resnet_in1k.evaluate.statistics import describe_reproduction
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.recipes.recipe import Interpolation, resize_size_for
from resnet_in1k.utils import files
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.device import choose_cpu_threads, choose_workers
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.errors import UserError, translate_errors
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.validation import check_options, within


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Common to evaluate.py and predict.py: the weights, the machine, and preprocessing, which is by default that of
    the weights' own evaluation or config.json."""

    GROUPS: ClassVar = {"ckpt": "Weights", "batch_size": "Hardware", "image_size": "Preprocessing"}
    BASIC: ClassVar = ("ckpt", "image_size", "data", "split", "output", "report", "images", "top_k", "json", "picture")

    ckpt: str
    """A run folder, a checkpoint folder, a .safetensors file, an old .pth state dict, torchvision/MODEL.WEIGHTS,
    USER/NAME on the Hub; for evaluation also an exported .onnx or .pt2."""
    batch_size: int = field(default=EVAL_BATCH_SIZE, metadata=within(at_least=1))
    """Images per process and forward pass; changes results by float32 rounding only."""
    workers: int | None = field(default=None, metadata=within(at_least=0))
    """Loader workers per process; by default from the number of CPU cores."""
    cpu_threads: int | None = field(default=None, metadata=within(at_least=1))
    """Threads for computing on the CPU, per process; by default all physical cores, shared among the processes."""
    image_size: int | None = field(default=None, metadata=within(at_least=1))
    """Side of the center crop, in pixels; by default as the weights were evaluated."""
    eval_crop_ratio: float | None = field(default=None, metadata=within(above=0, at_most=1))
    """The short side is resized to image_size / this before the crop; by default as the weights were evaluated."""
    eval_interpolation: Interpolation | None = None
    """Interpolation of resizing; by default as the weights were evaluated."""
    mean: RGB | None = None
    """Mean of the RGB values from 0 to 1, subtracted by normalization; by default as the weights were evaluated."""
    std: RGB | None = None
    """Standard deviation that normalization divides by; by default as the weights were evaluated."""

    def __post_init__(self) -> None:
        check_options(self)

    def change(self, recorded: EvalPreprocessing) -> EvalPreprocessing:
        changes = {"interpolation": self.eval_interpolation, "mean": self.mean, "std": self.std}
        found = recorded.at(self.image_size or recorded.image_size)
        if self.eval_crop_ratio:
            changes["resize_size"] = resize_size_for(found.image_size, self.eval_crop_ratio)
        return replace(found, **{name: value for name, value in changes.items() if value})


@dataclass(frozen=True, kw_only=True)
class EvalOptions(InferenceOptions):
    """Evaluate saved weights; every image counts once.

    Examples:
        {prog} --ckpt runs/tutorial
        {prog} --ckpt USER/NAME --data data/imagenet --output eval.json
        {prog} --ckpt torchvision/resnet50.IMAGENET1K_V2 --data data/imagenet --report report
    """

    GROUPS: ClassVar = {**InferenceOptions.GROUPS, "data": "Data", "output": "Results"}

    data: str | None = None
    """Data, named as for training; by default the data of the run."""
    split: Split = "val"
    """Split to evaluate on."""
    val_share: float | None = field(default=None, metadata=within(at_least=0, below=1))
    """Fraction of the images to hold out where the data has no val split; by default the run's."""
    output: Path | None = None
    """Write the result to this file, in the format of a run folder's eval.json."""
    report: Path | None = None
    """Write accuracy by class, confused pairs, calibration and figures of the worst mistakes to this folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise UserError(f"--output {self.output}: no folder {self.output.parent}")
        if self.report is not None and self.report.exists() and not self.report.is_dir():
            raise UserError(f"--report {self.report} is a file, not a folder")


def main() -> None:
    evaluate(parse(EvalOptions))


def evaluate(options: EvalOptions) -> Evaluation:
    """Evaluate saved weights; options that are not given are the run's. Raises UserError if it is not possible."""
    with Launch.connect() as launch, translate_errors():
        return _evaluate(options, launch)


def _evaluate(options: EvalOptions, launch: Launch) -> Evaluation:
    weights = resolve_checkpoint(options.ckpt)
    data = options.data or weights.data
    if data is None:
        raise UserError(f"{options.ckpt} is not in a run folder that names its data; give --data")
    preprocessing = options.change(weights.preprocessing)
    network = weights.exported or load_model(weights.file)
    if weights.exported and network.image_size not in (0, preprocessing.image_size):
        raise UserError(f"{weights.file} takes images of {network.image_size} px only; leave out --image-size")
    val_share = options.val_share if options.val_share is not None else weights.val_share if data == weights.data else 0
    source = launch.on_main_process(lambda: open_source(data, options.split, val_share), "listing images")
    model, matching = match_classes(network, network.num_outputs, weights.class_names, source, options.ckpt)
    with EvalLoader(source, preprocessing, options.batch_size, choose_workers(options.workers)) as loader:
        accelerator = make_accelerator(launch, "fp32")
        choose_cpu_threads(accelerator.device, options.cpu_threads)
        sizes = f"resized to {preprocessing.resize_size} px, center crop {preprocessing.image_size} px"
        print_line(f"{weights.file}: {network.architecture}, {network.num_outputs} classes")
        print_line("\n".join(filter(None, [f"{data}/{options.split}: {len(source):,} images, {sizes}", matching])))
        model = model.to(accelerator.device, memory_format=torch.channels_last)
        evaluation = evaluate_model(model, loader, accelerator)
    print_line(evaluation.summary())
    for name, reason in evaluation.bad_images.items():
        print_line(f"counted as wrong: {name} ({reason})")
    if accelerator.is_main_process:
        _write_results(evaluation, weights, options)
    accelerator.end_training()
    return evaluation


def _write_results(evaluation: Evaluation, weights: Weights, options: EvalOptions) -> None:
    """Compute the published accuracy by `evaluate`'s metric; write --output and --report."""
    source = evaluation.source
    computed = compute_by_metric(evaluation.top_ids, source.labels, len(source.class_names))
    assert computed == evaluation.counts
    result = evaluation.to_json(files.sha256_of(weights.file), weights.kind) | computed
    if weights.exported and "exported_from" in weights.exported.facts:
        result |= {"file": weights.file.name, "exported_from": weights.exported.facts["exported_from"]}
    if options.output is not None:
        with files.user_errors("--output: "):
            files.write_json(options.output, result)
        print(f"written to {options.output}")
    if weights.recorded_evaluation is not None:
        print(describe_reproduction(result, weights.recorded_evaluation))
    if options.report is not None:
        summary = write_report(evaluation, options.report)
        scores = f"balanced accuracy {summary['balanced_accuracy']:.2%}   macro F1 {summary['macro_f1']:.4f}"
        print(f"{scores}   report written to {options.report}")
