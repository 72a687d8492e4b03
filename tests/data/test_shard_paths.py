"""Which files the shards of a split are."""

import subprocess
from pathlib import Path

import pytest
from helpers.sources import as_shards

from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.data.tar_paths import expand_braces, is_pattern, shards_of_split, shards_of_whole
from resnet_in1k.utils.errors import UserError

NUMBERED = ["a-{00..12}.tar", "a-{8..11}.tar", "a-{0..12}.tar", "a-{3..0}.tar", "a-{11..08}", "{099..101}"]
WORDS = ["{x,y}-{0..2}.tar", "{only,}.tar", "no.tar", "a-{9..10}{b,c}/d"]


@pytest.mark.parametrize("pattern", NUMBERED + WORDS)
def test_braces_stand_for_what_bash_makes_of_them(pattern: str):
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == said.stdout.splitlines()


def test_braces_of_other_forms_are_refused():
    """Bash knows more; taken literally, they would find nothing."""
    for pattern in ("{a,b{1,2}}.tar", "{a..c}.tar", "{0..9..3}.tar", "x{1.tar"):
        with pytest.raises(UserError, match=r"braces are for \{000\.\.123\}, \{a,b\} and \{split\}, not"):
            expand_braces(pattern)
    assert expand_braces("{split}-{0..1}") == ["{split}-0", "{split}-1"]


def test_braces_without_end_are_refused():
    for pattern in ("{0..99999999999}", "{0..999}{0..999}"):
        with pytest.raises(UserError, match="stands for more than 100,000 names"):
            expand_braces(pattern)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_shards_are_found_in_a_folder_or_by_a_pattern(tmp_path: Path):
    folder = tmp_path / "set {1,2} [x]"  # no pattern, as it is there
    touch(folder, "in-train-01.tar", "in-train-00.tar", "in-validation-00.tar", "in-train-00.txt")
    assert not is_pattern(str(folder))
    assert names(shards_of_split(str(folder), "train"), folder) == ["in-train-00.tar", "in-train-01.tar"]
    assert names(shards_of_split(str(folder), "val"), folder) == ["in-validation-00.tar"]
    touch(tmp_path / "b", "train/1.tar", "val/2.tar", "other.tar")
    assert names(shards_of_split(f"{tmp_path}/b", "train"), tmp_path) == ["b/train/1.tar"]
    assert names(shards_of_split(f"{tmp_path}/b/{{split}}/*.tar", "val"), tmp_path) == ["b/val/2.tar"]
    assert names(shards_of_whole(f"{tmp_path}/b/other.tar"), tmp_path) == ["b/other.tar"]
    touch(tmp_path / "c", *(f"all-{number:03d}.tar" for number in range(4)))
    assert shards_of_split(f"{tmp_path}/c", "train") == []
    assert len(shards_of_whole(f"{tmp_path}/c")) == 4
    assert names(shards_of_whole(f"{tmp_path}/c/all-{{001..002}}.tar"), tmp_path) == ["c/all-001.tar", "c/all-002.tar"]
    with pytest.raises(UserError, match=r"the pattern needs \{split\} where the names of train and val differ"):
        shards_of_split(f"{tmp_path}/c/all-{{000..003}}.tar", "train")


def test_a_splits_name_is_a_word_of_the_files_name(tmp_path: Path):
    """Not a part of one: validation would be on training images."""
    touch(tmp_path, "retrieval-train-0.tar", "retrieval-test-0.tar", "retrained_valid.tar", "VAL1.tar")
    assert names(shards_of_split(str(tmp_path), "train"), tmp_path) == ["retrieval-train-0.tar"]
    assert names(shards_of_split(str(tmp_path), "val"), tmp_path) == ["VAL1.tar"]
    (tmp_path / "VAL1.tar").unlink()
    assert names(shards_of_split(str(tmp_path), "val"), tmp_path) == ["retrained_valid.tar"]


def test_a_shard_of_both_splits_is_refused(tmp_path: Path):
    touch(tmp_path, "set-train-val.tar", "set-train.tar")
    with pytest.raises(UserError, match=r"set-train-val\.tar is in both splits by its name; name them by a pattern"):
        open_source(f"shards:{tmp_path}", "val")


def test_a_shard_that_braces_name_must_be_there(tmp_path: Path):
    touch(tmp_path, "train-00.tar", "train-02.tar", "val-00.tar")
    with pytest.raises(UserError, match=r"03\}\.tar: 2 of 4 are missing: .*train-01\.tar, .*train-03\.tar$"):
        shards_of_split(f"{tmp_path}/{{split}}-{{00..03}}.tar", "train")
    assert names(shards_of_split(f"{tmp_path}/{{split}}-{{00..00}}.tar", "val"), tmp_path) == ["val-00.tar"]
    assert shards_of_split(f"{tmp_path}/nothing-{{split}}-{{00..03}}.tar", "val") == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_that_are_not_all_written_or_copied_are_refused(image_folder: Path, tmp_path: Path, split: str):
    """Else a part of the images would be trained or, worse, evaluated on without a word."""
    data = as_shards(image_folder, tmp_path / "shards")
    folder = tmp_path / "shards" / split
    last = sorted(folder.glob("*.tar"))[-1]
    last.rename(tmp_path / "elsewhere.tar")
    for place in (data, f"{data}/{{split}}/*.tar"):
        with pytest.raises(UserError, match=rf"{split}: 1 of \d+ shards are missing: {last.name}; copy them there, or"):
            open_train_and_val(place)
    (tmp_path / "elsewhere.tar").rename(last)
    (folder / "more.tar").symlink_to(last)  # others may lie beside them
    with_more = len(open_source(data, split))
    (folder / "more.tar").unlink()
    assert with_more > len(open_source(data, split)) == (37 if split == "train" else 12)
