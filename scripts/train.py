"""Train a ResNet.

accelerate launch --config_file accelerate_configs/two_gpu.yaml scripts/train.py --data data/imagenet
"""

import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli import train

if __name__ == "__main__":
    cli.run_script(train.main)
