"""Preparation of data: ImageNet's archives, resized copies, folders, tar shards, verification."""
