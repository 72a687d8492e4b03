"""Rules that the whole source keeps: the order of the sub-packages, lazy imports, sizes, thin scripts, no pickle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.processes import ROOT

PACKAGE = ROOT / "resnet_in1k"
SUB_PACKAGES = [
    "utils", "recipes", "run_folder", "augment", "data", "prepare", "model", "optim", "evaluate", "train", "hub", "cli",
]  # fmt: skip
"""Each may import only from itself and from those before it."""
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60


def imported_sub_packages(path: Path) -> set[str]:
    """The sub-packages of this package that a file imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("resnet_in1k."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("resnet_in1k.")}
    return names


def test_every_sub_package_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders | {"run_folder"} == set(SUB_PACKAGES)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "run_folder.py"}


@pytest.mark.parametrize("sub_package", SUB_PACKAGES)
def test_imports_between_sub_packages_go_one_way(sub_package: str):
    allowed = set(SUB_PACKAGES[: SUB_PACKAGES.index(sub_package) + 1])
    for path in (PACKAGE / sub_package).rglob("*.py"):
        assert imported_sub_packages(path) <= allowed, path


def test_files_and_functions_can_be_held_in_mind():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MAX_FILE_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


@pytest.mark.slow
def test_heavy_libraries_are_imported_only_when_used():
    heavy = ["torch", "accelerate", "evaluate", "datasets", "matplotlib", "sklearn", "timm"]
    flags = "import resnet_in1k.cli.options, resnet_in1k.cli.train_options"  # for --help
    for code, unused in [
        ("import resnet_in1k", heavy),
        (flags, heavy),
        ("from resnet_in1k import ResNet", heavy[1:]),
    ]:
        code = f"import sys; {code}; print([m for m in {unused} if m in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert result.stdout == "[]\n", result.stderr


def test_scripts_are_thin_and_do_not_hide_the_evaluate_library():
    """The package is imported by scripts/command.py alone, after it has set the path."""
    for script in (ROOT / "scripts").glob("*.py"):
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 7, script
        if script.stem == "command":
            assert text.index("sys.path[0] = ") < text.index("from resnet_in1k")
        else:
            assert re.findall("import .*", text) == ["import command"], script


def test_nothing_is_unpickled():
    """Except for what processes of one launch tell one another."""
    calls = [
        (path, ast.unparse(node))
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "utils/launch.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert calls
    assert all("weights_only=True" in call for _, call in calls), calls


@pytest.mark.parametrize(
    ("name", "processes"), [("cpu", 1), ("one_gpu", 1), ("two_gpu", 2), ("eight_gpu", 8), ("two_nodes", 4)]
)
def test_accelerate_configs_say_what_machine_never_what_science(name: str, processes: int):
    text = (ROOT / f"accelerate_configs/{name}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert config["num_processes"] == processes
    assert (config["distributed_type"] == "MULTI_GPU") == (processes > 1)
    assert config["use_cpu"] == (name == "cpu")
    assert "gradient_accumulation_steps" not in config
