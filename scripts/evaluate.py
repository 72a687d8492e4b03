"""Measure the accuracy of saved weights: python scripts/evaluate.py --ckpt runs/tutorial"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, evaluate

if __name__ == "__main__":
    arguments.run_script(evaluate.main)
