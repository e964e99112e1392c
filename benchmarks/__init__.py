"""Measures the package beside its peers: `python -m benchmarks`, or `make bench`. What and how: docs/benchmarks.md."""
