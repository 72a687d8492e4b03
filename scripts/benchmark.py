"""Compare this machine's speed with the tutorial's code: python scripts/benchmark.py train --data path/to/images"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else scripts/evaluate.py hides the library `evaluate`
from resnet_in1k.cli import arguments, benchmark

if __name__ == "__main__":
    arguments.run_script(benchmark.main)
