"""Top-1 and top-5 accuracy of saved weights, every image counted once.

python scripts/evaluate.py --ckpt runs/tutorial
accelerate launch --config_file accelerate_configs/two_gpu.yaml scripts/evaluate.py --ckpt runs/tutorial
"""

import sys
from pathlib import Path

# In place of scripts/, where this very file would hide the library of its name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.evaluate import EvalOptions, evaluate


def main() -> None:
    evaluate(cli.parse(EvalOptions, description="Evaluate saved weights, every image counted once."))


if __name__ == "__main__":
    cli.run_script(main)
