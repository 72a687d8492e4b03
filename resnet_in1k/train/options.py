"""How and where to train: what does not change what is computed, except for rounding."""

from dataclasses import dataclass, field
from pathlib import Path

from resnet_in1k.data.decode import OnBadImage
from resnet_in1k.utils.device import PrecisionFlag
from resnet_in1k.utils.validation import at_least, at_least_and_below, check_options


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How and where to train."""

    data: str = "data/imagenet"
    """A folder with train/<class>/* and val/<class>/*; hf:NAME[:CONFIG], a set of the Hub or a folder of parquet files;
    shards:DIR, tar files; `digits`; or `synthetic`."""
    val_share: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Of images without a val split: evaluate on this share of them, chosen by their names' hashes."""
    rescan: bool = False
    """List the images anew, also where what is kept of the last listing seems to hold."""
    init_from: str | None = None
    """Start from these weights, named as for evaluate.py; the head is kept if the class names agree."""
    output_dir: Path | None = None
    """Run folder; by default runs/<recipe>. One that already holds a run is refused unless --resume."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder; start if there is none."""
    workers: int | None = field(default=None, metadata=at_least(0))
    """Loader workers per process; by default from the number of CPU cores."""
    log_every: int = field(default=100, metadata=at_least(1))
    """Optimizer steps between two lines of the log; an epoch's last step has one too."""
    checkpoint_every: int = field(default=0, metadata=at_least(0))
    """Optimizer steps between two checkpoints, besides each epoch's end; 0 for epochs' ends only."""
    keep_checkpoints: int = field(default=2, metadata=at_least(1))
    """How many of the newest checkpoints to keep, besides the best."""
    report_to: str | None = None
    """An Accelerate tracker to report to as well, such as tensorboard or wandb."""
    dry_run: bool = False
    """Print the plan and the schedule, run the preflight, measure the speed and tell what the run would take; stop."""
    dollars_per_hour: float = field(default=0.0, metadata=at_least(0))
    """What all machines of the run cost per hour: time is then also given as a price, which log and card keep."""
    on_bad_image: OnBadImage = "fail"
    """At a training image that cannot be read: fail, or skip to the next one, for at most 0.1 % of them."""
    precision: PrecisionFlag = "auto"
    """Training precision; auto: as launched, and where the launch says nothing bf16 if the device is fast at it."""
    gradient_accumulation_steps: int = field(default=1, metadata=at_least(1))
    """Forward passes per optimizer step and process, for less memory: the global batch stays as it is."""
    compress_gradients: bool = False
    """With several processes, send gradients as bf16: half the bytes, and sums of 8 instead of 24 significant bits."""
    compile: bool = False
    """Compile the model and, on a GPU, the augmentation by torch.compile: slower to start; not measured on GPUs yet."""
    cpu_threads: int | None = field(default=None, metadata=at_least(1))
    """Threads for computing on the CPU, per process; by default, if it trains, all physical cores, shared out."""

    def __post_init__(self) -> None:
        check_options(self)
