"""Augmentation of batches on the device, and policies of the loader workers. The random crop is in data/crop.py."""
