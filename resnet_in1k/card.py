"""The model card: what is published of a run, from its records alone."""

import dataclasses
import math
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from resnet_in1k.names import human_names, is_imagenet_1k
from resnet_in1k.recipes import RECIPES, Recipe, crop_ratio_for
from resnet_in1k.stopwatch import duration

PROJECT = "resnet-in1k"
IMAGENET_ID = "ILSVRC/imagenet-1k"
IMAGENET_NUM_TRAIN_IMAGES, IMAGENET_NUM_VAL_IMAGES = 1_281_167, 50_000
FEW_CLASSES = 20
"""So many are listed one by one; of more, the strongest and the weakest."""


@dataclass(frozen=True)
class Evidence:
    """What a run has left behind, read and checked: all that a card may speak of."""

    repo_id: str
    license: str
    architecture: str
    evaluation: dict[str, Any]
    """eval.json."""
    recipe_name: str | None
    recipe: Recipe | None
    facts: dict[str, Any] | None
    """recipe.json; None for weights that were trained elsewhere, as are the two above."""
    records: list[dict[str, Any]]
    """log.jsonl."""
    num_bad_train_images: int
    has_curves: bool

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]

    @property
    def class_names(self) -> list[str]:
        return list(self.evaluation["class_names"])

    @property
    def is_imagenet(self) -> bool:
        """By its classes and by how many images there are: others have its classes too (ImageNetV2, subsets)."""
        trained_on = self.facts["data"]["num_train_images"] if self.facts else IMAGENET_NUM_TRAIN_IMAGES
        return (
            is_imagenet_1k(self.class_names)
            and (self.evaluation["split"], self.evaluation["num_images"]) == ("val", IMAGENET_NUM_VAL_IMAGES)
            and trained_on == IMAGENET_NUM_TRAIN_IMAGES
        )

    @property
    def dataset_name(self) -> str:
        return "ImageNet-1k" if self.is_imagenet else data_name(self.evaluation["data"])

    @property
    def dataset_id(self) -> str:
        return IMAGENET_ID if self.is_imagenet else data_name(self.evaluation["data"])

    @property
    def image_size(self) -> int:
        return int(self.evaluation["image_size"])

    @property
    def crop_ratio(self) -> float:
        """Of which resize_size is made again from image_size."""
        preferred = self.recipe.eval_crop_ratio if self.recipe is not None else 0.875
        return crop_ratio_for(self.image_size, self.evaluation["resize_size"], preferred)


def data_name(source: str) -> str:
    """A source's name without the folders it lies in, which are nobody's business."""
    return Path(source).name or source


def interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, https://doi.org/10.1080/01621459.1927.10502953."""
    z = 1.959964
    share, spread = correct / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return middle - half, middle + half


def make_card(evidence: Evidence) -> str:
    """README.md with its metadata."""
    from huggingface_hub import EvalResult, ModelCardData

    result = evidence.evaluation
    shared = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": evidence.dataset_id,
        "dataset_name": evidence.dataset_name,
        "dataset_split": result["split"],
        "dataset_args": {"num_images": result["num_images"], "image_size": evidence.image_size},
    }
    metadata = ModelCardData(
        model_name=evidence.name,
        license=evidence.license,
        library_name="timm",
        pipeline_tag="image-classification",
        datasets=[evidence.dataset_id] if evidence.is_imagenet else None,
        metrics=["accuracy"],
        tags=["image-classification", "timm", "transformers", "torchvision", evidence.architecture, PROJECT],
        eval_results=[
            EvalResult(metric_type="accuracy", metric_name=name, metric_value=result[key], **shared)
            for name, key in [("top-1 accuracy", "top1_accuracy"), (f"top-{result['top_k']} accuracy", "top5_accuracy")]
        ],
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {evidence.name}",
        _opening(evidence),
        _results(evidence),
        _reference(evidence),
        _usage(evidence),
        _training(evidence),
        _classes(evidence),
        _reproduction(evidence),
        _limits(evidence),
        f"## Licence\n\nThe weights are published under `{evidence.license}`. Images that weights are "
        "trained on have terms of their own.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _opening(evidence: Evidence) -> str:
    name = evidence.architecture.replace("resnet", "ResNet-")
    trained = f"trained from scratch on {evidence.dataset_name}"
    if evidence.recipe is None:
        trained = f"trained elsewhere and evaluated on {evidence.dataset_name}"
    return (
        f"A {name} {trained}: {len(evidence.class_names):,} classes, "
        f"{evidence.image_size} px. One `model.safetensors` that loads in {PROJECT}, torchvision, timm and "
        "transformers, with the same logits."
    )


def _results(evidence: Evidence) -> str:
    result = evidence.evaluation
    low, high = interval(result["top1_correct"], result["num_images"])
    bad = result.get("num_bad_images", 0)
    num_epochs = sum(record["kind"] == "epoch" for record in evidence.records)
    sentences = [
        f"Every image of the split is counted once, at one crop, without test-time augmentation, outside mixed "
        f"precision. With {result['num_images']:,} images, the 95 % interval of top-1 is {low:.2%} to {high:.2%}.",
        f"The weights are the best of {num_epochs} epochs on this very split, so the figure is a little flattered."
        if num_epochs > 1
        else "",
        f"{bad} images that no decoder could read are counted as wrong." if bad else "",
        f"The numbers belong to the file with sha256 `{result['weights_sha256']}`.",
    ]
    return (
        "## Results\n\n"
        f"| data | split | images | resized to | crop | top-1 | top-{result['top_k']} | loss |\n"
        "|---|---|---|---|---|---|---|---|\n"
        f"| {evidence.dataset_name} | {result['split']} | {result['num_images']:,} | {result['resize_size']} px | "
        f"{evidence.image_size} px | {result['top1_accuracy']:.2%} | {result['top5_accuracy']:.2%} | "
        f"{result['loss']:.4f} |\n\n" + " ".join(sentence for sentence in sentences if sentence)
    )


def _reference(evidence: Evidence) -> str:
    """Beside torchvision's own weights, whose figures come with the library; where the data are the same."""
    result = evidence.evaluation
    if not evidence.is_imagenet:
        return ""
    from torchvision.models import get_model_weights

    rows = []
    for weights in get_model_weights(evidence.architecture):
        published = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        difference = 100 * result["top1_accuracy"] - published
        preprocessing = weights.transforms()
        conditions = f"{preprocessing.resize_size[0]} px, crop {preprocessing.crop_size[0]} px"
        rows.append(f"| torchvision {weights.name} | {conditions} | {published:.2f} % | {difference:+.2f} points |")
    return (
        "## Beside published weights\n\n"
        "| weights | evaluated at | their top-1, published | this model's difference |\n|---|---|---|---|\n"
        + "\n".join(rows)
    )


def _usage(evidence: Evidence) -> str:
    repo, architecture = evidence.repo_id, evidence.architecture
    size, resize, classes = evidence.image_size, evidence.evaluation["resize_size"], len(evidence.class_names)

    def snippet(title: str, code: str) -> str:
        return f"{title}\n\n```python\n{textwrap.dedent(code).strip()}\n```"

    return "\n\n".join(
        [
            "## Use",
            snippet(
                "timm:",
                f"""
                import timm
                import torch
                from PIL import Image

                model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
                transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
                image = transform(Image.open("image.jpg").convert("RGB"))
                with torch.inference_mode():
                    probabilities = model(image[None]).softmax(dim=1)[0]
                best = int(probabilities.argmax())
                print(model.pretrained_cfg["label_names"][best], float(probabilities[best]))
                """,
            ),
            snippet(
                "transformers:",
                f"""
                from transformers import pipeline

                classify = pipeline("image-classification", model="{repo}")
                print(classify("image.jpg"))
                """,
            ),
            snippet(
                f"{PROJECT}, which also has `python scripts/predict.py --ckpt {repo} image.jpg`:",
                f"""
                from resnet_in1k import ResNet

                model = ResNet.from_pretrained("{repo}")
                """,
            ),
            snippet(
                "torchvision, with what the images go through written out:",
                f"""
                import torch
                import torchvision
                from huggingface_hub import hf_hub_download
                from PIL import Image
                from safetensors.torch import load_file
                from torchvision.transforms import v2

                model = torchvision.models.{architecture}(num_classes={classes}).eval()
                model.load_state_dict(load_file(hf_hub_download("{repo}", "model.safetensors")), strict=True)
                transform = v2.Compose([
                    v2.Resize({resize}),
                    v2.CenterCrop({size}),
                    v2.PILToTensor(),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ])
                with torch.inference_mode():
                    logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
                """,
            ),
            f"ONNX Runtime and torch.export, by {PROJECT}'s own export, which compares the logits first:\n\n"
            "```bash\n"
            f"python scripts/export.py --ckpt {repo} --format onnx --output model.onnx\n"
            f"python scripts/export.py --ckpt {repo} --format pt2 --output model.pt2\n"
            "```",
            snippet(
                "Both take images prepared as above:",
                f"""
                import numpy as np
                import onnxruntime
                import torch

                images = np.zeros((1, 3, {size}, {size}), dtype=np.float32)
                session = onnxruntime.InferenceSession("model.onnx")
                logits_of_onnx = session.run(None, {{"images": images}})[0]
                logits_of_export = torch.export.load("model.pt2").module()(torch.from_numpy(images))
                """,
            ),
        ]
    )


def _training(evidence: Evidence) -> str:
    if evidence.recipe is None or evidence.facts is None:
        return "## Training\n\nNot recorded: the weights were trained elsewhere and converted."
    facts, epochs = evidence.facts, [record for record in evidence.records if record["kind"] == "epoch"]
    seconds = sum(record[name] for record in epochs for name in ("load_seconds", "train_seconds", "val_seconds"))
    rates = [record["images_per_second"] for record in evidence.records if record["kind"] == "train"]
    sessions = [facts, *facts.get("resumed", [])]
    hardware = list(dict.fromkeys(f"{s['world_size']} × {s['hardware']}" for s in sessions))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    done = f"{len(epochs)} of {facts['recipe']['epochs']}"
    best = max(epochs, key=lambda record: record["top1_accuracy"], default=None)
    rows = [
        ("epochs", done + (f"; the weights are those after epoch {best['epoch']}" if best else "")),
        ("hardware (processes × device)", "; ".join(hardware)),
        ("time", f"{duration(seconds)}, of which validation {duration(sum(r['val_seconds'] for r in epochs))}"),
        ("throughput", f"{median(rates):,.0f} images/s, the median of the log's lines" if rates else "not recorded"),
        ("precision", {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[facts["mixed_precision"]]),
        ("accumulation steps", str(facts["gradient_accumulation_steps"])),
        ("sessions", f"{len(sessions)}, of which versions and commit are the first's" if len(sessions) > 1 else ""),
        ("images", f"{facts['data']['num_train_images']:,} for training"),
        ("unreadable images", f"{evidence.num_bad_train_images}" if evidence.num_bad_train_images else ""),
        ("versions", versions),
        ("commit", f"`{facts['commit']}`" if facts["commit"] else "not recorded"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    fields = "\n".join(f"| `{name}` | {value} |" for name, value in facts["recipe"].items() if name != "name")
    curves = "![Loss and accuracy over the epochs](curves.png)\n\n" if evidence.has_curves else ""
    return (
        f"## Training\n\n{curves}| | |\n|---|---|\n{table}\n\n"
        f"The recipe `{evidence.recipe_name}`{_changes(evidence)}, whole:\n\n| field | value |\n|---|---|\n{fields}"
    )


def _changes(evidence: Evidence) -> str:
    named = RECIPES.get(evidence.recipe_name or "")
    assert evidence.recipe is not None
    changes = named.differences(evidence.recipe) if named else []
    return f" with {'; '.join(changes)}" if changes else ""


def _classes(evidence: Evidence) -> str:
    result = evidence.evaluation
    counts = zip(
        human_names(evidence.class_names), result["class_num_images"], result["class_top1_correct"], strict=True
    )
    rows = sorted(((right / total, name, right, total) for name, total, right in counts if total), key=_strongest_first)

    def table(chosen: list[tuple[float, str, int, int]]) -> str:
        lines = [f"| {name} | {share:.1%} | {right} of {total} |" for share, name, right, total in chosen]
        return "| class | top-1 | images |\n|---|---|---|\n" + "\n".join(lines)

    if len(rows) <= FEW_CLASSES:
        text = f"From the strongest to the weakest:\n\n{table(rows)}"
    else:
        text = f"The ten strongest:\n\n{table(rows[:10])}\n\nThe ten weakest, weakest first:\n\n{table(rows[:-11:-1])}"
    fewest = min(total for _, _, _, total in rows)
    return (
        f"## Strengths and weaknesses\n\n{text}\n\nWith {fewest:,} images in the smallest class, one image more or "
        f"less is {1 / fewest:.1%} there."
    )


def _strongest_first(row: tuple[float, str, int, int]) -> tuple[float, str]:
    return -row[0], row[1]


def _reproduction(evidence: Evidence) -> str:
    evaluate = f"python scripts/evaluate.py --ckpt {evidence.repo_id} --data {_data_flag(evidence)}"
    if evidence.recipe is None or evidence.facts is None:
        return f"## Reproduce\n\n```bash\n{evaluate}\n```"
    named = RECIPES.get(evidence.recipe_name or "")
    names = [field.name for field in dataclasses.fields(evidence.recipe)]
    changed = [n for n in names if named is None or getattr(named, n) != getattr(evidence.recipe, n)]
    recipe = f" --recipe {evidence.recipe_name}" if named else ""
    flags = "".join(" " + _flag(name, getattr(evidence.recipe, name)) for name in changed)
    precision = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}[evidence.facts["mixed_precision"]]
    flags += f" --precision {precision}"
    if evidence.facts["gradient_accumulation_steps"] > 1:
        flags += f" --gradient-accumulation-steps {evidence.facts['gradient_accumulation_steps']}"
    if evidence.num_bad_train_images:
        flags += " --on-bad-image skip"
    launch = f"accelerate launch --num_processes {evidence.facts['world_size']}"
    train = f"{launch} scripts/train.py{recipe} --data {_data_flag(evidence)}{flags}"
    facts = evidence.facts
    commit = f"Commit `{facts['commit']}` of {PROJECT}" if facts["commit"] else f"Commit of {PROJECT}: not recorded"
    exact = (
        f"{commit}. The same hardware, versions and number of processes give the same weights on a CPU; other hardware "
        "rounds otherwise."
    )
    return f"## Reproduce\n\n```bash\n{train}\n{evaluate}\n```\n\n{exact}"


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _data_flag(evidence: Evidence) -> str:
    name = data_name(evidence.evaluation["data"])
    return name if name in ("digits", "synthetic") else shlex.quote(f"path/to/{name}")


def _limits(evidence: Evidence) -> str:
    result = evidence.evaluation
    points = [
        f"It knows its {len(evidence.class_names):,} classes and nothing else: shown anything at all, it names one of "
        "them, and may be sure of it.",
        "The numbers are of these validation images. On images taken elsewhere or otherwise it may do worse, and they "
        "do not say by how much.",
    ]
    if evidence.is_imagenet:
        points += [
            "ImageNet's validation labels are partly wrong or one of several that would be right "
            "(https://arxiv.org/abs/2006.07159), so the last points of accuracy measure agreement with the labellers.",
            "Its photographs come mostly from North America and Europe (https://arxiv.org/abs/1711.08536), and its few "
            "classes of people carry known bias (https://arxiv.org/abs/1912.07726): not for decisions about people.",
            "Accuracy on newly collected photographs of the same classes is lower by 11 to 14 points for models of "
            "this kind (https://arxiv.org/abs/1902.10811, published, not measured here).",
        ]
    elif data_name(result["data"]) == "digits":
        points.append(
            "The digits are those of scikit-learn: 8 × 8 pixels, written by 13 people and enlarged "
            "(the test set of https://archive.ics.uci.edu/dataset/80): a demonstration, not a reader of handwriting."
        )
    elif data_name(result["data"]) == "synthetic":
        points.append("Its images are noise: there is nothing to recognise, and the weights are good for timing only.")
    else:
        points.append("Who took the training images, where and of what, is not recorded here: neither is their bias.")
    return "## Limits and bias\n\n" + "\n".join(f"- {point}" for point in points)
