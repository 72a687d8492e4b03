"""Evaluation: predictions, counts, the top-k metric, class matching, statistics and the report."""
