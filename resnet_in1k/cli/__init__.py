"""The programs, one module each, with their command-line options."""

import os

SPIN_COUNT = "300"
"""Rounds a thread of libgomp waits busily at a barrier before it sleeps."""

# Read when torch is imported, which comes later. The default spins for milliseconds: with one busy process more than
# there are cores, most of the time goes to spinning (docs/performance.md has the figures).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
