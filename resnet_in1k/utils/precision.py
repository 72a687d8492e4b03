"""The precisions of training, in one table."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

PrecisionFlag = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Precision:
    flag: PrecisionFlag
    """As --precision takes it."""
    label: str
    """As people read it."""
    autocast_dtype: torch.dtype | None
    """None: no autocast."""


PRECISIONS: dict[str, Precision] = {
    "no": Precision("fp32", "float32", None),
    "bf16": Precision("bf16", "bfloat16 autocast", torch.bfloat16),
    "fp16": Precision("fp16", "float16 autocast", torch.float16),
}
"""By Accelerate's name, which is also what recipe.json records as mixed_precision."""

ACCELERATE_NAMES: dict[PrecisionFlag, str] = {precision.flag: name for name, precision in PRECISIONS.items()}


@contextlib.contextmanager
def reproducible_float32() -> Iterator[None]:
    """Float32 that is no TF32, which moves logits by about 1e-3, and algorithms that are not chosen by timing."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision = False, True, "ieee", "ieee"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision = before
