"""One training run: the plan, the preflight, the step, the loop, and what it logs."""
