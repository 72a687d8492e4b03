"""The images of a folder as tar shards and as a table of parquet files."""

from pathlib import Path

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_source
from resnet_in1k.prepare.write import write_shards
from resnet_in1k.utils.pool import Progress

SILENT = Progress(lambda line: None)


def as_shards(folder: Path, target: Path, shard_bytes: int = 20_000) -> str:
    """Return the value of `--data`."""
    for split in ("train", "val"):
        write_shards(open_source(str(folder), split), target / split, shard_bytes, 1, SILENT)
    return f"shards:{target}"


def as_parquet(folder: Path, target: Path) -> str:
    """Write by `datasets` itself, two files for each split; return the value of `--data`."""
    import datasets

    (target / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        source: Source = open_source(str(folder), split)
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(source.class_names))}
        images = [
            {"bytes": source.read(index).tobytes(), "path": Path(source.image_name(index)).name}
            for index in range(len(source))
        ]
        columns = {"image": images, "label": source.labels.tolist()}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        for number in range(2):
            part = table.shard(2, number, contiguous=True)
            part.to_parquet(str(target / f"data/{name}-{number:05d}-of-00002.parquet"))
    return f"hf:{target}"
