"""Publish a run on the Hub: python scripts/push_to_hub.py --run runs/tutorial --repo-id USER/NAME --dry-run"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, push_to_hub

if __name__ == "__main__":
    arguments.run_script(push_to_hub.main)
