"""Runs and weights side by side.

python scripts/compare.py runs/tutorial runs/a3 --picture compared.png
python scripts/compare.py runs/mine published.json
"""

import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.compare import CompareOptions, compare


def main() -> None:
    print(compare(cli.parse(CompareOptions, description="Compare runs and evaluations.")))


if __name__ == "__main__":
    cli.run_script(main)
