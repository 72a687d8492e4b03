"""Evaluate saved weights; write eval.json and, if asked for, a report."""

import os

import torch

from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.options import EvalOptions
from resnet_in1k.data.registry import check_several_classes, open_source
from resnet_in1k.evaluate.class_matching import match_classes
from resnet_in1k.evaluate.evaluation import EvalLoader, Evaluation, evaluate_model
from resnet_in1k.evaluate.metrics import compute_by_metric
from resnet_in1k.evaluate.report import write_report
from resnet_in1k.evaluate.statistics import describe_reproduction
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.model.weights import sha256_of_weights
from resnet_in1k.utils import files
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.device import choose_cpu_threads, choose_workers
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.errors import UserError, translate_errors
from resnet_in1k.utils.format import printable
from resnet_in1k.utils.launch import Launch


def main() -> None:
    evaluate(parse(EvalOptions))


def evaluate(options: EvalOptions) -> Evaluation:
    """Evaluate saved weights; options that are not given are the run's. Raises UserError if it is not possible."""
    with Launch.connect() as launch, translate_errors():
        return _evaluate(options, launch)


def _evaluate(options: EvalOptions, launch: Launch) -> Evaluation:
    weights = resolve_checkpoint(options.ckpt, options.weights)
    data = options.data or weights.data
    if data is None:
        raise UserError(f"{options.ckpt} is not in a run folder that names its data; give --data")
    preprocessing = options.change(weights.preprocessing)
    network = weights.exported or load_model(weights.file, weights.wanted)
    if weights.exported and network.image_size not in (0, preprocessing.image_size):
        raise UserError(f"{weights.file} takes images of {network.image_size} px only; leave out --image-size")
    val_share = options.val_share
    if val_share is None:  # photos/ is the same folder as photos
        val_share = weights.val_share if os.path.realpath(data) == os.path.realpath(weights.data or "") else 0
    source = launch.on_main_process(lambda: open_source(data, options.split, val_share), "listing images")
    check_several_classes(source)
    model, matching = match_classes(network, network.num_outputs, weights.class_names, source, options.ckpt)
    with EvalLoader(source, preprocessing, options.batch_size, choose_workers(options.workers)) as loader:
        accelerator = make_accelerator(launch, "fp32")
        choose_cpu_threads(accelerator.device, options.cpu_threads)
        sizes = f"resized to {preprocessing.resize_size} px, center crop {preprocessing.image_size} px"
        print_line(f"{weights.file}: {network.architecture}, {network.num_outputs} classes")
        lines = [f"{data}/{source.split}: {len(source):,} images, {sizes}", source.note, matching]
        print_line("\n".join(map(printable, filter(None, lines))))
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
    result = evaluation.to_json(sha256_of_weights(weights.file), weights.kind) | computed
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
