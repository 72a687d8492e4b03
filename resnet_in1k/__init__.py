"""Train ResNet on ImageNet-1k, know how good it is, publish it."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_in1k.model import ResNet

__all__ = ["ResNet"]

STARTED_BY = os.getppid()
"""The process that started this one, asked before torch has taken its seconds: by then it may have been killed."""


def __getattr__(name: str) -> Any:
    """`from resnet_in1k import ResNet` imports torch; `import resnet_in1k` does not."""
    if name == "ResNet":
        from resnet_in1k.model import ResNet

        return ResNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
