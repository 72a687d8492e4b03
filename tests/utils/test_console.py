import io
import sys

import pytest

from resnet_in1k.utils.console import bar_below_lines, print_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_flushed(monkeypatch: pytest.MonkeyPatch):
    """A log file shows a line at once."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw, 1 << 16), encoding="utf-8"))
    print_line("step 1")
    assert raw.getvalue() == b"step 1\n"


def test_bar_is_shown_in_a_terminal_by_the_main_process(monkeypatch: pytest.MonkeyPatch):
    def shown(stderr: io.StringIO, rank: str) -> str:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("RANK", rank)
        bar = bar_below_lines(total=8, description="epoch 1", done=3)
        bar.update()
        bar.refresh()
        bar.close()
        return stderr.getvalue()

    text = shown(Terminal(), rank="0")
    assert "epoch 1" in text
    assert "4/8" in text
    assert shown(Terminal(), rank="1") == shown(io.StringIO(), rank="0") == ""
