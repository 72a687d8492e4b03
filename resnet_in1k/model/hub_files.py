"""Downloading a repository of weights: only the files that are read here, none of them a pickle, none without limit."""

from pathlib import Path
from typing import Any

from resnet_in1k.core.errors import UserError
from resnet_in1k.core.text import file_size, first_line
from resnet_in1k.model.weights_file import WEIGHTS_NAME

MAX_BYTES = {WEIGHTS_NAME: 10**9, "config.json": 10**7, "eval.json": 10**7, "recipe.json": 10**7}
"""The files that are downloaded; a ResNet-152 has 0.24 GB."""


def download(repository: str, *, revision: str | None = None, **client_options: Any) -> Path:
    """The weights and what lies beside them, in a folder of the client's cache.

    Args:
        repository: USER/NAME.
        client_options: `token`, `cache_dir`, `force_download` … of huggingface_hub's snapshot_download.

    Raises:
        UserError: if there is no such repository, if it cannot be reached, or if a file is larger than MAX_BYTES.
    """
    from huggingface_hub import HfApi, snapshot_download

    reason: Exception | None = None
    try:
        tree = HfApi(token=client_options.get("token")).list_repo_tree(repository, revision=revision)
        _check_sizes(repository, {each.path: each.size for each in tree if hasattr(each, "size")})
    except UserError:
        raise
    except Exception as error:  # the client's errors share no base class
        reason = error
        client_options["local_files_only"] = True  # without the sizes only what was downloaded before
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*MAX_BYTES], **client_options))
    except Exception as error:
        reason = reason or error
        raise UserError(
            f"{repository} is no file or folder here, and no repository that could be downloaded "
            f"({first_line(reason.__cause__ or reason)})"
        ) from None


def _check_sizes(repository: str, sizes: dict[str, int]) -> None:
    for name, limit in MAX_BYTES.items():
        if sizes.get(name, 0) > limit:
            raise UserError(
                f"{repository}: {name} has {file_size(sizes[name])}, more than the {file_size(limit)} that are "
                "downloaded; download it yourself and give its path, if you trust it"
            )
