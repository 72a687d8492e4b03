from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from resnet_in1k.utils.plots import image_grid, save_figure


def drawn() -> Figure:
    figure = Figure(figsize=(2, 1), dpi=100)
    axes = figure.subplots()
    axes.plot([1, 2, 3], label="a line")
    axes.legend()
    return figure


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_figure_has_the_same_bytes_each_time(tmp_path: Path, suffix: str):
    for name in ("one", "two"):
        save_figure(drawn(), tmp_path / (name + suffix))
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one{suffix}", f"two{suffix}"]
    if suffix == ".png":
        assert Image.open(tmp_path / "one.png").size == (200, 100)
    else:
        assert "<dc:date>" not in (tmp_path / "one.svg").read_text()


@pytest.mark.parametrize(("num_images", "rows", "columns"), [(1, 1, 1), (5, 1, 5), (7, 2, 5)])
def test_images_are_in_rows_of_five_with_captions(num_images: int, rows: int, columns: int):
    images = [np.full((8, 8, 3), number, dtype=np.uint8) for number in range(num_images)]
    figure = image_grid(images, [f"image {number}" for number in range(num_images)], title="seven")
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)
    assert figure.get_suptitle() == "seven"
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_array()[0, 0, 0] for axes in shown] == list(range(num_images))
    assert [axes.texts[0].get_text() for axes in shown] == [f"image {number}" for number in range(num_images)]
    assert not any(axes.axison for axes in figure.axes)  # no frames, not even of the empty places


def test_captions_are_no_formulas(tmp_path: Path):
    """A class may have any name."""
    figure = image_grid([np.zeros((8, 8, 3), dtype=np.uint8)], ["$\\frac{$ 90 %"])
    save_figure(figure, tmp_path / "one.svg")
    assert figure.axes[0].texts[0].get_text() == "$\\frac{$ 90 %"
