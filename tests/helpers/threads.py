"""The processes of a launch as threads of this one, joined by a real TCPStore: quick to start, easy to make unequal."""

import threading
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore

from resnet_in1k.utils.launch import Launch


def run_launch(*bodies: Callable[[Launch], Any]) -> list[Any]:
    """Call each body with its place in a launch of so many; their results, or the exceptions that they raised."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results: list[Any] = [None] * len(bodies)

    def run(rank: int, body: Callable[[Launch], Any]) -> None:
        try:
            store = TCPStore("127.0.0.1", server.port, wait_for_workers=False)
            with Launch(store, rank, len(bodies)) as launch:
                results[rank] = body(launch)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=place, name=f"rank {place[0]}") for place in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    return results


def this_rank() -> int:
    """Of the thread that asks; 0 outside `run_launch`."""
    _, _, number = threading.current_thread().name.partition("rank ")
    return int(number or 0)
