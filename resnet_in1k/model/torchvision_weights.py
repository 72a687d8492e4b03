"""torchvision's published weights, `torchvision/resnet50.IMAGENET1K_V2`, through its own cache and checksums."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torchvision.models import WeightsEnum, get_model_weights

from resnet_in1k.model.resnet import LAYOUTS
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

PREFIX = "torchvision/"
_HASH = re.compile(r"-([a-f0-9]*)\.")
"""In the file's name, the beginning of its sha256: torch.hub's convention."""


def torchvision_weights(name: str) -> WeightsEnum:
    """`torchvision/MODEL.WEIGHTS`, or `torchvision/MODEL` for the weights that torchvision takes by default.

    Raises:
        UserError: for a name that torchvision does not have, or of no ResNet.
    """
    architecture, _, tag = name.removeprefix(PREFIX).partition(".")
    if architecture not in LAYOUTS:
        raise UserError(f"{name}: no {architecture} here, only {', '.join(LAYOUTS)}")
    known = get_model_weights(architecture)
    if (tag or "DEFAULT") not in known.__members__:
        raise UserError(f"{name}: torchvision has {', '.join(f'{architecture}.{each.name}' for each in known)}")
    return known[tag or "DEFAULT"]


def download_torchvision_weights(name: str, weights: WeightsEnum) -> Path:
    """The file in torch.hub's cache; downloaded if it is not there yet.

    Raises:
        UserError: if it cannot be downloaded, or is not what its name says.
    """
    url = str(weights.url)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    match = _HASH.search(file.name)
    expected = match.group(1) if match else ""
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), expected or None, progress=False)
        except Exception as error:  # urllib's, the disk's, torch's own for a wrong sha256
            raise UserError(
                f"{name} could not be downloaded from {url} ({first_line(error)}); with a copy of it in "
                f"{file.parent} no network is needed"
            ) from None
    if not files.sha256_of(file).startswith(expected):
        raise UserError(f"{file} is damaged: its sha256 does not begin with {expected}; remove it and try again")
    return file
