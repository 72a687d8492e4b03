"""scripts/gpu_check.py: what no CPU can show, checked and measured in minutes, as JSON and as a table for README."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_in1k.cli.gpu.checks import CHECKS
from resnet_in1k.cli.gpu.measurements import MEASUREMENTS, Row
from resnet_in1k.cli.gpu.runs import RUNS
from resnet_in1k.cli.gpu.setting import CheckFailedError, LeftOutError, Setting
from resnet_in1k.run_folder import provenance
from resnet_in1k.utils import files
from resnet_in1k.utils.device import PRECISIONS, choose_cpu_threads, hardware_name
from resnet_in1k.utils.distributed import make_accelerator, translate_process_errors
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration, first_line
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.pool import translate_worker_errors
from resnet_in1k.utils.validation import above, check_options

PARTS = {**CHECKS, **RUNS, **MEASUREMENTS}
OF_SEVERAL_PROCESSES = ("processes",)
"""What a launch of several measures; all others are for one process."""


@dataclass(frozen=True, kw_only=True)
class GpuCheckOptions:
    """What to check and measure, on what."""

    output_dir: Path = Path("runs/gpu_check")
    """gpu_check.json and gpu_check.md are written there."""
    data: str = "synthetic"
    """Images for the measurements, as for training; by default generated JPEGs."""
    minutes: float = field(default=8.0, metadata=above(0))
    """What has not been started by then is left out."""
    only: tuple[str, ...] = ()
    """Only these parts, by name."""
    toy: bool = False
    """At toy size, as always on a CPU: shows that the command works, and nothing else."""

    def __post_init__(self) -> None:
        check_options(self)
        if unknown := [name for name in self.only if name not in PARTS]:
            raise UserError(f"--only {unknown[0]}: must be of {', '.join(PARTS)}")


@dataclass
class Outcome:
    """Of one part."""

    name: str
    status: str
    """passed, failed, left out, measured."""
    text: str
    rows: list[Row]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "rows": [row.to_json() for row in self.rows]}


def gpu_check(options: GpuCheckOptions) -> bool:
    """Run all parts, report each as it ends, write both files; whether no check has failed.

    Raises:
        UserError: if the output folder cannot be written to.
    """
    with (
        translate_worker_errors(),
        translate_process_errors(),
        tempfile.TemporaryDirectory() as folder,
        Launch.connect() as launch,
    ):
        accelerator = make_accelerator(launch)
        toy = options.toy or accelerator.device.type == "cpu"
        setting = Setting(accelerator, launch, Path(folder), options.data, toy)
        choose_cpu_threads(accelerator.device, None)
        conditions = _conditions(setting)
        if launch.is_main_process:
            print(_headline(conditions), flush=True)
        deadline = time.monotonic() + 60 * options.minutes
        outcomes = []
        # A step of one process would wait for the gradients of the others.
        suitable = {name for name in PARTS if (name in OF_SEVERAL_PROCESSES) == (launch.world_size > 1)}
        if unsuitable := sorted(set(options.only) - suitable):
            how = "one process" if launch.world_size > 1 else "several processes, by accelerate launch"
            raise UserError(f"--only {unsuitable[0]}: start it with {how}")
        for name, part in PARTS.items():
            if name in (options.only or suitable):
                outcomes.append(_outcome(name, part, setting, deadline))
                if launch.is_main_process:
                    print(f"  {outcomes[-1].status:<9} {name:<16} {outcomes[-1].text}", flush=True)
        launch.on_main_process(lambda: _write(options.output_dir, conditions, outcomes), "writes the result", advice="")
        accelerator.end_training()
    return not any(outcome.status == "failed" for outcome in outcomes)


def _outcome(name: str, part: Callable[[Setting], Any], setting: Setting, deadline: float) -> Outcome:
    start_seconds = time.monotonic()
    rows: list[Row] = []
    if start_seconds > deadline:
        return Outcome(name, "left out", "no time left; give more --minutes", rows, 0.0)
    try:
        result = part(setting)
        if isinstance(result, str):
            status, text = "passed", result
        else:
            status, rows = "measured", result
            text = "; ".join(_cell(row) for row in rows)
    except LeftOutError as error:
        status, text = "left out", str(error)
    except CheckFailedError as error:
        status, text = "failed", str(error)
    except Exception as error:  # one part that fails must not hide what the others show
        status, text = "failed", f"{type(error).__name__}: {first_line(error)}"
    return Outcome(name, status, text, rows, time.monotonic() - start_seconds)


def _conditions(setting: Setting) -> dict[str, Any]:
    recipe = setting.recipe
    return {
        "hardware": hardware_name(setting.device),
        "device": setting.device.type,
        "num_processes": setting.launch.world_size,
        "toy": setting.toy,
        "cuda": torch.version.cuda,
        "precision": PRECISIONS[setting.accelerator.mixed_precision].label,
        "model": recipe.model,
        "batch_size": recipe.global_batch_size,
        "image_size": recipe.image_size,
        "data": setting.data,
        **provenance(),
    }


def _headline(conditions: dict[str, Any]) -> str:
    toy = "toy size: shows that the command works; not measured on a GPU" if conditions["toy"] else ""
    versions = f"torch {conditions['versions']['torch']}, CUDA {conditions['cuda']}, commit {conditions['commit']}"
    what = f"{conditions['model']}, batch {conditions['batch_size']}, {conditions['image_size']} px"
    return "\n".join(
        line
        for line in (
            f"{conditions['hardware']}, {conditions['num_processes']} process(es), {versions}",
            f"{what}, {conditions['precision']}, data {conditions['data']}",
            toy,
        )
        if line
    )


def _cell(row: Row) -> str:
    value = "not measured" if row.value is None else f"{row.value:,.{0 if row.value >= 100 else 2}f} {row.unit}".strip()
    return f"{row.what} {value}"


def markdown(conditions: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Two tables, with the conditions above them."""
    lines = [*_headline(conditions).splitlines(), "", "| check | outcome | what was seen |", "|---|---|---|"]
    checks = [outcome for outcome in outcomes if outcome.name not in MEASUREMENTS]
    lines += [f"| {each.name} | {each.status} | {each.text.replace('|', '/')} |" for each in checks]
    lines += ["", "| measured | value | note |", "|---|---|---|"]
    for outcome in outcomes:
        if outcome.name in MEASUREMENTS and not outcome.rows:
            lines.append(f"| {outcome.name} | {outcome.status} | {outcome.text.replace('|', '/')} |")
        for row in outcome.rows:
            value = _cell(row).removeprefix(f"{row.what} ")
            lines.append(f"| {row.what} | {value} | {row.note.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _write(folder: Path, conditions: dict[str, Any], outcomes: list[Outcome]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = [outcome.to_json() for outcome in outcomes]
    files.write_json(folder / "gpu_check.json", {**conditions, "parts": parts})
    files.write_text(folder / "gpu_check.md", markdown(conditions, outcomes))
    print(
        f"{duration(sum(outcome.seconds for outcome in outcomes))}; written to {folder / 'gpu_check.md'} and "
        f"{folder / 'gpu_check.json'}"
    )
