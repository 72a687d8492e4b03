"""The report of an evaluation: accuracy by class, confused pairs, calibration, and the most confident mistakes."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnet_in1k.data.dataset import Source
from resnet_in1k.evaluate.evaluation import NO_CLASS, Evaluation, Predictions
from resnet_in1k.utils import files
from resnet_in1k.utils.imagenet import human_names
from resnet_in1k.utils.plots import image_grid, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CONFUSED_PAIRS = 20
NUM_WORST_MISTAKES = 20
NUM_CALIBRATION_BINS = 15
MAX_CLASSES_IN_FIGURE = 100
PER_CLASS_COLUMNS = (
    "class", "name", "num_images", "top1_correct", "top5_correct", "top1_accuracy", "top5_accuracy", "precision",
    "recall", "f1",
)  # fmt: skip


def write_report(evaluation: Evaluation, source: Source, folder: Path) -> dict[str, float]:
    """Write per_class.csv, confused_pairs.csv, report.json and figures to `folder`; return what report.json holds.

    Raises:
        UserError: if the folder cannot be written to.
    """
    predictions = evaluation.predictions
    assert predictions is not None
    names = human_names(evaluation.class_names)
    confusion = confusion_matrix(predictions, len(names))
    scores = class_scores(predictions, len(names))
    _, recall, f1, num_images = scores
    present = num_images > 0
    summary = {
        "top1_accuracy": evaluation.top1_accuracy,
        "top5_accuracy": evaluation.top5_accuracy,
        "num_images": evaluation.num_images,
        "num_bad_images": len(evaluation.bad_images),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "expected_calibration_error": calibration_error(predictions),
        "mean_confidence": float(predictions.confidences.mean()),
    }
    with files.user_errors(f"--report {folder}: "):
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "per_class.csv", PER_CLASS_COLUMNS, per_class_rows(evaluation, scores))
        _write_csv(folder / "confused_pairs.csv", ("true", "predicted", "num_images"), confused_pairs(confusion, names))
        files.write_json(folder / "report.json", summary)
        for stale in ("worst_mistakes.png", "confusion_matrix.png"):
            (folder / stale).unlink(missing_ok=True)
        if mistakes := worst_mistakes(predictions):
            save_figure(_draw_mistakes(mistakes, evaluation, source, names), folder / "worst_mistakes.png")
        if len(names) <= MAX_CLASSES_IN_FIGURE:
            save_figure(_draw_confusion(confusion, names), folder / "confusion_matrix.png")
    return summary


Scores = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Precision, recall, F1 and number of images per class, (C,) each; scores are 0 where scikit-learn divides 0 by 0."""


def class_scores(predictions: Predictions, num_classes: int) -> Scores:
    """Score each class; an unreadable image is a false negative of its class and no class's false positive."""
    from sklearn.metrics import precision_recall_fscore_support  # takes a second

    classes, first = np.arange(num_classes), predictions.top_ids[:, 0]
    return precision_recall_fscore_support(predictions.labels, first, labels=classes, zero_division=0.0)


def per_class_rows(evaluation: Evaluation, scores: Scores) -> list[tuple[object, ...]]:
    """Return rows of PER_CLASS_COLUMNS in the order of the classes; a class without images has empty scores."""
    columns = (
        evaluation.class_names,
        human_names(evaluation.class_names),
        evaluation.class_num_images,
        evaluation.class_top1_correct,
        evaluation.class_topk_correct,
        zip(*(score.tolist() for score in scores[:3]), strict=True),
    )
    return [
        (name, human, count, top1, top5, *((top1 / count, top5 / count, *of_class) if count else ("",) * 5))
        for name, human, count, top1, top5, of_class in zip(*columns, strict=True)
    ]


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Return (C, C) int64: rows are true classes, columns predicted ones; unreadable images are left out."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(predictions.labels, predictions.top_ids[:, 0], labels=np.arange(num_classes))


def confused_pairs(confusion: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return (true, predicted, number of images) of the most frequent mistakes, most frequent first."""
    mistakes = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:NUM_CONFUSED_PAIRS]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [(names[i], names[j], int(mistakes[i, j])) for i, j in pairs if mistakes[i, j]]


def calibration_error(predictions: Predictions) -> float:
    """Return the expected calibration error, a fraction, with 15 bins of equal width
    (https://arxiv.org/abs/1706.04599): the mean over images of |accuracy - mean confidence| of their bin."""
    right = predictions.top_ids[:, 0] == predictions.labels
    bins = np.clip(np.ceil(predictions.confidences * NUM_CALIBRATION_BINS) - 1, 0, NUM_CALIBRATION_BINS - 1).astype(int)
    confidence = np.bincount(bins, weights=predictions.confidences, minlength=NUM_CALIBRATION_BINS)
    accuracy = np.bincount(bins, weights=right, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(confidence - accuracy).sum() / len(right))


def worst_mistakes(predictions: Predictions) -> list[int]:
    """Return indices of the wrong predictions with the highest confidence, highest first."""
    first = predictions.top_ids[:, 0]
    wrong = np.flatnonzero((first != predictions.labels) & (first != NO_CLASS))
    return wrong[np.argsort(-predictions.confidences[wrong], kind="stable")][:NUM_WORST_MISTAKES].tolist()


def _draw_mistakes(places: list[int], evaluation: Evaluation, source: Source, names: Sequence[str]) -> "Figure":
    predictions = evaluation.predictions
    images = [evaluation.preprocessing.square(source.read(place)) for place in places]
    captions = [
        f"{names[predictions.top_ids[place, 0]]} {predictions.confidences[place]:.0%}\n"
        f"true: {names[predictions.labels[place]]}"
        for place in places
    ]
    return image_grid(images, captions, f"The {len(places)} most confident mistakes: predicted and true class")


def _draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    side = max(5.0, 0.22 * len(names) + 2)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot(title="Images by true and predicted class", xlabel="predicted", ylabel="true")
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
