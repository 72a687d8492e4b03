"""The examples of CONTRIBUTING.md, written into a copy of the package, train and publish together."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import ROOT
from torchvision.transforms.functional import vflip

from resnet_in1k.augment import operations
from resnet_in1k.data.registry import open_source

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
PLACES = [
    ("recipes/published.py", '    "tutorial": NamedRecipe('),
    ("recipes/recipe.py", "    def __post_init__("),
    ("augment/operations.py", "OPERATIONS = ["),
    ("augment/operations.py", '    Operation("rotation"'),
    ("data/csv_table.py", ""),  # a new file
    ("data/registry.py", '    "digits": '),
]
"""File of each example, and the text that follows it there."""
PROGRAMS = f"""
{sys.executable} scripts/train.py --recipe small-160 --model resnet18 --image-size 32 --global-batch-size 8 --epochs 1 \
    --vflip-probability 0.5 --data csv:digits.csv --workers 1 --cpu-threads 1 --output-dir run &&
{sys.executable} scripts/push_to_hub.py --run run --repo-id me/digits --dry-run
"""


def write_table(folder: Path) -> None:
    """Write some digits, and digits.csv."""
    rows = ["path,class,split"]
    for split, number in (("train", 24), ("val", 10)):
        source = open_source("digits", split)
        for index in range(number):
            (folder / f"{split}{index}.png").write_bytes(source.read(index).tobytes())
            rows.append(f"{split}{index}.png,{source.class_names[source.labels[index]]},{split}")
    (folder / "digits.csv").write_text("\n".join(rows))


@pytest.mark.slow
def test_examples_train_and_publish(tmp_path: Path):
    for name in ("resnet_in1k", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for (file, following), block in zip(PLACES, BLOCKS, strict=True):
        path = tmp_path / "resnet_in1k" / file
        before, after = path.read_text(encoding="utf-8").split(following) if following else ("", "")
        text = f"{before}{block}\n{following}{after}".replace("import builtin,", "import builtin, csv_table,")
        path.write_text(text, encoding="utf-8")
    write_table(tmp_path)
    result = subprocess.run(PROGRAMS, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    facts, card = json.loads((tmp_path / "run/recipe.json").read_text()), (tmp_path / "run/hub/README.md").read_text()
    assert (facts["recipe"]["name"], facts["data"]["num_train_images"]) == ("small-160", 24)
    assert "--data csv:path/to/digits.csv" in card
    assert "| `vflip_probability` | 0.5 |" in card


def test_example_of_an_augmentation_equals_torchvision():
    names = dict(vars(operations))
    exec(BLOCKS[2], names)
    images, draws = torch.rand(4, 3, 6, 6), {"is_flipped": torch.tensor([[1.0], [0.0], [1.0], [0.0]])}
    flipped, _ = names["flip_vertically"](images, torch.zeros(4), draws)
    assert torch.equal(flipped, torch.stack([vflip(images[0]), images[1], vflip(images[2]), images[3]]))
