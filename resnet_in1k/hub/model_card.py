"""The model card: card.md.jinja, rendered with the records of a run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from torchvision.models import get_model_weights

from resnet_in1k.data.dataset import SourceFacts
from resnet_in1k.data.registry import source_facts
from resnet_in1k.evaluate.statistics import confidence_interval, paired
from resnet_in1k.model.torchvision_weights import PREFIX as TORCHVISION
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe, crop_ratio_for
from resnet_in1k.recipes.scaling import scaled_fields
from resnet_in1k.recipes.step_counts import accumulation_steps
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.device import PRECISIONS
from resnet_in1k.utils.format import duration

PROJECT = "resnet-in1k"
ALWAYS_SHOWN = (
    "loss",
    "optimizer",
    "lr_schedule",
    "decay_norms",
    "decay_biases",
    "eval_crop_ratio",
    "eval_interpolation",
)
"""Recipe fields that say something also where they have their defaults."""
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True)
class RunRecord:
    """The records of a run, read and checked: all that is published of it."""

    repo_id: str
    license: str
    architecture: str
    evaluation: dict[str, Any]
    """eval.json."""
    recipe: Recipe | None
    facts: dict[str, Any] | None
    """recipe.json; None for weights that were trained elsewhere, as is the recipe."""
    records: list[dict[str, Any]]
    """log.jsonl."""
    num_bad_train_images: int
    has_curves: bool
    exported: Sequence[dict[str, Any]] = ()
    """The evaluations of networks exported from the same weights."""

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]

    @property
    def is_imagenet(self) -> bool:
        trained_on = self.facts["data"]["num_train_images"] if self.facts else imagenet.NUM_TRAIN_IMAGES
        return imagenet.is_of_imagenet(self.evaluation, trained_on)

    @property
    def source(self) -> SourceFacts:
        return source_facts(self.evaluation["data"])

    @property
    def val_share_flag(self) -> str:
        """For a command; "" where the data have a val split."""
        share = self.facts["data"].get("val_share") if self.facts else None
        return f" --val-share {share:g}" if share else ""

    @property
    def dataset_name(self) -> str:
        return "ImageNet-1k" if self.is_imagenet else self.source.name

    @property
    def class_names(self) -> list[str]:
        return list(self.evaluation["class_names"])

    @property
    def image_size(self) -> int:
        return int(self.evaluation["image_size"])

    @property
    def interpolation(self) -> str:
        return self.evaluation.get("interpolation", "bilinear")  # evaluations of earlier versions record none

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the RGB values from 0 to 1, by which images are normalized; so is std."""
        return tuple(self.evaluation.get("mean", imagenet.MEAN))

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(self.evaluation.get("std", imagenet.STD))

    @property
    def crop_ratio(self) -> float:
        """The ratio from which a reader of config.json computes the same resize_size."""
        preferred = self.recipe.eval_crop_ratio if self.recipe is not None else 0.875
        return crop_ratio_for(self.image_size, self.evaluation["resize_size"], preferred)


def make_card(record: RunRecord) -> str:
    """README.md with its metadata.

    Raises:
        KeyError, TypeError, jinja2.UndefinedError: if recipe.json or log.jsonl are incomplete.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"commas": "{:,}".format, "percent": "{:.2%}".format, "duration": duration}
    result = record.evaluation
    counts = (result["class_top1_correct"], result["class_num_images"])
    rows = zip(imagenet.human_names(record.class_names), *counts, strict=True)
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=_metadata(record),
        run=record,
        result=result,
        exported=[(each["file"], each, _agreement(each, result)) for each in record.exported],
        interval=confidence_interval(result["top1_correct"], result["num_images"]),
        epochs=[line for line in record.records if line["kind"] == "epoch"],
        torchvision_weights=get_model_weights(record.architecture) if record.is_imagenet else [],
        initial=published_origin(record.facts) if record.facts and "init_from" in record.facts else None,
        training=_training(record) if record.facts else None,
        classes=sorted((row for row in rows if row[2]), key=lambda row: (-row[1] / row[2], row[0])),
    )
    return card.rstrip() + "\n"


def _agreement(exported: dict[str, Any], result: dict[str, Any]) -> str:
    """Of how many images the exported network is right where the weights are not, or the reverse."""
    images = paired(exported, result)
    return f"{images.only_first + images.only_second:,}" if images else "not recorded"


def _metadata(record: RunRecord) -> str:
    """As the Hub reads it: `model-index` carries the metrics."""
    from huggingface_hub import EvalResult, ModelCardData

    result = record.evaluation
    shared = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": imagenet.HUB_ID if record.is_imagenet else record.dataset_name,
        "dataset_name": record.dataset_name,
        "dataset_split": result["split"],
        "dataset_args": {"num_images": result["num_images"], "image_size": record.image_size},
        "metric_type": "accuracy",
    }
    data = ModelCardData(
        model_name=record.name,
        license=record.license,
        library_name="timm",
        pipeline_tag="image-classification",
        base_model=_base_model(record),
        datasets=[imagenet.HUB_ID] if record.is_imagenet else None,
        metrics=["accuracy"],
        tags=["image-classification", "timm", "transformers", "torchvision", record.architecture, PROJECT],
        eval_results=[
            EvalResult(metric_name="top-1 accuracy", metric_value=result["top1_accuracy"], **shared),
            EvalResult(metric_name=f"top-{result['top_k']} accuracy", metric_value=result["top5_accuracy"], **shared),
        ],
    )
    return data.to_yaml()


def published_origin(facts: dict[str, Any]) -> dict[str, Any]:
    """What recipe.json says of the initial weights, without folders of this machine."""
    initial = facts["init_from"]
    return {**initial, "checkpoint": initial["origin"] or Path(initial["checkpoint"]).name}


def _base_model(record: RunRecord) -> str | None:
    """The Hub repository of the initial weights."""
    origin = record.facts.get("init_from", {}).get("origin", "") if record.facts else ""
    return origin if origin and not origin.startswith(TORCHVISION) else None


def _training(record: RunRecord) -> dict[str, Any]:
    """What the card says of the training, beyond the facts as recorded."""
    facts, recipe = record.facts, record.recipe
    named = RECIPES.get(facts["recipe"]["name"])
    starts = [facts, *facts.get("resumed", [])]
    shown = {*recipe.non_default_fields(), *ALWAYS_SHOWN}
    rates = [line["images_per_second"] for line in record.records if line["kind"] == "train"]
    return {
        "facts": facts,
        "changes": named.recipe.differences(recipe) if named else [],
        "fields": {name: value for name, value in dataclasses.asdict(recipe).items() if name in shown},
        "hardware": dict.fromkeys(f"{start['world_size']} × {start['hardware']}" for start in starts),
        "num_resumes": len(starts) - 1,
        "images_per_second": median(rates) if rates else None,
        "precision": PRECISIONS[facts["mixed_precision"]],
        "command": _train_command(record),
    }


def _train_command(record: RunRecord) -> str:
    """The command that trains these weights again."""
    facts, recipe = record.facts, record.recipe
    named = RECIPES.get(facts["recipe"]["name"])
    words = [f"accelerate launch --num_processes {facts['world_size']} scripts/train.py"]
    words += [f"--recipe {facts['recipe']['name']}"] if named else []
    words.append(f"--data {record.source.data_flag}{record.val_share_flag}")
    if "init_from" in facts:
        initial = facts["init_from"]
        words.append(f"--init-from {initial['origin'] or 'path/to/' + Path(initial['checkpoint']).name}")
    batch, world_size = recipe.global_batch_size, facts["world_size"]
    given = {"epochs": recipe.epochs, "global_batch_size": batch, "image_size": recipe.image_size}
    follows = scaled_fields(named.recipe, **given) if named else {}  # what these three flags change by themselves
    for field in dataclasses.fields(recipe):
        value, flag = getattr(recipe, field.name), field.name.replace("_", "-")
        base = getattr(named.recipe, field.name) if named else field.default
        if field.name not in given:
            base = follows.get(field.name, base)
        if base != value and field.name != "lr_batch_rule":
            text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {text}")
    words.append(f"--precision {PRECISIONS[facts['mixed_precision']].flag}")
    images_per_forward_pass = named.images_per_forward_pass if named else 0
    if facts["gradient_accumulation_steps"] != accumulation_steps(batch, world_size, images_per_forward_pass):
        words.append(f"--gradient-accumulation-steps {facts['gradient_accumulation_steps']}")
    if record.num_bad_train_images:
        words.append("--on-bad-image skip")
    return " ".join(words)
