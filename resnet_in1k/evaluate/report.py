"""An evaluation as tables and figures: accuracy by class, confused pairs, calibration, confident mistakes."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from resnet_in1k.data.dataset import Source
from resnet_in1k.evaluate.evaluation import NO_CLASS, Evaluation, Predictions
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import human_names
from resnet_in1k.utils.plots import image_grid, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CONFUSED_PAIRS = 20
NUM_WORST_MISTAKES = 20
NUM_CALIBRATION_BINS = 15
MAX_CLASSES_IN_FIGURE = 100


def write_report(evaluation: Evaluation, source: Source, folder: Path) -> dict[str, float]:
    """Write per_class.csv, confused_pairs.csv, report.json and pictures to `folder`, made if it is not there.

    Returns:
        What is in report.json.

    Raises:
        UserError: if the folder cannot be written to.
    """
    predictions = evaluation.predictions
    assert predictions is not None, "on the main process"
    names = human_names(evaluation.class_names)
    confusion = confusion_matrix(predictions, len(names))
    by_class = class_scores(predictions, len(names))
    balanced_accuracy, macro_f1 = balanced_scores(by_class)
    summary = {
        "top1_accuracy": evaluation.top1_accuracy,
        "top5_accuracy": evaluation.top5_accuracy,
        "num_images": evaluation.num_images,
        "num_bad_images": len(evaluation.bad_images),
        "balanced_accuracy": balanced_accuracy,
        "macro_f1": macro_f1,
        "expected_calibration_error": calibration_error(predictions),
        "mean_confidence": float(predictions.confidences.mean()),
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "per_class.csv", PER_CLASS_COLUMNS, per_class_rows(evaluation, by_class))
        _write_csv(folder / "confused_pairs.csv", ("true", "predicted", "num_images"), confused_pairs(confusion, names))
        files.write_json(folder / "report.json", summary)
        for stale in ("worst_mistakes.png", "confusion_matrix.png"):
            (folder / stale).unlink(missing_ok=True)
        if mistakes := worst_mistakes(predictions):
            save_figure(_draw_mistakes(mistakes, predictions, evaluation, source, names), folder / "worst_mistakes.png")
        if len(names) <= MAX_CLASSES_IN_FIGURE:
            save_figure(_draw_confusion(confusion, names), folder / "confusion_matrix.png")

    if problem := files.failure_of(write):
        raise UserError(f"--report {folder}: {problem}")
    return summary


class ClassScores(NamedTuple):
    """Of each class, (C,); as scikit-learn computes them, 0 where nothing is divided by nothing."""

    precision: np.ndarray
    """Of the images predicted as it, the share that is of it."""
    recall: np.ndarray
    """Of its images, the share predicted as it: its top-1 accuracy."""
    f1: np.ndarray
    """The harmonic mean of the two."""
    num_images: np.ndarray


def class_scores(predictions: Predictions, num_classes: int) -> ClassScores:
    """An image that cannot be read is one of its class that was predicted as none."""
    from sklearn.metrics import precision_recall_fscore_support  # a second to import

    classes = np.arange(num_classes)
    first = predictions.top_ids[:, 0]
    return ClassScores(*precision_recall_fscore_support(predictions.labels, first, labels=classes, zero_division=0.0))


def balanced_scores(scores: ClassScores) -> tuple[float, float]:
    """Balanced accuracy and macro F1: the means of recall and F1 over the classes that have images, which count the
    same however many they have."""
    has_images = scores.num_images > 0
    return float(scores.recall[has_images].mean()), float(scores.f1[has_images].mean())


PER_CLASS_COLUMNS = (
    "class", "name", "num_images", "top1_correct", "top5_correct", "top1_accuracy", "top5_accuracy", "precision",
    "recall", "f1",
)  # fmt: skip


def per_class_rows(evaluation: Evaluation, scores: ClassScores) -> list[tuple[object, ...]]:
    """In the order of the classes; a class without images has no accuracy and no scores."""
    rows = zip(scores.precision.tolist(), scores.recall.tolist(), scores.f1.tolist(), strict=True)
    return [
        (name, human, count, top1, top5, *((top1 / count, top5 / count, *row) if count else ("",) * 5))
        for row, name, human, count, top1, top5 in zip(
            rows,
            evaluation.class_names,
            human_names(evaluation.class_names),
            evaluation.class_num_images,
            evaluation.class_top1_correct,
            evaluation.class_topk_correct,
            strict=True,
        )
    ]


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """(C, C) int64: of the images of class i, how many were predicted as class j; unreadable ones are in no column."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    first = predictions.top_ids[:, 0]
    readable = first != NO_CLASS
    np.add.at(matrix, (predictions.labels[readable], first[readable]), 1)
    return matrix


def confused_pairs(confusion: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """(true, predicted, number of images) of the most frequent mistakes, in that order."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:NUM_CONFUSED_PAIRS]
    pairs = (np.unravel_index(place, mistakes.shape) for place in order)
    return [
        (names[true], names[predicted], int(mistakes[true, predicted]))
        for true, predicted in pairs
        if mistakes[true, predicted]
    ]


def calibration_error(predictions: Predictions) -> float:
    """Expected calibration error over 15 bins of equal width (https://arxiv.org/abs/1706.04599), a fraction.

    The mean over images of the difference between a bin's accuracy and its mean confidence.
    """
    right = predictions.top_ids[:, 0] == predictions.labels
    bins = np.clip(np.ceil(predictions.confidences * NUM_CALIBRATION_BINS) - 1, 0, NUM_CALIBRATION_BINS - 1).astype(int)
    confidence = np.bincount(bins, weights=predictions.confidences, minlength=NUM_CALIBRATION_BINS)
    accuracy = np.bincount(bins, weights=right, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(confidence - accuracy).sum() / len(right))


def worst_mistakes(predictions: Predictions) -> list[int]:
    """Indices of the images that were wrong with the highest confidence, in that order."""
    first = predictions.top_ids[:, 0]
    wrong = np.flatnonzero((first != predictions.labels) & (first != NO_CLASS))
    return wrong[np.argsort(-predictions.confidences[wrong], kind="stable")][:NUM_WORST_MISTAKES].tolist()


def _draw_mistakes(
    places: list[int], predictions: Predictions, evaluation: Evaluation, source: Source, names: Sequence[str]
) -> "Figure":
    images = [evaluation.preprocessing.square(source.read(place)) for place in places]
    captions = [
        f"{names[first]} {confidence:.0%}\ntrue: {names[label]}"
        for first, confidence, label in zip(
            predictions.top_ids[places, 0],
            predictions.confidences[places],
            predictions.labels[places],
            strict=True,
        )
    ]
    return image_grid(images, captions, f"The {len(places)} most confident mistakes: predicted and true class")


def _draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    side = max(5.0, 0.22 * len(names) + 2)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        title="True classes (rows) and predicted classes (columns)", xlabel="predicted", ylabel="true"
    )
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(picture, label="share of the true class's images", shrink=0.8)
    return figure


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    files.write_text(path, text.getvalue())
