"""Refusals, each followed by its own advice: the cure is read from the message and applied; the command succeeds."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.sources import as_parquet
from helpers.training import narrow_resnet18, reset_accelerate_state
from PIL import Image

from resnet_in1k import ResNet
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.train import preflight, writer
from resnet_in1k.utils.errors import UserError

SHORT = {
    "TRAIN": "train --recipe demo --model resnet18 --image-size 32 --epochs 1 --global-batch-size 4 --workers 0 "
    "--cpu-threads 1 --data photos --output-dir r",
    "EVAL": "evaluate --workers 0 --ckpt RUN",
    "PREDICT": "predict --workers 0 --ckpt RUN",
    "PUSH": "push_to_hub --repo-id me/mine --dry-run --run RUN",
    "SHARD": "PREPARE --shards 1",
    "PREPARE": "prepare_data --processes 1 --data photos --output out",
    "INPUT": "benchmark input --batch-size 4 --steps 1 --repetitions 1 --workers 1 --image-size 32 --data photos",
    "STEP": "RUN/checkpoints/step_00000002",
    "RUN": "runs/tutorial",
    "TAR (cp|ln -s)": r"mkdir -p s/val t && for k in cat dog; do \1 $PWD/photos/val/$k/0.png t/$k.png; "
    "echo $k > t/$k.cls; done && tar -C t -cf s/val/0.tar .",
}
"""Abbreviations in the commands below. A flag that follows replaces an earlier one."""

CASES = r"""
train --recip demo --list-recipes ~ did you mean (--\w+)\? ~ train {0} demo --list-recipes
evaluate ~ --ckpt is missing; for example:  (python .+) ~ {0} --workers 0
train --recipe tutorail ~ did you mean (\w+)\? ~ train --recipe {0} --list-recipes
TRAIN --optimizer sdg ~ did you mean (\w+)\? ~ TRAIN --optimizer {0}
TRAIN --workers=-1 ~ must be at least (\d) ~ TRAIN --workers {0}
TRAIN --alternating-flip --hflip-probability .5 ~ (\w+), which must be (0) ~ TRAIN --alternating-flip --{0} {1}
TRAIN --lr-schedule multi_step ~ multi_step needs (\w+) ~ TRAIN --lr-schedule multi_step --{0} 1
SHARD && TRAIN --data shards:out --shuffle-window 2 --sampling balanced ~ needs (sampling) (uniform)
  ~ TRAIN --data shards:out --shuffle-window 2 --{0} {1}
TRAIN --augment-policy timm_rand_augment --rand-augment-magnitude 12 ~ (\w+) \(12\) must be an integer up to (\d+)
  ~ TRAIN --augment-policy timm_rand_augment --{0} {1}
EVAL --output no/e.json ~ no folder (\S+) ~ mkdir {0} && EVAL --output no/e.json
predict --ckpt RUN ~ name files or (folders) ~ PREDICT photos
PREDICT photos --picture a.jpg ~ must end in (\.png) ~ PREDICT photos --picture a{0}
compare RUN ~ name at least (two) ~ compare RUN RUN
export --ckpt RUN --format safetensors --output a.pt ~ end in (\.\w+)
  ~ export --ckpt RUN --format safetensors --output a{0}
PUSH --pr --revision dev ~ leave out (--revision) ~ PUSH --pr
PUSH --repo-id mine ~ must have the form USER(/)NAME ~ PUSH --repo-id me{0}mine
PUSH --license A ~ such as (\S+), ~ PUSH --license {0}
PREPARE --resize-val ~ needs (--resize)$ ~ PREPARE --resize-val {0} 32
PREPARE --report r.csv ~ needs (--verify)$ ~ prepare_data --report r.csv {0} photos
prepare_data --verify photos --output out ~ omit (--output) ~ prepare_data --verify photos
prepare_data --data photos ~ (--output): the folder to write ~ prepare_data --data photos {0} out
PREPARE --allow-partial ~ (--allow-partial) needs ~ PREPARE
INPUT --batch-size 99 ~ : (\d+) images are fewer than --batch-size ~ INPUT --batch-size {0}
INPUT --shuffle-window 3 ~ (--shuffle-window): benchmark.py reads images in random order ~ INPUT
WORLD_SIZE=2 PREDICT photos ~ in one process: (python \S+) … ~ {0} --ckpt RUN --workers 0 photos
evaluate --ckpt w.safetensors ~ give (--data)$ ~ EVAL --ckpt w.safetensors {0} photos
EVAL --ckpt nowhere ~ give a (run folder) ~ EVAL
mkdir x && mv w.safetensors x && EVAL --ckpt x --data photos ~ give the path of the (file)
  ~ EVAL --ckpt x/w.safetensors --data photos
EVAL --weights ema ~ has the other ones; (omit) the flag ~ EVAL
TRAIN --ema-decay .9 && EVAL --ckpt r --weights ema ~ such as (\S+)$ ~ EVAL --ckpt {0} --weights ema
TRAIN --ema-decay .9 --publish ema && EVAL --ckpt r --weights model ~ such as (\S+)$
  ~ EVAL --ckpt {0} --weights model
EVAL --ckpt averages.pth --data photos ~ has only averages; (--weights \w+) takes
  ~ EVAL --ckpt averages.pth --data photos {0}
PREDICT --ckpt body.safetensors photos ~ (train)\.py (--init-from) takes ~ TRAIN {1} body.safetensors
  && PREDICT --ckpt r photos
mv photos/train/dog photos/train/eel && mv photos/val/dog photos/val/eel && EVAL ~ by (train)\.py (--init-from)
  ~ TRAIN {1} RUN && EVAL --ckpt r
TRAIN --model resnet50 --init-from w.safetensors ~ give (--model \w+) ~ TRAIN --init-from w.safetensors {0}
TRAIN --recipe finetune ~ give (--init-from), such as a run folder ~ TRAIN --recipe finetune {0} RUN
train --recipe no/where ~ give a (run folder) ~ TRAIN --recipe RUN
compare RUN w.safetensors ~ (python .+), and compare NAME.json ~ {0} --data photos --workers 0
  && compare RUN NAME.json
compare RUN RUN/recipe.json ~ (evaluate)\.py (--output) writes one ~ EVAL {1} e.json && compare RUN e.json
cp RUN/eval.json e.json && compare e.json e.json --picture a.png ~ no (item) has a log
  ~ compare RUN e.json --picture a.png
export --ckpt RUN --format pt2 --output a.pt2 --image-size 32 && EVAL --ckpt a.pt2 --data photos --image-size 64
  ~ leave out (--image-size) ~ EVAL --ckpt a.pt2 --data photos
sed -i 's/"num_images": 8/"num_images": 9/' RUN/eval.json && PUSH ~ evaluate again: (python .+) ~ {0} && PUSH
rm RUN/eval.json && PUSH ~ evaluate again: (python .+) ~ {0} --workers 0 && PUSH
mkdir x && cp w.safetensors x/model.safetensors && PUSH --run x ~ evaluate again: (python .+) ~ mv photos DATA
  && {0} --workers 0 && PUSH --run x
mkdir x && cp prefixed.safetensors x/model.safetensors && PUSH --run x ~ export\.py (--format safetensors) renames
  ~ export --ckpt x {0} --output x/model.safetensors && EVAL --ckpt x --data photos --output x/eval.json
  && PUSH --run x
mkdir x && PUSH --run x ~ after its first (epoch) ~ TRAIN --output-dir x && PUSH --run x
echo '{"exported_from": "x", "file": "a.pt2"}' > RUN/a.json && PUSH ~ or remove (\S+)$ ~ rm {0} && PUSH
echo x >> STEP/model.safetensors && EVAL --ckpt STEP ~ take another (checkpoint) ~ EVAL
echo x > STEP/state.json && EVAL --ckpt STEP ~ ^(\S+) cannot be read .* remove it ~ rm {0} && EVAL --ckpt STEP
TRAIN --output-dir RUN ~ continue it with (--resume) ~ TRAIN --output-dir RUN {0}
TRAIN --output-dir RUN ~ choose another (--output-dir) ~ TRAIN {0} other
TRAIN --output-dir RUN --resume --lr .5 ~ lr (\S+) → 0.5; resume with the settings
  ~ TRAIN --output-dir RUN --resume --lr {0}
TRAIN --output-dir RUN --resume --init-from w.safetensors ~ from (random weights), not
  ~ TRAIN --output-dir RUN --resume
TRAIN --init-from w.safetensors && TRAIN --resume ~ started from (\S+), .* the same (--init-from)
  ~ TRAIN --resume {1} {0}
TRAIN --init-from w.safetensors && rm -r r/checkpoints && cp RUN/model.safetensors w.safetensors
  && TRAIN --resume --init-from w.safetensors ~ has changed .* another (--output-dir)
  ~ TRAIN --init-from w.safetensors {0} r2
sed -i 's/"format_version": 3/"format_version": 2/' RUN/recipe.json && TRAIN --output-dir RUN --resume
  ~ older version .* choose another (--output-dir) ~ TRAIN {0} r2
sed -i 's/"format_version": ./"format_version": 99/' STEP/state.json && TRAIN --output-dir RUN --resume
  ~ start again in another (--output-dir) ~ TRAIN {0} r2
rm STEP/model.safetensors && TRAIN --output-dir RUN --resume ~ start again in another (--output-dir) ~ TRAIN {0} r2
rm RUN/recipe.json && TRAIN --output-dir RUN ~ no recipe.json .* choose another (--output-dir) ~ TRAIN {0} r2
cp RUN/recipe.json keep && echo x > RUN/recipe.json && TRAIN --output-dir RUN --resume
  ~ ^(\S+) cannot be read .*; restore or ~ mv keep {0} && TRAIN --output-dir RUN --resume
echo x > RUN/log.jsonl && TRAIN --output-dir RUN --resume ~ ^(\S+) cannot be read .* remove it ~ rm {0}
  && TRAIN --output-dir RUN --resume
TRAIN --global-batch-size 9 ~ ^(\d+) training images are fewer ~ TRAIN --global-batch-size {0}
TRAIN --image-size 64 --gradient-accumulation-steps 3 ~ a multiple of (\d+)
  ~ TRAIN --image-size 64 --gradient-accumulation-steps 3 --global-batch-size {0}
TRAIN --global-batch-size 1 ~ use a larger (--global-batch-size) or --image-size ~ TRAIN {0} 2
TRAIN --global-batch-size 1 ~ use a larger --global-batch-size or (--image-size)
  ~ TRAIN --global-batch-size 1 {0} 64
TRAIN --lr 1e25 --warmup-epochs 0 --log-every 1 ~ try a lower (--lr), .* in another (--output-dir)$
  ~ TRAIN {0} .001 {1} r2
TRAIN --shuffle-window 1 ~ needs (--data shards:)… ~ SHARD && TRAIN --shuffle-window 1 {0}out
TRAIN --report-to trakio ~ installed: (\w+) ~ TRAIN --report-to {0}
ACCELERATE_MIXED_PRECISION=fp16 TRAIN ~ give (--precision \w+) ~ ACCELERATE_MIXED_PRECISION=fp16 TRAIN {0}
ACCELERATE_MIXED_PRECISION=fp8 TRAIN ~ choose one of no, (\w+) ~ ACCELERATE_MIXED_PRECISION={0} TRAIN
ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2 TRAIN ~ remove it there, and give train.py (--\S+) ~ TRAIN {0} 2
TRAIN --data flat ~ give (--data \S+ --val-share \S+) ~ TRAIN {0}
TRAIN --data photos/train/cat ~ give (--data \S+ --val-share \S+) ~ TRAIN {0}
EVAL --split test ~ the folders there are (\w+) ~ EVAL --split {0}
echo x > photos/train/cat/0.png && TRAIN ~ by (--on-bad-image skip) ~ TRAIN {0}
echo x > photos/train/cat/0.png && TRAIN ~ ^(\S+) cannot be read .* replace or remove the file ~ rm {0} && TRAIN
echo x > photos/train/cat/0.png && echo > photos/train/dog/0.png && TRAIN --on-bad-image skip
  ~ repair or (remove) the others; .* another (--output-dir) ~ rm photos/train/cat/0.png
  && TRAIN --on-bad-image skip {1} r2
PREPARE --output photos/train/x ~ choose a folder (outside) ~ PREPARE --output {0}
rm photos/val/dog/* && PREPARE ~ or write (--shards) ~ PREPARE {0} 1
PREPARE && PREPARE --resize 32 ~ choose (another) folder ~ PREPARE --resize 32 --output {0}
PREPARE && cp out/train/cat/0.png out/train/cat/9.png && PREPARE ~ Remove (that) class ~ rm -r out/train/cat
  && PREPARE
PREPARE && mkdir out/train/eel && PREPARE ~ of (\w+); add some, or remove these ~ rmdir out/train/{0} && PREPARE
SHARD && echo '["a"]' > out/classes.json && SHARD ~ ^(\S+) is of other images; .* or remove it ~ rm {0} && SHARD
SHARD && echo x > out/classes.json && EVAL --data shards:out ~ ^(\S+) cannot be read .* correct or
  ~ echo '["cat", "dog"]' > {0} && EVAL --data shards:out
SHARD && rm out/classes.json && EVAL --data shards:out ~ in (classes.json) next to the shards
  ~ echo '["cat", "dog"]' > out/{0} && EVAL --data shards:out
SHARD && mv out/val v && mv v out/x && EVAL --data shards:out ~ they belong in DIR/(\w+)/ ~ mv out/x out/{0}
  && EVAL --data shards:out
SHARD && rm -r out/val && EVAL --data shards:out ~ without a val split give (--val-share)
  ~ EVAL --data shards:out {0} .3
SHARD && EVAL --data shards:out --val-share .3 ~ (omit) --val-share ~ EVAL --data shards:out
SHARD && EVAL --data shards:out --val-share .3 ~ name the shards by a (pattern)
  ~ EVAL --data 'shards:out/train/*.tar' --val-share .3
SHARD && mkdir s && cp out/train/*.tar s/train-val.tar && EVAL --data shards:s ~ name them by a (pattern)
  ~ EVAL --data 'shards:out/{{split}}/*.tar'
TAR ln -s && EVAL --data shards:s ~ with files \((tar .*)\) ~ {0} -C t -cf s/val/0.tar . && EVAL --data shards:s
TAR cp && mv t/cat.png t/cat.x.png && tar -C t -cf s/val/0.tar . && EVAL --data shards:s
  ~ is named KEY(.jpg) or KEY(.png) ~ mv t/cat.x.png t/cat{1} && tar -C t -cf s/val/0.tar . && EVAL --data shards:s
TAR cp && echo -1 > t/cat.cls && tar -C t -cf s/val/0.tar . && EVAL --data shards:s
  ~ (\w+) has no label; .* or a name ~ echo {0} > t/cat.cls && tar -C t -cf s/val/0.tar . && EVAL --data shards:s
EVAL --data digits --split test ~ has no split test, but (\w+) ~ EVAL --split {0}
prepare_data --verify digits --val-share .2 ~ (--val-share) is for images without ~ prepare_data --verify digits
TABLE && TRAIN --data hf:table::train ~ or give (--val-share) ~ TRAIN --data hf:table::train {0} .3
TABLE && rm table/data/val* && TRAIN --data hf:table ~ or give (--val-share) ~ TRAIN --data hf:table {0} .3
TABLE && TRAIN --data hf:table --val-share .3 ~ (omit) --val-share ~ TRAIN --data hf:table
TABLE && TRAIN --data hf:table --val-share .3 ~ name one split: hf:NAME(.*)$
  ~ TRAIN --data hf:table::train --val-share .3
"""
"""A refused command, the cure in its message, and the command that applies it. Indented lines continue a case."""


def perform(line: str) -> None:
    """Run commands that are joined by && as a user would: ours in this process, others by the shell."""
    for short, text in SHORT.items():
        line = re.sub(rf"\b{short}(?!\w)", text, line)
    for command in line.split(" && "):
        environment = dict(re.findall(r"\b([A-Z_]+)=(\S+) ", command))
        words = shlex.split(re.sub(r"^python scripts/(\w+)\.py|^[A-Z_]+=\S+ ", r"\1", command))
        if command == "TABLE":
            as_parquet(Path("photos"), Path("table"))
        elif not importlib.util.find_spec(f"resnet_in1k.cli.{words[0]}"):
            subprocess.run(["bash", "-c", command], check=True)
        else:
            reset_accelerate_state()
            arguments = [f"scripts/{words[0]}.py", *words[1:]]
            with mock.patch.object(sys, "argv", arguments), mock.patch.dict(os.environ, environment):
                importlib.import_module(f"resnet_in1k.cli.{words[0]}").main()


def refusal(line: str) -> str:
    """Return the message of the last of these commands."""
    *first, last = line.split(" && ")
    perform(" && ".join(first) or "true")
    with pytest.raises(UserError) as refused:
        perform(last)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with what a user has: images with and without splits, a run, and weights of several kinds."""
    folder = tmp_path_factory.mktemp("user")
    for number, name in enumerate(f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(4)):
        for place in ("photos/train", "photos/val", "flat"):
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 40), 50 + number).convert("RGB").save(folder / place / name)
    with narrow_resnet18(), pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "save_figure"):  # most of the time of so short a training
            patch.setattr(writer, name, lambda *_: None)
        patch.chdir(folder)
        perform("TRAIN --output-dir RUN")
        state = weights_to_save(ResNet("resnet18", 2))
        write_tensors(state, Path("w.safetensors"))
        write_tensors({key: state[key] for key in state if "fc." not in key}, Path("body.safetensors"))
        write_tensors({f"module.{key}": state[key] for key in state}, Path("prefixed.safetensors"))
        torch.save({"state_dict_ema": state}, "averages.pth")
        yield folder


@pytest.fixture
def desk(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy these files to the current folder."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "here"))


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize(
    "case", re.sub("\n +", " ", CASES).strip().splitlines(), ids=lambda case: case.partition(" ~ ")[0][-40:]
)
def test_a_refused_command_succeeds_by_its_own_advice(case: str):
    refused, advice, cured = case.split(" ~ ")
    message = refusal(refused)
    found = re.search(advice, message)
    assert found, message
    perform(cured.format(*found.groups()))


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("kind", ["pickled", "list", "several"])
def test_weights_saved_as_the_message_has_it_are_read(kind: str):
    model, other = ResNet("resnet18", 2), weights_to_save(ResNet("resnet18", 2))
    held = {"pickled": model, "list": [1], "several": {"a": model.state_dict(), "b": other}}
    torch.save(held[kind], "x.pth")
    message = refusal("EVAL --ckpt x.pth --data photos")
    command = re.search(r"torch\.save\(.+\)", message)
    assert command or "save the tensors of one in a file of its own" in message
    exec(command[0] if command else "torch.save(model.state_dict(), 'weights.pth')", {"torch": torch, "model": model})
    perform("EVAL --ckpt weights.pth --data photos")


@pytest.mark.usefixtures("desk")
def test_fewer_checkpoints_and_workers_need_less(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000_000))
    flag = re.search(r"fewer (--\S+)$", refusal("TRAIN --keep-checkpoints 50"))
    perform(f"TRAIN {flag[1]} 1")
    with pytest.raises(UserError, match=r"for 2 loader workers: .*; use fewer --workers$"):
        preflight.check_memory(2, 10**12)
    preflight.check_memory(0, 10**12)
