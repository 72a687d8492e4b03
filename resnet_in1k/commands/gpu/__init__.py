"""What scripts/gpu_check.py checks and measures on an accelerator, or at toy size on a CPU."""
