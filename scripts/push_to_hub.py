"""Publish a run's weights and metrics as one repository that loads in torchvision, timm, transformers and here.

python scripts/push_to_hub.py --run runs/tutorial --repo-id USER/NAME --dry-run
python scripts/push_to_hub.py --run runs/tutorial --repo-id USER/NAME
"""

import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.push_to_hub import PushOptions, push


def main() -> None:
    push(cli.parse(PushOptions, description="Publish a run's best weights, with their metrics as a model card."))


if __name__ == "__main__":
    cli.run_script(main)
