"""Augmentation of complete batches on the device, and the per-image policies that loader workers run."""
