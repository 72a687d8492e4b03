"""The run folder: its layout, lock, recipe file, checkpoints and curves, and how --ckpt is resolved to weights."""
