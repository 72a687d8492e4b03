"""One optimizer step: forward in mixed precision, loss, backward, update."""

import contextlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from resnet_in1k.model.layers import FrozenBody, StochasticDepth, synchronize_norms
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.model.weights import weights_to_save
from resnet_in1k.optim.losses import build_loss
from resnet_in1k.optim.optimizers import build_optimizer, set_lr
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.train.guard import DivergenceGuard
from resnet_in1k.utils import rng
from resnet_in1k.utils.device import has_fused_optimizers
from resnet_in1k.utils.rng import Stream


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
        initial: Mapping[str, Tensor] | None = None,
        frozen_steps: int = 0,
    ):
        """
        Args:
            initial: what to start from in place of random weights, with or without the head.
            frozen_steps: only the head is trained before the step after these.
        """
        rng.key_global_generator(recipe.seed, Stream.WEIGHTS)  # the same initial weights on every process
        model = ResNet(recipe.model, num_classes, recipe.zero_init_residual)
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        if recipe.sync_batch_norm and num_processes > 1:
            model = synchronize_norms(model, accelerator.device)
        self.model = model.to(accelerator.device, memory_format=torch.channels_last)
        self._depth = (
            StochasticDepth(self.model, recipe, accelerator.device, rank, num_processes)
            if recipe.stochastic_depth
            else None
        )
        if initial is not None:
            self.model.load_state_dict({**self.model.state_dict(), **initial})
        self._max_grad_norm = recipe.max_grad_norm
        fused = accelerator.scaler is None and has_fused_optimizers(accelerator.device.type)
        self.optimizer = build_optimizer(self.model, recipe, fused=fused)
        if compile:
            self.model.compile()  # in place: no wrapper, no prefix
        self._loss_function = build_loss(recipe)
        self._accelerator, self._num_parts = accelerator, gradient_accumulation_steps
        self._guard = DivergenceGuard(self.optimizer, accelerator, self.model.fc.bias)
        self._prepared_model, self._prepared_optimizer = accelerator.prepare(self.model, self.optimizer)
        # DDP would broadcast the norm statistics before each forward, which does not read them; see broadcast_buffers.
        self._prepared_model.broadcast_buffers = False
        self._frozen_steps = frozen_steps
        self._prepared_head = accelerator.prepare_model(FrozenBody(self.model)) if frozen_steps else None

    def __call__(self, images: Tensor, targets: Tensor, lr: float, step: int = 0) -> Tensor:
        """Train on this process's share of a global batch; nothing here makes the host wait for the device, except for
        the loss scaler of fp16.

        Args:
            images: (B, 3, S, S) float32, normalized, channels_last.
            targets: (B,) int64 class indices, or (B, C) float32 probabilities.
            lr: learning rate of this step.
            step: its number, which stochastic depth is drawn for, and which decides whether the head is trained alone;
                0: a step before the first, of the whole model.

        Returns:
            Mean loss over the B images before the update, (), detached, on the device; NaN if this step or an earlier
            one has changed no weights, as the loss of any process or a gradient was not finite.
        """
        network = self._prepared_head if 0 < step <= self._frozen_steps else self._prepared_model
        network.train()
        set_lr(self.optimizer, lr)
        factors = self._depth.draw(step, len(images)).chunk(self._num_parts) if self._depth else ()
        losses = []
        for part, (images_part, targets_part) in enumerate(
            zip(images.chunk(self._num_parts), targets.chunk(self._num_parts), strict=True), start=1
        ):
            last = part == self._num_parts
            if self._depth:
                self._depth.use(factors[part - 1])
            with contextlib.nullcontext() if last else self._accelerator.no_sync(network):
                # Accelerate's wrapper runs the forward in mixed precision and returns float32 logits.
                logits = network(images_part)  # (B / parts, C)
                loss = self._loss_function(logits, targets_part) / self._num_parts
                self._accelerator.backward(self._guard.loss_for_backward(loss))
            losses.append(loss.detach())
        loss = sum(losses[1:], start=losses[0])
        if self._max_grad_norm:
            self._accelerator.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        with self._guard.step(loss):
            self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad(set_to_none=True)
        return self._guard.reported(loss)

    def without_communication(self) -> contextlib.AbstractContextManager[Any]:
        """In the body each process trains on its own gradients, for measuring: their weights then differ."""
        return self._accelerator.no_sync(self._prepared_model)

    def plain_copy(self) -> ResNet:
        """A plain ResNet with the model's weights as they are now, without gradients, on the same device."""
        copy = ResNet(self.model.architecture, self.model.fc.out_features).requires_grad_(False)
        copy = copy.to(self._accelerator.device, memory_format=torch.channels_last)
        copy.load_state_dict(self.model.state_dict())
        return copy

    @contextlib.contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Steps taken in the body, before any other, are rolled_back after it."""
        assert not self.optimizer.state, "only before the first step"
        weights, scaler_state = weights_to_save(self.model), self.scaler_state()
        optimizer_state = deepcopy(self.optimizer.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(optimizer_state)
            self.optimizer.zero_grad(set_to_none=True)
            self._guard.reset()
            self.load_scaler_state(scaler_state)

    def scaler_state(self) -> dict[str, Any] | None:
        """The loss scaler's, with fp16 only."""
        scaler = self._accelerator.scaler
        return scaler.state_dict() if scaler is not None else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        if self._accelerator.scaler is not None and state is not None:
            self._accelerator.scaler.load_state_dict(state)
