"""Export weights to ONNX, to torch.export's archive, or to safetensors with clean keys.

python scripts/export.py --ckpt runs/tutorial --format onnx --output resnet50.onnx
python scripts/export.py --ckpt old.pth --format safetensors --output runs/old/model.safetensors
"""

import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.export import ExportOptions, export


def main() -> None:
    options = cli.parse(ExportOptions, description="Export weights, compared before they are kept.")
    difference = export(options)
    print(f"{options.output} written; its logits differ by {difference:.1g} of the largest")


if __name__ == "__main__":
    cli.run_script(main)
