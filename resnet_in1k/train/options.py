"""The options of a training run: everything outside the recipe. Imports nothing slow, so that --help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from resnet_in1k.recipes.recipe import PublishedWeights
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.validation import OnBadImage, PrecisionFlag, check_options, within


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Data, machine and output of a run: everything outside the recipe."""

    GROUPS: ClassVar = {
        "output_dir": "Run",
        "data": "Data",
        "workers": "Hardware",
        "log_every": "Logging",
        "dollars_per_hour": "Run",
    }
    BASIC: ClassVar = (
        *("output_dir", "resume", "dry_run", "dollars_per_hour", "checkpoint_every", "init_from", "data", "val_share"),
        *("workers", "precision", "gradient_accumulation_steps"),
    )

    output_dir: Path | None = None
    """Run folder; default runs/<recipe>. A folder that contains a run needs --resume."""
    resume: bool = False
    """Continue from the newest checkpoint in the run folder; start if there is none."""
    dry_run: bool = False
    """Print the plan, run the preflight, estimate time and cost on this machine, then exit."""
    init_from: str | None = None
    """Start from these weights: a run folder, a .safetensors or .pth file, torchvision/resnet50.IMAGENET1K_V2 or
    USER/NAME on the Hub. The last layer is kept if the class names agree."""
    weights: PublishedWeights | None = None
    """Take the weights (model) or their moving average (ema), if --init-from has both; by default the weights."""
    teacher: str | None = None
    """Learn the predictions of this network, too, by teacher_weight: the same kinds as --init-from, an exported
    network, or timm:NAME, a model of timm with its weights."""
    checkpoint_every: int = field(default=0, metadata=within(at_least=0))
    """Optimizer steps between two checkpoints, in addition to the end of each epoch; 0 for epochs only."""
    keep_checkpoints: int = field(default=2, metadata=within(at_least=1))
    """Number of newest checkpoints to keep, in addition to the best."""

    data: str = "data/imagenet"
    """A folder with train/<class>/* and val/<class>/*; hf:NAME[:CONFIG[:TRAIN,VAL[:LABEL]]], a dataset of the Hub or a
    folder of parquet files; shards:DIR or shards:PATTERN, tar files; `digits`; or `synthetic`."""
    val_share: float = field(default=0.0, metadata=within(at_least=0, below=1))
    """Hold out this share of the images for validation if there is no validation split. A hash of each image's name
    decides, so the split is the same everywhere."""
    rescan: bool = False
    """List the images again; by default a cached listing is used while no folder has changed."""
    on_bad_image: OnBadImage = "fail"
    """At a training image that cannot be decoded: fail, or skip to the next image, for at most 0.1% of the images."""

    workers: int | None = field(default=None, metadata=within(at_least=0))
    """Loader workers per process; default: from the number of CPU cores."""
    precision: PrecisionFlag = "auto"
    """Training precision; auto: that of the run that is resumed, else the launch configuration's, else bf16 if the
    device is fast at it, fp16 on V100 and T4, else fp32."""
    gradient_accumulation_steps: int = field(default=1, metadata=within(at_least=1))
    """Forward passes per optimizer step and process, to save memory; the global batch stays the same."""
    compress_gradients: bool = False
    """Send gradients between processes as bf16: half the bytes, and sums of 8 significant bits instead of 24."""
    compile: bool = False
    """Compile the model by torch.compile: a slower start, then faster steps on a GPU."""
    cpu_threads: int | None = field(default=None, metadata=within(at_least=1))
    """CPU threads per process; default for training on the CPU: all physical cores, divided among the processes."""

    log_every: int = field(default=100, metadata=within(at_least=1))
    """Optimizer steps between two lines of the log. The last step of an epoch is always logged."""
    report_to: str | None = None
    """An Accelerate tracker to log to, such as tensorboard, trackio or wandb."""
    dollars_per_hour: float = field(default=0.0, metadata=within(at_least=0))
    """Price of all machines of the run together; the forecast, the log and the model card then have a price."""

    def __post_init__(self) -> None:
        check_options(self)

    def run_folder(self, recipe_name: str) -> RunFolder:
        return RunFolder(self.output_dir or Path("runs", recipe_name))
