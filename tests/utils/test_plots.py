"""Class names in figures: any text, in any script, without warnings."""

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager

from resnet_in1k.utils import plots
from resnet_in1k.utils.plots import figure_labels, image_grid, save_figure

NAMES = ["US$ 5 or A$ 5", "a|b*c", "$\\frac{", "two\nlines", "猫"]
NUMBERS = [f"class {number}" for number in range(len(NAMES))]


def draw(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with figure_labels(NAMES, NUMBERS) as labels:
            save_figure(image_grid([np.zeros((8, 8, 3), np.uint8)] * len(NAMES), labels, "all of $1 and $2"), path)
    return labels


@pytest.fixture(autouse=True)
def no_remembered_fonts() -> None:
    plots._fonts.cache_clear()


def test_names_are_drawn_as_text_and_numbered_where_no_font_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", ours)
    assert draw(tmp_path / "figure.svg") == ["US$ 5 or A$ 5", "a|b*c", "$\\frac{", "two\\nlines", "class 4"]
    comments = (tmp_path / "figure.svg").read_text()  # matplotlib writes each text as a comment next to its glyphs
    assert all(f"<!-- {text} -->" in comments for text in ("US$ 5 or A$ 5", "all of $1 and $2", "class 4"))


def test_a_font_of_the_system_that_has_the_characters_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for a Chinese font: matplotlib's own, as if it had the character."""
    real = font_manager.get_font
    chinese = next(font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Serif")

    class WithMore:
        scalable = True

        def get_charmap(self) -> dict[int, int]:
            return {ord("猫"): 1}

    monkeypatch.setattr(font_manager, "get_font", lambda path: WithMore() if path == chinese.fname else real(path))
    with figure_labels(NAMES, NUMBERS) as labels:
        assert matplotlib.rcParams["font.family"][-1] == "DejaVu Serif"
    assert labels == ["US$ 5 or A$ 5", "a|b*c", "$\\frac{", "two\\nlines", "猫"]
