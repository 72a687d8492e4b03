"""Data sets of a (local) Hub, read by the real client: a gated one, a missing one, no network, and then without one."""

import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.hub_server import READ_TOKEN, Blob, HubServer, Repo
from helpers.sources import as_parquet
from huggingface_hub import constants

from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.utils.errors import UserError

NAME = "someone/animals"


@pytest.fixture
def animals(image_folder: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """The images of the folder, as a data set that is not gated yet; the client has no token."""
    as_parquet(image_folder, tmp_path / "tables")
    repo = hub.repos[NAME] = Repo(private=False)
    tables = tmp_path / "tables"
    files = {path.relative_to(tables).as_posix(): path.read_bytes() for path in tables.rglob("*.parquet")}
    repo.add("main", "images", {name: Blob(data, lfs=True) for name, data in files.items()})
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN")
    return repo


def refused(data: str) -> str:
    with pytest.raises(UserError) as caught:
        open_source(data, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_set_of_the_hub_has_the_images_of_the_folder_it_was_made_of(
    animals: Repo, image_folder: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And once it was downloaded, needs no network."""
    for _ in range(2):
        for source, folder in zip(open_train_and_val(f"hf:{NAME}"), open_train_and_val(str(image_folder)), strict=True):
            assert source.class_names == folder.class_names
            assert np.array_equal(source.labels, folder.labels)
            for index in range(len(folder)):
                assert source.read(index).tobytes() == folder.read(index).tobytes()
        disconnect(monkeypatch)
    assert "hf:someone/others cannot be loaded (Couldn't reach 'someone/others' on the Hub" in (
        said := refused("hf:someone/others")
    )
    assert said.endswith("without a network only what was downloaded before, to this machine's HF_HOME, can be read")


def disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub: nothing listens there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_gated_set_is_read_by_who_has_accepted_its_terms(animals: Repo, monkeypatch: pytest.MonkeyPatch):
    animals.gated = True
    advice = f"accept its terms at https://huggingface.co/datasets/{NAME}, then `hf auth login`"
    assert refused(f"hf:{NAME}").endswith(advice)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert refused(f"hf:{NAME}").endswith(advice)
    animals.accepted_by.add("me")
    assert len(open_source(f"hf:{NAME}", "train")) == 37


def test_a_missing_set_and_a_private_one_look_alike(animals: Repo):
    """To who may not know that it is there."""
    animals.private = True
    for name in (NAME, "someone/nothing"):
        said = refused(f"hf:{name}")
        assert f"Dataset '{name}' doesn't exist on the Hub or cannot be accessed" in said
        assert said.endswith("is the name right? A private or gated one needs `hf auth login`")
