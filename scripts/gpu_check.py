"""What no CPU can show, checked and measured on this machine's GPU in minutes; on a CPU only that the command works.

python scripts/gpu_check.py
accelerate launch --config_file accelerate_configs/two_gpu.yaml scripts/gpu_check.py --only processes
"""

import sys
from pathlib import Path

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.gpu_check import GpuCheckOptions, gpu_check


def main() -> None:
    options = cli.parse(GpuCheckOptions, description="Check and measure this machine's GPU.")
    if not gpu_check(options):
        sys.exit(1)


if __name__ == "__main__":
    cli.run_script(main)
