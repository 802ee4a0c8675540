"""Ratios against the competitors, in the same process and on the same work: `python -m benchmarks.<name>`."""
