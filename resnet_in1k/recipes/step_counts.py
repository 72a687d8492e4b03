"""The arithmetic of a run: epochs, steps and batches from the sizes; the image size of an epoch."""

from dataclasses import dataclass

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count

NETWORK_STRIDE = 32
"""Factor by which a ResNet reduces images: a size between two multiples costs as much as the larger one."""


def accumulation_steps(global_batch_size: int, num_processes: int, images_per_forward_pass: int) -> int:
    """Return the fewest accumulation steps with at most that many images in a process's forward pass.

    1 if the batch cannot be divided so, or if `images_per_forward_pass` is 0: no limit.
    """
    for steps in range(1, global_batch_size // num_processes + 1) if images_per_forward_pass else ():
        images, rest = divmod(global_batch_size, num_processes * steps)
        if rest == 0 and images <= images_per_forward_pass:
            return steps
    return 1


@dataclass(frozen=True)
class StepCounts:
    """Sizes that follow from the recipe, the number of processes and the number of images.

    Epochs and optimizer steps count from 1.

    Raises:
        UserError: if the global batch cannot be divided evenly, or is larger than the data.
    """

    recipe: Recipe
    num_processes: int
    gradient_accumulation_steps: int
    num_train_images: int

    def __post_init__(self) -> None:
        batch, parts = self.recipe.global_batch_size, self.num_processes * self.gradient_accumulation_steps
        if batch % parts:
            raise UserError(
                f"--global-batch-size {batch} cannot be divided evenly among "
                f"{count(self.num_processes, 'process', 'es')} × "
                f"{count(self.gradient_accumulation_steps, 'accumulation step')}; use a multiple of {parts}"
            )
        if self.recipe.mixes and self.per_process_batch_size % 2:
            raise UserError(
                f"--global-batch-size {batch} is {self.per_process_batch_size} images for each of {self.num_processes} "
                f"processes, and mixing needs pairs; use a multiple of {2 * parts}"
            )
        if self.num_train_images < batch:
            raise UserError(
                f"{self.num_train_images} training images are fewer than --global-batch-size {batch}; use a smaller "
                "batch or more images"
            )

    @property
    def per_process_batch_size(self) -> int:
        """Images per process and optimizer step."""
        return self.recipe.global_batch_size // self.num_processes

    @property
    def per_device_batch_size(self) -> int:
        """Images per process and forward pass."""
        return self.per_process_batch_size // self.gradient_accumulation_steps

    @property
    def next_accumulation_steps(self) -> int | None:
        """Next larger number of accumulation steps that divides the batch; None if a forward pass has one image."""
        larger = range(self.gradient_accumulation_steps + 1, self.per_process_batch_size + 1)
        return next((steps for steps in larger if self.per_process_batch_size % steps == 0), None)

    @property
    def steps_per_epoch(self) -> int:
        """Complete global batches in an epoch."""
        return self.num_train_images // self.recipe.global_batch_size

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return round(self.recipe.warmup_epochs * self.steps_per_epoch)

    @property
    def frozen_steps(self) -> int:
        """Number of first steps that train only the last layer."""
        return min(self.recipe.freeze_epochs, self.recipe.epochs) * self.steps_per_epoch

    @property
    def ema_every_steps(self) -> int:
        """Steps between two updates of the moving average: the recipe's, but at least one update an epoch."""
        return min(self.recipe.ema_every_steps, self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        return (step - 1) // self.steps_per_epoch + 1

    def is_last_in_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def steps_into_epoch(self, step: int) -> int:
        """Position of a step in its epoch, from 1 to steps_per_epoch."""
        return (step - 1) % self.steps_per_epoch + 1


def train_image_size(recipe: Recipe, epoch: int) -> int:
    """Return the side of the training square in an epoch, in pixels.

    It grows linearly from initial_image_size to image_size, to the nearest multiple of 32 px, as in FFCV's recipes
    (https://arxiv.org/abs/2306.12517).
    """
    first, last = recipe.image_size_ramp_start, recipe.image_size_ramp_end
    if not recipe.initial_image_size or epoch >= last:
        return recipe.image_size
    if epoch <= first:
        return recipe.initial_image_size
    grown = (recipe.image_size - recipe.initial_image_size) * (epoch - first) / (last - first)
    nearest = round((recipe.initial_image_size + grown) / NETWORK_STRIDE) * NETWORK_STRIDE
    return min(max(recipe.initial_image_size, nearest), recipe.image_size)
