"""The parts of a training run, and how they are put together."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.crop import EvalPreprocessing, TrainCrop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.loader import Loader
from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.data.sampler import BatchSpec, train_specs
from resnet_in1k.data.tar_shards import ShardSource
from resnet_in1k.evaluate.evaluation import EvalLoader
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.optim.losses import balanced_weights
from resnet_in1k.recipes.recipe import PublishedWeights, Recipe
from resnet_in1k.recipes.step_counts import EVAL_BATCH_SIZE, StepCounts
from resnet_in1k.run_folder import provenance, read_recipe
from resnet_in1k.train.checkpoint import ModelGroup, OptimizerGroup, TensorGroup, TrainState
from resnet_in1k.train.init_weights import initial_weights
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.train.step import MovingAverage, TrainStep
from resnet_in1k.train.teacher import check_teacher, load_teacher
from resnet_in1k.utils import device
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.signals import StopSignals
from resnet_in1k.utils.timing import Lap, Stopwatch
from resnet_in1k.utils.validation import PRECISION_FLAGS, OnBadImage


class Trainer:
    """All parts of a run: data, loaders, model, optimizer and progress. The loop drives them."""

    def __init__(
        self,
        recipe_name: str,
        recipe: Recipe,
        options: TrainOptions,
        launch: Launch,
        signals: StopSignals,
        stack: contextlib.ExitStack,
        command: Sequence[str] = (),
    ):
        """The caller closes `stack`, which ends the loader workers and unlocks the run folder."""
        self.recipe_name, self.recipe, self.options = recipe_name, recipe, options
        self.launch, self.signals, self.stack, self.command = launch, signals, stack, command
        self.folder = options.run_folder(recipe_name)
        self.start_seconds = time.monotonic()
        check_teacher(recipe, options.teacher)
        self._open_data()
        self._make_parts()
        self.first_step = 1  # that this process takes: after a resume a later one
        # What is not collected from all processes yet: losses, (), on the device; decoder errors by image.
        self.uncollected_losses: list[torch.Tensor] = []
        self.uncollected_bad_images: dict[int, str] = {}
        self.damaged_steps: set[int] = set()  # of checkpoints that were skipped when the run was resumed
        self.stopwatch, self.epoch_lap = Stopwatch(self.device), Lap()
        self.shown_curves: Any = None  # a notebook's handle of the curves

    def _open_data(self) -> None:
        """Start the loader workers, before there is a process group: see Loader."""
        options = self.options
        self.launch.on_main_process(lambda: self.folder.check_free(options.resume), "reading the run folder")
        # recipe.json of a run that is resumed.
        self.started_with = read_recipe(self.folder, type(self.recipe))[1] if self.folder.recipe.exists() else {}
        self.train_source, self.val_source = self.launch.on_main_process(
            lambda: open_train_and_val(options.data, options.val_share, options.rescan), "listing images"
        )
        if self.recipe.shuffle_window:
            if not isinstance(self.train_source, ShardSource):
                raise UserError(f"--shuffle-window needs --data shards:…; {options.data} is not stored in shards")
            self.train_source = replace(self.train_source, in_windows=True)
        self.counts = StepCounts(
            self.recipe, self.launch.world_size, options.gradient_accumulation_steps, len(self.train_source)
        )
        self.preprocessing = EvalPreprocessing.from_recipe(self.recipe)
        self.num_workers = device.choose_workers(options.workers)
        # One loader for all epochs: the end of an epoch does not interrupt the workers.
        self.train_loader = self.stack.enter_context(
            train_loader(self.train_source, self.counts, self.num_workers, options.on_bad_image)
        )
        self.eval_loader = self.stack.enter_context(
            EvalLoader(self.val_source, self.preprocessing, EVAL_BATCH_SIZE, self.num_workers)
        )

    def _make_parts(self) -> None:
        """Start the process group; make the model and the optimizer."""
        recipe, options, launch, counts = self.recipe, self.options, self.launch, self.counts
        class_names = self.train_source.class_names
        self.init_from, weights = initial_weights(
            options.init_from, options.weights, recipe, class_names, self.folder, self.started_with, launch
        )
        self.teacher, teacher = {}, None
        if options.teacher is not None:
            self.teacher, teacher = load_teacher(options.teacher, recipe, self.train_source, self.started_with, launch)
        precision = options.precision
        if precision == "auto":
            precision = PRECISION_FLAGS.get(self.started_with.get("mixed_precision"), "auto")
        self.accelerator = make_accelerator(
            launch, precision, options.report_to, self.folder.path, options.compress_gradients
        )
        self.device = self.accelerator.device
        self.cpu_threads = device.choose_cpu_threads(self.device, options.cpu_threads)
        self.train_step = TrainStep(
            recipe,
            len(class_names),
            self.accelerator,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            compile=options.compile,
            frozen_steps=counts.frozen_steps,
            class_weights=balanced_weights(self.train_source.labels, len(class_names))
            if recipe.class_weights == "balanced"
            else None,
            teacher=teacher,
        )
        self.augmentation = Augmentation(recipe, len(class_names), launch.rank, launch.world_size, self.train_step.draw)
        self.train_step.model.load_state_dict(weights, strict=False)  # without the last layer, if that is new
        # Evaluation uses a plain copy, without DDP and mixed precision, with exactly the saved weights.
        self.eval_model = self.train_step.plain_copy()
        self.average = MovingAverage(self.train_step.plain_copy(), counts) if recipe.ema_decay else None
        # The weights that are saved and evaluated, and all tensors of a checkpoint by the names of its files.
        self.models: dict[PublishedWeights, ResNet] = {"model": self.train_step.model}
        if self.average is not None:
            self.models["ema"] = self.average.model
        self.groups: dict[str, TensorGroup] = {name: ModelGroup(model) for name, model in self.models.items()}
        self.groups["optimizer"] = OptimizerGroup(self.train_step.model, self.train_step.optimizer)

        self.state = TrainState(
            recipe_sha256=recipe.fingerprint(*(each.get("sha256", "") for each in (self.init_from, self.teacher)))
        )
        self.facts = self._run_facts()
        self.data_facts = describe_data(self.train_source, self.val_source, options.val_share)

    def _run_facts(self) -> dict[str, Any]:
        """Return the facts for recipe.json, besides the recipe and the data."""
        options = self.options
        return {
            **({"command": list(self.command)} if self.command else {}),
            "world_size": self.counts.num_processes,
            "gradient_accumulation_steps": self.counts.gradient_accumulation_steps,
            "mixed_precision": self.accelerator.mixed_precision,
            "compress_gradients": options.compress_gradients,
            "compile": options.compile,
            "hardware": device.hardware_name(self.device),
            "cpu_threads": self.cpu_threads,
            **({"dollars_per_hour": options.dollars_per_hour} if options.dollars_per_hour else {}),
            **({"init_from": self.init_from} if self.init_from else {}),
            **({"teacher": self.teacher} if self.teacher else {}),
            **provenance(),
        }

    def specs(self, first_step: int, last_step: int) -> Iterator[BatchSpec]:
        """Return this process's batches."""
        return train_specs(self.train_source, self.counts, first_step, last_step, self.launch.rank)


def train_loader(source: Source, counts: StepCounts, num_workers: int, on_bad_image: OnBadImage = "fail") -> Loader:
    return Loader(
        source,
        TrainCrop(counts.recipe),
        batch_size=counts.per_process_batch_size,
        largest_image_size=counts.recipe.image_size,
        num_workers=num_workers,
        if_bad=on_bad_image,
    )


def describe_data(train: Source, val: Source, val_share: float = 0.0) -> dict[str, Any]:
    """Return the facts about the data for recipe.json."""
    return {
        "source": train.name,
        **({"val_share": val_share} if val_share else {}),
        "num_train_images": len(train),
        "num_val_images": len(val),
        "class_names": list(train.class_names),
        "fingerprint": {"train": train.fingerprint(), "val": val.fingerprint()},
    }
