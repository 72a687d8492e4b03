"""From weights and data to counts: evaluation, the top-k metric, and the report for people."""
