"""The parts of a training run, and how they are put together."""

import contextlib
from dataclasses import replace
from pathlib import Path

from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.crop import EvalPreprocessing, TrainCrop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.loader import Loader
from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.data.sampler import TrainOrder
from resnet_in1k.data.tar_shards import ShardSource
from resnet_in1k.evaluate.evaluation import EVAL_BATCH_SIZE, eval_loader
from resnet_in1k.model.ema import MovingAverage
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.recipes.recipe import PublishedWeights, Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import RunFolder, describe_data
from resnet_in1k.train.agreement import check_same_data, check_same_program
from resnet_in1k.train.checkpoint import ModelGroup, OptimizerGroup, TensorGroup, TrainState
from resnet_in1k.train.init_weights import initial_weights
from resnet_in1k.train.log import TrainLog
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.train.resume import precision_of, run_facts
from resnet_in1k.train.skipped_images import SkippedImages
from resnet_in1k.train.step import TrainStep
from resnet_in1k.train.writer import RunWriter
from resnet_in1k.utils import device as devices
from resnet_in1k.utils.console import Console
from resnet_in1k.utils.distributed import Launch, make_accelerator
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.signals import StopSignals


class Trainer:
    """Compares the processes, opens the data, starts the loader workers and the process group, makes the model.

    Raises:
        UserError: if the run folder, the data, the batch size or the machine will not do, or if the processes differ.
    """

    def __init__(
        self,
        recipe_name: str,
        recipe: Recipe,
        options: TrainOptions,
        launch: Launch,
        signals: StopSignals,
        stack: contextlib.ExitStack,
    ):
        """`stack` ends the loader workers."""
        self.recipe_name, self.recipe, self.options = recipe_name, recipe, options
        self.launch, self.signals = launch, signals
        self.folder = RunFolder(options.output_dir or Path("runs", recipe_name))
        self._open_data(stack)
        self._make_parts()

    def _open_data(self, stack: contextlib.ExitStack) -> None:
        """Sources, sizes, loader workers; before there is a process group: see Loader."""
        recipe, options, launch = self.recipe, self.options, self.launch
        check_same_program(launch, recipe, options, self.folder)
        launch.broadcast_from_main(lambda: self.folder.check_free(options.resume), "looks at the run folder")
        self.train_source, self.val_source = launch.broadcast_from_main(
            lambda: open_train_and_val(options.data, options.val_share, options.rescan), "lists the images"
        )
        check_same_data(launch, (self.train_source, self.val_source))
        self.shard_of = None
        if recipe.shuffle_window:
            if not isinstance(self.train_source, ShardSource):
                raise UserError(
                    f"--shuffle-window is for --data shards:…, not for {options.data}, whose images lie apart"
                )
            self.train_source = replace(self.train_source, in_windows=True)
            self.shard_of = self.train_source.index.shard_of
        accumulation = options.gradient_accumulation_steps
        self.schedule = StepCounts(recipe, launch.world_size, accumulation, len(self.train_source))
        self.preprocessing = EvalPreprocessing.of(recipe)
        self.workers = devices.choose_workers(options.workers)
        self.train_loader = stack.enter_context(train_loader(self.train_source, self.schedule, options, self.workers))
        self.eval_loader = stack.enter_context(
            eval_loader(self.val_source, self.preprocessing, EVAL_BATCH_SIZE, self.workers)
        )

    def _make_parts(self) -> None:
        """The process group, model and optimizer, and what writes the run folder."""
        recipe, options, launch = self.recipe, self.options, self.launch
        class_names = self.train_source.class_names
        num_classes = len(class_names)
        self.initial = initial_weights(options.init_from, recipe, class_names, self.folder, launch)
        precision = precision_of(self.folder, options.precision, type(recipe))
        self.accelerator = make_accelerator(
            launch, precision, options.report_to, self.folder.path, options.compress_gradients
        )
        self.device, rank = self.accelerator.device, self.accelerator.process_index
        self.console = Console(self.accelerator.is_main_process)
        self.cpu_threads = devices.choose_cpu_threads(self.device, options.cpu_threads)
        self.augmentation = Augmentation(
            recipe, num_classes, rank, self.schedule.num_processes, compile=options.compile
        )
        self.train_step = TrainStep(
            recipe,
            num_classes,
            self.accelerator,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            compile=options.compile,
            initial=self.initial.tensors if self.initial else None,
            frozen_steps=self.schedule.frozen_steps,
        )
        # A plain model evaluates the very weights that are saved, without DDP and mixed precision.
        self.eval_model = self.train_step.plain_copy()
        self.average = MovingAverage(self.train_step.plain_copy(), self.schedule) if recipe.ema_decay else None

        self.writer = RunWriter(self.folder, launch, options.keep_checkpoints)
        self.log = TrainLog(
            self.schedule, self.folder, self.writer, self.accelerator, self.console, options, self.workers
        )
        self.skipped = SkippedImages(self.train_source, self.writer, self.folder.bad_images, self.console.print)
        self.state = TrainState(recipe_sha256=recipe.fingerprint(self.initial.facts["sha256"] if self.initial else ""))
        self.data = describe_data(self.train_source, self.val_source, options.val_share)
        self.facts = run_facts(
            self.schedule,
            self.accelerator.mixed_precision,
            devices.hardware_name(self.device),
            self.cpu_threads,
            options,
            self.initial,
        )

    def train_order(self, first_step: int, last_step: int) -> TrainOrder:
        """This process's batches from one step to another."""
        rank = self.accelerator.process_index
        return TrainOrder(self.schedule, first_step, last_step, rank, self.train_source.labels, self.shard_of)

    @property
    def groups(self) -> dict[str, TensorGroup]:
        """What a checkpoint holds, by the names of its files."""
        optimizer = OptimizerGroup(self.train_step.model, self.train_step.optimizer)
        return {**{name: ModelGroup(model) for name, model in self.models.items()}, "optimizer": optimizer}

    @property
    def models(self) -> dict[PublishedWeights, ResNet]:
        """The weights that are saved and evaluated; those that the recipe publishes come last."""
        models: dict[PublishedWeights, ResNet] = {"model": self.train_step.model}
        if self.average is not None:
            models["ema"] = self.average.model
        models[self.recipe.publish] = models.pop(self.recipe.publish)
        return models

    def end(self) -> None:
        """Once all processes are here, as a launcher ends the others when one exits early."""
        self.log.trackers.finish()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def train_loader(source: Source, schedule: StepCounts, options: TrainOptions, workers: int) -> Loader:
    """One loader for all epochs: an epoch's end does not interrupt the workers."""
    recipe = schedule.recipe
    return Loader(
        source,
        TrainCrop.of(recipe),
        batch_size=schedule.per_process_batch_size,
        largest_image_size=recipe.image_size,
        num_workers=workers,
        if_bad="replace" if options.on_bad_image == "skip" else "fail",
    )
