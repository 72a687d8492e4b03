"""Find a ResNet among the tensors of any file: under any wrapper and prefix, next to averages, with any last layer."""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_in1k.model.weights import read_tensors
from resnet_in1k.recipes.recipe import Architecture, PublishedWeights
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import printable
from resnet_in1k.utils.process import rank

LAYOUTS: dict[Architecture, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Kind and number of residual blocks in the four stages (https://arxiv.org/abs/1512.03385, table 1)."""
FIRST_BLOCK, COUNTER = "layer1.0.conv1.weight", "num_batches_tracked"
BODY = re.compile(r"(conv1|bn1|layer[1-4])\.")
LAST_LAYER = re.compile(r"(.*\.)?(fc|classifier|head|linear)(\.\d+)?\.weight")
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow|teacher|target|momentum|encoder_k)(?=[._\d])", re.I)
"""Parts of a prefix that mark a moving average of the weights next to it."""


def read_resnet(file: Path, wanted: PublishedWeights | None = None) -> tuple[Architecture, dict[str, Tensor]]:
    """Return the architecture of the ResNet in a file and its state dict, without `fc.weight` and `fc.bias` if its last
    layer is missing or is not one linear layer; log where in the file it is if that is not at the top.

    Raises UserError if the file cannot be read, its body is not exactly a ResNet's, it has several ResNets, or not the
    wanted weights or averages.
    """
    tensors = read_tensors(file)
    prefixes = [key.removesuffix(FIRST_BLOCK) for key in tensors if re.fullmatch(rf"(.*\.)?{FIRST_BLOCK}", key)]
    nearest = {prefix: _nearest(tensors, prefix, prefixes) for prefix in prefixes or [""]}
    fitting = {prefix: (name, state) for prefix, ((*_, misfit), name, state) in nearest.items() if not misfit}
    if not fitting:
        misfit = printable(min(misfit for misfit, *_ in nearest.values())[-1])
        raise UserError(f"{file} is not a torchvision ResNet: {misfit}; only {', '.join(LAYOUTS)} are supported")
    averages = [prefix for prefix in fitting if AVERAGED.search(prefix)]
    weights = [prefix for prefix in fitting if prefix not in averages]
    taken, others, flag = (averages, weights, "model") if wanted == "ema" else (weights, averages, "ema")
    kinds = {"model": "weights", "ema": "averages"}
    choice = printable(f"; --weights {flag} takes the {kinds[flag]} under {others[0]!r}") if others else ""
    if not taken:
        raise UserError(f"{file} has only {kinds[flag]}{choice}")
    name, state = fitting[taken[0]]
    for prefix in taken[1:]:
        again = fitting[prefix][1]
        if again.keys() != state.keys() or not all(torch.equal(state[key], again[key]) for key in state):
            several = printable(f"several ResNets, under {taken[0]!r} and {prefix!r}")
            raise UserError(f"{file} has {several}; save the tensors of one in a file of its own")
    if rank() == 0 and (taken[0] or others):
        where = printable(f"{kinds[wanted or 'model']} under {taken[0]!r}")
        logging.getLogger(__name__).warning("%s: took the %s%s", file, where, choice)
    return name, state


@functools.cache
def _body_shapes(block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...]) -> dict[str, torch.Size]:
    with torch.device("meta"):  # no memory, no initialization
        state = torchvision.models.ResNet(block, list(blocks)).state_dict()
    return {key: tensor.shape for key, tensor in state.items() if BODY.match(key)}


def _nearest(
    tensors: Mapping[str, Tensor], prefix: str, prefixes: Sequence[str]
) -> tuple[tuple[int, int, str], Architecture, dict[str, Tensor]]:
    """Return what `_compare` returns for the architecture that the tensors under the prefix fit best, and the state
    dict."""
    deeper = tuple(each for each in prefixes if each != prefix and each.startswith(prefix))
    own = {key[len(prefix) :]: tensors[key] for key in tensors if key.startswith(prefix) and not key.startswith(deeper)}
    if "0.weight" in own:  # nn.Sequential(*list(resnet.children())[:-1])
        own = {re.sub(r"^0\.", "conv1.", re.sub(r"^1\.", "bn1.", key)): tensor for key, tensor in own.items()}
    misfit, name = min((_compare(own, name), name) for name in LAYOUTS)
    body = {key: own.get(key, torch.tensor(0)) for key in _body_shapes(*LAYOUTS[name])}
    # The last layer may be next to the body, as in backbone.conv1.weight and head.fc.weight.
    parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
    beside = {key: tensors[key] for key in tensors if key.startswith(parent) and not key.startswith(tuple(prefixes))}
    rest = {key: tensor for key, tensor in own.items() if not BODY.match(key)} or beside
    return misfit, name, body | _linear_layer(rest, 512 * LAYOUTS[name][0].expansion)


def _compare(own: Mapping[str, Tensor], name: Architecture) -> tuple[int, int, str]:
    """Return the numbers of tensors with another name and with another shape, and a description, "" for none."""
    shapes = _body_shapes(*LAYOUTS[name])
    found = [key for key in own if key not in shapes and (BODY.match(key) or FIRST_BLOCK not in own)]
    # Files of 2017 have no counters; norms with a constant momentum do not use them.
    expected = [key for key in shapes if key not in own and not key.endswith(COUNTER)]
    num_names = len(found + expected)
    for key in filter(own.__contains__, shapes):
        is_number = own[key].is_floating_point() or key.endswith(COUNTER)
        if own[key].shape != shapes[key] or own[key].is_meta or not is_number:
            found.append(f"{key} {tuple(own[key].shape)}" + f" {own[key].dtype}" * (not is_number))
            expected.append(f"{key} {tuple(shapes[key])}")
    if not found + expected:
        return 0, 0, ""
    text = f"found {', '.join(found[:2]) or next(iter(own))}; expected {', '.join(expected[:2]) or 'no such tensors'}"
    first, second = (own.get(f"layer1.0.conv{number}.weight", torch.zeros(0)) for number in (1, 2))
    like = ""
    if first.shape[1:] == (64, 1, 1) and second.ndim == 4 and len(first) > 64 and (width := second.shape[1]):
        groups = f"resnext{name[6:]}_{len(first) // width}x{width}d"
        like = f", and it looks like {groups if width < len(first) else f'wide_{name}_{width // 64}'}"
    return num_names, len(found + expected) - num_names, f"{text}; nearest is {name}{like}"


def _linear_layer(rest: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return the one linear layer from `width` features to classes as `fc`; empty if it is missing or not alone."""
    matrices = [key for key, tensor in rest.items() if tensor.ndim == 2 and tensor.is_floating_point()]
    if len(matrices) != 1 or not LAST_LAYER.fullmatch(matrices[0]):
        return {}
    weight, bias = rest[matrices[0]], rest.get(matrices[0].removesuffix("weight") + "bias", torch.zeros(0))
    # A norm, or a normalization of the images, would change the logits. A loss may have one weight for each class.
    others = [tensor for key, tensor in rest.items() if key != matrices[0] and tensor.is_floating_point()]
    is_alone = all(tensor.shape in (bias.shape, ()) for tensor in others)
    is_linear = bias.numel() > 0 and weight.shape == (*bias.shape, width)
    return {"fc.weight": weight, "fc.bias": bias} if is_alone and is_linear else {}
