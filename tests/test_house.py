"""The rules of the house, checked on its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

PACKAGE = ROOT / "resnet_in1k"
FLOORS = [
    "errors", "files", "randomness", "recipes", "sources", "console", "stopwatch", "metrics", "images", "model",
    "pipeline", "augment", "optim", "devices", "preemption", "step", "checkpoint", "run_folder", "plan", "session",
    "pace", "plots", "evaluation", "run_writer", "preflight", "training", "benchmark", "names", "weights", "report",
    "scoring", "card", "hub", "push", "prediction", "export", "cli",
]  # fmt: skip
"""Ground floor first; each module may import only what stands before it."""


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "resnet_in1k":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("resnet_in1k."):
            names.add(node.module.split(".")[1])
    return names


def test_every_module_has_its_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("module", FLOORS)
def test_imports_go_down_only(module: str):
    assert imports_of(PACKAGE / f"{module}.py") <= set(FLOORS[: FLOORS.index(module)])


def test_heavy_libraries_are_imported_only_when_used():
    heavy = ["torch", "accelerate", "evaluate", "datasets", "matplotlib", "sklearn"]
    code = f"import sys, resnet_in1k; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
    code = f"import sys; from resnet_in1k import ResNet; print([m for m in {heavy[1:]} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin_and_do_not_hide_the_evaluate_library(script: Path):
    text = script.read_text(encoding="utf-8")
    first, *_ = [line for line in text.splitlines() if "sys.path" in line]
    assert first == "sys.path[0] = str(Path(__file__).resolve().parent.parent)"
    assert text.index(first) < text.index("from resnet_in1k")
    assert len(text.splitlines()) < 80


def test_nothing_is_unpickled():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                assert "weights_only=True" in ast.unparse(node), path


@pytest.mark.parametrize(("name", "processes"), [("cpu", 1), ("one_gpu", 1), ("two_gpu", 2), ("eight_gpu", 8)])
def test_accelerate_configs_say_what_machine_never_what_science(name: str, processes: int):
    text = (ROOT / f"accelerate_configs/{name}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert config["num_processes"] == processes
    assert (config["distributed_type"] == "MULTI_GPU") == (processes > 1)
    assert config["use_cpu"] == (name == "cpu")
    assert "gradient_accumulation_steps" not in config
    settings = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(" # " in line for line in settings)  # each with its reason
