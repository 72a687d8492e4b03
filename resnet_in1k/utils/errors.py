"""Errors that a user can act on, and the translation of torch's errors into such ones."""

import contextlib
import os
import re
from collections.abc import Iterator

from resnet_in1k.utils.format import count, first_line

OUT_OF_MEMORY = "out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|DefaultCPUAllocator"
"""Words of an allocation that failed in any library of a GPU, or on the CPU."""
LOST = "Connection (closed|reset|was likely closed)|Broken pipe|[Tt]imed out|remote process"


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
def translate_errors(
    num_images: int = 0, advice: str = "does something else use this device?", is_connected: bool = True
) -> Iterator[None]:
    """Raise ProcessError for a RuntimeError of torch that means too little memory for a forward pass of `num_images`,
    where `advice` is what to do; a dead loader worker; or a lost process, which needs a connection before."""
    try:
        yield
    except RuntimeError as error:
        import torch  # not at the top: --help does not need it

        text, reason, process = " ".join(str(error).split()), first_line(error), f"process {os.environ.get('RANK', 0)}"
        cause = f"; {text[place:]}" if (place := text.find("Last error:")) >= 0 else ""  # NCCL's first line is general
        if isinstance(error, torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, text):
            batch = f" with {count(num_images, 'image')} in a forward pass" if num_images else ""
            message = f"out of memory{batch} ({reason}); {advice}"
        elif "DataLoader worker (pid" in reason:
            message = (
                f"a loader worker died ({reason.rstrip('. ')}); if memory or /dev/shm is short (free -g, df -h "
                "/dev/shm), use fewer --workers"
            )
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            cure = "install one (apt install g++), or leave out --compile" if "Compiler" in text else "leave it out"
            message = f"--compile failed ({reason}); {cure}"
        elif not isinstance(error, torch.distributed.DistError) and "gloo" not in text:
            raise
        elif is_connected and re.search(LOST, text):
            message = (
                f"{process} lost its connection to the other processes ({reason.rpartition('] ')[2]}{cause}): one has "
                "ended, see the launcher's report or its last line; what was saved is intact, resume with --resume"
            )
        else:
            message = (
                f"{process} cannot communicate with the others: {text}; NCCL_DEBUG=INFO prints more, df -h /dev/shm "
                "shows whether shared memory is short, and GLOO_SOCKET_IFNAME chooses the network interface"
            )
        raise ProcessError(message) from None
