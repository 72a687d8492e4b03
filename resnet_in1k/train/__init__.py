"""Training a run: its parts, checks before it starts, the step, the loop, the log and the checkpoints."""
