"""Errors that a user can act on, and the translation of torch's errors into such ones."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from resnet_in1k.utils.format import first_line


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked.

    The message is one line: what is wrong, where, and a cure. Scripts print it and exit with status 2, without a
    traceback. All processes of a run raise such an error together, and the main process prints it.
    """


class ProcessError(UserError):
    """A UserError that one process may raise alone, and therefore prints itself."""


class Preempted(Exception):
    """The run was asked to stop and has saved everything; the message explains how to resume."""


@contextlib.contextmanager
def translate_errors(num_images: int = 0) -> Iterator[None]:
    """Raise ProcessError for a RuntimeError of torch that means a dead loader worker, a lost process or, in a forward
    pass of `num_images` for evaluation, too little memory."""
    try:
        yield
    except RuntimeError as error:
        text, reason, process = " ".join(str(error).split()), first_line(error), f"process {os.environ.get('RANK', 0)}"
        if num_images and is_out_of_memory(error):
            message = (
                f"out of memory with {num_images} images in a forward pass for evaluation ({reason}); use a smaller "
                "--image-size or, if the command has it, --batch-size"
            )
        elif "DataLoader worker (pid" in reason:
            message = (
                f"a loader worker died ({reason.rstrip('. ')}); if memory or /dev/shm is short (free -g, df -h "
                "/dev/shm), use fewer --workers"
            )
        elif not isinstance(error, torch.distributed.DistError) and "gloo" not in text:
            raise
        elif re.search("Connection (closed|reset|was likely closed)|Broken pipe|[Tt]imed out|remote process", text):
            message = (
                f"{process} lost its connection to the other processes ({reason.rpartition('] ')[2]}): one has ended, "
                "see the launcher's report or its last line; what was saved is intact, resume with --resume"
            )
        else:
            message = (
                f"{process} cannot communicate with the others: {text}; NCCL_DEBUG=INFO prints more, df -h /dev/shm "
                "shows whether shared memory is short, and GLOO_SOCKET_IFNAME chooses the network interface"
            )
        raise ProcessError(message) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for an allocation that failed on the CPU, or in any library of a GPU."""
    words = "out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|DefaultCPUAllocator"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(words, str(error)))
