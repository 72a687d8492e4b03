"""Downloading a repository of weights: only the files that are read here, none of them without limit.

A pickle only if there is no safetensors file; it is read by torch's weights-only reader, which executes nothing of it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resnet_in1k.model.weights import PICKLE_NAME, WEIGHTS_NAME
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size, first_line

JSON_NAMES = ("config.json", "preprocessor_config.json", "eval.json", "recipe.json")
MAX_BYTES = {WEIGHTS_NAME: 10**9, PICKLE_NAME: 10**9, **dict.fromkeys(JSON_NAMES, 10**7)}
"""The files that are downloaded, the second only where there is not the first; a ResNet-152 has 0.24 GB."""


REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""USER/NAME."""


def download(
    repository: str, *, revision: str | None = None, names: Iterable[str] = tuple(MAX_BYTES), **client_options: Any
) -> Path:
    """The weights and what lies beside them, in a folder of the client's cache.

    Args:
        repository: USER/NAME.
        names: of the files that are wanted; those that are not there are left out.
        client_options: `token`, `cache_dir`, `force_download` … of huggingface_hub's snapshot_download.

    Raises:
        UserError: if there is no such repository, if it cannot be reached, or if a file is larger than MAX_BYTES.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what its retries say by the way is in the one line below
    reason: Exception | None = None
    wanted = list(names)
    try:
        tree = HfApi(token=client_options.get("token")).list_repo_tree(repository, revision=revision)
        sizes = {each.path: each.size for each in tree if hasattr(each, "size")}
        if WEIGHTS_NAME in sizes and PICKLE_NAME in wanted:
            wanted.remove(PICKLE_NAME)
        _check_sizes(repository, {name: sizes.get(name, 0) for name in wanted})
    except UserError:
        raise
    except Exception as error:  # the client's errors share no base class
        reason = error
        client_options["local_files_only"] = True  # without the sizes only what was downloaded before
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, **client_options))
    except Exception as error:
        reason = reason or error
        raise UserError(
            f"{repository} is no file or folder here, and no repository that could be downloaded "
            f"({first_line(reason.__cause__ or reason)})"
        ) from None


def _check_sizes(repository: str, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size > MAX_BYTES[name]:
            raise UserError(
                f"{repository}: {name} has {file_size(size)}, more than the {file_size(MAX_BYTES[name])} that are "
                "downloaded; download it yourself and give its path, if you trust it"
            )
