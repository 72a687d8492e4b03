"""Train ResNet on ImageNet-1k, measure its accuracy exactly, publish its weights."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_in1k.model.resnet import ResNet

__all__ = ["ResNet"]

PARENT_PROCESS_ID = os.getppid()
"""The process that started this one; asked here, as it may have ended when torch has taken its seconds to import."""


def __getattr__(name: str) -> Any:
    """`from resnet_in1k import ResNet` imports torch; `import resnet_in1k` does not."""
    if name == "ResNet":
        from resnet_in1k.model.resnet import ResNet

        return ResNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
