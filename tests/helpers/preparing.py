"""scripts/prepare_data.py in this process, and what it wrote."""

import contextlib
import io
from pathlib import Path

from helpers.archives import Archives
from resnet_in1k.cli.prepare_data import PrepareOptions, prepare_data


def options(archives: Archives, output: Path, **changes: object) -> PrepareOptions:
    given = {"train_tar": archives.train, "val_tar": archives.val, "devkit_tar": archives.devkit}
    return PrepareOptions(**{**given, "output": output, "allow_partial": True, "processes": 1, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of all images by path; there must be no other files but the script's own."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    own = {".lock", "train/.plan.json", "val/.plan.json"}
    assert not [name for name in found.keys() - own if "/." in name or not name.startswith(("train/", "val/"))]
    return {name: path.read_bytes() for name, path in found.items() if name not in own}


def prepare(how: PrepareOptions) -> list[str]:
    """Return the printed lines."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert prepare_data(how) == (how.verify is None or printed.getvalue().endswith("no problems\n"))
    return printed.getvalue().splitlines()


def prepare_from(data: object, output: Path, **changes: object) -> list[str]:
    """From images as --data reads them."""
    return prepare(PrepareOptions(data=str(data), output=output, processes=1, **changes))
