"""One optimizer step: forward in mixed precision, loss, backward, update; and the moving average of the weights."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from resnet_in1k.model.layers import FrozenBody, StochasticDepth, synchronize_norms
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.model.weights import weights_to_save
from resnet_in1k.optim.losses import LOSSES, distillation_loss
from resnet_in1k.optim.optimizers import OPTIMIZERS, parameter_groups
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.teacher import Teacher
from resnet_in1k.utils import imagenet, rng
from resnet_in1k.utils.device import capabilities
from resnet_in1k.utils.rng import Stream
from resnet_in1k.utils.validation import lookup


class TrainStep:
    """Model, loss and optimizer of a run, and one step.

    `model` is the plain model, with clean keys in its state dict whatever Accelerate wraps around it to make
    `prepared_model`.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        accelerator: Accelerator,
        *,
        gradient_accumulation_steps: int = 1,
        compile: bool = False,
        frozen_steps: int = 0,
        class_weights: Tensor | None = None,
        teacher: Teacher | None = None,
    ):
        """
        Args:
            class_weights: (C,) float32, weights of the images' losses by class.
            frozen_steps: number of first steps that train only the last layer.
            teacher: network for the distillation loss, on the CPU.
        """
        device = accelerator.device
        rng.key_global_generator(recipe.seed, Stream.WEIGHTS)  # the same initial weights on every process
        model = ResNet(recipe.model, num_classes, recipe.zero_init_residual)
        if recipe.sync_batch_norm and accelerator.num_processes > 1:
            synchronize_norms(model)
        self.model = model.to(device, memory_format=torch.channels_last)
        self._depth = StochasticDepth(self.model, recipe) if recipe.stochastic_depth else None
        self._max_grad_norm = recipe.max_grad_norm
        # Not under a gradient scaler: if it skips the first step, fused SGD uses momentum that was never written.
        fused = accelerator.scaler is None and "fused_optimizers" in capabilities(device.type)
        make_optimizer = lookup(OPTIMIZERS, recipe.optimizer, "optimizer")
        self.optimizer = make_optimizer(parameter_groups(self.model, recipe), recipe, fused)
        if compile:
            # In place: no wrapper, no prefix of the keys. A graph for each image size: symbolic shapes are slower.
            self.model.compile(dynamic=False)
        self._loss_function = lookup(LOSSES, recipe.loss, "loss")(
            recipe, None if class_weights is None else class_weights.to(device)
        )
        self._recipe = recipe
        self._teacher = None if teacher is None else teacher.to(device, memory_format=torch.channels_last)
        self._accelerator, self._num_parts = accelerator, gradient_accumulation_steps
        # Of the loss; without fp16 one that does nothing and has no state.
        self.scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
        self.prepared_model, self._prepared_optimizer = accelerator.prepare(self.model, self.optimizer)
        # DDP would broadcast the norm statistics before each forward, which does not read them.
        # Set here, because the constructor's argument warns since torch 2.15.
        self.prepared_model.broadcast_buffers = False
        self._frozen_steps = frozen_steps
        self._prepared_head = accelerator.prepare_model(FrozenBody(self.model)) if frozen_steps else None

    def draw(self, step: int) -> dict[str, Tensor]:
        """Draw what a step needs, for the global batch on the CPU; empty without stochastic depth."""
        return {"depth_factors": self._depth.draw(step)} if self._depth else {}

    def __call__(
        self, images: Tensor, targets: Tensor, lr: float, step: int, depth_factors: Tensor | None = None
    ) -> Tensor:
        """Train on this process's share of a global batch.

        Nothing here makes the host wait for the device, except for the loss scaler of fp16.

        Args:
            images: (B, 3, S, S) float32, normalized, channels_last.
            targets: (B,) int64 class indices, or (B, C) float32 probabilities.
            lr: learning rate of this step.
            step: number of the step, which decides whether the body is frozen.
            depth_factors: (B, blocks) of `draw`, if the recipe has stochastic depth.

        Returns:
            Mean loss over the B images before the update, (), detached, on the device.
        """
        network = self._prepared_head if step <= self._frozen_steps else self.prepared_model
        network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        factors = depth_factors.chunk(self._num_parts) if depth_factors is not None else ()
        loss_sum = 0.0
        parts = zip(images.chunk(self._num_parts), targets.chunk(self._num_parts), strict=True)
        for number, (part_images, part_targets) in enumerate(parts):
            if factors:
                self._depth.factors = factors[number]
            is_last = number == self._num_parts - 1  # gradients are exchanged once, in the last backward
            with contextlib.nullcontext() if is_last else self._accelerator.no_sync(network):
                # Accelerate's wrapper runs the forward in mixed precision and returns float32 logits.
                logits = network(part_images)  # (B / parts, C)
                loss = self._loss(logits, part_targets, part_images) / self._num_parts
                self._accelerator.backward(loss)
            loss_sum = loss_sum + loss.detach()
        if self._max_grad_norm:
            self._accelerator.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad(set_to_none=True)
        return loss_sum

    def _loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Return the mean loss, (), of which the teacher's share is its predictions for the same images."""
        loss = self._loss_function(logits, targets)
        if self._teacher is None:
            return loss
        with self._accelerator.autocast():
            teacher_logits = self._teacher(images)
        taught = distillation_loss(logits, teacher_logits.float(), self._recipe.teacher_temperature)
        return torch.lerp(loss, taught, self._recipe.teacher_weight)

    def plain_copy(self) -> ResNet:
        """Copy the model as it is now to a plain ResNet without gradients, on the same device."""
        copy = ResNet(self.model.architecture, self.model.fc.out_features).requires_grad_(False)
        copy = copy.to(self._accelerator.device, memory_format=torch.channels_last)
        copy.load_state_dict(self.model.state_dict())
        return copy

    @contextlib.contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Undo all steps of the body at its end. Only before the first step of a run."""
        assert not self.optimizer.state, "the optimizer has state, which would be lost"
        weights, optimizer_state = weights_to_save(self.model), self.optimizer.state_dict()
        scaler_state = self.scaler.state_dict()
        try:
            yield
        finally:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(optimizer_state)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.load_state_dict(scaler_state)


def adjusted_ema_decay(counts: StepCounts) -> float:
    """Return the decay of one update of the average.

    As in torchvision's training reference, 1 - decay grows by the steps between two updates × global batch / epochs. So
    the average covers the same share of a run, however long it is and whatever its batch, for ImageNet's number of
    images. For n images, 1 - decay also grows by ImageNet's number / n.
    """
    recipe = counts.recipe
    adjustment = counts.ema_every_steps * recipe.global_batch_size / recipe.epochs
    adjustment *= imagenet.NUM_TRAIN_IMAGES / counts.num_train_images
    return 1 - min(1.0, (1 - recipe.ema_decay) * adjustment)


class MovingAverage:
    """Exponential moving average of weights and buffers (https://arxiv.org/abs/1803.05407; for its use in these recipes
    https://github.com/pytorch/vision/pull/4406).

    It has no state but the averaged tensors: an update is a function of the step.
    """

    def __init__(self, model: ResNet, counts: StepCounts):
        """`model`: a copy of the trained model, which belongs to the average from now on."""
        self.model = model
        self._weight = 1 - adjusted_ema_decay(counts)
        self._every_steps = counts.ema_every_steps
        self._last_copied_step = max(counts.warmup_steps, self._every_steps)

    @torch.no_grad()
    def update(self, model: ResNet, step: int) -> None:
        """Update after optimizer step `step`. Until warm-up ends, the average is a copy, as in torchvision."""
        if step % self._every_steps:
            return
        averages, values = self.model.state_dict(), model.state_dict()
        is_copy = step <= self._last_copied_step
        # Integer counters of the norms cannot be averaged. All in few kernels, and without a value from the host.
        averaged = [name for name, tensor in averages.items() if tensor.is_floating_point() and not is_copy]
        copied = list(averages.keys() - averaged)
        torch._foreach_copy_([averages[name] for name in copied], [values[name] for name in copied])
        if averaged:
            torch._foreach_lerp_(
                [averages[name] for name in averaged], [values[name] for name in averaged], self._weight
            )
