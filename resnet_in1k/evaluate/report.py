"""The report of an evaluation: accuracy by class, confused pairs, calibration, and the most confident mistakes."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnet_in1k.evaluate.evaluation import NO_CLASS, Evaluation
from resnet_in1k.utils import files
from resnet_in1k.utils.imagenet import human_names
from resnet_in1k.utils.plots import figure_labels, image_grid, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CONFUSED_PAIRS = 20
NUM_WORST_MISTAKES = 20
NUM_CALIBRATION_BINS = 15
MAX_CLASSES_IN_FIGURE, MAX_CLASSES_WITH_NUMBERS = 100, 20
PER_CLASS_COLUMNS = (
    "class", "name", "num_images", "top1_correct", "top5_correct", "top1_accuracy", "top5_accuracy", "precision",
    "recall", "f1", "number",
)  # fmt: skip


def write_report(evaluation: Evaluation, folder: Path) -> dict[str, float]:
    """Write per_class.csv, confused_pairs.csv, report.json and figures to `folder`; return the content of report.json.

    Raises:
        UserError: if the folder cannot be written to.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # takes a second

    labels, first = evaluation.source.labels, evaluation.top_ids[:, 0]
    names = human_names(evaluation.source.class_names)
    classes = np.arange(len(names))
    # An unreadable image is a false negative of its class, and no class's false positive.
    scores = precision_recall_fscore_support(labels, first, labels=classes, zero_division=0.0)
    _, recall, f1, num_images = scores
    confusion = confusion_matrix(labels, first, labels=classes)  # without unreadable images
    summary = {
        "top1_accuracy": evaluation.top1_accuracy,
        "top5_accuracy": evaluation.counts["top5_accuracy"],
        "num_images": len(labels),
        "num_bad_images": len(evaluation.bad_images),
        "balanced_accuracy": float(recall[num_images > 0].mean()),
        "macro_f1": float(f1[num_images > 0].mean()),
        "expected_calibration_error": calibration_error(first == labels, evaluation.confidences),
        "mean_confidence": float(evaluation.confidences.mean()),
    }
    with files.user_errors(f"--report {folder}: "):
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "per_class.csv", PER_CLASS_COLUMNS, _per_class(evaluation, names, *scores[:3]))
        _write_csv(folder / "confused_pairs.csv", ("true", "predicted", "num_images"), confused_pairs(confusion, names))
        files.write_json(folder / "report.json", summary)
        for stale in ("worst_mistakes.png", "confusion_matrix.png"):
            (folder / stale).unlink(missing_ok=True)
        with figure_labels(names, [f"class {number}" for number in classes]) as drawn:
            if mistakes := worst_mistakes(evaluation):
                save_figure(_draw_mistakes(mistakes, evaluation, drawn), folder / "worst_mistakes.png")
            if len(names) <= MAX_CLASSES_IN_FIGURE:
                save_figure(_draw_confusion(confusion, drawn), folder / "confusion_matrix.png")
    return summary


def _per_class(evaluation: Evaluation, names: Sequence[str], *scores: np.ndarray) -> Iterable[tuple[object, ...]]:
    """Yield rows of PER_CLASS_COLUMNS in the order of the classes; a class without images has empty scores."""
    counts = [evaluation.counts[f"class_{name}"] for name in ("num_images", "top1_correct", "top5_correct")]
    columns = (evaluation.source.class_names, names, *counts, *(values.tolist() for values in scores))
    for number, (name, human, count, top1, top5, *of_class) in enumerate(zip(*columns, strict=True)):
        yield name, human, count, top1, top5, *((top1 / count, top5 / count, *of_class) if count else [""] * 5), number


def confused_pairs(confusion: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return (true, predicted, number of images) of the most frequent mistakes, most frequent first.

    Args:
        confusion: (C, C) numbers of images; rows are true classes, columns predicted ones.
    """
    mistakes = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:NUM_CONFUSED_PAIRS]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [(names[i], names[j], int(mistakes[i, j])) for i, j in pairs if mistakes[i, j]]


def calibration_error(is_right: np.ndarray, confidences: np.ndarray) -> float:
    """Return the expected calibration error, a fraction, with 15 bins of equal width
    (https://arxiv.org/abs/1706.04599): the mean over images of |accuracy - mean confidence| of their bin."""
    bins = np.clip(np.ceil(confidences * NUM_CALIBRATION_BINS) - 1, 0, NUM_CALIBRATION_BINS - 1).astype(int)
    excess = np.bincount(bins, weights=confidences - is_right)  # confidence minus accuracy, summed over a bin's images
    return float(np.abs(excess).sum() / len(is_right))


def worst_mistakes(evaluation: Evaluation) -> list[int]:
    """Return indices of the wrong predictions with the highest confidence, highest first."""
    first = evaluation.top_ids[:, 0]
    wrong = np.flatnonzero((first != evaluation.source.labels) & (first != NO_CLASS))
    return wrong[np.argsort(-evaluation.confidences[wrong], kind="stable")][:NUM_WORST_MISTAKES].tolist()


def _draw_mistakes(places: list[int], evaluation: Evaluation, names: Sequence[str]) -> "Figure":
    source = evaluation.source
    images = [evaluation.preprocessing.square(source.read(place)) for place in places]
    columns = (evaluation.top_ids[places, 0], evaluation.confidences[places], source.labels[places])
    captions = [
        f"{names[predicted]} {confidence:.0%}\ntrue: {names[label]}"
        for predicted, confidence, label in zip(*columns, strict=True)
    ]
    return image_grid(images, captions, f"The {len(places)} most confident mistakes: predicted and true class")


def _draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    side = max(5.0, 0.22 * len(names) + 2)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot(title="Share of each true class's images by predicted class")
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    numbers = {"include_values": len(names) <= MAX_CLASSES_WITH_NUMBERS, "values_format": ".0%"}
    ConfusionMatrixDisplay(shares, display_labels=names).plot(
        ax=axes, cmap="Blues", xticks_rotation="vertical", im_kw={"vmin": 0, "vmax": 1}, **numbers
    )
    return figure


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    files.write_text(path, text.getvalue())
