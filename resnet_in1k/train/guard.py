"""What is done about a loss that is not finite, and about too little memory."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.utils.format import first_line


class DivergenceGuard:
    """Decides on the device whether a step may change the weights: never again once a loss was not finite.

    The host learns of such a loss only when it next reads the losses, many steps later. Other processes learn of it by
    the gradients, which are averaged anyway: all gradients of such a loss are made NaN. An optimizer that honors
    `found_inf` (torch's fused ones) leaves weights and state alone by itself. For any other, weights and state are
    copied before the step and restored where needed. With fp16 the loss scaler skips the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator, last_parameter: Tensor):
        """`last_parameter`: the one nearest to the loss, whose gradient is that of a loss made NaN."""
        self._optimizer, self._accelerator, self._last_parameter = optimizer, accelerator, last_parameter
        # The attribute by which torch's GradScaler, too, recognizes such optimizers.
        self._honors_found_inf = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._diverged = torch.zeros((), dtype=torch.float32, device=accelerator.device)  # as fused optimizers take it

    def reset(self) -> None:
        self._diverged.zero_()

    def loss_for_backward(self, loss: Tensor) -> Tensor:
        """The same loss, but with gradients of NaN if it is not finite or an earlier one was not."""
        diverged = (self._diverged > 0) | ~loss.detach().isfinite()  # an infinite loss can have finite gradients
        # A factor: where() would give its gradient, zero, to the loss that it does not choose.
        return loss * torch.where(diverged, torch.nan, 1.0)

    @contextlib.contextmanager
    def step(self, loss: Tensor) -> Iterator[None]:
        """Around the optimizer's step, after a backward of this loss."""
        finite = loss.isfinite()
        if self._accelerator.scaler is None:  # a scaler looks for the scale whose gradients are just finite
            finite &= self._last_parameter.grad.isfinite().all()
        self._diverged = torch.maximum(self._diverged, (~finite).to(self._diverged.dtype))
        if self._accelerator.scaler is not None:
            yield
        elif self._honors_found_inf:
            self._optimizer.found_inf = self._diverged  # type: ignore[attr-defined]
            yield
        else:
            before = [tensor.clone() for tensor in self._tensors()]
            yield
            # Tensors that this very step has added stay as they are: no later step uses them.
            for old, tensor in zip(before, self._tensors(), strict=False):
                tensor.copy_(torch.where(self._diverged > 0, old, tensor))

    def reported(self, loss: Tensor) -> Tensor:
        """The loss as the host reads it: not finite once no weights change any more, for whichever reason."""
        return torch.where((self._diverged > 0) & loss.isfinite(), torch.nan, loss)

    def _tensors(self) -> list[Tensor]:
        """Parameters, then the tensors of their state, in an order that a later step only adds to."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        states = [self._optimizer.state.get(parameter, {}).values() for parameter in parameters]
        tensors = [
            *(parameter.detach() for parameter in parameters),
            *(value for state in states for value in state if isinstance(value, Tensor)),
        ]
        # Not the step counts that some optimizers keep on the host, which would have to wait for the device.
        return [tensor for tensor in tensors if tensor.device == self._diverged.device]


def out_of_memory_message(error: RuntimeError, schedule: StepCounts | None) -> str:
    """What to do about it; without a schedule it came before the first step."""
    reason = first_line(error)
    if schedule is None:
        return f"out of memory before the first step ({reason}); does something else use this device?"
    steps = schedule.next_accumulation_steps
    if steps is None:
        return f"out of memory with 1 image in a forward pass ({reason}); use a smaller --image-size"
    return (
        f"out of memory with {schedule.per_device_batch_size} images in a forward pass ({reason}); "
        f"--gradient-accumulation-steps {steps} makes it {schedule.per_process_batch_size // steps} and leaves the "
        f"global batch of {schedule.recipe.global_batch_size} as it is; what was saved is intact, go on with --resume"
    )
