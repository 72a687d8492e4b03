"""What the READMEs say is so."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

from resnet_in1k.benchmark import BenchmarkOptions
from resnet_in1k.export import ExportOptions
from resnet_in1k.prediction import PredictOptions
from resnet_in1k.push import PushOptions
from resnet_in1k.recipes import Recipe
from resnet_in1k.scoring import EvalOptions
from resnet_in1k.training import TrainOptions

README, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))


def code_blocks(readme: Path, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```\n", readme.read_text(encoding="utf-8"), re.M | re.S)
    return [text for name, text in blocks if name == language]


def commands(readme: Path) -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in code_blocks(readme, "bash") for line in block.splitlines()]


def flags_of(cls: type) -> set[str]:
    return {"--" + field.name.replace("_", "-") for field in fields(cls)}


OPTIONS = {
    "scripts/benchmark.py": BenchmarkOptions,
    "scripts/evaluate.py": EvalOptions,
    "scripts/export.py": ExportOptions,
    "scripts/predict.py": PredictOptions,
    "scripts/push_to_hub.py": PushOptions,
}
COMMANDS = commands(README)
DIFFERENT = [command for command in COMMANDS if [*command, "--dry-run"] not in COMMANDS]


@pytest.mark.parametrize("command", DIFFERENT, ids=" ".join)
def test_every_command_can_be_given(command: list[str], run_script, image_folder: Path, tmp_path: Path):
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif command[0] == ".":
        assert command[1] == ".venv/bin/activate"
    elif command[0] == "sbatch":
        assert (ROOT / command[1]).is_file()
        assert {word for word in command if word.startswith("--")} <= flags_of(TrainOptions)
    elif "scripts/train.py" in command:
        place = command.index("scripts/train.py")
        config = Path(command[command.index("--config_file") + 1]).name
        # On the images of these tests, far fewer than a batch of the tutorial, and as a plan only.
        ours = ["--data", image_folder, "--global-batch-size", "8", "--dry-run", "--output-dir", tmp_path / "run"]
        result = run_script(*command[place:], *ours, config=config)
        assert result.returncode == 0, result.stderr
        assert "\n  steps         4 an epoch" in result.stdout
    else:
        assert command[0] == "python"
        assert {word for word in command if word.startswith("--")} <= flags_of(OPTIONS[command[1]])


def test_the_python_lines_load_a_model(tmp_path: Path):
    from resnet_in1k import ResNet
    from resnet_in1k.checkpoint import save_weights
    from resnet_in1k.model import weights_to_save

    save_weights(weights_to_save(ResNet("resnet18", 10)), tmp_path / "model.safetensors")
    (block,) = code_blocks(README, "python")
    names: dict[str, object] = {}
    exec(block.replace("runs/demo", str(tmp_path)), names)
    assert names["model"].fc.out_features == 10


def test_the_table_of_flags_is_complete():
    table = README.read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(--[a-z-]+)`", table, re.M))
    assert documented == flags_of(TrainOptions) | {"--recipe"}
    for script in ("evaluate", "predict", "push_to_hub", "export"):
        (sentence,) = re.findall(rf"^`scripts/{script}.py\b.*?\.\n\n", table, re.S | re.M)
        documented = {"--ckpt", *re.findall(r"`(--[a-z0-9-]+)`", sentence)}
        assert documented - flags_of(OPTIONS[f"scripts/{script}.py"]) <= {"--ckpt"}
        assert flags_of(OPTIONS[f"scripts/{script}.py"]) - documented <= {"--images"}  # which are given without a flag
    recipe_flags = re.search(r"^\| any field of the recipe.*$", table, re.M)
    assert set(re.findall(r"`(--[a-z-]+)`", recipe_flags[0])) - {"--help"} <= flags_of(Recipe)


def test_the_tree_is_the_tree():
    (tree,) = [block for block in code_blocks(README, "") if block.startswith("scripts/")]
    named = set(re.findall(r"^ +(\w+\.\w+) ", tree, re.M))
    there = {path.name for folder in ("scripts", "resnet_in1k") for path in (ROOT / folder).glob("*.*")}
    assert named == there - {"__init__.py"}


def test_the_chinese_readme_has_the_same_commands_tables_and_links():
    assert commands(CHINESE) == COMMANDS
    assert code_blocks(CHINESE, "python") == code_blocks(README, "python")
    for pattern in (r"^\| (`[^|`]*`)", r"\]\(([^)#]+)\)"):
        ours, theirs = (re.findall(pattern, path.read_text(encoding="utf-8"), re.M) for path in (README, CHINESE))
        assert [x for x in ours if "zh-CN" not in x] == [x for x in theirs if x != "README.md"]


@pytest.mark.parametrize("readme", [README, CHINESE], ids=lambda path: path.name)
def test_links_and_pictures_exist(readme: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target
