"""Which images prepare_data.py writes into which shard, and which shards there must be."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

PLAN_NAME = "plan.json"
"""Beside the shards: an interrupted writing goes on only with the same images, and nobody reads a part of them."""


@dataclass(frozen=True)
class ShardPlan:
    """Which images are in which shard: a function of these values."""

    source_sha256: str
    num_images: int
    images_per_shard: int
    resized_to: int

    @property
    def names(self) -> list[str]:
        """Of the shards."""
        return [f"shard-{number:06d}.tar" for number in range(-(-self.num_images // self.images_per_shard))]

    def members(self, shard: int) -> np.ndarray:
        """(n,) int64. The images are shuffled, as some loaders read one shard after the other; always alike."""
        order = np.random.Generator(np.random.PCG64(0)).permutation(self.num_images)
        return order[shard * self.images_per_shard : (shard + 1) * self.images_per_shard]


def check_complete(folder: Path) -> None:
    """Raises UserError if some of the shards that the folder's plan names are missing.

    It may have others, or no plan, or all under other names.
    """
    try:
        plan = ShardPlan(**files.read_json_object(folder / PLAN_NAME) or {})
        names = plan.names
    except (TypeError, ZeroDivisionError):  # none, or not ours
        return
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in names if name not in present]
    if 0 < len(missing) < len(names):
        raise UserError(
            f"{folder}: {len(missing):,} of {len(names):,} shards are missing: {shorten(missing)}; copy them there, or "
            "run prepare_data.py again to go on writing them"
        )
