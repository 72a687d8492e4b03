"""ImageNet's archives, Kaggle's copy or any images to folders by class or tar shards, resized if asked for; or verify.

python scripts/prepare_data.py --train-tar ILSVRC2012_img_train.tar --val-tar ILSVRC2012_img_val.tar --devkit-tar ILSVRC2012_devkit_t12.tar.gz --output data/imagenet
python scripts/prepare_data.py --data data/imagenet --resize 256 --output data/imagenet-256
python scripts/prepare_data.py --data data/imagenet --shards 500 --output data/imagenet-shards
python scripts/prepare_data.py --verify data/imagenet --report problems.csv
"""  # noqa: E501

import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.prepare_data import PrepareOptions, prepare_data


def main() -> None:
    if not prepare_data(cli.parse(PrepareOptions, description="Prepare images for training, or verify them.")):
        sys.exit(1)


if __name__ == "__main__":
    cli.run_script(main)
