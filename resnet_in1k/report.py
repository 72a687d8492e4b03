"""An evaluation for people: which classes are hard, what is taken for what, how sure, and the worst mistakes."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnet_in1k import files
from resnet_in1k.errors import UserError
from resnet_in1k.evaluation import NO_CLASS, Evaluation, Verdicts
from resnet_in1k.images import EvalTransform, decode
from resnet_in1k.names import human_names
from resnet_in1k.plots import picture_grid, save_figure
from resnet_in1k.sources import Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CONFUSED_PAIRS = 20
NUM_WORST_MISTAKES = 20
NUM_CALIBRATION_BINS = 15
MOST_CLASSES_IN_A_PICTURE = 100


def write_report(evaluation: Evaluation, source: Source, folder: Path) -> None:
    """Write per_class.csv, confused_pairs.csv, report.json and pictures to `folder`, which is made if need be.

    Raises:
        UserError: if the folder cannot be written to.
    """
    verdicts = evaluation.verdicts
    assert verdicts is not None, "on the main process"
    names = human_names(evaluation.class_names)
    confusion = confusion_matrix(verdicts, len(names))

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "per_class.csv", PER_CLASS_COLUMNS, per_class_rows(evaluation))
        _write_csv(folder / "confused_pairs.csv", ("true", "predicted", "num_images"), confused_pairs(confusion, names))
        files.write_json(
            folder / "report.json",
            {
                "top1_accuracy": evaluation.top1_accuracy,
                "top5_accuracy": evaluation.top5_accuracy,
                "num_images": evaluation.num_images,
                "num_bad_images": len(evaluation.bad_images),
                "expected_calibration_error": calibration_error(verdicts),
                "mean_confidence": float(verdicts.confidences.mean()),
            },
        )
        for stale in ("worst_mistakes.png", "confusion_matrix.png"):
            (folder / stale).unlink(missing_ok=True)
        if mistakes := worst_mistakes(verdicts):
            save_figure(_draw_mistakes(mistakes, verdicts, evaluation, source, names), folder / "worst_mistakes.png")
        if len(names) <= MOST_CLASSES_IN_A_PICTURE:
            save_figure(_draw_confusion(confusion, names), folder / "confusion_matrix.png")

    if problem := files.why_not(write):
        raise UserError(f"--report {folder}: {problem}")


PER_CLASS_COLUMNS = (
    "class", "name", "num_images", "top1_correct", "top5_correct", "top1_accuracy", "top5_accuracy",
)  # fmt: skip


def per_class_rows(evaluation: Evaluation) -> list[tuple[object, ...]]:
    """In the order of the classes; a class without images has no accuracy."""
    return [
        (name, human, count, top1, top5, top1 / count if count else "", top5 / count if count else "")
        for name, human, count, top1, top5 in zip(
            evaluation.class_names,
            human_names(evaluation.class_names),
            evaluation.class_num_images,
            evaluation.class_top1_correct,
            evaluation.class_topk_correct,
            strict=True,
        )
    ]


def confusion_matrix(verdicts: Verdicts, num_classes: int) -> np.ndarray:
    """(C, C) int64: of the images of class i, how many were taken for class j; unreadable ones are in no column."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    first = verdicts.top_ids[:, 0]
    said = first != NO_CLASS
    np.add.at(matrix, (verdicts.labels[said], first[said]), 1)
    return matrix


def confused_pairs(confusion: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """(true, predicted, number of images) of the most frequent mistakes, most frequent first."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:NUM_CONFUSED_PAIRS]
    pairs = (np.unravel_index(place, mistakes.shape) for place in order)
    return [(names[true], names[said], int(mistakes[true, said])) for true, said in pairs if mistakes[true, said]]


def calibration_error(verdicts: Verdicts) -> float:
    """Expected calibration error over 15 bins of equal width (https://arxiv.org/abs/1706.04599), a fraction.

    How far, in the mean over images, the accuracy in a bin of confidences is from the mean confidence in it.
    """
    right = verdicts.top_ids[:, 0] == verdicts.labels
    bins = np.clip(np.ceil(verdicts.confidences * NUM_CALIBRATION_BINS) - 1, 0, NUM_CALIBRATION_BINS - 1).astype(int)
    confidence = np.bincount(bins, weights=verdicts.confidences, minlength=NUM_CALIBRATION_BINS)
    accuracy = np.bincount(bins, weights=right, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(confidence - accuracy).sum() / len(right))


def worst_mistakes(verdicts: Verdicts) -> list[int]:
    """Places of the images that were wrong with the greatest confidence, worst first."""
    first = verdicts.top_ids[:, 0]
    wrong = np.flatnonzero((first != verdicts.labels) & (first != NO_CLASS))
    return wrong[np.argsort(-verdicts.confidences[wrong], kind="stable")][:NUM_WORST_MISTAKES].tolist()


def _draw_mistakes(
    places: list[int], verdicts: Verdicts, evaluation: Evaluation, source: Source, names: Sequence[str]
) -> "Figure":
    transform = EvalTransform(image_size=evaluation.image_size, resize_size=evaluation.resize_size)
    images = [transform(decode(source.read(place)), 0, place).permute(1, 2, 0).numpy() for place in places]
    captions = [
        f"{names[verdicts.top_ids[place, 0]]} {verdicts.confidences[place]:.0%}\nis {names[verdicts.labels[place]]}"
        for place in places
    ]
    return picture_grid(images, captions, f"The {len(places)} most confident mistakes: what was said, and what it is")


def _draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    side = max(5.0, 0.22 * len(names) + 2)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        title="True classes (rows) and what they were taken for", xlabel="predicted", ylabel="true"
    )
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(picture, label="share of the true class's images", shrink=0.8)
    return figure


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    files.write_text(path, text.getvalue())
