"""Where what was found about files is kept between runs: in the user's cache, by the paths of those files."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def cache_folder() -> Path:
    """Where there is no home, as for a container's user without a name, one that cannot be made: nothing is kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "resnet_in1k")
    except RuntimeError:
        return Path(os.devnull, "resnet_in1k")


def cache_file(kind: str, paths: Sequence[Path], suffix: str) -> Path:
    """Whether what is kept there still holds is for its reader to tell."""
    return cache_folder() / f"{kind}-{digest_of(str(path.absolute()) for path in paths)}{suffix}"


def digest_of(names: Iterable[str]) -> str:
    """16 hexadecimal digits."""
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return hashlib.sha256(joined).hexdigest()[:16]
