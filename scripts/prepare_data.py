"""Convert, resize, shard or verify images: python scripts/prepare_data.py --verify data/imagenet"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, prepare_data

if __name__ == "__main__":
    arguments.run_script(prepare_data.main)
