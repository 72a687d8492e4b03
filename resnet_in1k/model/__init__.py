"""The network, and reading and writing its weights."""
