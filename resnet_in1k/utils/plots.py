"""Writing figures, and grids of images with captions."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_in1k.utils import files

if TYPE_CHECKING:
    import numpy as np
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
