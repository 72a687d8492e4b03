"""What scripts/evaluate.py does: saved weights and data to eval.json and, if asked, a report for people."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_in1k import files
from resnet_in1k.console import Console
from resnet_in1k.devices import choose_cpu_threads, choose_workers, make_accelerator
from resnet_in1k.errors import UserError
from resnet_in1k.evaluation import EVAL_BATCH_SIZE, Evaluation, evaluate_model
from resnet_in1k.model import load_model
from resnet_in1k.names import human_names
from resnet_in1k.pipeline import worker_deaths_explained
from resnet_in1k.recipes import resize_size_for
from resnet_in1k.report import write_report
from resnet_in1k.sources import Split, check_same_classes, open_source
from resnet_in1k.weights import find_weights


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, on what."""

    ckpt: str
    """A run folder, a checkpoint folder, a .safetensors file, an old .pth state dict, or USER/NAME on the Hub."""
    data: str | None = None
    """As for training; by default what the run was trained on."""
    split: Split = "val"
    """Which split of the data."""
    image_size: int | None = None
    """Side of the centre crop, in pixels; by default the run's."""
    eval_crop_ratio: float | None = None
    """The short side is resized to image_size / this before the crop; by default the run's."""
    output: Path | None = None
    """Write the result to this file, as eval.json in a run folder."""
    report: Path | None = None
    """Write to this folder: accuracy by class, confused pairs, calibration, pictures of the worst mistakes."""
    batch_size: int = EVAL_BATCH_SIZE
    """Images per process and forward; the counts do not depend on it."""
    workers: int | None = None
    """Loader workers per process; by default from the number of CPU cores."""
    cpu_threads: int | None = None
    """Threads for computing on the CPU, per process; by default all physical cores, shared among the processes."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: at least 1")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size}: at least 1")
        if self.eval_crop_ratio is not None and not 0 < self.eval_crop_ratio <= 1:
            raise UserError(f"--eval-crop-ratio {self.eval_crop_ratio}: above 0, at most 1")


CONDITIONS = ("split", "num_images", "num_classes", "image_size", "resize_size")


def compared(result: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Whether numbers published or kept beside the weights were reproduced, in words."""
    known = {name: recorded.get(name) for name in CONDITIONS} | {"data": Path(str(recorded.get("data"))).name}
    now = {name: result[name] for name in CONDITIONS} | {"data": Path(result["data"]).name}
    if apart := [f"{name} {known[name]} there, {now[name]} here" for name in known if known[name] != now[name]]:
        return f"not comparable to the recorded eval.json: {'; '.join(apart)}"
    counts = [(name, recorded.get(name), result[name]) for name in ("top1_correct", "top5_correct")]
    if apart := [f"{name} {there} there, {here} here" for name, there, here in counts if there != here]:
        return f"not reproduced: {'; '.join(apart)}, by the recorded eval.json; other hardware may round otherwise"
    return "reproduced: the recorded eval.json has the same counts"


def evaluate_checkpoint(options: EvalOptions) -> Evaluation:
    """Evaluate saved weights; what the options leave open is as the run recorded it.

    Raises:
        UserError: if there are no weights or no data, if the classes of the two differ, or for weights outside a run
            folder if `data` is not given.
    """
    weights = find_weights(options.ckpt)
    file, data = weights.file, options.data or weights.data
    image_size = options.image_size or weights.image_size
    crop_ratio = options.eval_crop_ratio or weights.eval_crop_ratio
    if data is None:
        raise UserError(
            f"{options.ckpt} does not lie in a run folder, so nothing says what to evaluate it on; give --data"
        )
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: no folder {options.output.parent}")
    if options.report is not None and (options.report.exists() and not options.report.is_dir()):
        raise UserError(f"--report {options.report} is a file, not a folder")

    model = load_model(file)
    source = open_source(data, options.split)
    if weights.class_names not in (None, list(source.class_names), human_names(source.class_names)):
        check_same_classes(weights.class_names, "the run", source.class_names, data, where=options.ckpt)
    if len(source.class_names) != model.fc.out_features:
        raise UserError(
            f"{file} knows {model.fc.out_features} classes, but {data} has {len(source.class_names)}: "
            "these are not the data it was trained for"
        )

    accelerator = make_accelerator("fp32")
    choose_cpu_threads(accelerator.device, options.cpu_threads)
    console = Console(accelerator.is_main_process)
    resize_size = resize_size_for(image_size, crop_ratio)
    if weights.note:
        console.say(weights.note)
    console.say(
        f"{file}: {model.architecture}, {model.fc.out_features} classes\n"
        f"{data}/{options.split}: {len(source):,} images, resized to {resize_size} px, centre {image_size} px cropped"
    )
    with worker_deaths_explained():
        evaluation = evaluate_model(
            model.to(accelerator.device, memory_format=torch.channels_last),
            source,
            accelerator,
            image_size=image_size,
            resize_size=resize_size,
            num_workers=choose_workers(accelerator.device, options.workers),
            batch_size=options.batch_size,
        )
    assert isinstance(evaluation, Evaluation), "nobody asked it to stop"
    console.say(evaluation.summary())
    for name, reason in evaluation.bad_images.items():
        console.say(f"counted as wrong: {name} ({reason})")
    if len(source.class_names) < 5:
        console.say(f"fewer than five classes: top-{evaluation.top_k} stands in for top-5")
    if accelerator.is_main_process:
        result = evaluation.to_json(files.sha256_of(file))
        output = options.output
        if output is not None:
            if problem := files.why_not(lambda: files.write_json(output, result)):
                raise UserError(f"--output: {problem}")
            console.say(f"written to {output}")
        if weights.recorded_evaluation is not None:
            console.say(compared(result, weights.recorded_evaluation))
        if options.report is not None:
            write_report(evaluation, source, options.report)
            console.say(f"report written to {options.report}")
    accelerator.end_training()
    return evaluation
