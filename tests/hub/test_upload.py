"""The real client against a local Hub: what is published, with every kind of failure, and never a part of it."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.hub_server import OTHER_USERS_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer, Repo
from helpers.processes import ROOT

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.cli.predict import PredictOptions, predict
from resnet_in1k.cli.push_to_hub import PushOptions, main
from resnet_in1k.hub.hub_folder import build_hub_folder
from resnet_in1k.hub.upload import Upload, seconds_before_retry
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in the client

REPO = "me/tiny"
CREATED_BY_THE_HUB = {".gitattributes"}


@pytest.fixture(autouse=True)
def waits(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, by us and by the client; no test really waits."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture(scope="module")
def run(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A copy with its hub folder."""
    copy = tmp_path_factory.mktemp("publish") / "run"
    run = RunFolder(Path(shutil.copytree(finished.path, copy, ignore=shutil.ignore_patterns("checkpoints"))))
    build_hub_folder(run, REPO)
    return run


def publish(run: RunFolder, **options: Any) -> str:
    """Upload the hub folder that a run has; returns what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        Upload(run.path / "hub", REPO, **options).run()
    assert WRITE_TOKEN not in printed.getvalue()
    return printed.getvalue()


def publish_failing(run: RunFolder, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        publish(run, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_published(hub: HubServer, run: RunFolder, revision: str = "main") -> None:
    """Every file of the hub folder, byte for byte, in one commit after the Hub's own."""
    expected = {path.name: path.read_bytes() for path in (run.path / "hub").iterdir()}
    published = hub.repos[REPO].files(revision)
    assert published.keys() == expected.keys() | CREATED_BY_THE_HUB
    assert expected.items() <= published.items()
    assert len(hub.repos[REPO].commits) == 2


@pytest.fixture
def trained_elsewhere(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """Weights and their evaluation alone."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for path in (finished.weights, finished.evaluation):
        shutil.copy(path, run.path)
    return run


@pytest.mark.slow
def test_what_is_published_is_complete_and_gives_the_runs_results(
    hub: HubServer, run: RunFolder, image_folder: Path, capsys: pytest.CaptureFixture[str]
):
    lines = publish(run)
    assert_published(hub, run)
    assert "verified: 6 files downloaded, with equal bytes" in lines
    assert 'load it:  ResNet.from_pretrained("me/tiny")' in lines
    assert not hub.repos[REPO].private

    evaluate(EvalOptions(ckpt=REPO, data=str(image_folder), workers=0))
    assert "reproduced: the recorded eval.json has the same counts" in capsys.readouterr().out
    images = (image_folder / "val/ant/0.jpg",)
    expected, actual = (predict(PredictOptions(images=images, ckpt=ckpt)) for ckpt in (str(run.path), REPO))
    assert actual == expected


def test_dry_run_lists_all_files_and_sends_nothing(
    hub: HubServer, trained_elsewhere: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    flags = ["--run", str(trained_elsewhere.path), "--repo-id", REPO, "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["scripts/push_to_hub.py", *flags])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{REPO}, branch main ← {trained_elsewhere.path / 'hub'}"
    assert [line.split()[0] for line in lines[1:-1]] == ["README.md", "config.json", "eval.json", "model.safetensors"]
    assert lines[-1].startswith("dry run: nothing was sent")
    assert hub.requested == []


def test_private_repository_and_branch(hub: HubServer, run: RunFolder):
    lines = publish(run, private=True, revision="v1")
    assert 'load it:  ResNet.from_pretrained("me/tiny", revision="v1")' in lines
    assert hub.repos[REPO].private
    assert_published(hub, run, revision="v1")
    assert hub.repos[REPO].files("main").keys() == CREATED_BY_THE_HUB


@pytest.mark.slow
def test_pull_request_is_opened_once_and_not_after_it_was_merged(hub: HubServer, run: RunFolder):
    hub.fail("POST", "/commit/", "lose response")
    for _ in range(2):
        assert f"pull request: {hub.url}/{REPO}/discussions/1" in publish(run, pr=True)
        assert_published(hub, run, revision="refs/pr/1")
    repository = hub.repos[REPO]
    assert repository.files("main").keys() == CREATED_BY_THE_HUB
    repository.refs["main"] = repository.refs["refs/pr/1"]
    assert "nothing to do: commit " in publish(run, pr=True)
    assert len(repository.pull_requests) == 1


def test_options_that_exclude_each_other():
    with pytest.raises(UserError, match="--pr opens a pull request to main; leave out --revision"):
        PushOptions(run=Path("run"), repo_id=REPO, pr=True, revision="v1")


@pytest.mark.slow
def test_files_of_an_earlier_publication_are_deleted(hub: HubServer, trained_elsewhere: RunFolder):
    """Earlier: a run, with recipe and curves."""
    earlier = ("recipe.json", "curves.png", ".eval_results/digits.yaml", "notes.txt")
    hub.publish(REPO, dict.fromkeys(earlier, b"earlier"))
    build_hub_folder(trained_elsewhere, REPO)
    publish(trained_elsewhere)
    names = {path.name for path in (trained_elsewhere.path / "hub").iterdir()}
    assert names == {"README.md", "config.json", "eval.json", "model.safetensors"}
    assert hub.repos[REPO].files("main").keys() == names | {"notes.txt"} | CREATED_BY_THE_HUB  # not ours


@pytest.mark.slow
def test_temporary_failures_are_retried(hub: HubServer, run: RunFolder):
    """At each step a status, a cut connection, a lost response or a download with changed bytes."""
    hub.fail("GET", "/whoami", 500)
    hub.fail("POST", "/validate-yaml", 500)
    hub.fail("POST", "/repos/create", "lose response")
    hub.fail("PUT", "/lfs/", 500)
    hub.fail("PUT", "/lfs/", "cut")
    hub.fail("POST", "/commit/", 429, retry_after=7)
    hub.fail("POST", "/commit/", 500)
    hub.fail("POST", "/commit/", "lose response")
    hub.fail("GET", r"/resolve/.*/model.safetensors", "damage")  # without change of size
    lines = publish(run)
    assert all(fault.times == 0 for fault in hub.faults)  # all of them happened
    assert_published(hub, run)
    assert "verified: 6 files downloaded, with equal bytes" in lines
    assert re.search(r"could not upload \(.*429 Too Many Requests.*\); trying again in 7 s", lines)


def test_how_long_to_wait():
    def failure(status: int, **headers: str) -> Exception:
        error = Exception()
        error.response = SimpleNamespace(status_code=status, headers=headers)
        return error

    assert seconds_before_retry(failure(503), attempt=3) == 4
    assert seconds_before_retry(failure(404), attempt=1) is None
    assert seconds_before_retry(failure(429, RateLimit='"api";r=0;t=55'), attempt=1) == 55
    assert seconds_before_retry(failure(429, **{"Retry-After": "9000"}), attempt=1) == 300
    assert seconds_before_retry(ConnectionResetError(), attempt=2) == 2
    wrapped = ValueError()
    wrapped.__cause__ = failure(401)
    assert seconds_before_retry(wrapped, attempt=1) is None


@pytest.mark.slow
def test_a_lasting_failure_is_reported_with_the_progress_and_a_second_run_completes_it(
    hub: HubServer, run: RunFolder, waits: list[float]
):
    hub.fail("POST", "/commit/", 503, times=5)
    error = publish_failing(run)
    assert error.startswith("could not upload: ")
    assert error.endswith(f"; the upload to {REPO} may be incomplete; run the same command to complete it")
    assert waits == [1, 2, 4, 8]
    assert hub.repos[REPO].files("main").keys() == CREATED_BY_THE_HUB
    publish(run)
    assert_published(hub, run)
    assert "nothing to do: commit " in publish(run)
    assert_published(hub, run)


@pytest.mark.slow
def test_a_download_that_stays_damaged_is_reported(hub: HubServer, run: RunFolder):
    hub.fail("GET", r"/resolve/.*/model.safetensors", "damage", times=5)
    assert "could not verify the published files: model.safetensors differ" in publish_failing(run)
    assert_published(hub, run)


def test_an_interrupt_reports_the_progress(hub: HubServer, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    hub.fail("POST", "/commit/", 429, retry_after=60)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Upload(run.path / "hub", REPO).run()
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"interrupted: the upload to {REPO} may be incomplete; run the same command to complete it"


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "could not sign in: Invalid user token."),
        (READ_TOKEN, "could not prepare the repository: 403 Forbidden: "),
        (OTHER_USERS_TOKEN, "could not prepare the repository: 403 Forbidden: You don't have the rights"),
    ],
)
def test_a_token_without_permission_is_refused_and_not_shown(
    hub: HubServer, run: RunFolder, monkeypatch: pytest.MonkeyPatch, token: str, message: str
):
    monkeypatch.setenv("HF_TOKEN", token)
    error = publish_failing(run)
    assert error.startswith(message)
    assert not token or token not in error
    assert hub.repos == {}


def test_a_card_that_the_hub_refuses_is_not_published(hub: HubServer, run: RunFolder, tmp_path: Path):
    copy = RunFolder(Path(shutil.copytree(run.path, tmp_path / "run")))
    card = copy.path / "hub/README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: apache-9"))
    error = publish_failing(copy)
    assert re.match(r'could not validate the card: .*"license" must be one of \[apache-2.0, mit\]', error)
    assert "; nothing was published" in error
    assert hub.repos == {}


def test_an_existing_public_repository_is_not_used_as_private(hub: HubServer, run: RunFolder):
    hub.repos[REPO] = Repo(private=False)
    assert f"{REPO} exists and is public" in publish_failing(run, private=True)
    assert len(hub.repos[REPO].commits) == 1


CONSUMER = """
import re, sys
import numpy as np, timm, torch, torchvision
from PIL import Image
run = sys.argv[1]
blocks = re.findall(r"```python\\n(.*?)```", open(f"{run}/hub/README.md").read(), re.S)
assert len(blocks) == 6, len(blocks)
names = [{} for _ in blocks]
for block, space in zip(blocks, names):
    exec(block, space)
by_timm, by_transformers, ours, by_torchvision, onnx, pt2 = names

from resnet_in1k import ResNet
from resnet_in1k.augment.normalize import normalize
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
    assert torch.equal(pixels, batch), "transformers preprocesses images as timm does"
    # transformers keeps weights memory-mapped, and some kernels round differently by a tensor's alignment.
    assert torch.allclose(pipe.model(pixels).logits, expected, rtol=0, atol=1e-6)
    for parameter in pipe.model.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(pipe.model(pixels).logits, expected)
    of_zeros = trained(torch.zeros(1, 3, 32, 32))
assert torch.equal(pt2["logits"], of_zeros)
assert np.allclose(onnx["logits"], of_zeros.numpy(), atol=1e-4)
assert not ours["model"].training
predicted = pipe("image.jpg")
best = expected.softmax(1)[0].topk(5)
labels = ["ant", "bee", "cat", "dog", "eel", "fox"]
assert [entry["label"] for entry in predicted] == [labels[i] for i in best.indices.tolist()]
assert np.allclose([entry["score"] for entry in predicted], best.values.numpy(), atol=1e-6)

one_level = 1 / 255 / 0.224
square = torch.from_numpy(trained.preprocessing.square(np.fromfile("image.jpg", dtype=np.uint8)))
assert (normalize(square.permute(2, 0, 1)[None]) - batch).abs().max() <= 1.01 * one_level
assert torch.allclose(by_torchvision["transform"](image)[None], batch, atol=1e-6)
print("all equal")
"""


@pytest.mark.slow
def test_the_cards_code_runs_and_all_libraries_give_the_trained_models_logits(
    hub: HubServer, exported: RunFolder, image_folder: Path, tmp_path: Path
):
    run = RunFolder(Path(shutil.copytree(exported.path, tmp_path / "run")))
    build_hub_folder(run, REPO)
    publish(run)
    shutil.copy(image_folder / "val/ant/0.jpg", tmp_path / "image.jpg")
    result = subprocess.run(
        [sys.executable, "-c", CONSUMER, str(run.path)],
        cwd=tmp_path, env={**os.environ, **hub.env(tmp_path / "consumer"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all equal\n")
