"""Compare runs, weights and evaluations: python scripts/compare.py runs/tutorial runs/a3 --picture compared.png"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, compare

if __name__ == "__main__":
    arguments.run_script(compare.main)
