"""The flags of all commands but training. Imports nothing slow, so that --help and a misspelt flag are quick."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from resnet_in1k.cli.arguments import POSITIONAL
from resnet_in1k.recipes.recipe import Interpolation, PublishedWeights, resize_size_for
from resnet_in1k.recipes.step_counts import EVAL_BATCH_SIZE
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import RGB
from resnet_in1k.utils.validation import check_options, within

if TYPE_CHECKING:
    from resnet_in1k.data.crop import EvalPreprocessing


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Common to evaluate.py and predict.py: the weights, the machine, and preprocessing, which is by default that of
    the weights' own evaluation or config.json."""

    GROUPS: ClassVar = {"ckpt": "Weights", "batch_size": "Hardware", "image_size": "Preprocessing"}
    BASIC: ClassVar = ("ckpt", "image_size", "data", "split", "output", "report", "images", "top_k", "json", "picture")

    ckpt: str
    """A run folder, a checkpoint folder, a .safetensors file, a .pth of another program, torchvision/MODEL.WEIGHTS,
    USER/NAME on the Hub; for evaluation also an exported .onnx or .pt2."""
    weights: PublishedWeights | None = None
    """Take the weights (model) or their moving average (ema), if --ckpt has both; by default the weights."""
    batch_size: int = field(default=EVAL_BATCH_SIZE, metadata=within(at_least=1))
    """Images per process and forward pass; changes results by float32 rounding only."""
    workers: int | None = field(default=None, metadata=within(at_least=0))
    """Loader workers per process; by default from the number of CPU cores."""
    cpu_threads: int | None = field(default=None, metadata=within(at_least=1))
    """Threads for computing on the CPU, per process; by default all physical cores, shared among the processes."""
    image_size: int | None = field(default=None, metadata=within(at_least=1))
    """Side of the center crop, in pixels; by default as the weights were evaluated."""
    eval_crop_ratio: float | None = field(default=None, metadata=within(above=0, at_most=1))
    """The short side is resized to image_size / this before the crop; by default as the weights were evaluated."""
    eval_interpolation: Interpolation | None = None
    """Interpolation of resizing; by default as the weights were evaluated."""
    mean: RGB | None = None
    """Mean of the RGB values from 0 to 1, subtracted by normalization; by default as the weights were evaluated."""
    std: RGB | None = None
    """Standard deviation that normalization divides by; by default as the weights were evaluated."""

    def __post_init__(self) -> None:
        check_options(self)

    def change(self, recorded: "EvalPreprocessing") -> "EvalPreprocessing":
        changes = {"interpolation": self.eval_interpolation, "mean": self.mean, "std": self.std}
        found = recorded.at(self.image_size or recorded.image_size)
        if self.eval_crop_ratio:
            changes["resize_size"] = resize_size_for(found.image_size, self.eval_crop_ratio)
        return replace(found, **{name: value for name, value in changes.items() if value})


@dataclass(frozen=True, kw_only=True)
class EvalOptions(InferenceOptions):
    """Evaluate saved weights; every image counts once.

    Examples:
        {prog} --ckpt runs/tutorial
        {prog} --ckpt USER/NAME --data data/imagenet --output eval.json
        {prog} --ckpt torchvision/resnet50.IMAGENET1K_V2 --data data/imagenet --report report
    """

    GROUPS: ClassVar = {**InferenceOptions.GROUPS, "data": "Data", "output": "Results"}

    data: str | None = None
    """Data, named as for training; by default the data of the run."""
    split: str = "val"
    """Split to evaluate on: train, val, or another that the data has, such as test."""
    val_share: float | None = field(default=None, metadata=within(at_least=0, below=1))
    """Fraction of the images to hold out where the data has no val split; by default the run's."""
    output: Path | None = None
    """Write the result to this file, in the format of a run folder's eval.json."""
    report: Path | None = None
    """Write accuracy by class, confused pairs, calibration and figures of the worst mistakes to this folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise UserError(f"--output {self.output}: no folder {self.output.parent}")
        if self.report is not None and self.report.exists() and not self.report.is_dir():
            raise UserError(f"--report {self.report} is a file, not a folder")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions):
    """Classify images.

    Examples:
        {prog} --ckpt runs/tutorial photo.jpg
        {prog} --ckpt USER/NAME photographs --picture seen.png
        {prog} --ckpt runs/tutorial photographs --json --top-k 1
    """

    GROUPS: ClassVar = {**InferenceOptions.GROUPS, "images": "Images", "top_k": "Results"}

    images: tuple[Path, ...] = field(default=(), metadata=POSITIONAL)
    """Image files, and folders of images at any depth."""
    top_k: int = field(default=5, metadata=within(at_least=1))
    """Number of classes to print per image."""
    json: bool = False
    """Print one JSON object per image and line."""
    picture: Path | None = None
    """Draw the images with their three most probable classes to this .png or .svg."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise UserError("no image given; name files or folders")
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise UserError(f"--picture {self.picture}: must end in .png or .svg")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare runs and evaluations.

    Examples:
        {prog} runs/tutorial runs/a3
        {prog} runs/tutorial runs/a3 --picture compared.png
        {prog} ours.json theirs.json
    """

    items: tuple[str, ...] = field(default=(), metadata=POSITIONAL)
    """Run folders, weights with an eval.json in the same folder, or eval.json files."""
    picture: Path | None = None
    """Plot the runs' accuracy over epochs and over minutes to this .png or .svg."""

    def __post_init__(self) -> None:
        if len(self.items) < 2:
            raise UserError("nothing to compare; name at least two runs, weights or eval.json files")
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise UserError(f"--picture {self.picture}: must end in .png or .svg")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export weights; the file is kept only if its logits agree.

    Examples:
        {prog} --ckpt runs/tutorial --format onnx --output resnet50.onnx
        {prog} --ckpt runs/tutorial --format pt2 --output resnet50.pt2 --image-size 288
        {prog} --ckpt old.pth --format safetensors --output runs/old/model.safetensors
    """

    ckpt: str
    """Weights, as for evaluate.py."""
    format: Literal["onnx", "pt2", "safetensors"]
    """onnx: for ONNX Runtime; pt2: for torch.export.load; safetensors: with torchvision's keys."""
    output: Path
    """The file to write."""
    weights: PublishedWeights | None = None
    """Take the weights (model) or their moving average (ema), if --ckpt has both; by default the weights."""
    image_size: int | None = field(default=None, metadata=within(at_least=1))
    """Side of the images for .onnx and .pt2, in pixels; by default that of the weights' evaluation."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.output.suffix != f".{self.format}":
            raise UserError(f"--output {self.output}: must end in .{self.format} for --format {self.format}")


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Publish a run's best weights, with their metrics as a model card.

    Examples:
        {prog} --run runs/tutorial --repo-id USER/NAME --dry-run
        {prog} --run runs/tutorial --repo-id USER/NAME --private
        {prog} --run runs/tutorial --repo-id USER/NAME --pr
    """

    run: Path
    """The run folder; its hub/ gets the files to publish."""
    repo_id: str
    """USER/NAME on the Hub."""
    license: str = "apache-2.0"
    """License of the weights, by the Hub's identifier."""
    private: bool = False
    """Create the repository as private."""
    revision: str = "main"
    """The branch to publish on, created if it does not exist."""
    pr: bool = False
    """Open a pull request instead of publishing on a branch."""
    dry_run: bool = False
    """List the files that would be published, then exit."""

    def __post_init__(self) -> None:
        if self.pr and self.revision != "main":
            raise UserError("--pr opens a pull request to main; leave out --revision")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Prepare images for training, or verify them.

    Examples:
        {prog} --kaggle path/to/kaggle --output data/imagenet
        {prog} --data photos --val-share 0.2 --resize 256 --output data/photos
        {prog} --verify data/imagenet --report problems.csv
    """

    GROUPS: ClassVar = {"train_tar": "Input", "output": "Output", "verify": "Verification", "processes": "Hardware"}

    train_tar: Path | None = None
    """ILSVRC2012_img_train.tar; needs the next two."""
    val_tar: Path | None = None
    """ILSVRC2012_img_val.tar."""
    devkit_tar: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz, which has the labels of the validation images."""
    allow_partial: bool = False
    """Other checksums or counts than the original's, in archives or Kaggle's copy: a warning instead of an error."""
    kaggle: Path | None = None
    """Instead of the archives: the folder of Kaggle's unpacked archive, with ILSVRC/ and LOC_val_solution.csv."""
    data: str | None = None
    """Instead of the archives: images as for training."""
    val_share: float = field(default=0.0, metadata=within(at_least=0, below=1))
    """If --data has no validation split, hold out this share as one; with --verify no split is needed."""
    output: Path | None = None
    """The folder to write. The originals are not changed; files on the same file system become hard links."""
    resize: int | None = field(default=None, metadata=within(at_least=32))
    """Shorter side of training images in pixels: larger images become smaller copies."""
    resize_val: bool = False
    """Resize the validation images, too; accuracies are then not comparable with those on originals."""
    shards: int | None = field(default=None, metadata=within(at_least=1))
    """Write tar shards of about this many megabytes, for --data shards:OUTPUT, instead of a folder of classes."""
    verify: str | None = None
    """Decode all images of this folder or other --data and list what is wrong; write nothing else."""
    report: Path | None = None
    """Write the list of --verify to this .csv file."""
    processes: int | None = field(default=None, metadata=within(at_least=1))
    """Number of worker processes; by default one for each core."""

    @property
    def archives(self) -> list[Path]:
        return [path for path in (self.train_tar, self.val_tar, self.devkit_tar) if path]

    def resize_to(self, split: str) -> int:
        """Return the shorter side in pixels, 0 for unchanged images."""
        return self.resize if self.resize and (split == "train" or self.resize_val) else 0

    def __post_init__(self) -> None:
        check_options(self)
        inputs = [bool(self.archives), self.kaggle is not None, self.data is not None, self.verify is not None]
        takes_output = self.output or self.resize or self.shards
        for is_wrong, problem in (
            (len(self.archives) not in (0, 3), "--train-tar, --val-tar and --devkit-tar belong together"),
            (sum(inputs) != 1, "give either the three archives, or --kaggle, or --data, or --verify"),
            (self.verify is None and self.output is None, "--output: the folder to write is not given"),
            (self.resize_val and self.resize is None, "--resize-val needs --resize"),
            (self.verify and takes_output, "--verify writes nothing: omit --output, --resize and --shards"),
            (self.report and self.verify is None, "--report needs --verify"),
            (self.val_share and not (self.data or self.verify), "--val-share needs --data or --verify"),
            (self.allow_partial and not any(inputs[:2]), "--allow-partial needs the archives or --kaggle"),
        ):
            if is_wrong:
                raise UserError(problem)
