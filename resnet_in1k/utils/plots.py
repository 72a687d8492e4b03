"""Plots: the curves of a run, and grids of images with captions.

Figures are made without pyplot, so they need no display and leave no global state.
"""

import contextlib
import functools
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_in1k.utils import files
from resnet_in1k.utils.console import in_notebook
from resnet_in1k.utils.format import printable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

LOSS_COLOR, TOP1_COLOR, TOP5_COLOR = "#c44e52", "#1f4e79", "#7fa8d1"


@contextlib.contextmanager
def figure_labels(names: Sequence[str], otherwise: Sequence[str]) -> Iterator[list[str]]:
    """Yield labels for a figure that the body draws and saves: the names or, where no font has their characters, the
    texts of `otherwise`. A `$` is a `$`, not the start of a formula."""
    import matplotlib

    names = list(map(printable, names))
    families, missing = _fonts(frozenset("".join(names)))
    with matplotlib.rc_context({"text.parse_math": False, "font.family": families}):
        yield [name if missing.isdisjoint(name) else other for name, other in zip(names, otherwise, strict=True)]


@functools.cache
def _fonts(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Return matplotlib's font and the one with most of the characters it does not have; and what neither has."""
    import matplotlib
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    families = list(matplotlib.rcParams["font.family"])
    missing = {each for each in characters if ord(each) not in get_font(findfont(FontProperties())).get_charmap()}
    covered: dict[str, set[str]] = {}
    for entry in fontManager.ttflist if missing else ():
        with contextlib.suppress(OSError, RuntimeError):  # a damaged font
            font = get_font(entry.fname)
            if font.scalable and "Last Resort" not in entry.name:  # that one has a box for each character
                found = {each for each in missing if ord(each) in font.get_charmap()}
                covered[entry.name] = covered.get(entry.name, set()) | found  # of all its styles
    if any(covered.values()):
        best = max(covered, key=lambda name: len(covered[name]))
        families, missing = [*families, best], missing - covered[best]
    return families, frozenset(missing)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write .svg or .png, by the suffix. The same figure gives the same bytes, without a date or random ids."""
    import matplotlib

    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "resnet-in1k"}):
        files.write_atomically(path, functools.partial(figure.savefig, format=path.suffix[1:], metadata=metadata))


def image_grid(images: "Sequence[np.ndarray]", captions: Sequence[str], title: str = "") -> "Figure":
    """Draw images, (H, W, 3) uint8 each, in rows of at most five with their captions below."""
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
        axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8)
    return figure


def draw_curves(records: Sequence[dict[str, Any]], title: str, top_k: int = 5) -> "Figure":
    """Draw train loss and validation top-1 and top-k over the epochs of a log, with the best epoch marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [record for record in records if record["kind"] == "epoch"]
    numbers = [record["epoch"] for record in epochs]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    left = figure.add_subplot(title=title, xlabel="epoch")
    right = left.twinx()
    for axis, label, color in ((left, "train loss", LOSS_COLOR), (right, "validation accuracy", TOP1_COLOR)):
        axis.set_ylabel(label, color=color)
        axis.tick_params(axis="y", labelcolor=color)
        axis.spines["top"].set_visible(False)
    left.grid(alpha=0.25)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    right.set_ylim(0, 1.02)

    lines = []
    for axis, key, label, color, style in (
        (left, "train_loss", "train loss", LOSS_COLOR, "-"),
        (right, "top1_accuracy", "top-1", TOP1_COLOR, "-"),
        (right, "top5_accuracy", f"top-{top_k}", TOP5_COLOR, "--"),
    ):
        values = [record[key] for record in epochs]
        lines += axis.plot(numbers, values, color=color, linestyle=style, marker=".", label=label)
    if epochs:
        best = max(epochs, key=lambda record: record["top1_accuracy"])
        label = f"best: {best['top1_accuracy']:.2%} after epoch {best['epoch']}"
        circle = {"fillstyle": "none", "markersize": 9, "color": TOP1_COLOR}
        lines += right.plot(best["epoch"], best["top1_accuracy"], "o", label=label, **circle)
        left.set_xlim(0.5, max(numbers) + 0.5)
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def show_in_notebook(figure: "Figure", handle: Any = None) -> Any:
    """In a notebook, show a figure in place of that of the handle, if any, and return the handle of the figure."""
    if not in_notebook():
        return None
    display, png = sys.modules["IPython"].display, io.BytesIO()
    figure.savefig(png, format="png")  # a notebook shows a Figure as text, unless it has activated matplotlib
    image = display.Image(png.getvalue())
    if handle is None:
        return display.display(image, display_id=True)
    handle.update(image)
    return handle
