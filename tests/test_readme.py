"""The pages' commands parse, their links lead to a file and a heading; the READMEs' tables are complete."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers.processes import ROOT
from helpers.training import reset_accelerate_state
from torch.distributed.run import get_args_parser as torchrun_parser

from resnet_in1k import ResNet
from resnet_in1k.__main__ import COMMANDS as cli_commands
from resnet_in1k.__main__ import options_of
from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli import train
from resnet_in1k.cli.train import GivenRecipe, find_recipe
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.recipes.recipe import Recipe

README, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(readme: Path, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```\n", readme.read_text(encoding="utf-8"), re.M | re.S)
    return [text for name, text in blocks if name == language]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each line, joined with the next one if it ends with a backslash; of a loop, of each turn."""
    text = "".join(code_blocks(page, "bash")).replace("\\\n", " ")
    text = re.sub(r"^for (\w+) in (.+); do (.+); done$", turns, text, flags=re.M)
    return [shlex.split(line, comments=True) for line in text.splitlines()]


def turns(loop: re.Match[str]) -> str:
    variable, values, body = loop.groups()
    return "\n".join(body.replace(f"${variable}", value) for value in values.split())


OPTIONS = {f"scripts/{name.replace('-', '_')}.py": options_of(name) for name in cli_commands if name != "train"}
COMMANDS = commands(README)
ELSEWHERE = [
    *(command for page in PAGES if page not in (README, CHINESE) for command in commands(page)),
    *(
        shlex.split((ROOT / script).read_text(encoding="utf-8").splitlines()[0].strip('"').partition(": ")[2])
        for script in ("scripts/train.py", *OPTIONS)
    ),
]
"""In the other documents, and at the top of the scripts."""


@pytest.mark.parametrize("command", [*COMMANDS, *ELSEWHERE], ids=" ".join)
def test_every_command_can_be_given(command: list[str], tmp_path: Path, monkeypatch):
    """To the real parsers: the launcher's, and the script's, which also checks the values."""
    monkeypatch.chdir(tmp_path)
    for name in ("old", "photos"):  # made by the commands before those that write to them
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.setattr(train, "find_recipe", recipe_without_the_hub)
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        return
    if command[0] == ".":
        assert command[1] == ".venv/bin/activate"
        return
    if command[0] == "resnet-in1k":
        command = ["python", f"scripts/{command[1].replace('-', '_')}.py", *command[2:]]
    place = next(place for place, word in enumerate(command) if word.startswith("scripts/"))
    check_launcher(command[:place])
    monkeypatch.setattr(sys, "argv", command[place:])
    assert (ROOT / command[place]).is_file()
    if command[place] in ("scripts/train.py", "scripts/train.sbatch"):
        assert isinstance(train.parse_flags()[1].fields, Recipe)
    else:
        assert isinstance(cli.parse(OPTIONS[command[place]]), OPTIONS[command[place]])


def recipe_without_the_hub(given: str) -> GivenRecipe:
    return find_recipe("tutorial" if given.startswith("hub:") else given)


def check_launcher(words: list[str]) -> None:
    """What stands before the script."""
    if words[:2] == ["accelerate", "launch"]:
        arguments = launch_command_parser().parse_args([*words[2:], "script.py"])
        assert (ROOT / arguments.config_file).is_file()
    elif words[0] == "torchrun":
        torchrun_parser().parse_args([*words[1:], "script.py"])
    elif words[0] == "sbatch":
        assert all(re.fullmatch(r"--nodes=\d+", word) for word in words[1:])  # there is no sbatch to ask
    else:
        assert words == ["python"]


@pytest.mark.slow
def test_the_path_of_own_photos(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    """The section's lines, word by word, but for the paths, and few small images for a ResNet-18."""
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^## Own photos\n(.*?)^## ", text, re.M | re.S)[1].replace("\\\n", " ")
    write_tensors(weights_to_save(ResNet("resnet18", 1000)), tmp_path / "base.safetensors")
    mine = {
        "torchvision/resnet50.IMAGENET1K_V2": "base.safetensors",
        "--data photos": f"--data {image_folder}/train",
        "new.jpg": str(next((image_folder / "val").rglob("*.jpg"))),
    }
    for theirs, ours in mine.items():
        assert theirs in section
        section = section.replace(theirs, ours)
    small = ["--model", "resnet18", "--epochs", "2", "--image-size", "32", "--global-batch-size", "8", "--workers", "0"]
    (shell,), (python,) = (re.findall(rf"```{name}\n(.*?)```", section, re.S) for name in ("bash", "python"))
    monkeypatch.chdir(tmp_path)
    printed = {}
    for _, script, *flags in map(shlex.split, shell.splitlines()):
        name = Path(script).stem
        monkeypatch.setattr(sys, "argv", [script, *flags, *(small if name == "train" else [])])
        reset_accelerate_state()
        importlib.import_module(f"resnet_in1k.cli.{name}").main()
        printed[name] = capsys.readouterr().out
    assert "with a new head of 6 classes, because its classes have no names" in printed["train"]
    assert "dry run: nothing was sent" in printed["push_to_hub"]
    assert Path("runs/photos/report/per_class.csv").is_file()
    assert Path("new.png").is_file()
    names: dict[str, object] = {}
    exec(python, names)
    answer = names["model"].predict(mine["new.jpg"], top_k=6)
    assert {name for name, _ in answer} == {"ant", "bee", "cat", "dog", "eel", "fox"}
    assert sum(share for _, share in answer) == pytest.approx(1)


def test_readme_is_short():
    assert len(README.read_bytes()) <= 9000
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 190


def facts(text: str) -> list[str]:
    """Return numbers, code, links and dashes in their order: all that does not depend on the language.

    Links to the page's own headings differ; test_links_lead_to_a_file_and_a_heading checks them.
    """
    text = re.sub(r"\]\(#.+?\)", "](#)", text.replace("```", ""))
    return re.findall(
        r"`[^`\n]+`|\]\([^)]*\)|\]\[[\w-]+\]|^\[[\w-]+\]: .+|[AV]100|\d[\d.,]*(?<![.,])%?|[–±]", text, re.M
    )


def test_chinese_readme_has_the_same_commands_tables_and_links():
    assert commands(CHINESE) == COMMANDS
    for language in ("python", ""):
        assert code_blocks(CHINESE, language) == code_blocks(README, language)
    texts = (page.read_text(encoding="utf-8").replace(".zh-CN", "") for page in (README, CHINESE))
    for ours, theirs in zip(*(re.split(r"^## ", text, flags=re.M) for text in texts), strict=True):
        rows, their_rows = (re.findall(r"^\|.*", text, re.M) for text in (ours, theirs))
        for row, their_row in zip(rows, their_rows, strict=True):
            cells, their_cells = (line.split("|") for line in (row, their_row))
            assert [*map(facts, cells)] == [*map(facts, their_cells)]
        assert sorted(facts(ours)) == sorted(facts(theirs))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path):
    for target in re.findall(r"(?:\]\(|^\[[^\]]+\]: )([^)\s]+)", page.read_text(encoding="utf-8"), re.M):
        file, _, anchor = target.partition("#")
        if not file.startswith("https://"):
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
