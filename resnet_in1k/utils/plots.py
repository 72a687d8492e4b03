"""Plots: the curves of a run, and grids of images with captions."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_in1k.utils import files

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


import sys
from typing import TYPE_CHECKING, Any

from resnet_in1k.utils.console import in_notebook

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: Path) -> None:
    """As .svg or .png by its suffix; the same figure gives the same bytes, without a date or random ids."""
    import matplotlib

    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "resnet-in1k"}):
        files.write_atomically(path, functools.partial(figure.savefig, format=path.suffix[1:], metadata=metadata))


def image_grid(images: "Sequence[np.ndarray]", captions: Sequence[str], title: str = "") -> "Figure":
    """Images, (H, W, 3) uint8 each, in rows of at most five with their captions below."""
    from matplotlib.figure import Figure

    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    size = (2.2 * columns + 0.4, (2.2 + 0.2 * lines) * rows + 0.4)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest" if len(image) < 100 else "antialiased")
        # Class names from anywhere: text between two $ would be parsed as a formula.
        axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
    return figure


LOSS_COLOR, TOP1_COLOR, TOP5_COLOR = "#c44e52", "#1f4e79", "#7fa8d1"


def draw_curves(records: Sequence[dict[str, Any]], title: str, top_k: int = 5) -> "Figure":
    """Figure of a log's records: train loss, validation top-1 and top-k, the best epoch marked.

    It is made without pyplot, so it needs no display and leaves no state behind.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [record for record in records if record["kind"] == "epoch"]
    numbers = [record["epoch"] for record in epochs]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    loss_axis = figure.add_subplot(title=title, xlabel="epoch")
    loss_axis.set_ylabel("train loss", color=LOSS_COLOR)
    loss_axis.tick_params(axis="y", labelcolor=LOSS_COLOR)
    loss_axis.grid(alpha=0.25)
    loss_axis.spines["top"].set_visible(False)
    accuracy_axis = loss_axis.twinx()
    accuracy_axis.set_ylabel("validation accuracy", color=TOP1_COLOR)
    accuracy_axis.tick_params(axis="y", labelcolor=TOP1_COLOR)
    accuracy_axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    accuracy_axis.set_ylim(0, 1.02)
    accuracy_axis.spines["top"].set_visible(False)

    lines = loss_axis.plot(
        numbers, [record["train_loss"] for record in epochs], color=LOSS_COLOR, marker=".", label="train loss"
    )
    for key, label, color, style in [
        ("top1_accuracy", "top-1", TOP1_COLOR, "-"),
        ("top5_accuracy", f"top-{top_k}", TOP5_COLOR, "--"),
    ]:
        values = [record[key] for record in epochs]
        lines += accuracy_axis.plot(numbers, values, color=color, linestyle=style, marker=".", label=label)

    if epochs:
        best = max(epochs, key=lambda record: record["top1_accuracy"])
        lines += accuracy_axis.plot(
            best["epoch"],
            best["top1_accuracy"],
            linestyle="none",
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgewidth=1.5,
            color=TOP1_COLOR,
            label=f"best: {best['top1_accuracy']:.2%} after epoch {best['epoch']}",
        )
        loss_axis.set_xlim(0.5, max(numbers) + 0.5)
    loss_axis.set_ylim(bottom=0)
    loss_axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def save_curves(figure: "Figure", path: Path) -> None:
    """Write `path`.svg and `path`.png."""
    for suffix in (".svg", ".png"):
        save_figure(figure, path.with_suffix(suffix))


class LiveFigure:
    """In a notebook, one figure that is replaced in place at each update; elsewhere nothing."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, figure: "Figure") -> None:
        if not in_notebook():
            return
        display = sys.modules["IPython"].display
        if self._handle is None:
            self._handle = display.display(figure, display_id=True)
        else:
            self._handle.update(figure)
