"""Augmentation of whole batches on the device: the pipeline, and one file per operation."""
