"""Export weights: python scripts/export.py --ckpt runs/tutorial --format onnx --output resnet50.onnx"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, export

if __name__ == "__main__":
    arguments.run_script(export.main)
