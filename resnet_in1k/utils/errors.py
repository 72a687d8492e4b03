"""Errors that a user can act on, and the translation of torch's errors into such ones."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from resnet_in1k.utils.format import first_line

OUT_OF_MEMORY = "out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|DefaultCPUAllocator"
CONNECTION_LOST = "Connection (closed|reset|was likely closed)|Broken pipe|[Tt]imed out|remote process"


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
        reason = first_line(error)
        if num_images and is_out_of_memory(error):
            raise ProcessError(
                f"out of memory with {num_images} images in a forward pass for evaluation ({reason}); use a smaller "
                "--image-size or, if the command has it, --batch-size"
            ) from None
        if "DataLoader worker (pid" in reason:
            raise ProcessError(
                f"a loader worker died ({reason.rstrip('. ')}); if memory or /dev/shm is short (free -g, df -h "
                "/dev/shm), use fewer --workers"
            ) from error
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise ProcessError(_describe_failed_communication(error)) from None
        raise


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for an allocation that failed on the CPU, or in any library of a GPU."""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(OUT_OF_MEMORY, str(error)))


def _describe_failed_communication(error: RuntimeError) -> str:
    process = f"process {os.environ.get('RANK', '0')}"
    if re.search(CONNECTION_LOST, str(error)):
        return (
            f"{process} lost its connection to the other processes ({first_line(error).rpartition('] ')[2]}): one has "
            "ended, see the launcher's report or its last line; what was saved is intact, resume with --resume"
        )
    return (
        f"{process} cannot communicate with the others: {' '.join(str(error).split())}; NCCL_DEBUG=INFO prints more, "
        "df -h /dev/shm shows whether shared memory is short, and GLOO_SOCKET_IFNAME chooses the network interface"
    )
