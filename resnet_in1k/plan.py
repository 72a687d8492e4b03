"""What a run will do, derived from recipe, data and machine before its first step, and told."""

from dataclasses import dataclass

from resnet_in1k.errors import UserError
from resnet_in1k.recipes import Recipe
from resnet_in1k.sources import Source

PRECISION_NAMES = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from the recipe, the number of processes and the number of images."""

    recipe: Recipe
    num_processes: int
    gradient_accumulation_steps: int
    num_train_images: int

    def __post_init__(self) -> None:
        parts = self.num_processes * self.gradient_accumulation_steps
        if self.gradient_accumulation_steps < 1:
            raise UserError(f"--gradient-accumulation-steps {self.gradient_accumulation_steps}: at least 1")
        if self.recipe.global_batch_size % parts:
            raise UserError(
                f"--global-batch-size {self.recipe.global_batch_size} cannot be divided evenly among "
                f"{self.num_processes} processes × {self.gradient_accumulation_steps} accumulation steps; "
                f"take a multiple of {parts}"
            )
        if self.num_train_images < self.recipe.global_batch_size:
            raise UserError(
                f"{self.num_train_images} training images are fewer than --global-batch-size "
                f"{self.recipe.global_batch_size}; take a smaller batch or more images"
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
    def more_accumulation_steps(self) -> int | None:
        """The next larger number by which the batch can be divided; None if it is down to single images."""
        larger = range(self.gradient_accumulation_steps + 1, self.per_process_batch_size + 1)
        return next((steps for steps in larger if self.per_process_batch_size % steps == 0), None)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_train_images // self.recipe.global_batch_size

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def schedule(self) -> str:
        """The learning rate's course in words."""
        recipe = self.recipe
        epochs = "epoch" if recipe.warmup_epochs == 1 else "epochs"
        warmup = f"{recipe.warmup_epochs:g} {epochs} of warm-up to " if recipe.warmup_epochs else ""
        if recipe.lr_schedule == "cosine":
            return f"{warmup}{recipe.lr:g}, then cosine to 0"
        return f"{warmup}{recipe.lr:g}, × {recipe.lr_step_factor:g} every {recipe.lr_step_epochs} epochs"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def describe(
    plan: Plan,
    *,
    recipe_name: str,
    named_recipe: Recipe,
    train: Source,
    val: Source,
    device: str,
    mixed_precision: str,
    workers: int,
    cpu_threads: int,
) -> str:
    """The plan as a person reads it before the run."""
    recipe = plan.recipe
    changed = named_recipe.differences(recipe)
    left_over = plan.num_train_images - plan.steps_per_epoch * recipe.global_batch_size
    accumulation = (
        f" in {plan.gradient_accumulation_steps} accumulation steps of {plan.per_device_batch_size}"
        if plan.gradient_accumulation_steps > 1
        else ""
    )
    rows = [
        ("recipe", recipe_name + (f", but {'; '.join(changed)}" if changed else "")),
        ("model", f"{recipe.model}, {len(train.class_names)} classes, {recipe.image_size} px"),
        ("data", f"{train.name}: {len(train):,} training and {len(val):,} validation images"),
        (
            "batch",
            f"{recipe.global_batch_size} global = {_count(plan.num_processes, 'process', 'es')} × "
            f"{plan.per_process_batch_size}{accumulation}",
        ),
        (
            "steps",
            f"{plan.steps_per_epoch:,} an epoch"
            + (f" ({left_over} other images each epoch sit out)" if left_over else "")
            + f" × {recipe.epochs} epochs = {plan.total_steps:,}",
        ),
        ("learning rate", plan.schedule()),
        ("precision", f"{PRECISION_NAMES.get(mixed_precision, mixed_precision)}, channels_last; evaluation in float32"),
        ("device", device),
        ("per process", f"{_count(workers, 'loader worker')}, {_count(cpu_threads, 'CPU thread')}"),
    ]
    lines = [f"  {name:<14}{text}" for name, text in rows]
    lines += [f"  {'note':<14}{source.note}" for source in (train, val) if source.note]
    if len(train.class_names) < 5:
        lines.append(f"  {'note':<14}fewer than five classes: top-5 below means top-{len(train.class_names)}")
    return "\n".join(["plan", *lines])
