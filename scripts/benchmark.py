"""How fast input, step and training are here, beside the tutorial's code and beside the limit.

python scripts/benchmark.py input --data path/to/images
python scripts/benchmark.py step
python scripts/benchmark.py train --data path/to/images --json
"""

import json
import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.benchmark import BenchmarkOptions, benchmark
from resnet_in1k.cli.benchmark_table import table
from resnet_in1k.utils.launch import rank


def main() -> None:
    options = cli.parse(BenchmarkOptions, description="Measure this machine.")
    result = benchmark(options)
    if rank() == 0:
        print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    cli.run_script(main)
