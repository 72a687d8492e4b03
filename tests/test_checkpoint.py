import json
import os
from pathlib import Path

import pytest
import torch

from resnet_in1k import checkpoint as C
from resnet_in1k import files
from resnet_in1k.errors import UserError
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.optim import build_optimizer


@pytest.fixture
def trained(tiny):
    """A model and an optimizer after two steps, so that there is momentum."""
    torch.manual_seed(0)
    model = ResNet("resnet18", num_classes=3).to(memory_format=torch.channels_last)
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
    folder = save(tmp_path, trained, **state)
    assert folder.name == "step_00000007"
    torch.manual_seed(1)
    model = ResNet("resnet18", num_classes=3).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, tiny)
    assert C.load_checkpoint(folder, model, optimizer) == C.TrainState(**state)

    inputs = torch.randn(4, 3, 32, 32)
    for network, sgd in (trained, (model, optimizer)):
        sgd.zero_grad()
        network(inputs).square().mean().backward()
        sgd.step()
    for ours, theirs in zip(trained[0].state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


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
    for step in (1, 2, 3, 4, 5):
        (tmp_path / f"step_{step:08d}").mkdir()
    C.prune_checkpoints(tmp_path, keep=2, best_step=2)
    assert [step for step, _ in C.list_checkpoints(tmp_path)] == [2, 4, 5]


@pytest.mark.parametrize("name", [C.WEIGHTS_NAME, C.OPTIMIZER_NAME])
def test_a_damaged_file_is_named(tmp_path: Path, trained, name: str):
    folder = save(tmp_path, trained)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        C.load_checkpoint(folder, *trained)


@pytest.mark.parametrize("name", [C.WEIGHTS_NAME, C.OPTIMIZER_NAME, C.STATE_NAME])
def test_a_missing_file_is_named(tmp_path: Path, trained, name: str):
    folder = save(tmp_path, trained)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{folder.name} is not a whole checkpoint .*{name}"):
        C.load_checkpoint(folder, *trained)


def test_files_are_contiguous_prefix_free_and_readable_by_the_group(tmp_path: Path, trained):
    folder = save(tmp_path, trained)
    momentum = C.load_file(folder / C.OPTIMIZER_NAME)
    assert momentum.keys() == {f"{name}.momentum_buffer" for name, _ in trained[0].named_parameters()}
    assert json.loads((folder / C.STATE_NAME).read_text())["sha256"].keys() == {C.WEIGHTS_NAME, C.OPTIMIZER_NAME}
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in folder.iterdir())
