"""The notebook docs/tutorial.ipynb: its cells run, and its outputs are those of a complete run."""

import re

import nbformat
import pytest
from helpers.processes import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> list[list[nbformat.NotebookNode]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def assert_complete(notebook: nbformat.NotebookNode) -> None:
    """Assert that all cells ran, with four pictures, one curve for the whole training, a good network, equal logits."""
    kinds = [output.output_type for each in outputs(notebook) for output in each]
    assert set(kinds) == {"stream", "execute_result", "display_data"}  # no error
    pictures = [output for each in outputs(notebook) for output in each if "image/png" in output.get("data", {})]
    assert [output.output_type for output in pictures] == ["execute_result"] * 2 + ["display_data", "execute_result"]
    printed = ["".join(output.get("text", "") for output in each) for each in outputs(notebook)]
    assert float(re.search(r"best top-1 (\S+)%", "".join(printed))[1]) > 80
    assert "reproduced: the recorded eval.json has the same counts" in "".join(printed)
    assert printed[-1].endswith("\nlargest difference of the logits: 0.0\n")


@pytest.mark.slow
def test_the_cells_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for each in outputs(notebook):
        each.clear()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert_complete(notebook)


def test_the_outputs_are_small_complete_and_of_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r"/(home|root|tmp|Users|work|usr|var)/|site-packages|stderr", text)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert_complete(notebook)


def test_each_paragraph_is_followed_by_its_chinese():
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown"]
    for source in cells:
        paragraphs = [part for part in source.split("\n\n") if not part.startswith("#")]
        assert [bool(re.search(r"[\u4e00-\u9fff]", part)) for part in paragraphs] == [False, True], source
    for term in ("训练结果逐比特一致", "续训", "超参数", "预训练网络", "运行目录", "checkpoint"):
        assert term in "".join(cells)
    for name in re.findall(r"\]\((\S+?)\)", "".join(cells)):
        assert (NOTEBOOK.parent / name).is_file()
