"""What several processes cost: their training step with and without communication, beside one process alone."""

import collections
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils.launch import Launch

COLLECTIVE_PREFIXES = ("gloo:", "nccl:", "xccl:")
"""Of the profiler's names, by backend."""


def ways_of_several(
    launch: Launch, step: TrainStep, images: torch.Tensor, labels: torch.Tensor, rate: Callable[[Callable], float]
) -> dict[str, Callable[[], float]]:
    """Images/s of all processes together, for Bench's interleaved measurement; all processes call each alike.

    Args:
        images: (B, 3, S, S) float32, this process's share.
        labels: (B,) int64.
        rate: images/s of this process, from what takes a step.
    """

    def take_step() -> None:
        step(images, labels, 0.01)

    def together() -> float:
        launch.gather(None, "measures")  # start together
        return launch.world_size * rate(take_step)

    def without_communication() -> float:
        with step.without_communication():
            return together()

    def one_process() -> float:
        def alone() -> float:
            with step.without_communication():
                return rate(take_step)

        return launch.broadcast_from_main(alone, "measures itself alone")

    return {"ours": together, "without_communication": without_communication, "one_process": one_process}


def costs(rates: dict[str, float], world_size: int) -> dict[str, float]:
    """From the medians: the share of a step that communication takes, and what of N times one process is reached."""
    return {
        "communication_share": 1 - rates["ours"] / rates["without_communication"],
        "scaling_efficiency": rates["ours"] / (world_size * rates["one_process"]),
    }


def collectives_per_step(step: TrainStep, images: torch.Tensor, labels: torch.Tensor) -> dict[str, int]:
    """By the backend's name of them; called on all processes, once the step has settled."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(images, labels, 0.01)
    names = (event.name for event in profiler.events())
    return dict(collections.Counter(name for name in names if name.startswith(COLLECTIVE_PREFIXES)))
