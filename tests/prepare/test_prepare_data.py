"""scripts/prepare_data.py: archives, Kaggle's layout and folders to what trains, whole after any kill."""

import csv
import gzip
import io
import multiprocessing
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.archives import WNIDS, add, meta_mat, tar_of, write_archives, write_devkit
from helpers.images import encoded
from PIL import Image

from resnet_in1k.commands.prepare_data import PrepareOptions, prepare_data
from resnet_in1k.core.errors import UserError
from resnet_in1k.data.decode import decode
from resnet_in1k.data.sources import open_train_and_val
from resnet_in1k.prepare import imagenet_archives
from resnet_in1k.prepare.imagenet_archives import Archives


@pytest.fixture(scope="session")
def images(photographs: list[np.ndarray]) -> list[bytes]:
    """18 photographs of 300 × 200 and 90 × 120 pixels in turn."""
    pictures = []
    for number in range(18):
        height, width = [(200, 300), (120, 90)][number % 2]
        crop = photographs[number % 2][number : number + height, 2 * number : 2 * number + width]
        pictures.append(encoded(Image.fromarray(crop), format="JPEG", quality=90).tobytes())
    return pictures


@pytest.fixture
def archives(images: list[bytes], tmp_path: Path) -> tuple[Archives, dict[str, bytes]]:
    return write_archives(tmp_path / "archives", images)


def options(archives: Archives, output: Path, **changes: object) -> PrepareOptions:
    given = {"train_tar": archives.train, "val_tar": archives.val, "devkit_tar": archives.devkit}
    return PrepareOptions(**{**given, "output": output, "allow_partial": True, "processes": 1, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Of all images; there must be nothing else but what the script keeps for itself."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    own = {"prepared.json", "train/.plan.json", "val/.plan.json"}
    assert not [name for name in found.keys() - own if "/." in name or not name.startswith(("train/", "val/"))]
    return {name: path.read_bytes() for name, path in found.items() if name not in own}


def prepare(how: PrepareOptions) -> list[str]:
    said: list[str] = []
    assert prepare_data(how, said.append)
    return said


def test_archives_come_out_by_class(archives: tuple[Archives, dict[str, bytes]], tmp_path: Path):
    """The labels of the validation images are the devkit's, whose numbers are not in the order of the WordNet ids."""
    files, expected = archives
    before = {path: path.read_bytes() for path in files.by_name.values()}
    said = prepare(options(files, tmp_path / "out", processes=2))
    assert contents(tmp_path / "out") == expected
    assert "12 images in" in " ".join(said)
    assert "where ImageNet has 1,281,167" in " ".join(said)
    assert "3 classes in" in " ".join(said)
    assert {path: path.read_bytes() for path in before} == before
    train, val = open_train_and_val(str(tmp_path / "out"))
    assert train.class_names == tuple(sorted(WNIDS))
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    said = prepare(options(files, tmp_path / "out"))
    assert said == [f"nothing to do: {tmp_path / 'out'} has 12 + 6 images of these"]


def test_archives_that_are_not_the_originals_are_refused(archives: tuple[Archives, dict[str, bytes]], tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.tar is not ImageNet's ILSVRC2012_img_train\.tar: its md5 is \w{32}"):
        prepare(options(archives[0], tmp_path / "out", allow_partial=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_the_result_is_the_same(images: list[bytes], tmp_path: Path):
    """Twenty kills (-9) of two processes that resize 450 images; the moments are drawn from the whole time."""
    files, expected = write_archives(tmp_path / "archives", images, repeats=25)
    generator, context = random.Random(0), multiprocessing.get_context("fork")

    def start(output: Path) -> multiprocessing.Process:
        how = options(files, output, processes=2, resize=100)
        process = context.Process(target=prepare_data, args=(how, lambda line: None))
        process.start()
        return process

    started = time.monotonic()
    start(tmp_path / "whole").join()
    took = time.monotonic() - started
    num_finished = 0
    for _ in range(20):
        process = start(tmp_path / "out")
        process.join(timeout=generator.uniform(0, took))
        if process.exitcode is None:
            process.kill()
            process.join()
        elif (tmp_path / "out/prepared.json").exists():
            num_finished += 1
            shutil.rmtree(tmp_path / "out")
    assert num_finished < 20
    process = start(tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert contents(tmp_path / "out").keys() == expected.keys()


def test_killed_while_it_writes_its_plan(archives: tuple[Archives, dict[str, bytes]], tmp_path: Path):
    """What is left then are hidden files: they are removed, and the folder is not taken for somebody else's."""
    files, expected = archives
    for name in ("out/train/..plan.json.123.tmp", "out/val/..plan.json.123.tmp", "out/.prepared.json.123.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{")
    prepare(options(files, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new)


def inner_with(name: str, data: bytes = b"x", **changes: object) -> bytes:
    """An archive of one class with this entry."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        add(archive, f"{WNIDS[0]}_1.JPEG", b"image")
        add(archive, name, data, **changes)
    return tar_of([(f"{WNIDS[0]}.tar", file.getvalue())])


def devkit_bomb(path: Path) -> None:
    """Zeros to 1 GB."""
    with gzip.open(path, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("ILSVRC2012_devkit_t12/data/zeros")
        entry.size = 10**9
        archive.addfile(entry, Zeros())


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
HOSTILE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a path above": (
        "train",
        lambda _: inner_with("../../escaped.JPEG"),
        r"entry '\.\./\.\./escaped\.JPEG' has no name",
    ),
    "an absolute path": ("train", lambda _: inner_with("/tmp/escaped.JPEG"), r"escaped\.JPEG' has no name"),
    "a folder": ("train", lambda _: inner_with("sub/a.JPEG"), r"entry 'sub/a\.JPEG' has no name"),
    "a hidden file": ("train", lambda _: inner_with(".partial.JPEG"), "has no name of an image"),
    "a link": ("train", lambda _: inner_with("n_2.JPEG", b"", **LINK), r"entry 'n_2\.JPEG' is no plain file"),
    "a hard link": (
        "train",
        lambda _: inner_with("n_2.JPEG", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd", size=0),
        "is no plain file",
    ),
    "a device": ("train", lambda _: inner_with("n_2.JPEG", b"", type=tarfile.CHRTYPE, size=0), "is no plain file"),
    "a size of nothing": ("train", lambda _: inner_with("n_2.JPEG", b""), r"entry 'n_2\.JPEG' has 0 B"),
    "the same name twice": ("train", lambda _: inner_with(f"{WNIDS[0]}_1.JPEG"), "two entries named"),
    "no class": (
        "train",
        lambda _: tar_of([("../n01000000.tar", tar_of([("a.JPEG", b"x")]))]),
        "is not named as a class",
    ),
    "an empty class": ("train", lambda _: tar_of([("n01000000.tar", tar_of([]))]), r"n01000000\.tar: no images in it"),
    "cut off": ("train", lambda data: data[:9000], "is cut off or no tar file"),
    "cut off in a class": (
        "train",
        lambda data: replaced(data, b"n02000000_3.JPEG", b"\xff" * 16),
        "no entry and no end at byte",
    ),
    "no tar": ("train", lambda _: b"something else" * 99, "is cut off or no tar file"),
    "empty": ("train", lambda _: b"", "is cut off or no tar file"),
    "validation outside": (
        "val",
        lambda _: tar_of([("../ILSVRC2012_val_00000001.JPEG", b"x")]),
        "has no name of an image",
    ),
    "validation without a label": (
        "val",
        lambda _: tar_of([("ILSVRC2012_val_00000099.JPEG", b"x")]),
        "labels of 6 images",
    ),
    "validation of other names": ("val", lambda _: tar_of([("a.JPEG", b"x")]), "has no name of an image"),
    "validation cut off": ("val", lambda data: data[:-11_000], "cut off"),
    "no devkit": ("devkit", lambda _: b"something else", "is cut off or no ImageNet devkit"),
    "devkit cut off": ("devkit", lambda data: data[: len(data) // 2], "is cut off or no ImageNet devkit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_write_nothing_and_name_the_entry(images: list[bytes], tmp_path: Path, name: str):
    which, damage, message = HOSTILE[name]
    files, _ = write_archives(tmp_path / "archives", images)
    path = files.by_name[which]
    path.write_bytes(damage(path.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        prepare(options(files, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped.JPEG").exists()


def test_a_devkit_that_unpacks_to_too_much_is_refused(images: list[bytes], tmp_path: Path):
    files, _ = write_archives(tmp_path / "archives", images)
    devkit_bomb(files.devkit)
    assert files.devkit.stat().st_size < 10**7
    with pytest.raises(UserError, match=r"unpacks to over 210 MB; this is not ImageNet's devkit"):
        prepare(options(files, tmp_path / "out"))


def test_a_devkit_without_its_files_is_named(images: list[bytes], tmp_path: Path):
    files, _ = write_archives(tmp_path / "archives", images)
    files.devkit.write_bytes(gzip.compress(tar_of([("devkit/data/meta.mat", meta_mat())])))
    with pytest.raises(UserError, match=r"no 'data/ILSVRC2012_validation_ground_truth\.txt' in it"):
        prepare(options(files, tmp_path / "out"))
    write_devkit(files.devkit, [4, 1, 2, 2, 1, 3])  # a class above the others
    with pytest.raises(UserError, match="is of class unknown, which has no training images"):
        prepare(options(files, tmp_path / "out"))


def test_known_checksums_are_torchvisions(monkeypatch: pytest.MonkeyPatch, archives, tmp_path: Path):
    """Of the files that torchvision's own dataset knows; here those of the archives at hand are put in their place."""
    import hashlib

    files, _ = archives
    sums = {name: ("x", hashlib.md5(path.read_bytes()).hexdigest()) for name, path in files.by_name.items()}
    monkeypatch.setattr(imagenet_archives, "ARCHIVE_META", sums)
    with pytest.raises(UserError, match=r"12 images in .*train\.tar, where ImageNet has 1,281,167; download it again"):
        prepare(options(files, tmp_path / "out", allow_partial=False))


def test_resized_copies_are_what_pillow_makes_nearly(images: list[bytes], archives, tmp_path: Path):
    """Shorter side 100 px; images that have no more stay byte for byte; upright, as training sees them."""
    files, expected = archives
    said = prepare(options(files, tmp_path / "out", resize=100))
    assert "times as many" in said[-1]
    written = contents(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, data in expected.items():
        original = Image.open(io.BytesIO(data))
        if min(original.size) <= 100:
            assert written[name] == data
            continue
        ours = decode(np.frombuffer(bytearray(written[name]), dtype=np.uint8))
        assert ours.shape == (3, 100, 150)
        theirs = np.asarray(original.resize((150, 100), Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).mean() < 3  # JPEG's own loss
        assert Image.open(io.BytesIO(written[name])).format == "JPEG"


def test_a_rotated_photograph_is_resized_upright(photographs: list[np.ndarray], tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / "in" / split / "ant").mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(photographs[0][:100, :200]).save(tmp_path / "in" / split / "ant/a.jpg", exif=exif)
    prepare(PrepareOptions(data=str(tmp_path / "in"), output=tmp_path / "out", resize=50, processes=1))
    copy = Image.open(tmp_path / "out/train/ant/a.jpg")
    assert copy.size == (50, 100)
    assert not copy.getexif()


def test_straight_to_shards(archives, tmp_path: Path):
    files, expected = archives
    said = prepare(options(files, tmp_path / "out", shards=1))
    assert f"--data shards:{tmp_path / 'out'}" in said[-1]
    train, val = open_train_and_val(f"shards:{tmp_path / 'out'}")
    assert train.class_names == val.class_names == tuple(sorted(WNIDS))
    for source in (train, val):
        found = {(source.class_names[source.labels[i]], source.read(i).tobytes()) for i in range(len(source))}
        assert found == {(name.split("/")[1], data) for name, data in expected.items() if name.startswith(source.split)}


def write_kaggle(folder: Path, expected: dict[str, bytes]) -> Path:
    """As competition imagenet-object-localization-challenge unpacks."""
    images = folder / "ILSVRC/Data/CLS-LOC"
    lines = ["ImageId,PredictionString"]
    for name, data in expected.items():
        split, wnid, file = name.split("/")
        path = images / (f"train/{wnid}/{file}" if split == "train" else f"val/{file}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if split == "val":
            lines.append(f"{Path(file).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_kaggles_layout_and_what_may_be_wrong_in_it(archives, tmp_path: Path):
    _, expected = archives
    folder = write_kaggle(tmp_path / "kaggle", expected)
    prepare(PrepareOptions(kaggle=folder, output=tmp_path / "out", processes=1))
    assert contents(tmp_path / "out") == expected
    solution = folder / "LOC_val_solution.csv"
    text = solution.read_text()
    for changed, message in (
        (text.replace("n03000000", "n04000000"), "is of class n04000000, which has no folder"),
        (text.replace("val_00000002", "val_00000222"), "no image in|no line in"),
        (text.replace("PredictionString", "Other"), r"cannot be read \(KeyError"),
    ):
        solution.write_text(changed)
        with pytest.raises(UserError, match=message):
            prepare(PrepareOptions(kaggle=folder, output=tmp_path / "again", processes=1))
    solution.unlink()
    with pytest.raises(UserError, match=r"Kaggle's layout has ILSVRC/Data/CLS-LOC/ and LOC_val_solution\.csv"):
        prepare(PrepareOptions(kaggle=folder, output=tmp_path / "again", processes=1))


def test_a_folder_of_classes_is_divided_without_copies(image_folder: Path, tmp_path: Path):
    folder = shutil.copytree(image_folder / "train", tmp_path / "mine")
    prepare(PrepareOptions(data=str(folder), val_share=0.2, output=tmp_path / "out", processes=1))
    written = {path.split("/", 1)[1]: data for path, data in contents(tmp_path / "out").items()}
    assert written == {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}
    file = next((tmp_path / "out/train/ant").iterdir())
    assert file.stat().st_nlink == 2
    (folder / "ant/new.jpg").write_bytes((folder / "ant/0.jpg").read_bytes())
    with pytest.raises(UserError, match="is being made of other images or sizes; choose another folder, or remove it"):
        prepare(PrepareOptions(data=str(folder), val_share=0.2, output=tmp_path / "out", processes=1))


def test_images_keep_their_names_below_their_classes(image_folder: Path, photographs: list[np.ndarray], tmp_path: Path):
    """Also with colons, and in folders named as their class."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    names = ["ant/0.jpg", "ant/a:0.jpg", "ant/ant/0.jpg", "ant/ant/ant/b:0.jpg"]
    for number, name in enumerate(names):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photographs[number % 2]).save(folder / "train" / name, quality=50 + number)
    prepare(PrepareOptions(data=str(folder), output=tmp_path / "out", processes=1))
    written = contents(tmp_path / "out")
    assert {f"train/{name}" for name in names} < written.keys()
    assert written == contents(folder)


def test_images_of_shards_keep_their_keys_where_they_name_the_class(image_folder: Path, tmp_path: Path):
    """With a suffix, as a key has none; never outside the class's folder."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/classes.json").write_text('["ant", "bee"]')
    image = (image_folder / "val/ant/0.jpg").read_bytes()
    for split in ("train", "val"):
        keys = ["ant/one", "bee/two", "three", "ant/../../../outside"]
        entries = [
            (f"{key}.{kind}", data) for key in keys for kind, data in (("jpg", image), ("cls", b"%d" % ("bee" in key)))
        ]
        (tmp_path / f"shards/{split}.tar").write_bytes(tar_of(entries))
    prepare(PrepareOptions(data=f"shards:{tmp_path / 'shards'}", output=tmp_path / "a/b/c/out", processes=1))
    files = {"ant/00000000.jpg", "ant/one.jpg", "bee/two.jpg", "ant/00000003.jpg"}
    assert contents(tmp_path / "a/b/c/out").keys() == {
        f"{split}/{name}" for split in ("train", "val") for name in files
    }
    assert len(list((tmp_path / "a").rglob("*.jpg"))) == 8


def test_what_others_wrote_is_left_alone(image_folder: Path, tmp_path: Path):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and was not written by this script; choose another folder"):
        prepare(PrepareOptions(data=str(image_folder), output=tmp_path / "out", processes=1))
    assert [path.name for path in (tmp_path / "out/train").iterdir()] == ["precious.txt"]


def test_what_is_broken_duplicated_misfiled_or_empty_is_listed(archives, images: list[bytes], tmp_path: Path):
    files, _ = archives
    prepare(options(files, tmp_path / "out"))
    said: list[str] = []
    report = tmp_path / "report.csv"
    how = PrepareOptions(verify=str(tmp_path / "out"), report=report, processes=2)
    assert prepare_data(how, said.append)
    assert said[-1].endswith("18 images, all whole")
    assert report.read_text() == "image,kind,detail\n"

    train = tmp_path / "out/train"
    broken, empty = train / "n01000000/n01000000_0.JPEG", train / "n02000000/n02000000_1.JPEG"
    broken.write_bytes(images[0][:200])
    empty.write_bytes(b"")
    misfiled = shutil.move(train / "n03000000/n03000000_2.JPEG", train / "n02000000")
    twin = tmp_path / "out/val/n03000000/again.JPEG"
    shutil.copy(train / "n03000000/n03000000_3.JPEG", twin)
    said.clear()
    assert not prepare_data(how, said.append)
    found = {(Path(row["image"]).name, row["kind"]) for row in csv.DictReader(report.open())}
    assert found == {
        (broken.name, "broken"),
        (empty.name, "empty"),
        (Path(misfiled).name, "misfiled"),
        (twin.name, "duplicate"),
    }
    assert said[-1].endswith("19 images, 4 problems")


def test_other_sources_are_verified_too(image_folder: Path, tmp_path: Path):
    prepare(PrepareOptions(data=str(image_folder), output=tmp_path / "out", shards=1, processes=1))
    assert prepare_data(PrepareOptions(verify=f"shards:{tmp_path / 'out'}", processes=1), lambda line: None)
    with pytest.raises(UserError, match="no such folder"):
        prepare_data(PrepareOptions(verify=str(tmp_path / "nowhere"), processes=1))


def test_images_without_a_val_split_are_verified_all(image_folder: Path):
    said: list[str] = []
    assert prepare_data(PrepareOptions(verify=str(image_folder / "train"), processes=1), said.append)
    assert said[-1] == f"{image_folder / 'train'}: 37 images, all whole"


def test_splits_that_training_would_refuse_are_listed(image_folder: Path, tmp_path: Path):
    """And the images of the other split verified all the same."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    how = PrepareOptions(verify=str(folder), report=tmp_path / "report.csv", processes=1)
    shutil.rmtree(folder / "val/cat")
    assert not prepare_data(how, lambda line: None)
    (row,) = csv.DictReader(how.report.open())
    assert row["kind"] == "classes"
    assert "only in train: cat" in row["detail"]
    (folder / "val/cat").mkdir()
    (folder / "train/ant/0.jpg").write_bytes(b"")
    assert not prepare_data(how, lambda line: None)
    rows = list(csv.DictReader(how.report.open()))
    assert [row["kind"] for row in rows] == ["not verified", "empty"]
    assert "cat: no images in this class" in rows[0]["detail"]


def test_contradicting_options_are_refused(tmp_path: Path):
    for given, message in (
        ({"train_tar": tmp_path / "a"}, "--train-tar, --val-tar and --devkit-tar belong together"),
        ({}, "give either the three archives, or --kaggle, or --data, or --verify"),
        ({"data": "x", "verify": "y"}, "give either the three archives"),
        ({"data": "x"}, "--output: where to write is not given"),
        ({"data": "x", "output": tmp_path, "report": tmp_path / "r.csv"}, "--report is for --verify"),
        ({"data": "x", "output": tmp_path, "resize": 5}, "--resize 5: must be at least 32"),
    ):
        with pytest.raises(UserError, match=message):
            PrepareOptions(**given)
