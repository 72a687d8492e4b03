"""Train a ResNet: accelerate launch --config_file accelerate_configs/two_gpu.yaml scripts/train.py --recipe tutorial"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, train

if __name__ == "__main__":
    arguments.run_script(train.main)
