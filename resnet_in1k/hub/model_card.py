"""Render the model card, model_card.md.jinja, from the records of a run."""

import dataclasses
import functools
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torchvision.models import get_model_weights

from resnet_in1k.data.registry import source_facts
from resnet_in1k.evaluate.statistics import confidence_interval, paired
from resnet_in1k.model.resnet import card_environment
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.format import duration, printable
from resnet_in1k.utils.validation import PRECISIONS

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PROJECT_URL = ""
"""Address of this project's repository, which cards then link to; "" as long as there is none."""


@dataclass(frozen=True)
class RunRecord:
    """A run that has been checked for publication."""

    run: RunFolder
    repo_id: str
    license: str
    architecture: str
    evaluation: dict[str, Any]
    """eval.json, with interpolation, mean and std also if an earlier version did not record them."""
    exported: Sequence[dict[str, Any]] = ()
    """Evaluations of networks exported from these weights."""
    recipe: Recipe | None = None
    facts: dict[str, Any] | None = None
    """`published_facts` of recipe.json; like the recipe None for weights that were trained elsewhere."""

    @property
    def is_imagenet(self) -> bool:
        trained_on = self.facts["data"]["num_train_images"] if self.facts else imagenet.NUM_TRAIN_IMAGES
        return imagenet.is_of_imagenet(self.evaluation, trained_on)

    @property
    def dataset_name(self) -> str:
        return "ImageNet-1k" if self.is_imagenet else source_facts(self.evaluation["data"]).name


def make_card(record: RunRecord) -> str:
    """Return README.md; raises KeyError, TypeError or UndefinedError if recipe.json or log.jsonl are incomplete."""
    environment = card_environment()
    environment.filters |= {"commas": "{:,}".format, "percent": "{:.2%}".format, "duration": duration}
    environment.filters["cell"] = _cell
    environment.filters["quoted"] = functools.partial(json.dumps, ensure_ascii=False)
    run, result, facts, recipe = record.run, record.evaluation, record.facts, record.recipe
    counts = (result["class_top1_correct"], result["class_num_images"])
    rows = zip(imagenet.human_names(result["class_names"]), *counts, strict=True)
    log = run.records()
    rates = [line["images_per_second"] for line in log if line["kind"] == "train"]
    starts = [facts, *facts.get("resumed", [])] if facts else []
    named = RECIPES.get(facts["recipe"]["name"]) if facts else None
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        project_url=PROJECT_URL,
        record=record,
        result=result,
        source=source_facts(result["data"]),
        exported=[(each, paired(each, result)) for each in record.exported],
        interval=confidence_interval(result["top1_correct"], result["num_images"]),
        epochs=[line for line in log if line["kind"] == "epoch"],
        torchvision_weights=get_model_weights(record.architecture) if record.is_imagenet else [],
        facts=facts,
        initial=facts.get("init_from") if facts else None,
        teacher=facts.get("teacher") if facts else None,
        changes=named.recipe.differences(recipe) if named else [],
        fields=_applied_fields(recipe) if recipe else {},
        hardware=dict.fromkeys(f"{start['world_size']} × {start['hardware']}" for start in starts),
        num_resumes=len(starts) - 1,
        rate=median(rates) if rates else None,
        precision=PRECISIONS[facts["mixed_precision"]] if facts else None,
        num_bad_train_images=len(files.read_text(run.bad_images).splitlines()) if run.bad_images.exists() else 0,
        has_curves=run.curves.with_suffix(".png").exists(),
        command=_train_command(facts) if facts and "command" in facts else "",
        classes=sorted((row for row in rows if row[2]), key=lambda row: (-row[1] / row[2], row[0])),
    )
    return card.rstrip() + "\n"


def _cell(text: str) -> str:
    """Escape what Markdown or a table would take for markup, and show control characters as text."""
    return re.sub(r"([\\`*\[\]<>|~$])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", printable(text)).replace("  ", "&nbsp; ")


def _applied_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's fields that had an effect, and differ from their defaults or are always listed."""
    falls, has_momentum = recipe.lr_schedule not in ("step", "multi_step"), recipe.optimizer not in ("adamw", "lamb")
    is_rand_augment = recipe.augment_policy.endswith("rand_augment")
    had_effect = {
        "lr_batch_rule": False,
        "lr_step_epochs": recipe.lr_schedule == "step",
        "lr_step_factor": not falls,
        "lr_milestones": recipe.lr_schedule == "multi_step",
        "lr_floor": falls,
        "lr_power": recipe.lr_schedule == "polynomial",
        "warmup_start_factor": recipe.warmup_epochs,
        "momentum": has_momentum,
        "nesterov": has_momentum,
        "decay_norms": recipe.weight_decay,
        "decay_biases": recipe.weight_decay,
        "ema_every_steps": recipe.ema_decay,
        "teacher_temperature": recipe.teacher_weight,
        "bce_target_threshold": recipe.loss == "binary_cross_entropy",
        "image_size_ramp_start": recipe.initial_image_size,
        "image_size_ramp_end": recipe.initial_image_size,
        "rand_augment_num_ops": is_rand_augment,
        "rand_augment_magnitude": is_rand_augment,
        "rand_augment_magnitude_std": recipe.augment_policy == "timm_rand_augment",
        "mix_by_pair": recipe.mixes,
    }
    always = {"loss", "optimizer", "lr_schedule", "decay_norms", "decay_biases", "eval_crop_ratio"}
    listed = recipe.non_default_fields().keys() | always
    fields = dataclasses.asdict(recipe)
    return {name: value for name, value in fields.items() if name in listed and had_effect.get(name, True)}


def _train_command(facts: dict[str, Any]) -> str:
    """Return the recorded command in the form in which the installed package is started."""
    start, processes = ["resnet-in1k", "train"], facts["world_size"]
    if processes > 1:
        start = f"accelerate launch --multi_gpu --num_processes {processes} -m resnet_in1k train".split()
    return shlex.join([*start, *facts["command"][1:]])


def published_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return recipe.json, or its entry of one resume, without the folders of this machine."""
    published, origins = dict(facts), []
    for name in ("init_from", "teacher"):
        if given := facts.get(name):
            published[name] = {**given, "checkpoint": given["origin"] or Path(given["checkpoint"]).name}
            origins.append(given["origin"])
    if "command" in facts:
        published["command"] = published_command(facts["command"], origins)
    if "data" in facts:
        published["data"] = {**facts["data"], "source": source_facts(facts["data"]["source"]).name}
    if "resumed" in facts:
        published["resumed"] = [published_facts(each) for each in facts["resumed"]]
    return published


def published_command(command: Sequence[str], origins: Sequence[str]) -> list[str]:
    """Return the words of a recorded command with path/to/NAME in place of local paths; `origins` are not paths."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--") else [word])]
    published = ["scripts/train.py"]
    for word in itertools.dropwhile(lambda word: not word.startswith("--"), words):
        if published[-1] == "--data":
            word = shlex.split(source_facts(word).data_flag)[0]
        elif "/" in word and word not in origins and not word.startswith("hub:"):
            word = f"path/to/{Path(word).name}"
        published.append(word)
    return published
