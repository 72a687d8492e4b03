from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import PrecisionType

from resnet_in1k.utils.device import ACCELERATE_NAMES, PRECISIONS, PrecisionFlag


def test_names_are_accelerates_and_flags_are_those_of_the_option():
    assert set(PRECISIONS) <= set(PrecisionType.list())
    assert [precision.flag for precision in PRECISIONS.values()] == list(get_args(PrecisionFlag)[1:])
    assert ACCELERATE_NAMES == {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@pytest.mark.parametrize("name", ["no", "bf16"])  # Accelerate refuses fp16 without a GPU
def test_autocast_is_accelerates(name: str):
    matrix = torch.ones(2, 2)
    with Accelerator(cpu=True, mixed_precision=name).autocast():
        computed = (matrix @ matrix).dtype
    assert computed == (PRECISIONS[name].autocast_dtype or torch.float32)
