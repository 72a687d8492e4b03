import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_in1k import checkpoint as C
from resnet_in1k import files
from resnet_in1k.errors import UserError
from resnet_in1k.model import weights_file, weights_to_save
from resnet_in1k.optim import build_optimizer

WEIGHTS, OPTIMIZER, STATE = C.WEIGHTS_NAME, C.OPTIMIZER_NAME, C.STATE_NAME


class Small(torch.nn.Module):
    """Enough of a ResNet for a checkpoint: a convolution, a norm with its buffers, a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.fc = torch.nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn1(self.conv1(images)).relu().mean(dim=(2, 3)))


@pytest.fixture
def trained(tiny):
    """A model and an optimizer after two steps, so that there is momentum."""
    torch.manual_seed(0)
    model = Small().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, tiny)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(folder: Path, trained, **state: object) -> Path:
    model, optimizer = trained
    return C.save_checkpoint(
        folder, C.TrainState(**{"step": 2, **state}), weights_to_save(model), C.optimizer_tensors(model, optimizer)
    )


def test_everything_comes_back_and_goes_on_alike(tmp_path: Path, trained, tiny):
    state = {"step": 7, "epoch_losses": [0.1, 1 / 3], "best_step": 5, "best_top1_accuracy": 0.7}
    state |= {"best_evaluation": {"top1_accuracy": 0.7, "weights_sha256": "0" * 64}, "bad_images": [3, 4]}
    folder = save(tmp_path, trained, **state)
    assert folder.name == "step_00000007"
    torch.manual_seed(1)
    model = Small().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, tiny)
    assert C.load_checkpoint(folder, model, optimizer) == C.TrainState(**state)

    inputs = torch.randn(4, 3, 32, 32)
    for network, sgd in (trained, (model, optimizer)):
        sgd.zero_grad()
        network(inputs).square().mean().backward()
        sgd.step()
    for ours, theirs in zip(trained[0].state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizer_without_tensors_comes_back_if_it_may_have_none(tmp_path: Path, tiny, scaled: bool):
    """SGD without momentum; or one whose only step was skipped by a loss scaler."""
    model = Small()
    optimizer = build_optimizer(model, replace(tiny, momentum=0.9 if scaled else 0.0), fused=not scaled)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(model(torch.full((4, 3, 8, 8), float("inf") if scaled else 1.0)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    scale = scaler.state_dict() if scaled else None
    folder = save(tmp_path, (model, optimizer), step=1, grad_scaler=scale)
    assert C.load_file(folder / OPTIMIZER) == {}
    assert C.load_checkpoint(folder, model, optimizer) == C.TrainState(step=1, grad_scaler=scale)


@pytest.mark.parametrize("rename_that_fails", [1, 2])
def test_a_step_saved_again_is_the_old_or_the_new(tmp_path: Path, trained, monkeypatch, rename_that_fails: int):
    folder, whole, calls = save(tmp_path, trained, step=2), os.rename, []

    def rename(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == rename_that_fails:
            raise OSError(5, "Input/output error")
        whole(*paths)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path, trained, step=2, bad_images=[1])
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert C.load_checkpoint(folder, *trained).bad_images == []


def test_a_read_that_fails_in_passing_is_no_damage(tmp_path: Path, trained, monkeypatch):
    folder, whole, failed = save(tmp_path, trained), Path.read_text, []

    def once_stale(self: Path, *arguments: object, **options: object) -> str:
        if not failed:
            failed.append(self)
            raise OSError(116, "Stale file handle")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", once_stale)
    assert C.load_checkpoint(folder, *trained).step == 2
    assert failed == [folder / STATE]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, trained, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, trained, step=1)
    monkeypatch.setattr(files, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, trained, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "file"
    target.write_text("old")

    def half(path: Path) -> None:
        path.write_text("ne")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        files.write_atomically(target, half)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_listing_is_numeric_and_knows_whole_folders_only(tmp_path: Path):
    for name in ("step_00000009", "step_00000010", "step_100000000", ".step_00000011.7.tmp", "notes"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in C.list_checkpoints(tmp_path)] == [9, 10, 100_000_000]
    assert C.list_checkpoints(tmp_path / "nowhere") == []


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    for step in (1, 2, 3, 4, 5, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
    C.prune_checkpoints(tmp_path, keep=2, best_step=2, passed_over={4, 9})
    assert [step for step, _ in C.list_checkpoints(tmp_path)] == [2, 3, 4, 5, 9]
    assert not list(tmp_path.glob(".*"))


def test_the_format_before_is_read_too(tmp_path: Path, trained):
    folder = save(tmp_path, trained, epoch_losses=[0.5])
    values = json.loads((folder / STATE).read_text())
    assert values["format_version"] == 3
    values["format_version"] = 2
    del values["sha256"][STATE]
    (folder / STATE).write_text(json.dumps(values))
    assert C.load_checkpoint(folder, *trained) == C.TrainState(step=2, epoch_losses=[0.5])


def test_the_state_can_be_written_anew_beside_the_same_tensors(tmp_path: Path, trained):
    folder = save(tmp_path, trained, step=2, epoch_losses=[1.0, 0.5])
    before = {name: (folder / name).read_bytes() for name in (WEIGHTS, OPTIMIZER)}
    verdict = {"best_step": 2, "best_top1_accuracy": 0.5, "best_evaluation": {"loss": 1.0, "weights_sha256": "0" * 64}}
    C.save_state_anew(tmp_path, C.TrainState(step=2, **verdict))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert C.load_checkpoint(folder, *trained) == C.TrainState(step=2, **verdict)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Change a file and its recorded sum with it, so that only the content is wrong."""
    (folder / name).write_bytes(data)
    state = json.loads((folder / C.STATE_NAME).read_text())
    state["sha256"][name] = hashlib.sha256(data).hexdigest()
    write_sealed(folder, state)


def write_sealed(folder: Path, state: dict) -> None:
    """With its own sum, if there can be one."""
    if isinstance(state.get("sha256"), dict):
        state["sha256"][STATE] = C.state_sha256(state)
    (folder / STATE).write_text(json.dumps(state))


def cut(name: str, share: float):
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def cut_with_sum(name: str, share: float):
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        rewrite(folder, name, data[: int(len(data) * share)])

    return damage


def flip(name: str, place: int):
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(data)

    return damage


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def content(name: str, data: bytes):
    return lambda folder: rewrite(folder, name, data)


def tensors(name: str, change):
    def damage(folder: Path) -> None:
        state = C.load_file(folder / name)
        change(state)
        rewrite(folder, name, C.save(state))

    return damage


def state(**changes: object):
    def damage(folder: Path) -> None:
        values = json.loads((folder / C.STATE_NAME).read_text())
        values.update(changes)
        write_sealed(folder, {key: value for key, value in values.items() if value != "absent"})

    return damage


def raw_state(text: bytes):
    return lambda folder: (folder / C.STATE_NAME).write_bytes(text)


def a_digit_of_the_state(folder: Path) -> None:
    text = (folder / STATE).read_text()
    changed = text.replace('"best_top1_accuracy": -1.0', '"best_top1_accuracy": -3.0')
    assert changed != text
    (folder / STATE).write_text(changed)


HUGE_HEADER = (1 << 60).to_bytes(8, "little") + b"{}"
MALFORMED = {
    "weights missing": remove(WEIGHTS),
    "optimizer missing": remove(OPTIMIZER),
    "state missing": remove(STATE),
    "weights empty": cut(WEIGHTS, 0),
    "weights cut in the header": cut(WEIGHTS, 0.01),
    "weights cut in the middle": cut(WEIGHTS, 0.5),
    "weights a byte short": cut(WEIGHTS, 0.9999),
    "optimizer cut in the middle": cut(OPTIMIZER, 0.5),
    "state cut in the middle": cut(STATE, 0.5),
    "state empty": cut(STATE, 0),
    "a bit of the weights' header": flip(WEIGHTS, 20),
    "a bit of the weights": flip(WEIGHTS, -1),
    "a bit of the momentum": flip(OPTIMIZER, -1),
    "weights cut, with its sum": cut_with_sum(WEIGHTS, 0.5),
    "optimizer cut, with its sum": cut_with_sum(OPTIMIZER, 0.9),
    "weights empty, with its sum": cut_with_sum(WEIGHTS, 0),
    "weights with a huge header": content(WEIGHTS, HUGE_HEADER),
    "optimizer with a huge header": content(OPTIMIZER, HUGE_HEADER),
    "weights with a header that is no JSON": content(WEIGHTS, (4).to_bytes(8, "little") + b"\xff\xfe{}"),
    "weights of another shape": tensors(WEIGHTS, lambda s: s.update({"fc.bias": torch.zeros(4)})),
    "weights with a key too many": tensors(WEIGHTS, lambda s: s.update(extra=torch.zeros(1))),
    "weights with a key too few": tensors(WEIGHTS, lambda s: s.pop("bn1.running_var")),
    "momentum of another shape": tensors(OPTIMIZER, lambda s: s.update({"fc.bias.momentum_buffer": torch.zeros(4)})),
    "momentum of nothing": tensors(OPTIMIZER, lambda s: s.update({"fc.other.momentum_buffer": torch.zeros(3)})),
    "momentum without a name": tensors(OPTIMIZER, lambda s: s.update(momentum=torch.zeros(3))),
    "state of another format": state(format_version=99),
    "state with the version of one without a sum": state(format_version=2),
    "state without a version": state(format_version="absent"),
    "state without sums": state(sha256={}),
    "state with sums that are none": state(sha256=[1, 2]),
    "state of another step": state(step=3),
    "state with a step in words": state(step="two"),
    "state with losses that are none": state(epoch_losses=["much"]),
    "state with a key too many": state(extra=1),
    "state whose best is of no weights": state(best_step=1, best_top1_accuracy=0.5, best_evaluation={}),
    "state of another recipe": state(recipe_sha256="0" * 64),
    "state with a recipe that is none": state(recipe_sha256=5),
    "state with losses that are a mapping": state(epoch_losses={}),
    "state with a loss that is not finite": state(epoch_losses=[float("nan")]),
    "state with more losses than steps": state(epoch_losses=[1.0, 1.0, 1.0]),
    "state with a best that is not finite": state(best_top1_accuracy=float("nan")),
    "state with a best step and no verdict": state(best_step=1),
    "state with a scaler that is none": state(grad_scaler={"x": 1}),
    "state with a scaler in words": state(grad_scaler={**dict.fromkeys(C.SCALER_KEYS, 1), "scale": "much"}),
    "state with a verdict that is not finite": state(
        best_step=1, best_top1_accuracy=0.5, best_evaluation={"weights_sha256": "0", "loss": float("nan")}
    ),
    "a digit of the state": a_digit_of_the_state,
    "momentum of no parameter at all": tensors(OPTIMIZER, lambda s: s.clear()),
    "state with a bad image before the first": state(bad_images=[-1]),
    "momentum of another type": tensors(
        OPTIMIZER, lambda s: s.update({"fc.bias.momentum_buffer": torch.zeros(3).half()})
    ),
    "momentum of a parameter missing": tensors(OPTIMIZER, lambda s: s.pop("fc.bias.momentum_buffer")),
    "state with bad images that are none": state(bad_images=["a.jpg"]),
    "state that is a list": raw_state(b"[]"),
    "state that is no text": raw_state(b"\xff\xfe\x00"),
    "state nested without end": raw_state(b"[" * 100_000),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_checkpoint_is_named_and_changes_nothing(tmp_path: Path, trained, name: str):
    folder = save(tmp_path, trained)
    MALFORMED[name](folder)
    model, optimizer = trained
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        C.load_checkpoint(folder, model, optimizer, recipe_sha256="")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_a_pickle_bomb_does_not_go_off(tmp_path: Path, trained, name: str):
    folder = save(tmp_path, trained)
    bomb = b"cos\nmkdir\n(V" + str(tmp_path / "boom").encode() + b"\ntR."
    if name == STATE:
        (folder / name).write_bytes(bomb)
    else:
        rewrite(folder, name, bomb)
    with pytest.raises(UserError, match=name):
        C.load_checkpoint(folder, *trained)
    assert not (tmp_path / "boom").exists()


def test_a_broken_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, trained):
    save(tmp_path, trained, step=1)
    flip(WEIGHTS, -1)(save(tmp_path, trained, step=2))
    said: list[str] = []
    assert C.load_newest_checkpoint(tmp_path, *trained, said.append).step == 1
    assert len(said) == 2
    assert "passed over: " in said[0]
    assert "step_00000002/model.safetensors is damaged" in said[0]
    assert "resuming after step 1" in said[1]


def test_weights_that_are_not_their_checkpoints_are_refused_by_other_readers_too(tmp_path: Path, trained):
    folder = save(tmp_path, trained)
    flip(WEIGHTS, -1)(folder)
    for checkpoint in (folder, folder / WEIGHTS):
        with pytest.raises(UserError, match=r"step_00000002/model.safetensors is damaged: its sha256 is not"):
            weights_file(checkpoint)
    (folder / STATE).write_text("{")
    with pytest.raises(UserError, match=r"cannot be compared with the sum in its state.json \(JSONDecodeError"):
        weights_file(folder)


def test_what_a_kill_left_half_done_is_mended(tmp_path: Path, trained):
    """A step that was about to be replaced by itself comes back; what was begun goes."""
    whole = save(tmp_path, trained, step=1)
    whole.rename(tmp_path / ".step_00000001.old")
    save(tmp_path, trained, step=2)
    for name in (".step_00000001.77.tmp", ".step_00000002.old", ".temporary.abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".state.json.77.tmp").write_text("{")
    C.recover_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    assert C.load_checkpoint(tmp_path / "step_00000001", *trained).step == 1


def test_to_start_afresh_is_the_users_decision(tmp_path: Path, trained):
    assert C.load_newest_checkpoint(tmp_path, *trained, print) is None
    remove(STATE)(save(tmp_path, trained))
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* can be used, as said above; mend that, or "):
        C.load_newest_checkpoint(tmp_path, *trained, print)


def test_files_are_contiguous_prefix_free_and_readable_by_the_group(tmp_path: Path, trained):
    folder = save(tmp_path, trained)
    momentum = C.load_file(folder / C.OPTIMIZER_NAME)
    assert momentum.keys() == {f"{name}.momentum_buffer" for name, _ in trained[0].named_parameters()}
    assert json.loads((folder / C.STATE_NAME).read_text())["sha256"].keys() == {WEIGHTS, OPTIMIZER, STATE}
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in folder.iterdir())
