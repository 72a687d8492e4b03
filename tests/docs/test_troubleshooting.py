"""Each message of docs/troubleshooting.md is one that the program prints."""

import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.archives import write_archives
from helpers.preparing import options
from helpers.processes import ROOT
from helpers.training import TINY, narrow_resnet18, run
from PIL import Image

from resnet_in1k import ResNet, run_folder
from resnet_in1k.cli.prepare_data import prepare_data
from resnet_in1k.data.decode import read_image
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.evaluate.class_matching import match_classes
from resnet_in1k.hub import hub_folder, upload
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.prepare.write import check_space
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train import checkpoint, preflight
from resnet_in1k.train.step import TrainStep
from resnet_in1k.train.trainer import TrainOptions
from resnet_in1k.utils import distributed, files
from resnet_in1k.utils.errors import UserError, translate_errors
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.pool import run_parallel

TABLES = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("## Questions")[0]
MESSAGES = re.findall(r"^\| `+(.+?[^`])`+ \|", TABLES, re.M)


@dataclass
class Case:
    folder: Path
    patch: pytest.MonkeyPatch
    fixture: Callable[[str], object]

    def command(self, name: str, *words: object) -> None:
        self.patch.setattr(sys, "argv", [f"scripts/{name}.py", *map(str, words)])
        importlib.import_module(f"resnet_in1k.cli.{name}").main()

    def train(self, **fields: object) -> None:
        run(replace(TINY, **fields), self.fixture("image_folder"), self.folder / "run")

    def train_with(self, owner: object, name: str, substitute: object) -> None:
        self.patch.setattr(owner, name, substitute)
        self.train()

    def images(self, *names: str) -> str:
        """Write an image to each of these paths in a folder of data, and return the folder."""
        for name in names:
            (self.folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(self.folder / "data" / name)
        return str(self.folder / "data")

    def read_corrupt_image(self, if_bad: str) -> None:
        Path(data := self.images("train/cat/1.png"), "train/cat/1.png").write_bytes(b"")
        read_image(open_source(data, "train"), 0, if_bad, {})

    def weights(self) -> Path:
        """Write weights of two classes without names."""
        write_tensors(weights_to_save(ResNet("resnet18", 2)), self.folder / "model.safetensors")
        return self.folder / "model.safetensors"

    def resume(self, version: int = run_folder.FORMAT_VERSION, **fields: object) -> None:
        """Resume a run without any change but these."""
        data, facts, folder = {"source": "digits", "fingerprint": {}}, {"mixed_precision": "no"}, RunFolder(self.folder)
        run_folder.write_recipe(folder, "tiny", TINY, data, facts)
        self.patch.setattr(run_folder, "FORMAT_VERSION", version)
        run_folder.check_resumable(folder, replace(TINY, **fields), data, facts)

    def fail(self, text: str) -> None:
        with translate_errors():
            raise RuntimeError(text)

    def prepare_too_few(self) -> None:
        archives, _ = write_archives(self.folder, [b"%d" % number for number in range(18)])
        prepare_data(options(archives, self.folder / "out", allow_partial=False))

    def start_again(self) -> None:
        (self.folder / "recipe.json").write_text("{}")
        RunFolder(self.folder).check_free(resume=False)

    def lock_twice(self) -> None:
        with files.lock_folder(self.folder):
            list(run_parallel(files.lock_folder, [self.folder] * 2, 2))

    def load_damaged_checkpoints(self) -> None:
        (self.folder / "step_00000001").mkdir()
        checkpoint.load_newest_checkpoint(self.folder, {}, "")

    def launch_two_on_one_gpu(self) -> None:
        self.patch.setattr(distributed, "device_type", lambda: "cuda")
        self.patch.setattr(torch.accelerator, "device_count", lambda: 1)
        self.patch.setenv("LOCAL_WORLD_SIZE", "2")
        distributed.check_launch()

    def launch_by_hand(self) -> None:
        self.patch.setenv("WORLD_SIZE", "2")
        Launch.connect()

    def launch_with_another_torch(self) -> None:
        launch = Launch()
        launch.gather = lambda value, doing: [value, ("node1", {"torch": "2.0"})]
        preflight.check_same_program(launch, TINY, TrainOptions(), RunFolder(self.folder))

    def evaluate_other_tensors(self) -> None:
        write_tensors({"weight": torch.ones(1)}, self.folder / "other.safetensors")
        self.command("evaluate", "--ckpt", self.folder / "other.safetensors", "--data", "digits")

    def evaluate_a_backbone(self) -> None:
        state = weights_to_save(ResNet("resnet18", 2))
        write_tensors({key: state[key] for key in state if "fc." not in key}, self.folder / "body.safetensors")
        self.command("predict", "--ckpt", self.folder / "body.safetensors", "photo.jpg")

    def predict_with_a_web_page(self) -> None:
        (self.folder / "page.pth").write_text("<html>")
        self.command("predict", "--ckpt", self.folder / "page.pth", "photo.jpg")

    def publish_without_token(self) -> None:
        self.patch.setattr("huggingface_hub.get_token", lambda: None)
        upload.Upload(self.folder, "me/mine")

    def match_other_classes(self) -> None:
        source = open_source(self.images("val/eel/1.png", "val/fox/1.png"), "val")
        match_classes(torch.nn.Identity(), 2, ["cat", "dog"], source, "runs/mine")


def run_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


PROVOKED: dict[str, Callable[[Case], object]] = {
    "unknown flag": lambda case: case.command("train", "--recip", "demo"),
    "is missing; for example": lambda case: case.command("evaluate"),
    "--… …: must be": lambda case: case.command("train", "--recipe", "tutorail"),
    "no such folder": lambda case: case.command("train", "--data", "nowhere"),
    "check its path and permissions": lambda case: case.command("train", "--data", "nowhere", "--val-share", "0.2"),
    "one image only": lambda case: open_source(case.images("cat/1.png", "cat/2.png", "dog/1.png"), "train", 0.2),
    "files must be in a folder": lambda case: open_source(case.images("train/1.png", "train/cat/2.png"), "train"),
    "train and val must": lambda case: open_train_and_val(case.images("train/a/1.png", "train/b/1.png", "val/a/1.png")),
    "cannot be read as an image": lambda case: case.read_corrupt_image("fail"),
    "skip replaces at most": lambda case: case.read_corrupt_image("skip"),
    "is incomplete": lambda case: open_source(case.images("train/.partial.1/cat/1.png"), "train"),
    "give --allow-partial": Case.prepare_too_few,
    "free, but": lambda case: check_space(case.folder, 10**18, 1),
    "already contains a run": Case.start_again,
    "with other settings": lambda case: case.resume(lr=1.0),
    "by an older version": lambda case: case.resume(version=4),
    "is being written to": Case.lock_twice,
    "starts from trained weights": lambda case: case.command("train", "--recipe", "finetune"),
    "the recipe's model is": lambda case: case.command("train", "--data", "digits", "--init-from", case.weights()),
    "teacher_weight is": lambda case: case.command("train", "--data", "digits", "--teacher-weight", "1"),
    "invalid recipe": lambda case: case.command("train", "--lr=-1"),
    "training images are fewer": lambda case: StepCounts(TINY, 1, 1, num_train_images=7),
    "cannot be divided evenly": lambda case: StepCounts(TINY, 3, 1, num_train_images=99),
    "too little memory": lambda case: preflight.check_memory(1, 10**18),
    "too little space": lambda case: case.train_with(shutil, "disk_usage", lambda path: SimpleNamespace(free=0)),
    "out of memory": lambda case: case.train_with(TrainStep, "__call__", run_out_of_memory),
    "the loss of step": lambda case: case.train(lr=1e25, warmup_epochs=0),
    "a loader worker died": lambda case: case.fail("DataLoader worker (pid(s) 7) exited unexpectedly"),
    "cannot be read or written": lambda case: Launch().on_main_process(Path("gone").read_text, "writing the log"),
    "none of the": Case.load_damaged_checkpoints,
    "were launched on this machine": Case.launch_two_on_one_gpu,
    "without MASTER_ADDR": Case.launch_by_hand,
    "differs from": Case.launch_with_another_torch,
    "lost its connection": lambda case: case.fail("[gloo/tcp/pair.cc:5] Connection closed by peer"),
    "is not in a run folder": lambda case: case.command("evaluate", "--ckpt", case.weights()),
    "class names are": lambda case: case.command("evaluate", "--ckpt", case.weights(), "--data", "digits"),
    "are not those of the data": Case.match_other_classes,
    "no such repository": lambda case: case.fixture("hub") and resolve_checkpoint("me/nothing"),
    "is not a torchvision ResNet": Case.evaluate_other_tensors,
    "has no last layer": Case.evaluate_a_backbone,
    "as plain tensors": Case.predict_with_a_web_page,
    "of … images cannot be read": lambda case: case.command("predict", "--ckpt", case.weights(), "nowhere.jpg"),
    "no token": Case.publish_without_token,
    "evaluate again": lambda case: hub_folder.build_hub_folder(RunFolder(case.weights().parent), "me/mine"),
}
"""What produces a message, by words that are in no other message of the page."""


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Case]:
    monkeypatch.chdir(tmp_path)
    with narrow_resnet18():
        yield Case(tmp_path, monkeypatch, request.getfixturevalue)


def test_page_and_table_have_the_same_messages():
    assert [sum(words in message for words in PROVOKED) for message in MESSAGES] == [1] * len(PROVOKED)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_prints_the_message(case: Case, message: str):
    (provoke,) = (function for words, function in PROVOKED.items() if words in message)
    with pytest.raises(UserError) as raised:
        provoke(case)
    assert re.fullmatch(re.escape(message).replace("…", ".+"), str(raised.value))
