"""Render the model card, model_card.md.jinja, from the records of a run."""

import dataclasses
import itertools
import shlex
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
from resnet_in1k.model.foreign import TORCHVISION
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.device import PRECISIONS
from resnet_in1k.utils.format import duration

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
ALWAYS_LISTED = ("loss", "optimizer", "lr_schedule", "decay_norms", "decay_biases", "eval_crop_ratio")
"""Recipe fields that are listed even with their default values."""
UNUSED_BY_SCHEDULE = {
    "step": ("lr_milestones", "lr_floor", "lr_power"),
    "multi_step": ("lr_step_epochs", "lr_floor", "lr_power"),
    "cosine": ("lr_step_epochs", "lr_step_factor", "lr_milestones", "lr_power"),
    "linear": ("lr_step_epochs", "lr_step_factor", "lr_milestones", "lr_power"),
    "polynomial": ("lr_step_epochs", "lr_step_factor", "lr_milestones"),
}
UNUSED_WITHOUT = {
    "initial_image_size": ("image_size_ramp_start", "image_size_ramp_end"),
    "ema_decay": ("ema_every_steps",),
    "warmup_epochs": ("warmup_start_factor",),
    "mixes": ("mix_by_pair",),
}


@dataclass(frozen=True)
class RunRecord:
    """Records of a run that have been read and checked for publication."""

    repo_id: str
    license: str
    architecture: str
    evaluation: dict[str, Any]
    """eval.json, with interpolation, mean and std also if an earlier version did not record them."""
    recipe: Recipe | None
    facts: dict[str, Any] | None
    """recipe.json; like the recipe None for weights that were trained elsewhere."""
    records: list[dict[str, Any]]
    """log.jsonl."""
    num_bad_train_images: int
    has_curves: bool
    exported: Sequence[dict[str, Any]] = ()
    """Evaluations of networks exported from these weights."""

    @property
    def is_imagenet(self) -> bool:
        trained_on = self.facts["data"]["num_train_images"] if self.facts else imagenet.NUM_TRAIN_IMAGES
        return imagenet.is_of_imagenet(self.evaluation, trained_on)

    @property
    def source(self) -> SourceFacts:
        return source_facts(self.evaluation["data"])

    @property
    def val_share_flag(self) -> str:
        """Flag for a command; "" if the data have a val split."""
        share = self.facts["data"].get("val_share") if self.facts else None
        return f" --val-share {share:g}" if share else ""

    @property
    def dataset_name(self) -> str:
        return "ImageNet-1k" if self.is_imagenet else self.source.name


def make_card(record: RunRecord) -> str:
    """Return README.md with its metadata.

    Raises:
        KeyError, TypeError, jinja2.UndefinedError: if recipe.json or log.jsonl are incomplete.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"commas": "{:,}".format, "percent": "{:.2%}".format, "duration": duration}
    result, facts, recipe = record.evaluation, record.facts, record.recipe
    counts = (result["class_top1_correct"], result["class_num_images"])
    rows = zip(imagenet.human_names(result["class_names"]), *counts, strict=True)
    rates = [line["images_per_second"] for line in record.records if line["kind"] == "train"]
    pairs = [paired(each, result) for each in record.exported]
    starts = [facts, *facts.get("resumed", [])] if facts else []
    named = RECIPES.get(facts["recipe"]["name"]) if facts else None
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=_metadata(record),
        run=record,
        result=result,
        exported=list(zip(record.exported, pairs, strict=True)),
        interval=confidence_interval(result["top1_correct"], result["num_images"]),
        epochs=[line for line in record.records if line["kind"] == "epoch"],
        torchvision_weights=get_model_weights(record.architecture) if record.is_imagenet else [],
        initial=published_origin(facts["init_from"]) if facts and "init_from" in facts else None,
        facts=facts,
        changes=named.recipe.differences(recipe) if named else [],
        fields=_applied_fields(recipe) if recipe else {},
        hardware=dict.fromkeys(f"{start['world_size']} × {start['hardware']}" for start in starts),
        num_resumes=len(starts) - 1,
        rate=median(rates) if rates else None,
        precision=PRECISIONS[facts["mixed_precision"]] if facts else None,
        command=shlex.join(published_command(facts)) if facts and "command" in facts else "",
        classes=sorted((row for row in rows if row[2]), key=lambda row: (-row[1] / row[2], row[0])),
    )
    return card.rstrip() + "\n"


def _metadata(record: RunRecord) -> str:
    """Return the card's YAML, with the metrics in `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    result = record.evaluation
    shared = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": imagenet.HUB_ID if record.is_imagenet else record.dataset_name,
        "dataset_name": record.dataset_name,
        "dataset_split": result["split"],
        "dataset_args": {"num_images": result["num_images"], "image_size": result["image_size"]},
        "metric_type": "accuracy",
    }
    origin = (record.facts or {}).get("init_from", {}).get("origin", "")
    data = ModelCardData(
        model_name=record.repo_id.split("/")[1],
        license=record.license,
        library_name="timm",
        pipeline_tag="image-classification",
        base_model=origin if origin and not origin.startswith(TORCHVISION) else None,  # a repository on the Hub
        datasets=[imagenet.HUB_ID] if record.is_imagenet else None,
        metrics=["accuracy"],
        tags=["image-classification", "timm", "transformers", "torchvision", record.architecture, "resnet-in1k"],
        eval_results=[
            EvalResult(metric_name="top-1 accuracy", metric_value=result["top1_accuracy"], **shared),
            EvalResult(metric_name=f"top-{result['top_k']} accuracy", metric_value=result["top5_accuracy"], **shared),
        ],
    )
    return data.to_yaml()


def _applied_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's fields that differ from their defaults and had an effect."""
    unused = {"lr_batch_rule", *UNUSED_BY_SCHEDULE.get(recipe.lr_schedule, ())}
    unused |= {field for switch, fields in UNUSED_WITHOUT.items() if not getattr(recipe, switch) for field in fields}
    listed = {*recipe.non_default_fields(), *ALWAYS_LISTED} - unused
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name in listed}


def published_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return recipe.json without the folders of this machine."""

    def without_folders(entry: dict[str, Any]) -> dict[str, Any]:
        initial = {"init_from": published_origin(entry["init_from"])} if "init_from" in entry else {}
        command = {"command": published_command(entry)} if "command" in entry else {}
        return {**entry, **initial, **command}

    data = {**facts["data"], "source": source_facts(facts["data"]["source"]).name}
    resumed = {"resumed": [without_folders(entry) for entry in facts["resumed"]]} if "resumed" in facts else {}
    return {**without_folders(facts), "data": data, **resumed}


def published_origin(initial: dict[str, Any]) -> dict[str, Any]:
    """Return recipe.json's `init_from` without its folder."""
    return {**initial, "checkpoint": initial["origin"] or Path(initial["checkpoint"]).name}


def published_command(facts: dict[str, Any]) -> list[str]:
    """Return the words of the recorded command with path/to/NAME in place of local paths."""
    origin = facts.get("init_from", {}).get("origin", "")

    def published(flag: str, value: str) -> str:
        flag = flag.replace("_", "-")
        if flag == "--data":
            return shlex.split(source_facts(value).data_flag)[0]
        if (flag == "--init-from" and origin) or (flag == "--recipe" and value.startswith("hub:")):
            return value
        is_path = flag in ("--output-dir", "--init-from") or "/" in value
        return f"path/to/{Path(value).name}" if is_path else value

    words, flag = ["scripts/train.py"], ""
    for word in itertools.dropwhile(lambda word: not word.startswith("--"), facts["command"]):
        if not word.startswith("--"):
            words.append(published(flag, word))
            continue
        flag, equals, value = word.partition("=")
        words.append(f"{flag}={published(flag, value)}" if equals else word)
    return words
