"""The figure of a run, saved and in a notebook."""

import base64
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from resnet_in1k.utils.plots import draw_curves, save_figure, show_in_notebook

TOP1 = [0.1, 0.55, 0.9, 0.85]
RECORDS = [{"kind": "train", "epoch": 1, "step": 5, "loss": 9.0}] + [
    {"kind": "epoch", "epoch": e, "train_loss": 3 / e, "top1_accuracy": t, "top5_accuracy": t / 2 + 0.5}
    for e, t in enumerate(TOP1, start=1)
]


def test_loss_is_left_accuracies_right_and_the_best_marked():
    figure = draw_curves(RECORDS, "a run", top_k=3)
    left, right = figure.axes
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == ("a run", "epoch", "train loss")
    assert (right.get_ylabel(), right.yaxis.get_label_position()) == ("validation accuracy", "right")
    (loss,) = left.get_lines()
    assert loss.get_ydata().tolist() == [3, 1.5, 1, 0.75]
    top1, top5, best = right.get_lines()
    assert (top1.get_label(), list(top1.get_ydata())) == ("top-1", TOP1)
    assert (top5.get_label(), list(top5.get_ydata())) == ("top-3", [0.55, 0.775, 0.95, 0.925])
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([3], [0.9])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "train loss", "top-1", "top-3", "best: 90.00% after epoch 3",
    ]  # fmt: skip


@pytest.mark.parametrize("num_records", [0, len(RECORDS)])
def test_saved_as_svg_and_png_without_a_display_or_a_warning(tmp_path: Path, monkeypatch, num_records: int):
    monkeypatch.delenv("DISPLAY", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_curves(RECORDS[:num_records], "a run")
        for name in ("curves.png", "curves.svg"):
            save_figure(figure, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "curves.svg"]
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    assert image.shape == (675, 1200)
    assert 0.005 < (image < 200).mean() < 0.2  # something is drawn, and most of it is background


def test_in_a_notebook_one_figure_is_updated_in_place(monkeypatch: pytest.MonkeyPatch):
    """Through IPython's own machinery: what a notebook's kernel would send to the browser."""
    shell = InteractiveShell.instance(display_pub_class=CapturingDisplayPublisher)
    shell.kernel = None  # what a Jupyter kernel's shell has, and a terminal's has not
    monkeypatch.setattr(shell.display_pub, "outputs", [])
    try:
        handle = show_in_notebook(draw_curves(RECORDS[:2], "a run"))
        assert show_in_notebook(draw_curves(RECORDS, "a run"), handle) is handle
        first, second = shell.display_pub.outputs
    finally:
        InteractiveShell.clear_instance()
    shown = [base64.b64decode(output["data"]["image/png"]) for output in (first, second)]  # a picture, not its name
    assert [Image.open(io.BytesIO(png)).size for png in shown] == [(1200, 675)] * 2
    assert shown[0] != shown[1]
    assert (first.get("update"), second.get("update")) == (False, True)
    assert first["transient"]["display_id"] == second["transient"]["display_id"]


def test_outside_a_notebook_nothing_is_displayed(capsys: pytest.CaptureFixture):
    assert show_in_notebook(draw_curves(RECORDS, "a run")) is None
    assert capsys.readouterr() == ("", "")
