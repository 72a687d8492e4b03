"""The plan: what a run will do, printed before its first step."""

from resnet_in1k.model.ema import adjusted_decay, steps_between_updates
from resnet_in1k.optim.lr import describe_lr
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.scaling import describe_scaling
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.utils.device import PRECISIONS, hardware_name, missing_capabilities
from resnet_in1k.utils.format import count


def describe_plan(run: Trainer) -> str:
    """One line for each thing that the recipe, the data and the machine decide."""
    recipe, train, val = run.recipe, run.train_source, run.val_source
    named = RECIPES.get(run.recipe_name)
    changed = named.recipe.differences(recipe) if named else []
    device = hardware_name(run.device) + (" (no GPU is used)" if run.device.type == "cpu" else "")
    precision = PRECISIONS[run.accelerator.mixed_precision].label
    rows = [
        ("recipe", run.recipe_name + (f", but {'; '.join(changed)}" if changed else "")),
        ("model", f"{recipe.model}, {count(len(train.class_names), 'class', 'es')}, {_sizes(recipe)}"),
        *([("starts from", run.initial.describe())] if run.initial else []),
        ("data", f"{train.name}: {len(train):,} training and {len(val):,} validation images"),
        ("batch", _batch(run.schedule)),
        ("steps", _steps(run.schedule)),
        ("learning rate", describe_lr(recipe)),
        *(("scaled", text) for text in (describe_scaling(named.recipe, recipe) if named else [])),
        *([("average", _average(run.schedule))] if recipe.ema_decay else []),
        ("precision", f"{precision}, channels_last; evaluation in float32"),
        ("device", device),
        ("per process", f"{count(run.workers, 'loader worker')}, {count(run.cpu_threads, 'CPU thread')}"),
        *([("note", run.initial.note)] if run.initial and run.initial.note else []),
        *(("note", text) for text in missing_capabilities(run.device.type)),
        *(("note", source.note) for source in (train, val) if source.note),
    ]
    if len(train.class_names) < 5:
        rows.append(("note", f"fewer than five classes: top-5 below means top-{len(train.class_names)}"))
    return "\n".join(["plan", *(f"  {name:<14}{text}" for name, text in rows)])


def _sizes(recipe: Recipe) -> str:
    train = f"{recipe.image_size} px"
    if recipe.initial_image_size and recipe.image_size_ramp_start >= recipe.epochs:
        train = f"{recipe.initial_image_size} px throughout"  # so few epochs end before it grows
    elif recipe.initial_image_size:
        train = (
            f"{recipe.initial_image_size} px, growing to {train} from epoch {recipe.image_size_ramp_start} "
            f"to {recipe.image_size_ramp_end}"
        )
    return train + (f", evaluated at {recipe.eval_size} px" if recipe.eval_size != recipe.image_size else "")


def _average(schedule: StepCounts) -> str:
    every, published = steps_between_updates(schedule), schedule.recipe.publish
    return (
        f"of weights, every {count(every, 'step')} with a decay of {adjusted_decay(schedule):.4g}; both are evaluated, "
        f"published: {'the average' if published == 'ema' else 'the model'}"
    )


def _batch(schedule: StepCounts) -> str:
    text = (
        f"{schedule.recipe.global_batch_size} global = {count(schedule.num_processes, 'process', 'es')} × "
        f"{schedule.per_process_batch_size}"
    )
    if schedule.gradient_accumulation_steps > 1:
        text += f" in {schedule.gradient_accumulation_steps} accumulation steps of {schedule.per_device_batch_size}"
    return text


def _steps(schedule: StepCounts) -> str:
    left_over = schedule.num_train_images - schedule.steps_per_epoch * schedule.recipe.global_batch_size
    dropped = f" ({count(left_over, 'image')} dropped each epoch, others each time)" if left_over else ""
    epochs = count(schedule.recipe.epochs, "epoch")
    return f"{schedule.steps_per_epoch:,} an epoch{dropped} × {epochs} = {schedule.total_steps:,}"
