"""Print class names and probabilities of images: python scripts/predict.py --ckpt runs/tutorial photographs/ cat.jpg"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, predict

if __name__ == "__main__":
    arguments.run_script(predict.main)
