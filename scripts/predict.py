"""Class names and probabilities of images.

python scripts/predict.py --ckpt runs/tutorial photographs/ cat.jpg --picture seen.png
python scripts/predict.py --ckpt USER/NAME photographs/ --json
"""

import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.predict import PredictOptions, predict


def main() -> None:
    predict(cli.parse(PredictOptions, description="Classify images."))


if __name__ == "__main__":
    cli.run_script(main)
