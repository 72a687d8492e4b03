"""Sources in memory and in files."""

import gc
import multiprocessing
from pathlib import Path

import numpy as np
import psutil
import pytest

from resnet_in1k.data.dataset import FileSource, PackedBytes, PackedSource

ITEMS = [b"one", b"", "zwölf/Bild.jpg".encode(), b"\xff\x00"]


def test_packed_bytes_is_a_list_of_bytes():
    packed = PackedBytes(ITEMS)
    assert [packed[index] for index in range(len(packed))] == ITEMS
    assert [packed.view(index).tobytes() for index in range(len(packed))] == ITEMS
    assert packed.num_bytes == sum(map(len, ITEMS)) + 8 * (len(ITEMS) + 1)


def num_bytes_copied_by_reading(source: PackedSource, answer: "multiprocessing.connection.Connection") -> None:
    gc.disable()  # it would write to, and so copy, all that was inherited
    process = psutil.Process()
    before = process.memory_full_info().uss
    for index in range(len(source)):
        source.read(index)
    answer.send(process.memory_full_info().uss - before)


def test_a_forked_process_copies_nothing_of_the_images_that_it_reads():
    """To read an item of a Python list is to write its reference count, which copies the page of memory that it is in:
    here 13 MB, for ImageNet's paths 0.2 GB in each loader worker."""
    items = [number.to_bytes(4, "big") * 25 for number in range(100_000)]
    source = in_memory(items, labels=(0,) * len(items))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=num_bytes_copied_by_reading, args=(source, theirs))
    process.start()
    assert ours.poll(timeout=60)
    assert ours.recv() < 2e6
    process.join()


def in_memory(items: list[bytes] = ITEMS, labels: tuple[int, ...] = (0, 1, 0, 1), **changes: object) -> PackedSource:
    facts = {"name": "x", "split": "val", "class_names": ("a", "b"), **changes}
    return PackedSource(labels=np.array(labels), items=PackedBytes(items), **facts)


def test_more_labels_than_images_repeat_the_images():
    source = in_memory(labels=(0, 1, 0, 1, 1, 0))
    assert len(source) == 6
    assert [source.read(index).tobytes() for index in range(6)] == [*ITEMS, *ITEMS[:2]]
    assert source.image_name(5) == "x/val[5]"


@pytest.mark.parametrize(
    "changed",
    [
        {"items": [b"one", b"", b"other", b"\xff\x00"]},
        {"items": [b"on", b"e", *ITEMS[2:]]},  # the same bytes, divided otherwise
        {"labels": (0, 1, 1, 1)},
        {"class_names": ("a", "c")},
    ],
)
def test_the_fingerprint_changes_with_images_labels_and_class_names(changed: dict):
    assert in_memory().fingerprint() == in_memory(name="y").fingerprint()
    assert in_memory(**changed).fingerprint() != in_memory().fingerprint()


def in_files(folder: Path, *paths: bytes) -> FileSource:
    labels = np.zeros(len(paths), dtype=np.int64)
    return FileSource(name="x", split="val", class_names=("a",), labels=labels, items=PackedBytes(paths), folder=folder)


def test_files_are_read_below_their_folder(tmp_path: Path):
    """Also one whose name is no UTF-8."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.jpg").write_bytes(b"content")
    Path(str(tmp_path), "a", "\udcff.jpg").write_bytes(b"other")
    source = in_files(tmp_path, b"a/b.jpg", b"a/\xff.jpg")
    assert [source.read(index).tobytes() for index in range(2)] == [b"content", b"other"]
    assert source.image_name(0) == str(tmp_path / "a/b.jpg")
    assert source.read(0).flags.writeable  # torch warns of arrays that are not


def test_a_read_error_is_not_taken_for_the_end_of_the_file(tmp_path: Path):
    """A folder can be opened, but not read, as a file on a failing disk."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        in_files(tmp_path, b"folder").read(0)
