"""The real client against a local Hub: what is published, what befalls it on the way, and that nothing is half done."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import READ_TOKEN, STRANGERS_TOKEN, WRITE_TOKEN, HubServer
from processes import ROOT

from resnet_in1k.checkpoint import save_weights
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.prediction import PredictOptions, predict
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.scoring import EvalOptions, evaluate_checkpoint

REPO = "me/tiny"
NOTHING = {".gitattributes"}


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


class Publisher:
    """Pushes a run in a process of its own, as the endpoint and token are read when the client is imported."""

    def __init__(self, run: Path, home: Path):
        self.run, self.home = run, home

    def command(self, hub: HubServer, *flags: str, token: str, xet: bool) -> dict:
        command = [sys.executable, "scripts/push_to_hub.py", "--run", str(self.run), "--repo-id", REPO, *flags]
        environment = {**os.environ, **hub.env(self.home, token=token, xet=xet), "PYTHONUNBUFFERED": "1"}
        return {"args": command, "cwd": ROOT, "env": environment, "text": True}

    def __call__(self, hub: HubServer, *flags: str, token: str = WRITE_TOKEN, xet: bool = False) -> "tuple[int, str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 180}
        result = subprocess.run(**self.command(hub, *flags, token=token, xet=xet), **pipes)
        assert "Traceback" not in result.stdout
        assert token not in result.stdout if token else True
        return result.returncode, result.stdout


@pytest.fixture(scope="module")
def finished_run(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A copy, as publishing writes into it."""
    copy = tmp_path_factory.mktemp("publish") / "run"
    return RunFolder(Path(shutil.copytree(finished.path, copy, ignore=shutil.ignore_patterns("checkpoints"))))


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A ResNet-50 that was trained elsewhere, and evaluated here."""
    folder = RunFolder(tmp_path_factory.mktemp("large"))
    save_weights(weights_to_save(ResNet("resnet50", 10)), folder.weights)
    evaluate_checkpoint(EvalOptions(ckpt=str(folder.path), data="digits", image_size=32, output=folder.evaluation))
    return folder


@pytest.fixture
def publish(finished_run, tmp_path: Path) -> Publisher:
    return Publisher(finished_run.path, tmp_path / "home")


DRIVER = """
import json, os, pathlib, sys
from resnet_in1k.errors import UserError
from resnet_in1k.push import PushOptions, push
for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked.pop("token")
    said, error = [], ""
    try:
        push(PushOptions(**asked | {"run": pathlib.Path(asked["run"])}), said.append)
    except UserError as problem:
        error = str(problem)
    print(json.dumps([said, error]), flush=True)
"""


class Station:
    """A hub, and one process that publishes there again and again: its imports take longer than all else."""

    def __init__(self, run: Path, home: Path):
        self.hub, self.run, self.repo = HubServer(), run, ""
        environment = {**os.environ, **self.hub.env(home, xet=False), "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, cwd=ROOT, **pipes)

    def publish(self, token: str = WRITE_TOKEN, **options: object) -> tuple[str, str]:
        """What was said, and the error, if there was one."""
        asked = {"run": str(self.run), "repo_id": self.repo, "token": token, **options}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        said, error = json.loads(self.process.stdout.readline())
        assert not token or token not in "".join([*said, error])
        assert "\n" not in error
        return "\n".join(said), error


@pytest.fixture(scope="module")
def shared_station(finished_run, tmp_path_factory: pytest.TempPathFactory):
    station = Station(finished_run.path, tmp_path_factory.mktemp("home"))
    with station.hub:
        yield station
    station.process.stdin.close()
    station.process.wait(timeout=60)


@pytest.fixture
def station(shared_station: Station, request: pytest.FixtureRequest) -> Station:
    """With a repository of its own for each test, and without the faults of the last."""
    shared_station.repo = f"me/{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower()).strip('-')[-60:].strip('-')}"
    shared_station.hub.faults.clear()
    shared_station.hub.objects.clear()  # else the weights need not be uploaded again
    return shared_station


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_published(hub: HubServer, run: Path, revision: str = "main", repo: str = REPO) -> None:
    """Every file of the hub folder, byte for byte, in one commit after the Hub's own."""
    published, names = hub.repos[repo].files(revision), names_in(run / "hub")
    assert published.keys() == names | NOTHING
    assert all(published[name] == (run / "hub" / name).read_bytes() for name in names)
    assert len(hub.repos[repo].history(revision)) == 2


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_published_verified_and_not_published_twice(hub: HubServer, publish, finished_run, xet: bool):
    status, said = publish(hub, xet=xet)
    assert status == 0, said
    assert_published(hub, finished_run.path)
    assert re.search(r"verified: 7 files downloaded again, checksums and logits are equal", said)
    assert not hub.repos[REPO].private

    # The token went to the hub alone, and every address of it was asked with the token.
    assert {request.token for request in hub.requests if request.origin == "hub"} == {WRITE_TOKEN}
    assert WRITE_TOKEN not in {request.token for request in hub.requests if request.origin == "storage"}

    status, said = publish(hub, xet=xet)
    assert status == 0, said
    assert "nothing to do: commit " in said
    assert_published(hub, finished_run.path)


def test_weights_of_a_hundred_megabytes(hub: HubServer, tmp_path: Path, finished_run, large_run):
    publish = Publisher(large_run.path, tmp_path / "home")
    assert large_run.weights.stat().st_size > 90e6
    status, said = publish(hub, xet=True)
    assert status == 0, said
    assert_published(hub, large_run.path)


def test_private_branch_and_pull_request(station: Station):
    said, error = station.publish(private=True, revision="v1")
    assert error == ""
    repository = station.hub.repos[station.repo]
    assert repository.private
    assert_published(station.hub, station.run, revision="v1", repo=station.repo)
    assert repository.files("main").keys() == NOTHING

    for _ in range(2):  # the second finds what the first proposed
        said, error = station.publish(pr=True)
        assert error == ""
        assert f"/{station.repo}/discussions/1" in said
        assert len(repository.pull_requests) == 1
        assert_published(station.hub, station.run, revision="refs/pr/1", repo=station.repo)
    assert repository.files("main").keys() == NOTHING


FAULTS = {
    "500 on whoami": lambda hub: hub.fail("GET", "/whoami", status=500),
    "500 on create": lambda hub: hub.fail("POST", "/repos/create", status=500),
    "answer lost after create": lambda hub: hub.lose_response("POST", "/repos/create"),
    "500 on upload": lambda hub: hub.fail("PUT", "/lfs/", status=500),
    "connection dropped within the upload": lambda hub: hub.drop("PUT", "/lfs/", midway=True),
    "429 on commit": lambda hub: hub.fail("POST", "/commit/", status=429, retry_after=2),
    "500 on commit": lambda hub: hub.fail("POST", "/commit/", status=500),
    "answer lost after the commit": lambda hub: hub.lose_response("POST", "/commit/"),
    "download damaged without change of size": lambda hub: hub.damage(r"/resolve/.*/model.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_waited_for(station: Station, fault: str):
    FAULTS[fault](station.hub)
    started_seconds = time.monotonic()
    said, error = station.publish()
    assert error == ""
    assert all(rule.times == 0 for rule in station.hub.faults)  # it did befall
    assert_published(station.hub, station.run, repo=station.repo)
    assert "verified: 7 files downloaded again, checksums and logits are equal" in said
    if fault.startswith("429"):
        assert "trying again in 2 s" in said
        assert time.monotonic() - started_seconds > 2


def test_by_xet_faults_of_the_upload_are_waited_for_too(hub: HubServer, publish, finished_run):
    hub.drop("POST", "/v1/xorbs/", midway=True)
    hub.fail("POST", "/v1/shards", status=500)
    status, said = publish(hub, xet=True)
    assert status == 0, said
    assert all(rule.times == 0 for rule in hub.faults)
    assert_published(hub, finished_run.path)


def test_a_second_publication_leaves_nothing_of_the_first(hub: HubServer, publish, finished_run, tmp_path: Path):
    """A run; then to the same repository its weights as if trained elsewhere, without recipe and curves."""
    assert publish(hub)[0] == 0
    bare = RunFolder(tmp_path / "bare")
    bare.path.mkdir()
    for path in (finished_run.weights, finished_run.evaluation):
        shutil.copy(path, bare.path)
    status, said = Publisher(bare.path, tmp_path / "home")(hub)
    assert status == 0, said
    assert hub.repos[REPO].files("main").keys() == names_in(bare.path / "hub") | NOTHING
    assert "recipe.json" not in hub.repos[REPO].files("main")


def test_by_xet_a_lost_answer_makes_no_second_commit(hub: HubServer, publish, finished_run):
    """The client itself tries such commits again; without their parent given, the Hub would take both."""
    hub.lose_response("POST", "/commit/")
    status, said = publish(hub, xet=True)
    assert status == 0, said
    assert_published(hub, finished_run.path)


LASTING = {
    "wrong token": ("hf_wrong", "could not sign in: the token is not valid (401); run `hf auth login`"),
    "no token": ("", "no token for the Hub: run `hf auth login`, or set HF_TOKEN"),
    "read-only token": (READ_TOKEN, "the token of me may only read; make one that may write: http://"),
    "another user's namespace": (STRANGERS_TOKEN, "--repo-id "),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_the_token_does_not_allow_is_one_line_and_changes_nothing(station: Station, case: str):
    token, message = LASTING[case]
    _, error = station.publish(token=token)
    assert error.startswith(message)
    assert station.repo not in station.hub.repos


def test_what_does_not_pass_is_told_with_how_far_it_came_and_a_second_run_finishes_it(station: Station):
    station.hub.fail("POST", "/commit/", status=503, times=5)
    _, error = station.publish()
    assert error.startswith("could not upload: ")
    assert f"whether all has arrived in {station.repo} is not known, and the same command goes on from there" in error
    assert station.hub.repos[station.repo].files("main").keys() == NOTHING
    _, error = station.publish()
    assert error == ""
    assert_published(station.hub, station.run, repo=station.repo)


def test_a_download_that_stays_damaged_is_told(station: Station):
    station.hub.damage(r"/resolve/.*/model.safetensors", times=2)
    _, error = station.publish()
    assert "is not what was published: model.safetensors differ" in error
    assert_published(station.hub, station.run, repo=station.repo)


def test_an_existing_public_repository_is_not_taken_for_private(station: Station):
    assert station.publish()[1] == ""
    _, error = station.publish(private=True)
    assert f"{station.repo} is there already and public" in error


def test_an_interrupt_says_how_far_it_came(hub: HubServer, publish, finished_run):
    hub.fail("POST", "/commit/", status=429, retry_after=60)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(**publish.command(hub, token=WRITE_TOKEN, xet=False), **pipes)
    said = []
    for line in process.stdout:
        said.append(line)
        if "trying again in 60 s" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "interrupted: whether all has arrived in me/tiny is not known; the same command finishes it\n" in said
    assert "Traceback" not in "".join(said)
    assert publish(hub)[0] == 0
    assert_published(hub, finished_run.path)


def test_a_dry_run_shows_all_and_asks_nobody(hub: HubServer, publish, image_folder: Path):
    status, said = publish(hub, "--dry-run", token="")
    assert status == 0, said
    for name in ("README.md", "config.json", "curves.png", "eval.json", "model.safetensors", "recipe.json"):
        assert f"\n  {name} " in said
    assert f"\n  .eval_results/{image_folder.name}.yaml " in said
    assert said.endswith("dry run: nothing was sent\n")
    assert hub.requests == []


def test_from_the_hub_it_is_evaluated_and_predicts(hub: HubServer, publish, finished_run, image_folder, tmp_path: Path):
    assert publish(hub)[0] == 0
    environment = {**os.environ, **hub.env(tmp_path / "fresh", xet=False)}

    def run(*command: object) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)

    result = run("scripts/evaluate.py", "--ckpt", REPO, "--data", image_folder)
    assert result.returncode == 0, result.stderr
    assert "reproduced: the recorded eval.json has the same counts" in result.stdout
    image = image_folder / "val/ant/0.jpg"
    here = predict(PredictOptions(images=(image,), ckpt=str(finished_run.path)), say=lambda text: None)
    there = run("scripts/predict.py", image, "--ckpt", REPO, "--json")
    assert json.loads(there.stdout) == json.loads(here[0].to_json())
    assert len(json.loads(there.stdout)["predictions"]) == 5

    missing = run("scripts/predict.py", image, "--ckpt", "me/nothing")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: me/nothing is no file or folder here, and no repository that could be")
    assert missing.stderr.count("\n") == 1


CONSUMER = """
import re, subprocess, sys
import numpy as np, timm, torch, torchvision
from PIL import Image
from safetensors.torch import load_file
card, repo, run = open(sys.argv[1]).read(), sys.argv[2], sys.argv[3]
blocks = re.findall(r"```python\\n(.*?)```", card, re.S)
assert len(blocks) == 5, len(blocks)
for command in re.search(r"```bash\\n(python scripts/export.*?)```", card, re.S)[1].splitlines():
    words = [sys.executable, sys.argv[4] + "/" + command.split()[1], *command.split()[2:]]
    subprocess.run(words, check=True)
names = [{} for _ in blocks]
for block, space in zip(blocks, names):
    exec(block, space)
by_timm, by_transformers, ours, by_torchvision, exported = names

sys.path.insert(0, sys.argv[4])
from resnet_in1k import ResNet
from resnet_in1k.augment import normalise
from resnet_in1k.images import EvalTransform, decode
trained = ResNet.from_pretrained(run)
image = Image.open("image.jpg").convert("RGB")
batch = by_timm["transform"](image)[None]
with torch.inference_mode():
    expected = trained(batch)
    assert torch.equal(by_timm["model"](batch), expected)
    assert torch.equal(ours["model"](batch), expected)
    assert torch.equal(by_torchvision["model"](batch), expected)
    pipe = by_transformers["classify"]
    pixels = pipe.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, batch), "transformers prepares images as timm does"
    # transformers leaves weights where the file is mapped, and by a tensor's place in memory a kernel may round.
    assert torch.allclose(pipe.model(pixels).logits, expected, rtol=0, atol=1e-6)
    for parameter in pipe.model.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(pipe.model(pixels).logits, expected)
    of_zeros = trained(torch.zeros(1, 3, 32, 32))
assert torch.equal(exported["logits_of_export"], of_zeros)
assert np.allclose(exported["logits_of_onnx"], of_zeros.numpy(), atol=1e-4)
assert not ours["model"].training
said = pipe("image.jpg")
best = expected.softmax(1)[0].topk(5)
labels = ["ant", "bee", "cat", "dog", "eel", "fox"]
assert [entry["label"] for entry in said] == [labels[i] for i in best.indices.tolist()]
assert np.allclose([entry["score"] for entry in said], best.values.numpy(), atol=1e-6)

one_level = 1 / 255 / 0.224
mine = EvalTransform(image_size=32, resize_size=36)(decode(np.fromfile("image.jpg", dtype=np.uint8)), 0, 0)
assert (normalise(mine[None]) - batch).abs().max() <= 1.01 * one_level
assert torch.allclose(by_torchvision["transform"](image)[None], batch, atol=1e-6)
print("all equal")
"""


def test_the_card_s_snippets_run_and_all_loaders_give_the_trained_models_logits(
    hub: HubServer, publish, finished_run, image_folder: Path, tmp_path: Path
):
    assert publish(hub)[0] == 0
    shutil.copy(image_folder / "val/ant/0.jpg", tmp_path / "image.jpg")
    arguments = [finished_run.path / "hub/README.md", REPO, finished_run.path, ROOT]
    result = subprocess.run(
        [sys.executable, "-c", CONSUMER, *map(str, arguments)],
        cwd=tmp_path, env={**os.environ, **hub.env(tmp_path / "fresh", xet=False), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all equal\n")
