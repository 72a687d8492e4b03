"""scripts/evaluate.py: saved weights and data to eval.json and, if asked for, a report."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from resnet_in1k.cli.preprocessing import PreprocessingOptions
from resnet_in1k.data.dataset import Source, Split
from resnet_in1k.data.registry import open_source
from resnet_in1k.evaluate.class_matching import match_classes
from resnet_in1k.evaluate.evaluation import EVAL_BATCH_SIZE, Evaluation, eval_loader, evaluate_model
from resnet_in1k.evaluate.report import write_report
from resnet_in1k.evaluate.reproduction import describe_reproduction
from resnet_in1k.model.exported import ExportedNetwork, is_exported, load_exported
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.utils import files
from resnet_in1k.utils.console import Console
from resnet_in1k.utils.device import choose_cpu_threads, choose_workers
from resnet_in1k.utils.distributed import make_accelerator, translate_process_errors
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.pool import translate_worker_errors
from resnet_in1k.utils.validation import at_least, at_least_and_below, check_options


@dataclass(frozen=True, kw_only=True)
class EvalOptions(PreprocessingOptions):
    """What to evaluate, on what."""

    ckpt: str
    """A run folder, a checkpoint folder, a .safetensors file, an old .pth state dict, an exported .onnx or .pt2,
    torchvision/MODEL.WEIGHTS, or USER/NAME on the Hub."""
    data: str | None = None
    """As for training; by default what the run was trained on."""
    split: Split = "val"
    """Which split of the data."""
    val_share: float | None = field(default=None, metadata=at_least_and_below(0, 1))
    """Of data without a val split: the share that is one; by default as the run divided them."""
    output: Path | None = None
    """Write the result to this file, as eval.json in a run folder."""
    report: Path | None = None
    """Write to this folder: accuracy by class, confused pairs, calibration, figures of the worst mistakes."""
    batch_size: int = field(default=EVAL_BATCH_SIZE, metadata=at_least(1))
    """Images per process and forward pass; only images whose classes are within float32's rounding depend on it."""
    workers: int | None = field(default=None, metadata=at_least(0))
    """Loader workers per process; by default from the number of CPU cores."""
    cpu_threads: int | None = field(default=None, metadata=at_least(1))
    """Threads for computing on the CPU, per process; by default all physical cores, shared among the processes."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise UserError(f"--output {self.output}: no folder {self.output.parent}")
        if self.report is not None and self.report.exists() and not self.report.is_dir():
            raise UserError(f"--report {self.report} is a file, not a folder")


def evaluate(options: EvalOptions) -> Evaluation:
    """Evaluate saved weights; what the options leave open is as the run recorded it.

    Raises:
        UserError: if there are no weights or no data, if the classes of the two differ, or for weights outside a run
            folder if `data` is not given.
    """
    with translate_worker_errors(), translate_process_errors(), Launch.connect() as launch:
        return _evaluate(options, launch)


def _evaluate(options: EvalOptions, launch: Launch) -> Evaluation:
    weights = resolve_checkpoint(options.ckpt)
    data = options.data or weights.data
    if data is None:
        raise UserError(f"{options.ckpt} is not in a run folder, so nothing says what to evaluate it on; give --data")
    network, description, num_outputs = _load_network(weights.file)
    val_share = options.val_share if options.val_share is not None else weights.val_share if data == weights.data else 0
    source = launch.broadcast_from_main(lambda: open_source(data, options.split, val_share), "lists the images")
    classes = match_classes(weights.class_names, num_outputs, source.class_names, source.name, options.ckpt)
    preprocessing = options.for_weights(weights)
    if isinstance(network, ExportedNetwork):
        network.check_image_size(preprocessing.image_size, weights.file)
    loader = eval_loader(source, preprocessing, options.batch_size, choose_workers(options.workers))
    with loader:
        accelerator = make_accelerator(launch, "fp32")
        choose_cpu_threads(accelerator.device, options.cpu_threads)
        console = Console(accelerator.is_main_process)
        if weights.note:
            console.print(weights.note)
        console.print(
            f"{weights.file}: {description}, {num_outputs} classes\n"
            f"{data}/{options.split}: {len(source):,} images, resized to {preprocessing.resize_size} px, center "
            f"{preprocessing.image_size} px cropped"
        )
        if explanation := classes.describe():
            console.print(explanation)
        model = classes.apply(network).to(accelerator.device, memory_format=torch.channels_last)
        evaluation = evaluate_model(model, source, loader, accelerator, preprocessing)
    evaluation = replace(evaluation, weights=weights.kind)
    console.print(evaluation.summary())
    for name, reason in evaluation.bad_images.items():
        console.print(f"counted as wrong: {name} ({reason})")
    if len(source.class_names) < 5:
        console.print(f"fewer than five classes: top-{evaluation.top_k} in place of top-5")
    if accelerator.is_main_process:
        write_results(evaluation, weights, source, options, console)
    accelerator.end_training()
    return evaluation


def _load_network(file: Path) -> tuple[torch.nn.Module, str, int]:
    """With what it is, in words, and the number of its outputs."""
    if is_exported(file):
        network = load_exported(file)
        return network, "an exported network, computed on the CPU", network.num_outputs
    model = load_model(file)
    return model, model.architecture, model.fc.out_features


def write_results(
    evaluation: Evaluation, weights: Weights, source: Source, options: EvalOptions, console: Console
) -> None:
    """Raises UserError if --output or --report cannot be written."""
    result = evaluation.to_json(files.sha256_of(weights.file))
    if weights.exported_from:
        result |= {"file": weights.file.name, "exported_from": weights.exported_from}
    output = options.output
    if output is not None:
        if problem := files.failure_of(lambda: files.write_json(output, result)):
            raise UserError(f"--output: {problem}")
        console.print(f"written to {output}")
    if weights.recorded_evaluation is not None:
        console.print(describe_reproduction(result, weights.recorded_evaluation))
    if options.report is not None:
        summary = write_report(evaluation, source, options.report)
        console.print(
            f"balanced accuracy {summary['balanced_accuracy']:.2%}   macro F1 {summary['macro_f1']:.4f}   "
            f"report written to {options.report}"
        )
