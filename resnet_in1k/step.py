"""One optimizer step: forward in mixed precision, backward, update."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from resnet_in1k import randomness
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.optim import build_optimizer, set_lr
from resnet_in1k.randomness import Stream
from resnet_in1k.recipes import Recipe


class TrainStep:
    """Model, loss and optimizer of a run, and one step of them.

    `model` is the plain model, whose state dict has clean keys whatever Accelerate wraps around it.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        accelerator: Accelerator,
        *,
        gradient_accumulation_steps: int = 1,
        compile: bool = False,
    ):
        randomness.key_global_generator(recipe.seed, Stream.WEIGHTS)  # the same initial weights on every process
        model = ResNet(recipe.model, num_classes, recipe.zero_init_residual)
        self.model = model.to(accelerator.device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, recipe, fused=accelerator.scaler is None)
        if compile:
            self.model.compile()  # in place: no wrapper, no prefix
        self._loss_function = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._accelerator, self._num_parts = accelerator, gradient_accumulation_steps
        self._diverged = torch.zeros((), device=accelerator.device)
        self._prepared_model, self._prepared_optimizer = accelerator.prepare(self.model, self.optimizer)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, lr: float) -> torch.Tensor:
        """Learn from this process's share of a global batch; nothing here makes the host wait for the device.

        Args:
            images: (B, 3, S, S) float32, normalised, channels_last.
            labels: (B,) int64.
            lr: learning rate of this step.

        Returns:
            Mean loss over the B images before the update, (), detached, on the device.
        """
        self._prepared_model.train()
        set_lr(self.optimizer, lr)
        losses = []
        for part, (images_part, labels_part) in enumerate(
            zip(images.chunk(self._num_parts), labels.chunk(self._num_parts), strict=True), start=1
        ):
            last = part == self._num_parts
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._prepared_model):
                # Accelerate's wrapper runs the forward in mixed precision and returns float32 logits.
                logits = self._prepared_model(images_part)  # (B / parts, C)
                loss = self._loss_function(logits, labels_part) / self._num_parts
                self._accelerator.backward(self._nan_once_diverged(loss))
            losses.append(loss.detach())
        loss = sum(losses[1:], start=losses[0])
        self._update_unless_diverged(loss)
        return loss

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps taken in the body, before any other, are forgotten after it."""
        assert not self.optimizer.state, "only before the first step"
        weights, scaler_state = weights_to_save(self.model), self.scaler_state()
        try:
            yield
        finally:
            self.model.load_state_dict(weights)
            self.optimizer.state.clear()
            self.optimizer.zero_grad(set_to_none=True)
            self._diverged.zero_()
            self.load_scaler_state(scaler_state)

    def scaler_state(self) -> dict[str, Any] | None:
        """The loss scaler's, with fp16 only."""
        scaler = self._accelerator.scaler
        return scaler.state_dict() if scaler is not None else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        if self._accelerator.scaler is not None and state is not None:
            self._accelerator.scaler.load_state_dict(state)

    def _nan_once_diverged(self, loss: torch.Tensor) -> torch.Tensor:
        """With fp16, a loss to go backward by; its gradients make the scaler skip the step, as all after divergence."""
        if self._accelerator.scaler is None:
            return loss
        diverged = (self._diverged > 0) | ~loss.detach().isfinite()  # an infinite loss can have finite gradients
        # A factor: where() would give its gradient, zero, to the loss that it does not choose.
        return loss * torch.where(diverged, torch.nan, 1.0)

    def _update_unless_diverged(self, loss: torch.Tensor) -> None:
        """Update the weights, but never again once a loss of any process was not finite.

        The host learns of such a loss only when it next looks, many steps later. So the device decides: the fused
        optimizer leaves weights and momentum alone where `found_inf` is set. With fp16 the scaler leaves them alone.
        """
        self._diverged = torch.maximum(self._diverged, (~loss.isfinite()).to(self._diverged.dtype))
        if self._accelerator.num_processes > 1:
            torch.distributed.all_reduce(self._diverged, torch.distributed.ReduceOp.MAX)
        if self._accelerator.scaler is None:
            self.optimizer.found_inf = self._diverged
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad(set_to_none=True)
